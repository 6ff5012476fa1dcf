"""Models beyond the iterates of a run (ExPO): "Weak-to-Strong Extrapolation Expedites Alignment"."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from onlinerl import config as configuration
from onlinerl import hub, preflight
from onlinerl.errors import ConfigError, LearnerError, StoreError
from onlinerl.learners._export import export_weights
from onlinerl.learners._interpolation import Interpolated, SavedSource
from onlinerl.stores import exported, summary

DESCRIPTION = "extrapolation.json"
"""In each model: what it was made of."""
WEIGHTS = (".safetensors", ".safetensors.index.json")
_GIB = 1 << 30


def extrapolate(
    run: Path,
    folder: Path,
    alphas: Sequence[float],
    *,
    start: int = 0,
    end: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write the model `end + alpha * (end - start)` for each alpha, tensor by tensor: computed in float32, saved in the dtype of `end`.

    Nothing is trained from it, and the run is only read.

    Args:
        run: its directory.
        folder: where the models go, `alpha-0.3` and so on, each an ordinary Hugging Face model.
        alphas: from -1, which gives `start`; 0 gives `end`.
        start: an iterate; 0 is the base model.
        end: a later one; the newest by default.
        tell: is given a line for each model that is finished.

    Returns:
        The folder of each model.

    Raises:
        OnlineRLError: naming field, cause and fix, before anything is written.
    """
    summary.status(run)  # refuses what is no run
    end = exported.newest(run) if end is None else end
    models = _targets(run, folder, alphas)
    if not 0 <= start < end:
        raise ConfigError(
            f"is {start}, which is not before the other iterate, {end}",
            field="start",
            fix="give an earlier one, 0 for the base model" if end else "wait until the first iteration is trained",
        )
    last = exported.iterate(run, end)
    first = exported.iterate(run, start) if start else _base(run)
    ends, starts = _sources(last, first)
    kinds = {tensor.dtype for tensor in ends.metadata()}
    kind = kinds.pop()
    assert not kinds, "an export has one dtype"
    _require_room(folder, len(models) * sum(file.stat().st_size for file in last.glob("*.safetensors")))
    of = f"iterate {start}" if start else "the base model"
    for alpha, model in models.items():
        unfinished = model.with_name(f".{model.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        export_weights(Interpolated(starts, ends, 1 + alpha), unfinished, kind, writer=True)
        for file in last.iterdir():
            if not file.name.endswith(WEIGHTS) and file.name != exported.MANIFEST:
                shutil.copy(file, unfinished)
        made = {"run": str(run.absolute()), "start": start, "end": end, "alpha": alpha}
        (unfinished / DESCRIPTION).write_text(json.dumps(made, indent=1) + "\n")
        unfinished.rename(model)
        tell(f"{model}: iterate {end} + {alpha:g} * (iterate {end} - {of})")
    return list(models.values())


def _targets(run: Path, folder: Path, alphas: Sequence[float]) -> dict[float, Path]:
    """Where the model of each alpha goes.

    Raises:
        ConfigError: if an alpha makes no sense, or a model is there already.
    """
    if not alphas:
        raise ConfigError("is missing", field="alpha", fix="give one or more, e.g. --alpha 0.1 --alpha 0.3 --alpha 0.5")
    for alpha in alphas:
        if not (math.isfinite(alpha) and alpha >= -1):
            raise ConfigError(f"is {alpha:g}", field="alpha", fix="give a number from -1, usually one from 0.1 to 0.5")
    if folder.resolve().is_relative_to(run.resolve()):
        raise ConfigError(f"{folder} is in the run", field="folder", fix="choose another one: only the run itself writes there")
    models = {alpha: folder / f"alpha-{alpha:g}" for alpha in alphas}
    if len(set(models.values())) < len(models):
        raise ConfigError(
            f"has values that are the same to six digits: {', '.join(map(repr, models))}",
            field="alpha",
            fix="leave one of them out: models are named by these digits",
        )
    for model in models.values():
        if model.exists():
            raise ConfigError(f"{model} is there already", field="folder", fix="remove it, or choose another folder")
    return models


def _base(run: Path) -> Path:
    """The model that a run started from.

    Raises:
        ConfigError: if it is not where it was, or is another one.
    """
    model = configuration.load(run / "config.yaml", stored=True).model
    found, was = preflight.identity(model), exported.base(run)
    path = hub.local(model)
    if path is None or any(found.get(key) != value for key, value in was.items() if key != "model"):
        raise ConfigError(
            f"the base model of the run is no longer at {model}"
            if path is None
            else f"{model} is not the model the run began with",
            field="model",
            fix="restore it, or begin with an iterate: --start 1",
        )
    return path


def _sources(end: Path, start: Path) -> tuple[SavedSource, SavedSource]:
    """The tensors of both models.

    Raises:
        ConfigError: if they are not the same ones.
    """
    if not any(end.glob("*.safetensors")):
        raise ConfigError(
            f"{end} holds no safetensors files",
            field="learner.name",
            fix="choose a run of another learner; this one is for tests",
        )
    try:
        ends = SavedSource(end)
        starts = SavedSource(start, [tensor.name for tensor in ends.metadata()])
        Interpolated(starts, ends, 1)
    except LearnerError as error:
        raise ConfigError(
            error.cause, field="start", fix="begin with an iterate that the run has exported, e.g. --start 1"
        ) from error
    return ends, starts


def _require_room(folder: Path, wanted: int) -> None:
    """Refuse before anything is written.

    Raises:
        StoreError: with the numbers.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise StoreError(
            f"the models take {wanted / _GIB:.2f} GiB, and {there} has {free / _GIB:.2f} GiB free",
            field="folder",
            fix="free some space, or choose another folder",
        )
