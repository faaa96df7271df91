"""The one place where the command line's MODEL becomes a subject."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haltkit.cli.device import choose_device, describe_device
from haltkit.cli.factories import call_factory
from haltkit.cli.options import describe_dtype

if TYPE_CHECKING:
    import typer

    from haltkit.diagnostics import Case
    from haltkit.models.checkpoint import Checkpoint
    from haltkit.models.reasoner.checkpoint import ReasonerCheckpoint
    from haltkit.subject import Subject

__all__ = [
    "BUNDLED",
    "MODEL_TYPES",
    "Loader",
    "ModelType",
    "asked_options",
    "is_function",
    "is_text",
    "reasoner",
    "resolve",
    "resolve_case",
    "text_model",
]


@dataclass(frozen=True)
class Loader:
    """A function from a checkpoint folder, and what else it takes.

    Args:
        place: ``module:function``; it takes (folder, name) and the options.
        options: of the command line that it takes; the others are refused.
        own_defaults: those of which it knows better than the commands what they are where they were not given.
    """

    place: str
    options: frozenset[str]
    own_defaults: frozenset[str] = frozenset()

    def load(self, folder: Path, name: str, options: Mapping[str, Any], asked: set[str], **more: Any) -> Any:
        """What the function makes of the options that it takes.

        Raises:
            ValueError: an option was asked for that has no meaning for this kind of model.
        """
        if refused := sorted((set(options) - self.options) & asked):
            raise ValueError(f"--{refused[0].replace('_', '-')} has no meaning for {name!r}")
        wanted = self.options - (self.own_defaults - asked)
        module, _, function = self.place.partition(":")
        taken = {option: value for option, value in options.items() if option in wanted}
        return getattr(importlib.import_module(module), function)(folder, name=name, **taken, **more)


@dataclass(frozen=True)
class ModelType:
    """How a kind of checkpoint becomes a subject of the tools, and a case of the diagnostics."""

    subject: Loader
    case: Loader


TEXT, REASONER = "looped_gpt", "haltkit-"
# By the "model_type" in a checkpoint's config.json.
MODEL_TYPES: dict[str, ModelType] = {
    TEXT: ModelType(
        Loader(
            "haltkit.models.gpt.subject:checkpoint_subject",
            frozenset(
                {"text", "data", "split", "max_loops", "tokens", "batch", "mode", "execution", "ragged", "sequences"}
            ),
        ),
        Loader(
            "haltkit.models.gpt.diagnosing:checkpoint_case",
            frozenset({"text", "tokens", "seed", "snapshots", "snapshot_loops", "control", "control_windows"}),
        ),
    ),
    # A reasoner of any task: "haltkit-chase", or "haltkit-pkg.mod" of a task of a user's own.
    REASONER: ModelType(
        Loader(
            "haltkit.models.reasoner.subject:checkpoint_subject",
            frozenset({"max_loops", "batch", "execution", "sequences", "test_set", "draw"}),
            own_defaults=frozenset({"max_loops", "batch", "execution"}),
        ),
        Loader("haltkit.models.reasoner.diagnosing:checkpoint_case", frozenset({"tokens", "seed"})),
    ),
}
# Models that come with haltkit: name to folder among the bundled ones.
BUNDLED: dict[str, str] = {"text": "", "chase": "chase", "sudoku": "sudoku"}
DEFAULT = "text"


def asked_options(context: typer.Context) -> set[str]:
    """The options that stand on the command line."""
    found = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in found.items() if source is not None and source.name == "COMMANDLINE"}


def resolve(model: str | None, options: Mapping[str, Any], asked: set[str], device: str = "auto") -> Subject:
    """The subject that MODEL names.

    Args:
        model: a bundled name, a folder, or ``pkg.mod:function``; None: the bundled text model.
        options: what the command has to say about samples and passes, defaults included.
        asked: names of those that stand on the command line, ``device`` among them; one that has no meaning for the
            model is refused.
        device: where a checkpoint goes.

    Raises:
        ValueError: there is no such model, or an option has no meaning for it.
    """
    folder = _folder(model)
    if folder is None:
        return _from_function(str(model), {*options, "device"} & asked)
    kind = _kind(folder)
    found: Subject = kind.subject.load(folder, _shown(model), options, asked, device=choose_device(device))
    return _about(found, {"model": f"{_shown(model)} checkpoint"})


def resolve_case(model: str | None, options: Mapping[str, Any], asked: set[str]) -> Case:
    """The case of the diagnostics that MODEL names.

    Args:
        model: a bundled name, a checkpoint or run folder, or ``pkg.mod:function`` returning a Subject or a Case; None:
            the bundled text model.
        options: what ``haltkit diagnose`` has to say about the model, its controls and its inputs.
        asked: names of those that stand on the command line.

    Raises:
        ValueError: there is no such model, it has no loop, or an option has no meaning for it.
    """
    folder = _folder(model)
    if folder is not None:
        # A run folder has snapshots beside the checkpoint, so the folder is handed on as it was given.
        given = Path(str(model)) if model is not None and model not in BUNDLED else folder
        case: Case = _kind(folder).case.load(given, _shown(model), options, asked)
        return case
    from haltkit.diagnostics import Case
    from haltkit.subject import Subject

    _refuse_options(str(model), set(options) & asked - {"tokens", "seed"})
    made = call_factory(str(model), (Subject, Case), f"MODEL {model}")
    return Case.of(made) if isinstance(made, Subject) else made


def is_text(model: str | None) -> bool:
    """Whether MODEL names a checkpoint of the bundled kind of text model.

    Raises:
        ValueError: there is no such model.
    """
    folder = _folder(model)
    return folder is not None and _kind(folder) is MODEL_TYPES[TEXT]


def text_model(model: str | None, command: str, device: str = "auto") -> Checkpoint:
    """The checkpoint that MODEL names, for a command that works on the bundled kind of text model.

    Raises:
        ValueError: there is no such model, or it is of another kind.
    """
    folder = _folder(model)
    if folder is None or _kind(folder) is not MODEL_TYPES[TEXT]:
        raise ValueError(f"'haltkit {command}' works on checkpoints of looped text models, and {model!r} is none")
    from haltkit.models.checkpoint import load_checkpoint

    return load_checkpoint(folder, device=choose_device(device))


def reasoner(model: str, command: str) -> tuple[Path, ReasonerCheckpoint]:
    """The folder and the checkpoint that MODEL names, for a command that works on reasoners.

    Raises:
        ValueError: there is no such model, or it is of another kind.
    """
    folder = _folder(model)
    if folder is None or _kind(folder) is not MODEL_TYPES[REASONER]:
        raise ValueError(f"'haltkit {command}' works on reasoners such as chase and sudoku, and {model!r} is none")
    from haltkit.models.reasoner.checkpoint import load_reasoner

    return folder, load_reasoner(folder)


def is_function(model: str | None) -> bool:
    """Whether MODEL is written as the place of a function, ``pkg.mod:function``."""
    return model is not None and _folder(model) is None


def _shown(model: str | None) -> str:
    return "bundled" if model in (None, DEFAULT) else str(model)


def _folder(model: str | None) -> Path | None:
    """The checkpoint folder that MODEL names; None: it is a function's place."""
    name = DEFAULT if model is None else model
    if name in BUNDLED:
        from haltkit.models.weights import BUNDLED as FOLDER

        return FOLDER / BUNDLED[name]
    folder = Path(name)
    if folder.exists():
        from haltkit.models.weights import checkpoint_in

        return checkpoint_in(folder)
    if ":" in name:
        return None
    raise ValueError(
        f"{name!r} is not a checkpoint: there is no such folder. Bundled models are {', '.join(BUNDLED)}; a function "
        "of yours is written pkg.mod:function"
    )


def _kind(folder: Path) -> ModelType:
    """By config.json; a folder without one goes to the loader of text models, which says what is missing."""
    from haltkit.models.weights import CHECKPOINT_CONFIG, read_header

    name = read_header(folder).model_type if (folder / CHECKPOINT_CONFIG).is_file() else TEXT
    if name.startswith(REASONER):
        return MODEL_TYPES[REASONER]
    if name not in MODEL_TYPES:
        raise ValueError(f"{str(folder)!r} contains a model of type {name!r}; known are {TEXT} and {REASONER}...")
    return MODEL_TYPES[name]


def _from_function(path: str, refused: set[str]) -> Subject:
    from haltkit.subject import Subject

    _refuse_options(path, refused)
    found: Subject = call_factory(path, Subject, f"MODEL {path}")
    return _about(found, {"model": path, "text": f"{len(found.samples)} samples"})


def _refuse_options(path: str, refused: set[str]) -> None:
    if refused:
        name = sorted(refused)[0].replace("_", "-")
        raise ValueError(f"--{name} is for checkpoints; what {path} returns brings its own inputs")


def _about(subject: Subject, known: Mapping[str, Any]) -> Subject:
    import torch

    parameter = next(subject.model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    where = {"device": describe_device(device), "dtype": describe_dtype(subject.model)}
    return replace(subject, about={**known, **where, **subject.about})
