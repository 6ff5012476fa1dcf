"""Every algorithm on vLLM and DeepSpeed, two iterations each, in one sweep that is stopped in the middle and goes on: `make test-algorithms`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from every import ITERATIONS, write_sweep

from onlinerl import registry
from onlinerl.stores.summary import summarise

NAMES = registry.names("algorithms")
REQUEUE = 75


def start(folder: Path, sweep: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "onlinerl.cli", "sweep", str(sweep), *options]
    with log.open("ab") as file:
        return subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=file, stderr=file, start_new_session=True
        )


def test_the_sweep_is_accepted(tiny_llama: Path, tmp_path: Path) -> None:
    """All of it, so that what is run seldom does not go out of date."""
    process = start(tmp_path, write_sweep(tmp_path, tiny_llama), tmp_path / "log", "--check")
    assert process.wait() == 0, (tmp_path / "log").read_text()
    assert f"every: {len(NAMES)} runs" in (tmp_path / "log").read_text()


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the sweep, which was stopped in the second iteration of its second run."""
    folder = tmp_path_factory.mktemp("every")
    sweep, log = write_sweep(folder, tiny_llama), folder / "log"
    made = folder / "runs" / "every"
    process = start(folder, sweep, log)
    try:
        second = made / NAMES[1] / "iterations" / "0002"
        while process.poll() is None and not second.exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == REQUEUE, log.read_text()[-3000:]
        process = start(folder, sweep, log)
        assert process.wait() in (0, 1), log.read_text()[-3000:]  # 1: a run has failed, which its own test says
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    yield made
    print(log.read_text()[-3000:])


@pytest.mark.engine
@pytest.mark.algorithms
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_real_parts(runs: Path, name: str) -> None:
    record: dict[str, Any] = json.loads((runs / "sweep.json").read_text())
    [made] = [each for each in record["runs"] if each.partition("-")[0] == name]  # knobs follow the name
    assert made not in record.get("failed", {}), record["failed"][made]
    run = runs / made
    rows = summarise(run)["iterations"]
    assert [row["iteration"] for row in rows] == list(range(ITERATIONS + 1))
    assert all(row["sync"]["proved"] for row in rows)
    trained = [json.loads((run / f"iterations/{t:04d}/manifest.json").read_text())["phases"]["train"] for t in (1, 2)]
    assert all(each["steps"] > 0 and each["skipped"] == 0 for each in trained), trained
    assert rows[-1]["kl_ref"] != 0, "no step moved the weights"
