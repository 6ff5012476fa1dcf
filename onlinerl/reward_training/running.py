"""From a configuration to a trained model, its report and its table. What is there already is not computed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from onlinerl import preflight
from onlinerl.config import reward_model as configuration
from onlinerl.config.reward_model import RewardConfig
from onlinerl.errors import LearnerError, OnlineRLError, StoreError
from onlinerl.reward_training import checks, reports, scoring, steps
from onlinerl.reward_training.checks import Checked
from onlinerl.reward_training.starting import started
from onlinerl.stores import documents
from onlinerl.stores.directory import RunDirectory
from onlinerl.types.preferences import Comparison

if TYPE_CHECKING:
    from onlinerl.learners._group import RankGroup

BEFORE = "before.json"
"""Figures of a reward model that is trained further, as it was."""
SAY_EVERY = 20
"""Steps, about: so many lines in all."""


def run(config: RewardConfig, console: Console, *, fresh: bool = False) -> Path:
    """Train, or go on where a training of this name was stopped. Returns the path of the model.

    Args:
        config: as `configuration.load` gives it.
        console: where it says what it does.
        fresh: move an older one of this name aside first.

    Raises:
        OnlineRLError: naming field, cause and fix.
    """
    checked = checks.check(config)
    for note in checked.notes:
        console.print(note, highlight=False, soft_wrap=True)
    if fresh and (aside := RunDirectory.move_aside(config.directory)) is not None:
        console.print(f"the older one is now {aside}", highlight=False)
    manifest = identity(checked, config)
    store = RunDirectory.create(config.directory, config_yaml=configuration.dump(config), manifest=manifest)
    with store:
        require_unchanged(store, manifest)
        store.write_config(configuration.dump(config))
        found = _finish(checked, store, console)
    _say(found, console)
    _require_no_worse(found)
    console.print(
        f"model: {found['path']}   report: {config.directory / reports.REPORT}   in a run: {reports.in_a_run(config, found['path'])}",
        highlight=False,
        soft_wrap=True,
    )
    return Path(found["path"])


def identity(checked: Checked, config: RewardConfig | None = None) -> dict[str, Any]:
    """What a training is, for its manifest.

    Args:
        checked: what is trained.
        config: as it was written, if `checked` has found its model somewhere else.
    """
    written = config or checked.config
    return {
        "name": written.name,
        "kind": reports.KIND,
        "config_digest": configuration.digest(written),
        "fingerprint": configuration.fingerprint(written),
        "model": preflight.identity(checked.config.model),
        "data": data_digests(checked),
    }


def _finish(checked: Checked, store: RunDirectory, console: Console) -> dict[str, Any]:
    """What is left to do; the report."""
    if store.artefact("exports", checked.steps) is not None and (there := reports.read(store.path)) is not None:
        return there
    store.update_manifest(status="running")
    status = "failed"
    try:
        with started(checked.config) as learner:
            before = _before(checked, store, learner)
            steps.train(checked, store, learner, _teller(console))
            path = steps.export(store, learner, checked.steps)
            figures = scoring.evaluate(learner, checked.reader, checked.heldout)
        report = reports.made(checked, figures, path, before)
        reports.write(store.path, report)
        status = "finished"
        return report
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except OnlineRLError as error:
        error.started = True
        raise
    finally:
        with suppress(StoreError):  # what ended it is on its way to the user
            store.update_manifest(status=status)


def _before(checked: Checked, store: RunDirectory, learner: RankGroup) -> dict[str, Any] | None:
    """The figures of a model that is trained further, before the first step; kept, because a resume has another model."""
    if not checked.trained_before:
        return None
    if (there := documents.read(store.path / BEFORE)) is None:
        documents.write(store.path / BEFORE, scoring.evaluate(learner, checked.reader, checked.heldout))
        there = documents.read(store.path / BEFORE)
    return there


def _require_no_worse(report: Mapping[str, Any]) -> None:
    """Refuse to offer a model that was better before.

    Raises:
        LearnerError: with both accuracies.
    """
    if report["rejected"] is None:
        return
    rejected = LearnerError(
        report["rejected"],
        field="preferences.max_accuracy_drop",
        fix="keep the model that it began with; train with more of the older comparisons, or with a lower learning rate",
    )
    rejected.started = True
    raise rejected


def data_digests(checked: Checked) -> dict[str, str]:
    """Of the comparisons that are trained and evaluated on."""
    return {"train": _digest(checked.train.comparisons), "heldout": _digest(checked.heldout.comparisons)}


def _digest(comparisons: Iterable[Comparison]) -> str:
    hasher = hashlib.sha256()
    for each in comparisons:
        turns = [[m.role, m.content] for m in each.prompt.messages]
        said = [
            each.prompt.text,
            turns,
            each.chosen,
            each.rejected,
            each.prob,
            each.margin,
            each.strength,
            each.weight,
            each.source,
        ]
        hasher.update(json.dumps(said).encode())
    return hasher.hexdigest()


def require_unchanged(store: RunDirectory, manifest: Mapping[str, Any]) -> None:
    """Refuse to go on with another model or other data under the same names.

    Raises:
        StoreError: naming what has changed.
    """
    stored = store.manifest
    for key, what, field in (("data", "other comparisons", "preferences"), ("model", "another model", "model")):
        if stored[key] != manifest[key]:
            raise StoreError(
                f"{store.path} was begun with {what}: the files behind {field} have changed since",
                field=field,
                fix="restore them, give this training another name, or set the older one aside with --fresh",
            )


def _teller(console: Console) -> steps.Tell:
    def tell(step: int, total: int, figures: Mapping[str, float]) -> None:
        if step == total or step % max(1, total // SAY_EVERY) == 0:
            said = f"loss {figures['loss']:.4f}  accuracy {figures.get('accuracy', float('nan')):.3f}  grad norm {figures['grad_norm']:.3g}"
            console.print(f"step {step:,} of {total:,}  {said}", highlight=False)

    return tell


def _say(report: Mapping[str, Any], console: Console) -> None:
    console.print(reports.table(report))
    for warning in report["heldout"]["warnings"]:
        console.print(f"note: {warning}", highlight=False, soft_wrap=True, style="yellow")
