"""Write the figures of finished runs into the README, so that no number there is typed by hand.

python benchmarks/readme_figures.py quickstart runs/seed0 runs/seed1 runs/seed2
python benchmarks/readme_figures.py algorithms runs/ppo runs/grpo ...
python benchmarks/readme_figures.py layouts runs/seed0 runs/two-by-two ...
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from onlinerl.stores.summary import summarise

README = Path(__file__).parents[1] / "README.md"


def cell(row: dict[str, Any]) -> str:
    """Win rate with its interval."""
    rate = row["win_rate"]
    return "-" if rate is None else f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"


def quickstart(runs: list[Path]) -> list[str]:
    """One column of reward, KL and win rate per seed, one line per iteration."""
    summaries = [summarise(run)["iterations"] for run in runs]
    seeds = [yaml.safe_load((run / "config.yaml").read_text())["seed"] for run in runs]
    head = " | ".join(f"seed {seed}: reward | KL | win rate vs base [95 %]" for seed in seeds)
    lines = [f"| iteration | {head} |", "|---|" + "---|" * 3 * len(runs)]
    for rows in zip(*summaries, strict=True):
        cells = " | ".join(f"{r['reward']:.2f} | {r['kl_ref']:.2f} | {cell(r)}" for r in rows)
        lines.append(f"| {rows[0]['iteration']} | {cells} |")
    return lines


def table(runs: list[Path], first: str, label: Any) -> list[str]:
    """One line per run: the last iterate against the base."""
    lines = [
        f"| {first} | reward, base | reward | KL to base (nats) | win rate vs base [95 %] |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        rows = summarise(run)["iterations"]
        base, last = rows[0], rows[-1]
        lines.append(f"| {label(run)} | {base['reward']:.2f} | {last['reward']:.2f} | {last['kl_ref']:.1f} | {cell(last)} |")
    return lines


def layout(run: Path) -> str:
    """How a run was spread out."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    parts = (config["engine"]["replicas"], "replica"), (config["learner"]["ranks"], "rank")
    return ", ".join(f"{n} {what}{'s' if n > 1 else ''}" for n, what in parts) + f", ZeRO-{config['learner']['zero_stage']}"


def main(kind: str, *paths: str) -> None:
    """Replace the block of the README between the markers of `kind`."""
    runs = [Path(p) for p in paths]
    if kind == "quickstart":
        lines = quickstart(runs)
    elif kind == "algorithms":
        lines = table(runs, "algorithm", lambda run: f"`{summarise(run)['algorithm']}`")
    else:
        lines = table(runs, "layout", layout)
    text = README.read_text()
    pattern = rf"(<!-- figures: {kind} -->\n).*?(<!-- /figures -->)"
    if not re.search(pattern, text, flags=re.DOTALL):
        sys.exit(f"README.md has no block '{kind}'")
    README.write_text(re.sub(pattern, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], text, flags=re.DOTALL))


if __name__ == "__main__":
    main(*sys.argv[1:])
