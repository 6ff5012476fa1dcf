"""Reward models of HH dialogues, Bradley-Terry and general preference, on one CPU; `make train-rm-hh`.

    python benchmarks/reward_models.py [--data ../shared/data]

Needs `hh_rlhf/harmless_base.jsonl.gz` (chosen, rejected) under the data directory. The models go to reward_models/, and their figures on
dialogues that were held out replace the table in docs/results.md. Stopped and called again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onlinerl.controller.accuracy import shown

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "reward_models" / "hh.yaml"
RESULTS = ROOT / "docs" / "results.md"
MODELS = {
    "hh": ["reward_model.objective=bradley_terry"],
    "hh-gpm": ["reward_model.objective=general_preference", "name=hh-gpm"],
}
"""Name, and what it changes in the configuration."""


def train(data: Path, overrides: list[str]) -> int:
    """One model; the exit code of the command."""
    where = f"preferences.train={data / 'hh_rlhf' / 'harmless_base.jsonl.gz'}"
    onlinerl = Path(sys.executable).with_name("onlinerl")
    return subprocess.run([onlinerl, "train-rm", CONFIG, where, *overrides], cwd=ROOT, check=False).returncode


def line(report: Mapping[str, Any]) -> str:
    """One row of the table."""
    found = report["heldout"]
    error, bias = found["calibration"], found["length_bias"]
    return (
        f"| {report['objective']} | {report['trained_comparisons']:,} in {report['steps']} steps | {found['comparisons']:,} "
        f"| {shown(found['accuracy'])} | {error['ece']:.3f} | {error['floor']:.3f} / {error['floor_95']:.3f} "
        f"| {bias['shorter_is_better']['value']:.2f} / {bias['longer_is_better']['value']:.2f} |"
    )


def record(reports: list[Mapping[str, Any]]) -> None:
    """Replace the table in docs/results.md."""
    head = [
        f"Measured {datetime.now(UTC):%Y-%m-%d} with `make train-rm-hh`: SmolLM2-135M, one pass over the comparisons, float32 on a CPU.",
        "",
        "| objective | trained on | held out | accuracy [95 %] | calibration error | by chance, mean / 95th percentile | accuracy where the shorter / the longer answer is better |",
        "|---|---|---|---|---|---|---|",
    ]
    block = "\n".join([*head, *map(line, reports)])
    pattern = r"(<!-- figures: reward models -->\n).*?(<!-- /figures -->)"
    text = RESULTS.read_text()
    RESULTS.write_text(re.sub(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL))


def main() -> int:
    """Train, record. Returns 1 if a training failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    data = parser.parse_args().data.absolute()
    if not (data / "hh_rlhf").is_dir():
        sys.exit(f"there is no directory {data / 'hh_rlhf'}: give one with hh_rlhf/ in it (--data)")
    if any([train(data, overrides) for overrides in MODELS.values()]):
        return 1
    reports = [json.loads((ROOT / "reward_models" / name / "report.json").read_text()) for name in MODELS]
    record(reports)
    for report in reports:
        print(line(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
