"""Cards: a policy that was chosen for a model, as a YAML file or as a folder that holds it beside a certificate."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from haltkit.calibration.certificate import Certificate
from haltkit.cardfile import CARD, CERTIFICATE_FILE, VERSION, read_card
from haltkit.files import check_room, write_text
from haltkit.folders import atomic_folder, check_beside
from haltkit.identity import Identity
from haltkit.measured import Measured
from haltkit.protocol import HaltingPolicy
from haltkit.registry import known_names
from haltkit.specs import Choice, Spec, files_of, parse_choice, policy_for_regions
from haltkit.standing import CERTIFICATE, MODEL, Standing
from haltkit.weights import Weights

__all__ = ["Card", "OtherModel", "is_card"]

_NONE = "so nothing is promised"
# How a user says that a card is to be used on another model than its own.
_BY_OPTION = (
    ": --without-certificate (lm-eval: without_certificate=True; Python: Card.load(path).without_certificate())"
)
# What is in a card's folder; the weights are called as haltkit.specs.packed does.
_OWN = re.compile(r"\.?(card\.yaml|certificate\.json|weights(-\d+)?\.safetensors)(\.partial)?")


class OtherModel(ValueError):
    """A card that is used whole is for another model.

    Attributes:
        differences: of the model from the card's, in words.
    """

    def __init__(self, message: str, differences: Sequence[str]) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


def is_card(given: object) -> bool:
    """Whether what was given for a policy is a card, or its path: a path, or text that ends in ``.yaml``, or a folder.

    A folder that has the name of a policy is one only if there is a card in it.
    """
    if not isinstance(given, str):
        return isinstance(given, (Card, PathLike))
    if given.endswith((".yaml", ".yml")) or os.path.isfile(os.path.join(given, CARD)):
        return True
    return os.path.isdir(given) and given not in known_names()


@dataclass(frozen=True)
class Card:
    """A policy and the model that it was chosen for.

    Args:
        policy: a spec, or ``region=spec;region=spec``.
        model: name of the model's class; empty: not known, as in files that older versions wrote.
        regions: the model's regions; empty: not known.
        loops: region to the description of its loop, the plain fields of :class:`haltkit.Loop`; empty: the model's
            preset finds them, or the model halts itself.
        about: how it was chosen, for a reader of the file.
        identity: of the very model that a certificate is about, or that a probe was fitted on; None: any weights will
            do.
        certificate: what is promised of the policy on that model.
        folder: where files of weights are that the policy names; None: where the process runs.
        weights: those files, and the SHA-256 of each.
        measured: what it cost when it was chosen, for a reader of the card; None: not known.
        name: what outputs call it: its file or folder, without the suffix.
        without: what of it the user does without, see :meth:`without_certificate`.

    Raises:
        ValueError: a certificate about another policy, or about no model.
    """

    policy: str
    model: str = ""
    regions: tuple[str, ...] = ()
    loops: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: str = field(default="", compare=False)
    identity: Identity | None = None
    certificate: Certificate | None = None
    folder: Path | None = field(default=None, compare=False)
    weights: Mapping[str, str] = field(default_factory=dict)
    measured: Measured | None = field(default=None, compare=False)
    name: str = field(default="", compare=False)
    without: str = ""

    def __post_init__(self) -> None:
        if self.certificate is not None and self.certificate.setting != self.policy:
            raise ValueError(f"a card for {self.policy!r} with a certificate for {self.certificate.setting!r}")
        if self.certificate is not None and self.identity is None:
            raise ValueError("a card with a certificate has the identity of the model that it is about")

    @property
    def choice(self) -> Choice:
        """The policy as parsed: one spec, or one per region, with files of weights looked for beside the card."""
        found = parse_choice(self.policy)
        if self.folder is None:
            return found
        if isinstance(found, Spec):
            return found.located(self.folder)
        return {region: spec.located(self.folder) for region, spec in found.items()}

    @property
    def path(self) -> str:
        """Its file without the suffix, or its folder; empty: it was not loaded."""
        if self.folder is None or not self.name:
            return ""
        whole = self.folder.stem == self.name and (self.folder / CARD).is_file()
        return str(self.folder if whole else self.folder / self.name)

    def chosen_on(self, source: str) -> bool:
        """Whether it says that it was chosen, or certified, on data of this name: they are no fresh evidence of it."""
        return f" {source}:" in self.about

    def policies(self, regions: Sequence[str]) -> dict[str, HaltingPolicy[Any]]:
        """The policy of each region.

        Raises:
            ValueError: a bad spec, an unknown region, or a missing one.
        """
        return policy_for_regions(self.choice, regions)

    def without_certificate(self) -> Card:
        """The same policy for any weights, dtype and full depth, without the certificate: nothing is promised.

        The class of the model and its regions stay what they must be, and fitted weights must fit the states. Every
        output says that the policy is used so. A card for any weights comes back as it is.
        """
        if self.identity is None:
            return self
        return replace(self, certificate=None, without=MODEL if self.certificate is None else CERTIFICATE)

    def check(self, model: nn.Module, regions: Sequence[str] = (), full_depth: int = 0) -> Standing:
        """Whether the card, and its certificate if there is one, is for this model.

        Args:
            model: that is to be run.
            regions: its regions, if known.
            full_depth: the budget that it is run with; 0: not known.

        Returns:
            what is promised of the policy on this model, or what it is used without.

        Raises:
            ValueError: another class or other regions; of a card with an identity that is used whole also other
                weights, another structure, dtype or full depth.
        """
        name = type(model).__name__
        other = bool(self.model and self.model != name)
        other = other or bool(self.regions and regions and set(self.regions) != set(regions))
        if other:
            raise ValueError(
                f"the card was made for {self.model or 'another model'}{_with(self.regions)}, and this is a "
                f"{name}{_with(regions)}: thresholds do not carry over; run 'haltkit compare --save' on this model"
            )
        if self.identity is None:
            return Standing()
        differences = self.identity.differences(Identity.of(model, full_depth))
        if self.without:
            fitted = ["its weights were fitted on another model"] if self.weights and differences else []
            return Standing.waived(self.without, [*differences, *fitted])
        self._refuse(differences)
        return Standing("" if self.certificate is None else self.certificate.promise, bound=True)

    def check_depth(self, full_depth: int) -> None:
        """Whether the card is for a run with this budget; one without an identity is for any.

        Raises:
            ValueError: it is for another full depth.
        """
        if self.identity is not None:
            self._refuse(self.identity.differences(replace(self.identity, full_depth=full_depth)))

    def check_reach(self, depth: int) -> None:
        """Whether the card knows loops that run this deep by themselves; not all inputs take a model to its full depth.

        Raises:
            ValueError: it does not.
        """
        if self.identity is not None and depth > self.identity.full_depth:
            self.check_depth(depth)

    def _refuse(self, differences: Sequence[str]) -> None:
        """Refuse a model that differs, if it does."""
        if not differences or self.without:
            return
        told = "; ".join(differences)
        if self.certificate is None:
            raise OtherModel(
                f"the card's policy is for another model ({told}): run 'haltkit fit' or 'haltkit compare --save' on "
                f"this one, or use it without {MODEL}{_BY_OPTION}",
                differences,
            )
        raise OtherModel(
            f"the card's certificate is not about this model ({told}): run 'haltkit calibrate' on this one, or use the "
            f"policy without {CERTIFICATE}{_BY_OPTION}",
            differences,
        )

    def save(self, path: str | PathLike[str], weights: Mapping[str, Weights] | None = None) -> None:
        """Write a file, ``*.yaml``, or a folder, which appears whole or not at all.

        A card with a certificate or weights is always a folder.

        Args:
            path: of the file or folder.
            weights: what is in the files of weights that the policy names (see :func:`haltkit.specs.packed`); None:
                what is in those of the card that was loaded.

        Raises:
            ValueError: a folder is asked for where something that is no card stands, or the policy names weights that
                are not given, or by another name than haltkit's; or the card is used without a part of it.
        """
        if self.without:
            raise ValueError(f"this card is used without {self.without}: save it as it was loaded")
        if weights is None:
            weights = {name: Weights.load((self.folder or Path()) / name) for name in self.weights}
        named = files_of(parse_choice(self.policy))
        if set(named) != set(weights) or not all(map(_OWN.fullmatch, named)):
            raise ValueError(
                f"the policy names the weights {', '.join(named) or 'of no file'}, and a card has its own beside it: "
                "save the policy with its weights, as haltkit.specs.packed gives them"
            )
        card = replace(self, weights={name: one.sha256 for name, one in weights.items()})
        if self.certificate is None and not weights and Path(path).suffix in (".yaml", ".yml"):
            card._write(Path(path))
            return
        self.check_folder(path)
        with atomic_folder(Path(path)) as folder:
            card._write(folder / CARD)
            for name, one in weights.items():
                one.save(folder / name)
            if self.certificate is not None:
                write_text(folder / CERTIFICATE_FILE, self.certificate.to_json() + "\n")

    def to_markdown(self) -> str:
        """A section for a model card: the policy, what is promised of it, on which model, and how it was chosen."""
        lines = ["## Halting", "", f"- Policy: `{self.policy}`"]
        if self.model:
            lines.append(f"- Model: {self.model}{_with(self.regions)}")
        if self.identity is not None:
            known = self.identity
            lines.append(f"- Weights (SHA-256): `{known.weights}`, {known.dtype}, full depth {known.full_depth} steps")
        if self.about:
            lines.append(f"- How it was chosen: {' '.join(self.about.split())}")
        if self.measured is not None:
            lines.append(f"- Measured: {self.measured}")
        if self.certificate is None:
            lines.append(f"- Certificate: none, {Standing.waived(self.without) if self.without else _NONE}")
        else:
            one = self.certificate
            failing = "in expectation" if one.delta is None else f"delta {one.delta:g}"
            lines += [
                f"- Certificate: {one.promise}",
                f"- Risk: {one.risk}; epsilon {one.epsilon:g}, {failing}; measured {one.empirical_risk:.4g}",
                f"- Method: {one.method}, {one.correction}, on {one.units} of unit {one.unit}; losses (SHA-256) "
                f"`{one.data_hash}`, seed {one.seed}",
            ]
        return "\n".join(lines) + "\n"

    @staticmethod
    def check_folder(path: str | PathLike[str]) -> None:
        """Whether a card that is a folder can be written there: nothing, an empty folder or such a card may be there.

        Raises:
            ValueError: something else is, also where the card is written until it is complete; or nothing can be
                written there, or the name is too long.
        """
        folder = Path(path).absolute()
        if not folder.parent.is_dir():
            raise ValueError(f"cannot write {str(path)!r}: there is no folder {str(folder.parent)!r}")
        check_room(folder, f"cannot write {str(path)!r}")
        free = not folder.exists() or (folder.is_dir() and all(_OWN.fullmatch(p.name) for p in folder.iterdir()))
        if not free or folder.is_symlink():
            raise ValueError(f"{str(folder)!r} is there and is no card: move it, or name another folder")
        check_beside(folder)

    def _write(self, path: Path) -> None:
        import yaml

        values: dict[str, Any] = {"version": VERSION, "policy": self.policy}
        if self.model:
            values["model"] = self.model
        if self.regions:
            values["regions"] = list(self.regions)
        if list(self.loops) == ["loop"]:
            values["loop"] = dict(self.loops["loop"])
        elif self.loops:
            values["loops"] = {name: dict(fields) for name, fields in self.loops.items()}
        if self.weights:
            values["weights"] = dict(self.weights)
        if self.identity is not None:
            values["identity"] = self.identity.fields()
        if self.certificate is not None:
            values["certified"] = True
        if self.measured is not None:
            values["measured"] = self.measured.fields()
        if self.about:
            values["about"] = self.about
        write_text(path, yaml.safe_dump(values, sort_keys=False, width=120))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Card:
        """The card in a file, or in a folder with its certificate.

        Raises:
            ValueError: no such file, or it is not a card, or of a later version, or its certificate is missing or about
                another policy, or its weights are missing or other ones; the message says what is wrong.
            CodeRefused: a policy is code of its own, ``pkg.mod:Class``, that the user has not allowed
                (:func:`haltkit.allow_code`).
        """
        return cls(**read_card(Path(path)))


def _with(regions: Sequence[str]) -> str:
    return f" with regions {', '.join(regions)}" if regions else ""
