"""Write the figures of finished runs into docs/results.md and README.md, so that no number there is typed by hand.

python benchmarks/readme_figures.py quickstart runs/seed0 runs/seed1 runs/seed2
python benchmarks/readme_figures.py sweep runs/quickstart-all    (and its plot, docs/quickstart-all.svg)
python benchmarks/readme_figures.py layouts runs/seed0 runs/two-by-two ...
python benchmarks/readme_figures.py curves runs/dpo-lag0-seed0 runs/dpo-lag1-seed0 ...
python benchmarks/readme_figures.py demo runs/quickstart     (the README's output of `make demo`)
"""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from onlinerl.stores import sweeps
from onlinerl.stores.summary import summarise
from onlinerl.trackers.console import ConsoleTracker, render_table
from onlinerl.views import sweep as sweep_view

ROOT = Path(__file__).parents[1]


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


def sweep(folder: Path) -> list[str]:
    """One line per finished run, the highest reward first: the last iterate beside the base model, and what it took. Those that are not finished or
    left out are named below."""
    record = sweeps.read(folder)
    if record is None:
        sys.exit(f"{folder} is no sweep")
    found = sweep_view.summarise(folder, record)
    finished = [run for run in found["runs"] if run["status"] == "finished"]
    unfinished = [f"`{run['name']}`" for run in found["runs"] if run["status"] != "finished"]
    if not finished:
        sys.exit(f"no run of {folder} is finished")
    shutil.copy(sweep_view.write_plot(folder, found), ROOT / f"docs/{record.name}.svg")
    lines = [
        "| run | reward, base | reward | KL to base (nats) | win rate vs base [95 %] | length (tokens) | tokens sampled | labels | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(finished, key=lambda run: run["reward"], reverse=True):
        kl = f"{run['kl_ref']:.1f}" + (" (k1)" if run["kl_estimator"] == "k1" else "")
        lines.append(
            f"| `{run['name']}` | {run['history'][0]['reward']:.2f} | {run['reward']:.2f} | {kl} | {cell(run)} | {run['length']:.1f} "
            f"| {run['tokens']} | {run['labels']} | {run['seconds'] / 60:.1f} |"
        )
    if unfinished:
        lines += ["", f"Not measured yet: {', '.join(unfinished)}."]
    return lines + [text for name, reason in found["refused"].items() for text in ("", f"`{name}` is left out: {reason}.")]


def layouts(runs: list[Path]) -> list[str]:
    """One line per run: the last iterate against the base."""
    lines = [
        "| layout | reward, base | reward | KL to base (nats) | win rate vs base [95 %] |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        rows = summarise(run)["iterations"]
        base, last = rows[0], rows[-1]
        lines.append(f"| {layout(run)} | {base['reward']:.2f} | {last['reward']:.2f} | {last['kl_ref']:.1f} | {cell(last)} |")
    return lines


def layout(run: Path) -> str:
    """How a run was spread out."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    parts = (config["engine"].get("replicas", 1), "replica"), (config["learner"].get("ranks", 1), "rank")
    spread = ", ".join(f"{n} {what}{'s' if n > 1 else ''}" for n, what in parts)
    return f"{spread}, ZeRO-{config['learner'].get('zero_stage', 0)}"


def curves(runs: list[Path]) -> list[str]:
    """One line per algorithm and iteration: the seeds of a lag together, beside those of the other."""
    found: dict[tuple[str, int], list[list[dict[str, Any]]]] = {}
    for run in runs:
        config, report = yaml.safe_load((run / "config.yaml").read_text()), summarise(run)
        found.setdefault((report["algorithm"], config["schedule"]["max_lag"]), []).append(report["iterations"])
    lags = sorted({lag for _, lag in found})
    figures: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "reward": lambda row: row["reward"],
        "KL to base (nats)": lambda row: row["kl_ref"],
        "win rate vs base": lambda row: row["win_rate"] and row["win_rate"]["value"],
    }
    head = " | ".join(f"{what}, lag {lag}" for what in figures for lag in lags)
    lines = [f"| algorithm | iteration | {head} |", "|---|---|" + "---|" * len(figures) * len(lags)]
    for algorithm in dict.fromkeys(name for name, _ in found):
        for i in range(len(found[algorithm, lags[0]][0])):
            cells = (seeds([read(c[i]) for c in found[algorithm, lag]]) for read in figures.values() for lag in lags)
            lines.append(f"| `{algorithm}` | {i} | {' | '.join(cells)} |")
    return lines


def seeds(values: list[float | None]) -> str:
    """The mean over the seeds, the lowest and the highest."""
    known = [v for v in values if v is not None]
    return f"{sum(known) / len(known):.2f} [{min(known):.2f}, {max(known):.2f}]" if known else "-"


def demo(run: Path) -> list[str]:
    """The last push and the table, as a terminal of 80 columns shows them: eight lines for four iterations."""
    report = summarise(run, extras=True)
    file = io.StringIO()
    console = Console(file=file, width=80, color_system=None)
    last = report["iterations"][-1]
    ConsoleTracker(console).phase_finished(last["iteration"], "sync", last["phases"]["sync"])
    shown = render_table(report)
    shown.title = shown.caption = None
    console.print(shown)
    return ["```text", *(line.rstrip() for line in file.getvalue().splitlines()), "```"]


def write(kind: str, lines: list[str], document: Path) -> None:
    """Replace the block of a document between the markers of `kind`."""
    text = document.read_text()
    pattern = rf"(<!-- figures: {kind} -->\n).*?(<!-- /figures -->)"
    if not re.search(pattern, text, flags=re.DOTALL):
        sys.exit(f"{document.name} has no block '{kind}'")
    document.write_text(re.sub(pattern, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], text, flags=re.DOTALL))


def main(kind: str, *paths: str) -> None:
    """Make the block of this kind from finished runs."""
    runs = [Path(p) for p in paths]
    if kind == "demo":
        write(kind, demo(runs[0]), ROOT / "README.md")
        return
    made = {
        "sweep": lambda: sweep(runs[0]),
        "quickstart": lambda: quickstart(runs),
        "layouts": lambda: layouts(runs),
        "curves": lambda: curves(runs),
    }
    write(kind, made[kind](), ROOT / "docs/results.md")


if __name__ == "__main__":
    main(*sys.argv[1:])
