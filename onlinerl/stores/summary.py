"""A finished or running run, read without its lock: the figures of every iteration, and samples for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from onlinerl.errors import StoreError
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.protocols.store import EVALUATION, EVALUATION_VERDICTS, PAIRS, ROLLOUTS, SELECTION, VERDICTS
from onlinerl.stores import _files, _lock, _manifest
from onlinerl.stores import rows as columns
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.tables import StoredTable
from onlinerl.types import Failure, Group, Pair, TrainedPair, Verdict

REFRESHED = ("taken", "reason", "comparisons", "before", "after", "change", "reward_shift", "oracle_versions")
"""What is shown of a training of the oracle."""
FAILURE = "failure.json"
"""In the run directory: what the last attempt failed on."""


def summarise(path: str | Path, *, extras: bool = False) -> dict[str, Any]:
    """What a run has reached, as plain JSON: every number is finite, a missing value is None.

    Returns `{"run", "algorithm", "iterations": [{"iteration", "reward", "kl_ref", "kl_prev", "win_rate": {"value", "low", "high",
    "n"}, "phases": {name: seconds}, "sync": {"seconds", "bytes", "proved"}, "samples", "oracle_calls", "status", "kl_estimator", "kl_conflict",
    "insufficient", "idle", "oracle_versions"}]}`. Iteration 0 is the base model: its KL is 0 and its win rate None. `sync` and `win_rate` are None
    until they are known. `status` is what the iteration was committed as: "promoted", or "keep" where there was nothing to learn
    and `idle` says why; before that "running", or "unfinished" if no process is working on the run. `kl_estimator` says which
    estimate `kl_ref` is (k3, or k1 where that has less noise), `kl_conflict` whether the two disagree, and `insufficient` which
    figures were measured on too few prompts to decide by. `oracle_versions` are those that judged what the finished phases used; figures
    of different ones cannot be compared. An iteration in which the oracle was examined by known pairs also has "examined": how it did. One
    in which responses of earlier iterations may be reused has "reused": {"prompts": by how many iterations ago they were sampled, "tokens"}.
    Where the oracle keeps scores by name it has "components": {name: {"score", "win_rate"}}, as `win_rate` above, the latter None for the base model.
    One after which the reward model was trained further has "refreshed": whether the weights were "taken" or the "reason" why not, accuracies on what is held
    out, and by how much the same answers score higher.
    With `extras`, each iteration also has "oracle_failures" and every other metric with a column in the table (see the catalogue).

    Raises:
        StoreError: if there is no run or it is damaged.
    """
    path = Path(path)
    stored = manifest(path)
    fingerprint = stored.get("fingerprint") or {}
    active = stored.get("status") == "running" and _lock.held(path / "lock")
    summary: dict[str, Any] = _files.finite(
        {
            "run": stored.get("name"),
            "algorithm": fingerprint.get("algorithm.name"),
            "iterations": [_iteration(t, phases, active=active, extras=extras) for t, phases in records(path).items()],
        }
    )
    return summary


def status(path: str | Path) -> str:
    """How a run stands, in one word: running, interrupted, failed or finished.

    Raises:
        StoreError: if there is no run or it is damaged.
    """
    stored = manifest(Path(path)).get("status")
    gone = stored == "running" and not _lock.held(Path(path) / "lock")
    return "interrupted" if gone else str(stored)


def state(path: str | Path) -> str:
    """How a run stands, in words: running, interrupted, failed (and why) or finished.

    Raises:
        StoreError: if there is no run or it is damaged.
    """
    path = Path(path)
    status = manifest(path).get("status")
    if status == "running" and not _lock.held(path / "lock"):
        return f"interrupted: its process is gone; continue with `onlinerl resume {path}`"
    if status == "interrupted":
        return f"interrupted; continue with `onlinerl resume {path}`"
    if status == "failed":
        return f"failed: {_cause(path)}; once that is repaired, continue with `onlinerl resume {path}`"
    return str(status)


def state_or_damage(path: str | Path) -> str:
    """How a run stands, for a list of runs that must not end at the first damaged one: what is wrong with it is a state, too."""
    try:
        return state(path)
    except StoreError as error:
        return f"damaged: {error.cause}; {error.fix}"


def runs(folder: str | Path) -> list[Path]:
    """The runs in a folder, by name."""
    return sorted(manifest.parent for manifest in Path(folder).glob("*/manifest.json"))


def _cause(path: Path) -> str:
    """What a run failed on, in one line."""
    try:
        record = _files.read_json(path / FAILURE)
    except (FileNotFoundError, StoreError):
        return f"{FAILURE} is missing or damaged"
    lines = str(record.get("message") or record.get("error")).strip().splitlines()
    return f"{record.get('boundary')}: {lines[0] if lines else 'no message'}"


def records(path: str | Path) -> dict[int, dict[str, dict[str, Any]]]:
    """What each finished phase recorded, by iteration and name.

    Raises:
        StoreError: if there is no run or it is damaged.
    """
    manifest(Path(path))
    folders = sorted((p for p in (Path(path) / "iterations").glob("[0-9]*") if p.name.isdigit()), key=lambda p: int(p.name))
    return {int(folder.name): _manifest.read(folder).get("phases", {}) for folder in folders}


def taken_over(path: str | Path) -> bool:
    """Whether a run has the verdicts on its base model from another run.

    Raises:
        StoreError: if there is no run or it is damaged.
    """
    return "base_verdicts_of" in manifest(Path(path))


def tables(path: str | Path) -> list[str]:
    """Names of the tables that any iteration of a run has, by name."""
    ends = (".parquet", ".journal", ".jsonl")
    return sorted({f.name.split(".")[0] for f in Path(path).glob("iterations/[0-9]*/*") if f.suffix in ends})


def rows(path: str | Path, iteration: int, table: str) -> list[dict[str, Any]]:
    """All rows of a table of an iteration, in the order in which they were appended; empty if there are none.

    Raises:
        StoreError: if the table is damaged.
    """
    files = TableFiles(Path(path) / "iterations" / f"{iteration:04d}", table)
    return [row for chunk in files.chunks(arrays=False) for row in chunk]


def sampled(path: str | Path, *, heldout: bool = False) -> list[int]:
    """Iterations of which `samples` are there, ascending. Only one that is being sampled is looked into."""
    phase, table = ("answer", EVALUATION) if heldout else ("sample", ROLLOUTS)

    def begun(t: int) -> bool:
        return bool(TableFiles(Path(path) / "iterations" / f"{t:04d}", table).ids())

    return [t for t, phases in records(path).items() if phase in phases or begun(t)]


def samples(path: str | Path, iteration: int, limit: int, *, heldout: bool = False) -> list[dict[str, Any]]:
    """The first `limit` prompts of an iteration with their responses, scores and pairs, for people.

    What an iteration trains on was sampled by the iterate before it; with `heldout`, its own answers to the held-out prompts.

    Raises:
        StoreError: if there is no run, or nothing was sampled in that iteration.
    """
    path = Path(path)
    table, verdicts = (EVALUATION, EVALUATION_VERDICTS) if heldout else (ROLLOUTS, VERDICTS)
    manifest(path)
    folder = path / "iterations" / f"{iteration:04d}"
    files = TableFiles(folder, table)
    # A group that was asked for again, because the engine's first answer was unusable, has two rows: the later one counts.
    kept = None if heldout else records(path).get(iteration, {}).get("sample", {}).get("kept")  # of dynamic sampling
    chosen = list(islice((i for i in files.ids() if not kept or i in kept), max(0, limit)))
    if not files.ids():
        known = sampled(path, heldout=heldout)
        if known:
            cause, fix = f"has no samples of iteration {iteration}", f"choose one of {', '.join(map(str, known))}"
        elif heldout:
            cause, fix = "has no held-out answers yet", "wait until the base model has answered"
        else:
            cause, fix = "has sampled nothing to train on yet", "wait until the first iteration has sampled"
            if sampled(path, heldout=True):
                fix += "; --heldout shows the base model's answers"
        raise StoreError(f"{path} {cause}", field="iteration", fix=fix)
    labels = StoredTable(TableFiles(folder, verdicts), columns.LABELS).select(chosen)
    selection = [] if heldout else StoredTable(TableFiles(folder, SELECTION), columns.SELECTION).select(chosen)
    reasons = {
        one.prompt_id: {"reason": one.reason, "probability": one.probability, "reused_from": one.reused_from}
        for one in selection
        if one is not None
    }
    pairs: dict[str, list[TrainedPair]] = {prompt_id: [] for prompt_id in chosen}
    for pair in () if heldout else StoredTable(TableFiles(folder, PAIRS), columns.PAIRS):
        if pair.prompt_id in pairs:
            pairs[pair.prompt_id].append(pair)
    shown: list[dict[str, Any]] = _files.finite(
        [
            _sample(group, None if label is None else label.result, pairs[group.prompt.id])
            | {"selected": reasons.get(group.prompt.id)}
            for group, label in zip(StoredTable(files, columns.groups_of(None)).select(chosen), labels, strict=True)
            if group is not None
        ]
    )
    return shown


def manifest(path: Path) -> dict[str, Any]:
    """What a run says of itself.

    Raises:
        StoreError: if there is no run or it is damaged.
    """
    try:
        found = _files.read_json(path / "manifest.json")
    except FileNotFoundError:
        folder = path.parent
        fix = (
            f"check the path; `ls {folder}` lists the runs there"
            if folder.is_dir()
            else f"check the path: there is no directory {folder.absolute()}; relative paths start where onlinerl was started"
        )
        raise StoreError(f"{path} holds no run", field="name", fix=fix) from None
    if lacking := [key for key in ("name", "status") if not isinstance(found.get(key), str)]:
        raise _files.damaged(path / "manifest.json", f"it does not say the {' and the '.join(lacking)} of the run")
    return found


def _iteration(number: int, phases: Mapping[str, Mapping[str, Any]], *, active: bool, extras: bool) -> dict[str, Any]:
    label, sync, measure, examine = (phases.get(name, {}) for name in ("label", "sync", "measure", "examine"))
    rate = measure.get("win_rate") if number > 0 else None
    calls = [record["oracle_calls"] for record in (label, measure) if record.get("oracle_calls") is not None]
    calls += [examine["asked"]] if examine.get("asked") else []
    row: dict[str, Any] = {
        "iteration": number,
        "reward": measure.get("reward"),
        "kl_ref": measure.get("kl_ref") if number > 0 else 0.0,
        "kl_prev": measure.get("kl_prev") if number > 0 else 0.0,
        "win_rate": {key: rate.get(key) for key in ("value", "low", "high", "n")} if rate else None,
        "phases": {name: record["seconds"] for name, record in phases.items() if record.get("seconds") is not None},
        "sync": {key: sync.get(key) for key in ("seconds", "bytes", "proved")} if sync else None,
        "samples": phases.get("sample", {}).get("samples"),
        "oracle_calls": sum(calls) if calls else None,
        "status": phases.get("commit", {}).get("status") or ("running" if active else "unfinished"),
        "kl_estimator": measure.get("kl_estimator"),
        "kl_conflict": measure.get("kl_conflict"),
        "insufficient": measure.get("insufficient", []),
        "idle": phases.get("train", {}).get("idle"),
        "oracle_versions": list(label.get("oracle_versions", {}) | measure.get("oracle_versions", {})),
    }
    if measure.get("components"):
        row["components"] = measure["components"]
    if examine.get("figures") is not None:
        row["examined"] = {**examine["figures"], "agreement": examine.get("agreement")}
    if (refresh := phases.get("refresh", {})).get("trained"):
        row["refreshed"] = {name: refresh[name] for name in REFRESHED}
    if (reused := phases.get("sample", {}).get("reused")) is not None:
        row["reused"] = {"prompts": reused, "tokens": phases["sample"].get("tokens_saved")}
    if extras:
        row |= {name: measure.get(name) for name in CATALOGUE.columns() if name not in row}
        row["oracle_failures"] = label.get("failures")
    return row


def _sample(group: Group, result: Verdict | Failure | None, pairs: Sequence[TrainedPair]) -> dict[str, Any]:
    verdict = result if isinstance(result, Verdict) else None
    win_rates = verdict.win_rates().tolist() if verdict and (verdict.scores or verdict.preferences) else None
    return {
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "responses": [
            {
                "text": rollout.text,
                "source": rollout.source,
                "score": verdict.scores[k] if verdict and verdict.scores and k not in verdict.unjudged else None,
                "win_rate": win_rates[k] if win_rates else None,
                "tokens": len(rollout.token_ids),
                "finish_reason": rollout.finish_reason,
                "policy_version": rollout.policy_version,
            }
            for k, rollout in enumerate(group.rollouts)
        ],
        "oracle": verdict.annotator if verdict else None,
        "failure": f"{result.kind}: {result.message}" if isinstance(result, Failure) else None,
        "raw": verdict.raw if verdict else None,
        "pairs": [_pair(trained.pair) for trained in pairs],
    }


def _pair(pair: Pair) -> dict[str, Any]:
    plain = {name: getattr(pair, name) for name in ("chosen", "rejected", "prob", "gap")}
    return plain if pair.steps is None else plain | {"steps": [asdict(step) for step in pair.steps]}
