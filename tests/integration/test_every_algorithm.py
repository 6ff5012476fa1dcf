"""Every algorithm on vLLM and DeepSpeed: one iteration, and a second one in a run that is resumed, in sweeps whose engines stay up.

One of each kind in `make test`; all of them in `make test-algorithms`, where the sweep is stopped in the middle, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from every import FAMILIES, ITERATIONS, asking_for, phases, resumed_once, run_of, start, write_sweep

from onlinerl import registry
from onlinerl.stores.summary import summarise

NAMES = registry.names("algorithms")
STOPPED = NAMES[1]
"""In whose second iteration the sweep over all is stopped."""


@dataclass(frozen=True)
class Swept:
    """A sweep that has ended."""

    made: Path
    """Its folder."""
    left: dict[str, dict[str, Any]]
    """By algorithm, what the phases of iteration 1 had recorded before the run was resumed."""
    resumes: Callable[[str], int]
    """How often a run of it was resumed."""


@pytest.mark.parametrize("iterations", [1, ITERATIONS])
def test_the_sweep_is_accepted(tiny_llama: Path, tmp_path: Path, iterations: int) -> None:
    """All of it, before and after the resume, so that what is run seldom does not go out of date."""
    write_sweep(tmp_path, tiny_llama, NAMES)
    process = start(tmp_path, asking_for(iterations, tmp_path, NAMES), "--check")
    assert process.wait() == 0, (tmp_path / "log").read_text()
    assert f"every: {len(NAMES)} runs" in (tmp_path / "log").read_text()


@pytest.fixture(scope="module")
def families(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """One of each kind."""
    folder = tmp_path_factory.mktemp("families")
    return Swept(folder / "runs/every", resumed_once(folder, tiny_llama, list(FAMILIES)), lambda name: 1)


@pytest.fixture(scope="module")
def every(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """All of them."""
    folder = tmp_path_factory.mktemp("every")
    left = resumed_once(folder, tiny_llama, NAMES, stopped=STOPPED)
    return Swept(folder / "runs/every", left, lambda name: 2 if name == STOPPED else 1)


@pytest.mark.engine
@pytest.mark.parametrize("name", FAMILIES)
def test_one_of_each_kind_runs_on_real_parts(families: Swept, name: str) -> None:
    check(families, name)


@pytest.mark.engine
@pytest.mark.algorithms
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_real_parts(every: Swept, name: str) -> None:
    check(every, name)


def check(swept: Swept, name: str) -> None:
    """Both iterations have trained and were pushed, and the second one goes on from the first, which nobody has done again."""
    run = run_of(swept.made, name)
    failed = json.loads((swept.made / "sweep.json").read_text()).get("failed", {})
    assert run.name not in failed, failed[run.name]
    rows = summarise(run)["iterations"]
    assert [row["iteration"] for row in rows] == list(range(ITERATIONS + 1))
    assert all(row["sync"]["proved"] for row in rows)
    assert json.loads((run / "manifest.json").read_text())["attempt"] == swept.resumes(name)
    assert phases(run, 1) == swept.left[name]
    for t in (1, 2):
        trained = phases(run, t)["train"]
        assert trained["steps"] > 0, trained
        assert trained["skipped"] == 0, trained
        assert trained["policy_version"] == t - 1, trained
        assert t - 1 in trained["sampled_by"], trained  # some also train on what an older one has sampled
    assert {"sample", "label", "train", "checkpoint", "sync"} <= swept.left[name].keys()
    assert rows[-1]["kl_ref"] != 0, "no step moved the weights"
