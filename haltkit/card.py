"""Cards: a policy that was chosen for a model, as a YAML file or as a folder that holds it beside a certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from os.path import isfile
from pathlib import Path
from typing import Any

from torch import nn

from haltkit.calibration.certificate import Certificate
from haltkit.files import read_yaml, write_text
from haltkit.folders import atomic_folder
from haltkit.identity import Identity
from haltkit.protocol import HaltingPolicy
from haltkit.specs import Choice, Spec, parse_choice, policy_for_regions
from haltkit.trust import reading
from haltkit.weights import Weights

__all__ = ["Card", "is_card"]

_KEYS = ("policy", "model", "regions", "loop", "loops", "identity", "certified", "about")
# In the folder of a card with a certificate.
_CARD, _CERTIFICATE, _WEIGHTS = "card.yaml", "certificate.json", "weights.safetensors"

_FILES = {_CARD, _CERTIFICATE, _WEIGHTS}


def is_card(given: object) -> bool:
    """Whether what was given for a policy is the path of a card: a path, text that ends in ``.yaml``, or its folder."""
    if isinstance(given, PathLike):
        return True
    return isinstance(given, str) and (given.endswith((".yaml", ".yml")) or isfile(f"{given}/{_CARD}"))


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

    def policies(self, regions: Sequence[str]) -> dict[str, HaltingPolicy[Any]]:
        """The policy of each region.

        Raises:
            ValueError: a bad spec, an unknown region, or a missing one.
        """
        return policy_for_regions(self.choice, regions)

    def check(self, model: nn.Module, regions: Sequence[str] = (), full_depth: int = 0) -> None:
        """Whether the card, and its certificate if there is one, is for this model.

        Args:
            model: that is to be run.
            regions: its regions, if known.
            full_depth: the budget that it is run with; 0: not known.

        Raises:
            ValueError: another class or other regions; under a certificate also other weights, another structure, dtype
                or full depth.
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
            return
        if differences := self.identity.differences(Identity.of(model, full_depth)):
            if self.certificate is None:
                raise ValueError(
                    f"the card's policy was fitted on another model ({'; '.join(differences)}): run 'haltkit fit' on it"
                )
            raise ValueError(
                f"the card's certificate is not about this model ({'; '.join(differences)}): run 'haltkit calibrate' "
                f"on it, or use the policy without a certificate by its spec, {self.policy!r}"
            )

    def save(self, path: str | PathLike[str], weights: Weights | None = None) -> None:
        """Write the file; a card with a certificate or weights is a folder, which appears whole or not at all.

        Args:
            path: of the file or folder.
            weights: of the fitted policy, which names them ``weights.safetensors``.

        Raises:
            ValueError: a folder is asked for where something that is no card stands.
        """
        if self.certificate is None and weights is None:
            self._write(Path(path))
            return
        self.check_folder(path)
        with atomic_folder(Path(path)) as folder:
            self._write(folder / _CARD)
            if weights is not None:
                weights.save(folder / _WEIGHTS)
            if self.certificate is not None:
                write_text(folder / _CERTIFICATE, self.certificate.to_json() + "\n")

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
        if self.certificate is None:
            lines.append("- Certificate: none, so nothing is promised")
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
            ValueError: something else is, or the folder around it is not there.
        """
        folder = Path(path)
        if not folder.absolute().parent.is_dir():
            raise ValueError(f"cannot write {str(path)!r}: there is no folder {str(folder.absolute().parent)!r}")
        free = not folder.exists() or (folder.is_dir() and {p.name for p in folder.iterdir()} <= _FILES)
        if not free or folder.is_symlink():
            raise ValueError(f"{str(path)!r} is there and is no card: name a new folder for the card")

    def _write(self, path: Path) -> None:
        import yaml

        values: dict[str, Any] = {"policy": self.policy}
        if self.model:
            values["model"] = self.model
        if self.regions:
            values["regions"] = list(self.regions)
        if list(self.loops) == ["loop"]:
            values["loop"] = dict(self.loops["loop"])
        elif self.loops:
            values["loops"] = {name: dict(fields) for name, fields in self.loops.items()}
        if self.identity is not None:
            values["identity"] = self.identity.fields()
        if self.certificate is not None:
            values["certified"] = True
        if self.about:
            values["about"] = self.about
        write_text(path, yaml.safe_dump(values, sort_keys=False, width=120))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Card:
        """The card in a file, or in a folder with its certificate.

        Raises:
            ValueError: no such file, or it is not a card, or its certificate is missing or about another policy; the
                message says what is wrong.
            CodeRefused: a policy is code of its own, ``pkg.mod:Class``, that the user has not allowed
                (:func:`haltkit.allow_code`).
        """
        folder = Path(path)
        path = folder / _CARD if folder.is_dir() else folder
        values: Any = read_yaml(path, "the card", object)
        wrong = not isinstance(values, dict) or bool(set(values) - set(_KEYS)) or {"loop", "loops"} <= set(values)
        policy = None if wrong else _policy(values.get("policy"))
        if policy is None:
            raise ValueError(
                f"{str(path)!r} must contain 'policy: SPEC' and may contain 'loop:', the fields of haltkit.Loop, or "
                "'loops:', those of several by region"
            )
        with reading(f"the card {str(path)!r}"):
            parse_choice(policy)
        model, regions, loops = values.get("model", ""), values.get("regions", []), values.get("loops") or {}
        about = values.get("about", "")
        if (
            not isinstance(model, str)
            or not isinstance(about, str)
            or not isinstance(regions, list)
            or not isinstance(loops, dict)
        ):
            raise ValueError(
                f"{str(path)!r}: model must be a name, about text, regions a list, and loops a mapping from regions"
            )
        if values.get("loop") is not None:
            loops = {"loop": values["loop"]}
        for described in loops.values():
            if not isinstance(described, dict):
                raise ValueError(f"{str(path)!r}: a loop is described by the fields of haltkit.Loop, by name")
        named = tuple(map(str, regions))
        if len(set(named)) < len(named):
            raise ValueError(f"{str(path)!r}: a region is named more than once: {', '.join(named)}")
        by_region = {str(name): described for name, described in loops.items()}
        try:
            identity, certificate = _certified(path, values.get("identity"), values.get("certified", False))
            return cls(policy, model, named, by_region, about, identity, certificate, path.parent)
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from None


def _with(regions: Sequence[str]) -> str:
    return f" with regions {', '.join(regions)}" if regions else ""


def _certified(card: Path, identity: Any, certified: Any) -> tuple[Identity | None, Certificate | None]:
    """The identity in a card, and the certificate in the file beside it, which a card that is certified has."""
    if not isinstance(certified, bool):
        raise ValueError("certified must be true or false")
    if identity is not None and not isinstance(identity, dict):
        raise ValueError("identity must be a mapping")
    found = None if identity is None else Identity.of_fields(identity)
    path = card.parent / _CERTIFICATE
    if not certified:
        return found, None
    if not path.is_file():
        raise ValueError(f"the certificate that belongs to the card, {_CERTIFICATE}, is not beside it")
    try:
        return found, Certificate.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"the certificate beside the card, {_CERTIFICATE}, is not text") from None


def _policy(written: Any) -> str | None:
    """The policy's text: as it stands, or from a mapping from regions to specs; None: neither."""
    if isinstance(written, str):
        return written
    if isinstance(written, dict) and written and all(isinstance(spec, str) for spec in written.values()):
        return ";".join(f"{region}={spec}" for region, spec in written.items())
    return None
