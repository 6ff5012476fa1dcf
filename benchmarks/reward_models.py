"""Reward models of HH dialogues, and a run that learns from one while another one watches, on one CPU.

    python benchmarks/reward_models.py models [--data ../shared/data]    (`make train-rm-hh`)
    python benchmarks/reward_models.py loop [--data ../shared/data]      (`make rm-loop-hh`)

Needs `hh_rlhf/harmless_base.jsonl.gz` (chosen, rejected) under the data directory. `models` trains a Bradley-Terry and a general preference
model. `loop` trains the first, unless it is there, and one of other pairs, and gives both to a run of online DPO: the first is what it learns
from. Models go to reward_models/, the run to runs/, and figures into docs/results.md. Called again, either goes on where it was stopped
and reads what is finished.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onlinerl.config import load
from onlinerl.controller.accuracy import shown
from onlinerl.stores.summary import summarise
from onlinerl.trackers.jsonl import read_metrics

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "docs" / "results.md"
DATA = Path("hh_rlhf") / "harmless_base.jsonl.gz"
BRADLEY_TERRY, GENERAL, WATCH = "hh", "hh-gpm", "hh-watch"
MODELS = {
    BRADLEY_TERRY: ("hh.yaml", []),
    GENERAL: ("hh.yaml", ["reward_model.objective=general_preference", f"name={GENERAL}"]),
    WATCH: ("hh_watch.yaml", []),
}
"""Name -> its configuration in configs/reward_models, and what is changed in it."""


def onlinerl(*arguments: str | Path) -> None:
    """One command, from the root of the repository; a failure ends this program with its exit code."""
    done = subprocess.run([Path(sys.executable).with_name("onlinerl"), *arguments], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def train(data: Path, name: str) -> dict[str, Any]:
    """A model, unless it is there; its report."""
    config, overrides = MODELS[name]
    where = [f"preferences.train={data / DATA}", f"preferences.heldout={data / DATA}"]
    onlinerl("train-rm", CONFIGS / "reward_models" / config, *where, *overrides)
    found: dict[str, Any] = json.loads((ROOT / "reward_models" / name / "report.json").read_text())
    return found


def line(report: Mapping[str, Any]) -> str:
    """One row of the table of models."""
    found = report["heldout"]
    error, bias = found["calibration"], found["length_bias"]
    return (
        f"| {report['objective']} | {report['trained_comparisons']:,} in {report['steps']} steps | {found['comparisons']:,} "
        f"| {shown(found['accuracy'])} | {error['ece']:.3f} | {error['floor']:.3f} / {error['floor_95']:.3f} "
        f"| {shown(bias['shorter_is_better'])} | {shown(bias['longer_is_better'])} |"
    )


def parts(report: Mapping[str, Any]) -> list[str]:
    """Rows of the table of accuracies: by length, and by source."""
    found = report["heldout"]
    lengths = ((f"{part['from']} to {part['to']} {found['length_unit']}", part) for part in found["accuracy_by_length"])
    sources = ((f"source {name}", part) for name, part in found["accuracy_by_source"].items())
    return [f"| {report['objective']} | {what} | {shown(part)} | {part['n']:,} |" for what, part in (*lengths, *sources)]


def models(data: Path) -> list[str]:
    """Train both models; their tables."""
    reports = [train(data, name) for name in (BRADLEY_TERRY, GENERAL)]
    return [
        f"Measured {datetime.now(UTC):%Y-%m-%d} with `make train-rm-hh`: SmolLM2-135M, one pass over the comparisons, on a CPU. Accuracies with "
        "95 % intervals; of length is that of both answers, with the dialogue.",
        "",
        "| objective | trained on | held out | accuracy | calibration error | by chance, mean / 95th percentile "
        "| accuracy where the shorter answer is better | where the longer one is |",
        "|---|---|---|---|---|---|---|---|",
        *map(line, reports),
        "",
        "| objective | held-out comparisons | accuracy | n |",
        "|---|---|---|---|",
        *(row for report in reports for row in parts(report)),
    ]


def run(data: Path, reports: Sequence[Mapping[str, Any]]) -> Path:
    """The run against two models, or what is left of it; its directory."""
    config = CONFIGS / "rm_loop" / "hh.yaml"
    directory = ROOT / "runs" / load(config).name
    if (directory / "manifest.json").exists():
        onlinerl("resume", "--finished-ok", directory)
        return directory
    paths = zip(("trained", "watch"), reports, strict=True)
    oracles = [f"oracle.members.{member}.path={report['path']}" for member, report in paths]
    onlinerl("run", config, f"prompts.train={data / DATA}", f"prompts.heldout={data / DATA}", *oracles)
    return directory


def divergences(directory: Path) -> dict[int, Mapping[str, Any]]:
    """KL to the base model by iteration, with its interval; a later attempt's counts."""
    records = read_metrics(directory / "metrics.jsonl")
    found = (r for r in records if r["name"] == "kl_headline" and r["labels"]["reference"] == "initial")
    return {r["iteration"]: {"value": r["value"], "low": r["ci_low"], "high": r["ci_high"], "n": r["n"]} for r in found}


def curves(directory: Path) -> list[str]:
    """One row for each iteration."""
    kl = divergences(directory)
    found = []
    for row in summarise(directory, extras=True)["iterations"]:
        cells = [
            "-" if figure is None else shown(figure)
            for name in ("trained", "watch")
            for figure in (row["components"][name]["score"], row["components"][name]["win_rate"])
        ]
        t = row["iteration"]
        found.append(f"| {t} | {' | '.join(cells)} | {shown(kl[t]) if t else '0'} | {row['length']:.1f} |")
    return found


def loop(data: Path) -> list[str]:
    """Train both models and run; the table of both curves."""
    reports = [train(data, name) for name in (BRADLEY_TERRY, WATCH)]
    directory = run(data, reports)
    right = [shown(report["heldout"]["accuracy"]) for report in reports]
    return [
        f"Measured {datetime.now(UTC):%Y-%m-%d} with `make rm-loop-hh`. The training oracle is right about {right[0]} of held-out comparisons, the "
        f"watching one about {right[1]}. 95 % intervals; scores of two oracles are on two scales.",
        "",
        "| iteration | training oracle: score | win rate vs base | watching oracle: score | win rate vs base | KL to base (nats) | tokens |",
        "|---|---|---|---|---|---|---|",
        *curves(directory),
    ]


PARTS = {"models": (models, "reward models"), "loop": (loop, "reward model loop")}
"""What can be asked for: what does it, and where its tables stand in docs/results.md."""


def record(place: str, lines: Sequence[str]) -> None:
    """Replace what stands in a marked place of docs/results.md."""
    pattern = rf"(<!-- figures: {place} -->\n).*?(<!-- /figures -->)"
    text, block = RESULTS.read_text(), "\n".join(lines)
    RESULTS.write_text(re.sub(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL))


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is asked for, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    asked = parser.parse_args(arguments)
    data = asked.data.absolute()
    if not (data / DATA).is_file():
        sys.exit(f"there is no {data / DATA}: give a directory that has it (--data)")
    do, place = PARTS[asked.part]
    lines = do(data)
    record(place, lines)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
