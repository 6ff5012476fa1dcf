"""How many responses OPTune has to sample for the win rate of online DPO; `make bench-optune`, or

    python benchmarks/optune.py [--seeds 0 1 2] [--arms dpo optune regenerate] [--runs runs/optune]

The arms are configs/quickstart.yaml with other keys:

    dpo          plain online DPO: every iteration samples all prompts
    optune       `algorithm.name: optune`, which weighs pairs by their gap, and `selection.name: regenerate` at its defaults: from iteration 2 on half
                 of the prompts are sampled, those answered worst, and the others are trained on with their latest responses
    regenerate   optune's prompts with plain DPO's weights, to tell the two apart; only if it is asked for

OPTune goes through one set of prompts again and again. So that it is compared with sampling, not with fresh prompts, all arms have the same
prompts, as many as an iteration takes: those of the quickstart's first iteration, in the same order in each (`regenerate` takes them in that
of `shuffled`). Each arm gets as many iterations as the same number of sampled prompts allows, here 256: 4 of all 64, or 1 of 64 and 6 of 32. What OPTune saves in
sampling it therefore spends in training; minutes of either are in the table. Held-out prompts, learning rate and the rest are those of the quickstart.

The target of a seed is the highest win rate against the base model that all its arms reach. What an arm has sampled when it first reaches it is read off the
straight lines between its iterates, the base model having a half at no cost, where a rate that falls is held at its highest. The ratio of a seed is
plain DPO's responses (tokens) to the other arm's; above 1, the other one needs fewer. Beside the mean over seeds stand the lowest and the highest, and the 95 %
interval of a bootstrap over the held-out prompts, the same ones in all runs, at their iterates and seeds as they are.

Finished runs are read, others resumed; the table replaces the one in docs/results.md once no run is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from onlinerl import config as configuration
from onlinerl.prompts._source import ShuffledPrompts
from onlinerl.stores.summary import records, rows, status
from onlinerl.types import Prompt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results.md"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
PLAIN = "dpo"
ARMS: dict[str, list[str]] = {
    PLAIN: ["iterations=4"],
    "optune": ["iterations=7", "algorithm.name=optune", "selection.name=regenerate"],
    "regenerate": ["iterations=7", "selection.name=regenerate"],
}
DRAWS = 2000


@dataclass(frozen=True)
class Curve:
    """What a run has sampled when it had its iterates, the base model first, and how good they are."""

    responses: Sequence[float]
    """Up to each iterate, together."""
    tokens: Sequence[float]
    wins: np.ndarray
    """f64[iterates, prompts], by held-out prompt, in an order that all runs have: 1 where the iterate's answer beats the base model's, 0.5 a tie."""

    def rates(self, prompts: np.ndarray | None = None) -> list[float]:
        """Win rates, on all prompts or on these."""
        wins = self.wins if prompts is None else self.wins[:, prompts]
        return [float(rate) for rate in wins.mean(axis=1)]


def read(run: Path) -> Curve:
    """A finished run."""
    found = records(run)
    spent = {
        name: np.cumsum([found[t].get("sample", {}).get(name, 0) for t in sorted(found)]) for name in ("samples", "tokens")
    }
    prompt_ids = sorted(row["prompt_id"] for row in rows(run, 0, "evaluation"))
    wins = [np.full(len(prompt_ids), 0.5), *(_wins(run, t, prompt_ids) for t in sorted(found) if t > 0)]
    return Curve(spent["samples"].tolist(), spent["tokens"].tolist(), np.array(wins))


def _wins(run: Path, iteration: int, prompt_ids: Sequence[str]) -> np.ndarray:
    """Against the base model, by prompt.

    Raises:
        SystemExit: if their mean is not the win rate that the run has recorded.
    """
    base, now = (
        {row["prompt_id"]: row["scores"][0] for row in rows(run, t, "evaluation_verdicts") if row["status"] == "ok"}
        for t in (0, iteration)
    )
    recorded = records(run)[iteration]["measure"]["win_rate"]["value"]
    if lacking := [i for i in prompt_ids if i not in base or i not in now]:
        sys.exit(f"{run}: {len(lacking)} answers of iteration {iteration} or of the base model have no score")
    wins = np.array([0.5 + 0.5 * np.sign(now[i] - base[i]) for i in prompt_ids])
    if abs(wins.mean() - recorded) > 1e-9:
        sys.exit(f"{run}: iteration {iteration} wins {wins.mean():.4f} of its prompts here, and {recorded:.4f} as recorded")
    return wins


def reached(cost: Sequence[float], rates: Sequence[float], target: float) -> float:
    """What had been spent when this rate was first reached, on straight lines through the highest rates so far; NaN if it never was.

    >>> reached([0, 100, 200], [0.5, 0.7, 0.9], 0.8)
    150.0
    """
    highest = np.maximum.accumulate(rates)
    if target > highest[-1]:
        return float("nan")
    if target <= highest[0]:
        return float(cost[0])
    place = int(np.argmax(highest >= target))
    share = (target - highest[place - 1]) / (highest[place] - highest[place - 1])
    return float(cost[place - 1] + share * (cost[place] - cost[place - 1]))


def target(curves: Sequence[Curve], prompts: np.ndarray | None = None) -> float:
    """The highest win rate that all of them reach."""
    return min(max(curve.rates(prompts)) for curve in curves)


def ratios(plain: Curve, other: Curve, goal: float, prompts: np.ndarray | None = None) -> tuple[float, float]:
    """Of responses and of tokens, plain DPO's to the other arm's."""
    wanted = [(reached(c.responses, c.rates(prompts), goal), reached(c.tokens, c.rates(prompts), goal)) for c in (plain, other)]
    (responses, tokens), (fewer, fewer_tokens) = wanted
    return responses / fewer if fewer else float("nan"), tokens / fewer_tokens if fewer_tokens else float("nan")


def interval(found: Mapping[tuple[str, int], Curve], arm: str, seeds: Sequence[int]) -> tuple[float, float]:
    """95 % of the mean ratio of responses over bootstraps of the held-out prompts."""
    rng = np.random.default_rng(0)
    size = next(iter(found.values())).wins.shape[1]
    means = []
    for _ in range(DRAWS):
        prompts = rng.integers(0, size, size)
        of_seeds = []
        for seed in seeds:
            pair = found[PLAIN, seed], found[arm, seed]
            of_seeds.append(ratios(*pair, target(pair, prompts), prompts)[0])
        means.append(float(np.mean(of_seeds)))
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(low), float(high)


def report(found: Mapping[tuple[str, int], Curve], minutes: Mapping[tuple[str, int], tuple[float, float]]) -> list[str]:
    """The table.

    Args:
        found: by arm and seed.
        minutes: of the engine sampling, and of all phases, by the same.
    """
    seeds = sorted({seed for _, seed in found})
    others = [arm for arm in ARMS if arm != PLAIN and (arm, seeds[0]) in found]
    lines = [
        "| arm | seed | win rate of each iterate | win rate reached by both | responses for it | dpo's | ratio, responses | ratio, tokens "
        "| minutes of sampling | of all |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    summary = []
    for arm in others:
        pairs = {seed: (found[PLAIN, seed], found[arm, seed]) for seed in seeds}
        goals = {seed: target(pair) for seed, pair in pairs.items()}
        got = {seed: ratios(*pairs[seed], goals[seed]) for seed in seeds}
        for seed, (plain, other) in pairs.items():
            sampling, all_of_it = (
                f"{other_s:.1f} (dpo {plain_s:.1f})"
                for other_s, plain_s in zip(minutes[arm, seed], minutes[PLAIN, seed], strict=True)
            )
            both = [reached(curve.responses, curve.rates(), goals[seed]) for curve in (other, plain)]
            lines.append(
                f"| `{arm}` | {seed} | {', '.join(f'{rate:.2f}' for rate in other.rates()[1:])} (dpo "
                f"{', '.join(f'{rate:.2f}' for rate in plain.rates()[1:])}) | {goals[seed]:.2f} | {both[0]:.0f} | {both[1]:.0f} | "
                f"{got[seed][0]:.2f} | {got[seed][1]:.2f} | {sampling} | {all_of_it} |"
            )
        responses, tokens = ([got[seed][n] for seed in seeds] for n in (0, 1))
        low, high = interval(found, arm, seeds)
        summary.append(
            f"`{arm}`: dpo samples {np.mean(responses):.2f} times as many responses for the same win rate (lowest {min(responses):.2f}, highest "
            f"{max(responses):.2f}; bootstrap over held-out prompts [{low:.2f}, {high:.2f}]), and {np.mean(tokens):.2f} times as many "
            f"tokens ({min(tokens):.2f} to {max(tokens):.2f})."
        )
    return [*lines, "", *summary]


def seconds(run: Path) -> tuple[float, float]:
    """Minutes of sampling, and of all phases, one after the other."""
    found = [(name, one["seconds"]) for phases in records(run).values() for name, one in phases.items()]
    return sum(s for name, s in found if name == "sample") / 60, sum(s for _, s in found) / 60


def record(lines: Sequence[str], seeds: Sequence[int]) -> None:
    """Replace the table in docs/results.md."""
    head = (
        f"Measured {datetime.now(UTC):%Y-%m-%d} with `python benchmarks/optune.py`, seeds {', '.join(map(str, seeds))}: 64 prompts, of which plain DPO "
        "samples all in each of 4 iterations and OPTune half from the second of 7 on; 4 responses each."
    )
    pattern = r"(<!-- figures: optune -->\n).*?(<!-- /figures -->)"
    block = "\n".join([head, "", *lines])
    RESULTS.write_text(re.sub(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", RESULTS.read_text(), flags=re.DOTALL))


def prepare(file: Path, base: Path, overrides: Sequence[str], seed: int) -> None:
    """Write the prompts of a seed: those that plain DPO samples first."""
    loaded = configuration.load(base, [*overrides, f"seed={seed}"])
    raw = {prompt.id: prompt for prompt in loaded.prompts.raw("train")}
    bare = [Prompt(id=prompt.id, text=prompt.text, token_ids=()) for prompt in raw.values()]
    taken, _ = ShuffledPrompts(bare, seed=seed).take(loaded.prompts.per_iteration, 0)
    lines = [json.dumps({"id": prompt.id, "text": prompt.text}) + "\n" for prompt in taken]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))


def run(folder: Path, arm: str, seed: int, base: Path, overrides: Sequence[str]) -> int:
    """One run to its end, whatever there is of it already. Returns its exit code."""
    name, prompts = f"{arm}-seed{seed}", folder / f"train-seed{seed}.jsonl"
    command = [str(Path(sys.executable).with_name("onlinerl"))]
    if (folder / name / "manifest.json").exists():
        if status(folder / name) == "finished":
            return 0
        command += ["resume", str(folder / name), "--finished-ok"]
    else:
        prepare(prompts, base, overrides, seed)
        keys = {"name": name, "runs": folder, "seed": seed, "prompts.train": prompts, "prompts.reuse": "true"}
        command += ["run", str(base), *overrides, *(f"{key}={value}" for key, value in keys.items()), *ARMS[arm]]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Run what is missing, compare, record. Returns 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="of all runs, for tries; their table is printed and not recorded"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[PLAIN, "optune"])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "optune")
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    arguments = parser.parse_args()
    arms = [arm for arm in ARMS if arm == PLAIN or arm in arguments.arms]
    chosen = [(arm, seed) for seed in arguments.seeds for arm in arms]
    failed = [
        f"{arm}-seed{seed}"
        for arm, seed in chosen
        if run(arguments.runs.absolute(), arm, seed, arguments.config, arguments.overrides)
    ]
    if failed:
        print(f"not finished: {', '.join(failed)}; the same command goes on")
        return 1
    places = {(arm, seed): arguments.runs / f"{arm}-seed{seed}" for arm, seed in chosen}
    lines = report({key: read(path) for key, path in places.items()}, {key: seconds(path) for key, path in places.items()})
    print("\n".join(lines))
    if not arguments.overrides and arguments.config == QUICKSTART:
        record(lines, arguments.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
