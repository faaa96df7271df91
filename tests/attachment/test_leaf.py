"""A part of an output can be taken out, put back and written as code, wherever it is."""

from __future__ import annotations

import dataclasses
from collections.abc import ValuesView
from typing import Any, NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st

from haltkit.attachment.leaf import leaves, parts, replaced_text


@dataclasses.dataclass(frozen=True)
class Data:
    first: Any
    second: Any


class Named(NamedTuple):
    first: Any
    second: Any


def containers(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(Data, inside, inside),
        st.builds(Named, inside, inside),
        st.lists(inside, min_size=1, max_size=3),
        st.lists(inside, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["a", "b", "c"]), inside, min_size=1),
        st.dictionaries(st.sampled_from(["a", "b", "c"]), inside, min_size=1).map(dict.values),
    )


def comparable(output: Any) -> Any:
    """The same with lists of what dictionaries' ``values()`` show, which are equal to nothing but themselves."""
    if isinstance(output, ValuesView):
        return "values", [comparable(part) for part in output]
    if isinstance(output, dict):
        return {key: comparable(part) for key, part in output.items()}
    if isinstance(output, Data):
        return Data(comparable(output.first), comparable(output.second))
    if isinstance(output, Named):
        return Named(*map(comparable, output))
    return type(output)(map(comparable, output)) if isinstance(output, (list, tuple)) else output


OUTPUTS = st.recursive(st.integers(0, 99), containers, max_leaves=8)


@given(OUTPUTS)
def test_every_part_is_found_and_only_it_is_replaced(output: Any) -> None:
    found = list(parts(output))
    for place, (leaf, part) in enumerate(found):
        assert leaf.get(output) is part
        assert comparable(leaf.put(output, part)) == comparable(output)
        assert type(leaf.put(output, part)) is type(output)
        after = [value for _, value in parts(leaf.put(output, -1))]
        assert after == [-1 if i == place else value for i, (_, value) in enumerate(found)]


@given(OUTPUTS, st.data())
def test_code_says_what_the_functions_do(output: Any, data: st.DataObject) -> None:
    found = list(parts(output))
    names = {"dataclasses": dataclasses}
    for leaf, part in found:
        assert comparable(eval(leaf.select_text(), names)(output)) == comparable(part)
        assert comparable(eval(leaf.put_text(), names)(output, -1)) == comparable(leaf.put(output, -1))
    some = data.draw(st.lists(st.sampled_from([leaf for leaf, _ in found]), min_size=1, unique=True))
    expected = output
    for leaf in some:
        expected = leaf.put(expected, -1)
    code = replaced_text("out", dict.fromkeys(some, "-1"))
    assert comparable(eval(code, {**names, "out": output})) == comparable(expected)


def test_a_state_is_a_tensor_of_real_numbers() -> None:
    output = {"ids": torch.ones(3, dtype=torch.long), "pair": (1.0, torch.ones(3)), "done": torch.ones(3).bool()}
    assert [leaf.text("out") for leaf in leaves(output)] == ["out['pair'][1]"]
