"""What does not fit the model is one clear error that says what to do, and leaves the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import WIDTH, Refiner, hrm_model
from haltkit.attachment.errors import BatchNotFound

X = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(1, 50, (2, 5), generator=torch.Generator().manual_seed(0))
LOOPS = {"core": haltkit.Loop(["core"]), "head": haltkit.Loop(["head"])}


def attached(policy: Any, **options: Any) -> Callable[[], None]:
    def run() -> None:
        model = Refiner().eval()
        kinds = [type(module) for module in model.modules()]
        try:
            with haltkit.attach(model, policy, **options):
                model(X)
        finally:
            assert [type(module) for module in model.modules()] == kinds

    return run


def attached_to_hrm(policy: Any) -> Callable[[], None]:
    def run() -> None:
        model = hrm_model()
        with haltkit.attach(model, policy):
            model(IDS, use_cache=False)

    return run


BAD: dict[str, tuple[Callable[[], None], list[str]]] = {
    "no such region": (attached("middle=norm:tau=1", body=["core"]), ["middle", "loop", "without a name"]),
    "no such region of two": (attached({"middle": "norm:tau=1"}, loops=LOOPS), ["middle", "'core=SPEC;head=SPEC'"]),
    "a region without a policy": (attached("core=norm:tau=1", loops=LOOPS), ["core, head", "'core=SPEC;head=SPEC'"]),
    "no such region in a preset": (attached_to_hrm("middle=norm:tau=1"), ["middle", "high, low", "'high=SPEC'"]),
    "a readout for no region": (
        attached("kl:tau=1", body=["core"], readout={"a": nn.Identity()}),
        ["loop", "for regions a"],
    ),
    "no readout": (attached("kl:tau=1", body=["core"]), ["readout=", "norm"]),
    "no readout, in a combination": (attached("any(norm:tau=1|entropy:tau=1)", body=["core"]), ["readout="]),
    "no readout in one of two": (attached_to_hrm("high=kl:tau=1;low=kl:tau=1"), ["'low'", "readout="]),
}


@torch.no_grad()
@pytest.mark.parametrize("case", BAD)
def test_an_error_says_what_to_do(case: str) -> None:
    run, tokens = BAD[case]
    with pytest.raises(ValueError, match=re.escape(tokens[0])) as error:
        run()
    message = str(error.value)
    assert all(token in message for token in tokens), message
    assert "\n" not in message


class Kept(nn.Module):
    """A step that takes its state from itself."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.x = nn.Linear(WIDTH, WIDTH), torch.zeros(())

    def forward(self) -> Tensor:
        self.x = torch.tanh(self.map(self.x))
        return self.x


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = Kept()

    def forward(self, x: Tensor) -> Tensor:
        self.core.x = x
        for _ in range(6):
            x = self.core()
        return x


@torch.no_grad()
def test_a_batch_that_no_argument_has_is_named_with_the_module() -> None:
    model = Keeps().eval()
    fields: dict[str, Any] = {"body": ["core"], "initial": None}
    spec = "norm:tau=0.1,granularity=sequence"
    with (
        haltkit.attach(model, spec, execution="compact", **fields),
        pytest.raises(BatchNotFound, match=r"'core'.*masked"),
    ):
        model(X)
    with haltkit.attach(model, spec, **fields) as session, pytest.raises(BatchNotFound, match=r"'core'.*one by one"):
        list(session.queue(list(X), lambda x: model(x[None]), slots=2))
