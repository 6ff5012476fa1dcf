"""The report of a trained model: report.json, and the lines of its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from onlinerl.config.reward_model import RewardConfig, objective_name
from onlinerl.controller.accuracy import shown
from onlinerl.errors import StoreError
from onlinerl.reward_training import refresh
from onlinerl.stores import documents

if TYPE_CHECKING:
    from onlinerl.reward_training.checks import Checked

REPORT = "report.json"
KIND = "reward_model"
"""In the manifest of such a directory, which a run's has not."""


def made(checked: Checked, figures: Mapping[str, Any], path: Path, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """All that is said of a trained model.

    Args:
        checked: what was trained.
        figures: on held-out comparisons, as `scoring.evaluate` gives them.
        path: of the model.
        before: the same figures of the reward model that it began with, if it did.
    """
    most = checked.config.preferences.max_accuracy_drop
    return {
        "name": checked.config.name,
        "objective": objective_name(checked.config),
        "path": str(path),
        "steps": checked.steps,
        "trained_comparisons": len(checked.train.comparisons),
        "notes": checked.notes,
        "heldout": _reported(figures),
        "before": None if before is None else _reported(before),
        "rejected": None if before is None else refresh.worse(before, figures, most),
    }


def _reported(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figure for name, figure in figures.items() if name != refresh.OUTCOMES}


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Durably; figures that are not numbers become null."""
    documents.write(folder / REPORT, report)


def read(folder: Path) -> dict[str, Any] | None:
    """The report of an earlier attempt; None if there is none."""
    return documents.read(folder / REPORT)


def stored(folder: Path) -> dict[str, Any] | None:
    """What is kept of a reward model in a folder: its report, if there is one yet, and how its training stands (`status`); None if the folder
    holds none."""
    try:
        manifest = documents.read(folder / "manifest.json")
    except StoreError:  # what is wrong with it says whoever knows what it should be
        return None
    if manifest is None or manifest.get("kind") != KIND:
        return None
    return {**(read(folder) or {}), "status": str(manifest.get("status"))}


def table(report: Mapping[str, Any]) -> Table:
    """As it is shown."""
    made = Table(title=f"{report['name']}: {report['objective']}, {report['heldout']['comparisons']:,} held-out comparisons")
    for header in ("", "value", "n"):
        made.add_column(header, justify="right" if header else "left")
    for row in rows(report):
        made.add_row(*row)
    return made


def in_a_run(config: RewardConfig, path: str) -> str:
    """The keys with which a run takes it for its oracle."""
    oracle = config.reward_model.oracle
    return f"oracle.name={oracle} oracle.path={path}" if oracle else f"oracle.path={path}"


def rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What is shown: name, value with its 95 % interval, number of comparisons."""
    heldout = report["heldout"]

    def line(name: str, estimate: Mapping[str, Any]) -> tuple[str, str, str]:
        known = {key: float("nan") if value is None else value for key, value in estimate.items()}
        return name, shown(known), f"{int(known['n']):,}"

    yield line("accuracy", heldout["accuracy"])
    if report["before"] is not None:
        yield line("accuracy before", report["before"]["accuracy"])
    error = heldout["calibration"]
    if error["bins"]:
        of_chance = f"{error['ece']:.3f} (by chance {error['floor']:.3f}, 95 % below {error['floor_95']:.3f})"
        yield "calibration error", of_chance, f"{int(heldout['accuracy']['n']):,}"
    for part in heldout["accuracy_by_length"]:
        yield line(f"accuracy, {part['from']} to {part['to']} {heldout['length_unit']}", part)
    for name, key in (("accuracy, shorter is better", "shorter_is_better"), ("accuracy, longer is better", "longer_is_better")):
        yield line(name, heldout["length_bias"][key])
    if len(heldout["accuracy_by_source"]) > 1:
        for name, part in heldout["accuracy_by_source"].items():
            yield line(f"accuracy, {name}", part)
    if "swap_disagreement" in heldout:
        yield line("orders disagree", heldout["swap_disagreement"])
    for name, said in (("circles, by the model", "model"), ("circles, by the data", "data")):
        if heldout["cycles"] is not None and said in heldout["cycles"]:
            yield line(name, heldout["cycles"][said])
