"""The run directory keeps what it promised, wherever it is interrupted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import values
from values import labels

from onlinerl import mounts
from onlinerl.errors import StoreError
from onlinerl.protocols.store import Store
from onlinerl.stores import _files, _lock
from onlinerl.stores.directory import RunDirectory

MANIFEST = {"name": "r", "config_digest": "abc", "fingerprint": {"seed": 1, "algorithm.name": "dpo"}}


def make(path: Path, **changes: object) -> RunDirectory:
    return RunDirectory.create(path, config_yaml="name: r\n", manifest={**MANIFEST, **changes})


@pytest.fixture
def run(tmp_path):
    with make(tmp_path / "r") as run:
        yield run


def full_disk(*_args):
    raise OSError(errno.ENOSPC, "No space left on device")


# --- the run ---


def test_a_run_is_created_and_opened_again(tmp_path):
    with make(tmp_path / "r") as run:
        assert run.manifest["status"] == "running"
        assert run.manifest["attempt"] == 0
        assert run.manifest["format"] == 6
        run.update_manifest(status="interrupted", attempt=1, best=float("nan"))
    with RunDirectory.open(tmp_path / "r") as run:
        assert run.manifest["status"] == "interrupted"
        assert run.manifest["attempt"] == 1
        assert run.manifest["best"] is None
        assert run.manifest["fingerprint"] == MANIFEST["fingerprint"]
        assert run.config_yaml == "name: r\n"
        run.write_config("name: r\niterations: 9\n")
        assert "9" in run.config_yaml


def test_it_has_every_method_of_the_protocol():
    for name in (n for n in vars(Store) if not n.startswith("_")):
        assert callable(getattr(RunDirectory, name)), name


def test_creating_the_same_run_continues_it(tmp_path):
    with make(tmp_path / "r") as run:
        run.labels(1, "verdicts").append(labels([1]))
        run.update_manifest(attempt=3)
    with make(tmp_path / "r") as run:
        assert run.manifest["attempt"] == 3
        assert list(run.labels(1, "verdicts")) == labels([1])


def test_creating_a_different_run_there_is_refused_and_names_the_difference(tmp_path):
    make(tmp_path / "r").close()
    with pytest.raises(StoreError, match="different run; it differs in seed") as caught:
        make(tmp_path / "r", config_digest="xyz", fingerprint={"seed": 2, "algorithm.name": "dpo"})
    assert "--fresh" in caught.value.fix
    RunDirectory.open(tmp_path / "r").close()  # the refusal left no lock


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds files but no run \(notes.txt\)"):
        make(tmp_path)


def test_a_crash_during_create_leaves_a_directory_that_create_accepts(tmp_path):
    (tmp_path / "lock").write_text("process 1 on a\n")
    (tmp_path / "config.yaml").write_text("na")
    (tmp_path / ".manifest.json.tmp").write_text("{")
    with make(tmp_path) as run:
        assert run.config_yaml == "name: r\n"
    assert not (tmp_path / ".manifest.json.tmp").exists()


def test_opening_nothing_says_which_runs_there_are(tmp_path):
    make(tmp_path / "good").close()
    with pytest.raises(StoreError, match="holds no run") as caught:
        RunDirectory.open(tmp_path / "goood")
    assert "good" in caught.value.fix
    assert f"ls {tmp_path}" in caught.value.fix


@pytest.mark.parametrize("content", ["{", "[]", "\x00\x00"])
def test_a_damaged_manifest_is_an_error(tmp_path, content):
    make(tmp_path / "r").close()
    (tmp_path / "r" / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match="damaged"):
        RunDirectory.open(tmp_path / "r")


def test_a_run_of_another_format_is_refused(tmp_path):
    make(tmp_path / "r", format=99).close()
    with pytest.raises(StoreError, match="format 99"):
        RunDirectory.open(tmp_path / "r")


def test_move_aside_takes_the_next_free_number(tmp_path):
    assert RunDirectory.move_aside(tmp_path / "r") is None
    for expected in ("r.1", "r.2"):
        make(tmp_path / "r").close()
        assert RunDirectory.move_aside(tmp_path / "r") == tmp_path / expected
        assert not (tmp_path / "r").exists()
        RunDirectory.open(tmp_path / expected).close()


def test_move_aside_takes_a_run_without_its_manifest_and_no_other_files(tmp_path):
    make(tmp_path / "r").close()
    (tmp_path / "r/manifest.json").unlink()
    (tmp_path / "r/iterations").mkdir(exist_ok=True)
    assert RunDirectory.move_aside(tmp_path / "r") == tmp_path / "r.1"
    (tmp_path / "r").mkdir()
    (tmp_path / "r/notes.txt").write_text("x")
    with pytest.raises(StoreError, match="holds files but no run"):
        RunDirectory.move_aside(tmp_path / "r")
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["notes.txt"]


def test_an_unwritable_place_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        make(tmp_path / "file" / "r")

    def denied(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StoreError, match="Permission denied") as caught:
        make(tmp_path / "r")
    assert "`runs`" in caught.value.fix


# --- the lock ---

HOLD = """
import sys, time
from onlinerl.stores.directory import RunDirectory
run = RunDirectory.open(sys.argv[1])
sys.stdout.write("held\\n"); sys.stdout.flush()
time.sleep(60)
"""


def test_a_second_process_is_told_who_writes_and_a_dead_one_is_no_problem(tmp_path):
    make(tmp_path / "r").close()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for attempt in (RunDirectory.open, RunDirectory.move_aside, make):
            with pytest.raises(StoreError, match=f"in use by process {holder.pid} "):
                attempt(tmp_path / "r")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    RunDirectory.open(tmp_path / "r").close()


def test_the_lock_holds_within_one_process_and_close_releases_it(tmp_path):
    run = make(tmp_path / "r")
    with pytest.raises(StoreError, match=f"process {os.getpid()} "):
        RunDirectory.open(tmp_path / "r")
    run.close()
    run.close()
    RunDirectory.open(tmp_path / "r").close()


MOUNTS = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:35 / /shared rw,relatime shared:2 - nfs4 server:/export rw,vers=4.2,local_lock=none,addr=10.0.0.1
41 22 0:36 / /old rw,relatime - nfs server:/old rw,vers=3,nolock,local_lock=all
42 22 0:37 / /my\040files rw - fuse.sshfs me@host:/ rw,user_id=0
43 40 8:2 / /shared/local rw - xfs /dev/sdb1 rw
44 22 0:38 / /scratch rw - lustre mds@tcp:/scratch rw,localflock
"""


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/home/me/runs/r", None),
        ("/shared/runs/r", "/shared/runs/r is on nfs4: the lock of a run holds between machines only if"),
        ("/old/r", "is on nfs, mounted with nolock: the lock of a run holds on this machine only"),
        ("/my files/r", "is on fuse.sshfs: "),
        ("/shared/local/r", None),
        ("/sharedness/r", None),
        ("/scratch/r", "is on lustre, mounted with localflock: "),
    ],
)
def test_a_network_file_system_is_said(tmp_path, monkeypatch, path, says):
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(mounts, "_MOUNTS", tmp_path / "mounts")
    found = _lock.caveat(Path(path))
    assert (found is None) if says is None else (says in found)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(StoreError, match="takes no locks: Operation not supported") as caught:
        make(tmp_path / "r")
    assert "mount it with locks" in caught.value.fix


# --- phases ---


def test_phases_are_kept_in_the_order_in_which_they_finished(run):
    assert run.phases(2) == {}
    assert not run.phase_done(2, "sample")
    run.finish_phase(2, "sample", {"seconds": np.float32(1.5), "samples": np.int64(8)})
    run.finish_phase(2, "label", {"seconds": float("nan"), "failures": {"timeout": 1}})
    run.finish_phase(2, "sample", {"seconds": 2.0})
    assert run.phases(2) == {"label": {"seconds": None, "failures": {"timeout": 1}}, "sample": {"seconds": 2.0}}
    assert list(run.phases(2)) == ["label", "sample"]
    assert run.phase_done(2, "label")
    run.finish_phase(0, "measure", {})
    assert run.iterations() == [0, 2]


@pytest.mark.parametrize("call", ["writev", "fsync"])
def test_a_full_disk_keeps_the_finished_phases(run, monkeypatch, call):
    run.finish_phase(1, "sample", {"seconds": 1.0})
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(StoreError, match="disk is full"):
        run.finish_phase(1, "label", {"seconds": 1.0})
    monkeypatch.undo()
    assert list(run.phases(1)) == ["sample"]
    assert not list(run.path.glob("iterations/*/.*"))


# --- checkpoints and exports ---


def save(run, number, content=b"weights", kind="checkpoints"):
    with run.staged(kind, number) as path:
        (path / "shards").mkdir()
        (path / "shards" / "model.bin").write_bytes(content)
        (path / "empty").write_bytes(b"")


def test_an_artefact_is_there_completely_or_not_at_all(run):
    assert run.artefact("checkpoints", 1) is None
    save(run, 1)
    path = run.require("checkpoints", 1)
    assert path == run.path / "checkpoints" / "0001"
    listed = json.loads((path / "complete.json").read_text())["files"]
    assert listed["shards/model.bin"]["bytes"] == 7
    assert len(listed["shards/model.bin"]["sha256"]) == 64
    assert run.artefact("exports", 1) is None
    assert run.artefacts("checkpoints") == [1]


def test_an_artefact_without_files_is_none(run):
    """Ranks on a node that does not share the disk wrote theirs somewhere else."""
    with pytest.raises(StoreError, match="nothing was written") as caught, run.staged("checkpoints", 1):
        pass
    assert caught.value.field == "runs"
    assert run.artefact("checkpoints", 1) is None


def test_an_exception_leaves_nothing_of_it_and_keeps_the_older_one(run):
    save(run, 1, b"old")

    def fail():
        with run.staged("checkpoints", 1) as path:
            (path / "half").write_bytes(b"x")
            raise KeyError("learner died")

    with pytest.raises(KeyError):
        fail()
    assert (run.artefact("checkpoints", 1) / "shards" / "model.bin").read_bytes() == b"old"
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["0001"]


def test_a_newer_one_replaces_an_older_one_of_the_same_number(run):
    save(run, 1, b"old")
    save(run, 1, b"new!")
    assert (run.require("checkpoints", 1) / "shards" / "model.bin").read_bytes() == b"new!"
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["0001"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: (p / "shards" / "model.bin").write_bytes(b"weigh"),
        lambda p: (p / "shards" / "model.bin").unlink(),
        lambda p: (p / "complete.json").unlink(),
        lambda p: (p / "complete.json").write_text('{"files": {"shards/mod'),
        lambda p: (p / "complete.json").write_text('{"files": []}'),
    ],
)
def test_damaged_artefacts_are_not_there(run, damage):
    save(run, 1)
    save(run, 2)
    damage(run.path / "checkpoints" / "0002")
    assert run.artefact("checkpoints", 2) is None
    assert run.artefacts("checkpoints") == [1]


def test_checksums_over_the_ends_of_large_files_are_still_read(run, monkeypatch):
    """As format 1 took them of files above 64 MiB."""
    monkeypatch.setattr("onlinerl.stores._artefacts._ENDS_BYTES", 4)
    save(run, 1, b"0123456789")
    file = run.path / "checkpoints" / "0001" / "shards" / "model.bin"
    listed = json.loads((file.parents[1] / "complete.json").read_text())["files"]
    listed["shards/model.bin"]["sha256"] = f"ends:{_files.sha256(b'01236789')}"
    (file.parents[1] / "complete.json").write_text(json.dumps({"files": listed}))
    assert run.require("checkpoints", 1)
    file.write_bytes(b"012345678X")
    with pytest.raises(StoreError, match="does not agree with its checksum"):
        run.require("checkpoints", 1)


def test_leftovers_of_crashes_are_cleaned_when_the_run_is_opened(tmp_path):
    with make(tmp_path / "r") as run:
        save(run, 1, b"one")
        save(run, 2, b"two")
        folder = run.path / "checkpoints"
    (folder / ".0003.tmp").mkdir()  # killed while writing
    (folder / ".0003.tmp" / "half").write_bytes(b"x")
    (folder / "0002").rename(folder / ".0002.old")  # killed between the two renames of a replacement
    shutil.copytree(folder / "0001", folder / ".0002.tmp")
    shutil.copytree(folder / "0001", folder / ".0001.old")  # killed after both renames
    with RunDirectory.open(tmp_path / "r") as run:
        assert sorted(p.name for p in folder.iterdir()) == ["0001", "0002"]
        assert (run.require("checkpoints", 2) / "shards" / "model.bin").read_bytes() == b"two"


def test_retain_removes_the_others_and_never_leaves_a_half_one(run, monkeypatch):
    for number in (1, 2, 3):
        save(run, number)
    run.retain("checkpoints", {3})
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["0003"]
    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", full_disk)
    with pytest.raises(StoreError):
        run.retain("checkpoints", set())
    monkeypatch.setattr(shutil, "rmtree", real)
    assert run.artefacts("checkpoints") == []


@pytest.mark.parametrize("where", ["block", "fsync"])
def test_a_full_disk_keeps_the_previous_checkpoint(run, monkeypatch, where):
    save(run, 1)

    def attempt():
        with run.staged("checkpoints", 2) as path:
            (path / "model.bin").write_bytes(b"x")
            if where == "block":
                full_disk()
            monkeypatch.setattr(os, "fsync", full_disk)

    with pytest.raises(StoreError, match="disk is full"):
        attempt()
    monkeypatch.undo()
    assert run.artefacts("checkpoints") == [1]
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["0001"]


def test_a_failed_replacement_brings_the_older_one_back(run, monkeypatch):
    save(run, 1, b"old")
    real = Path.rename

    def rename(self, target):
        if self.name == ".0001.tmp":
            full_disk()
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StoreError, match="disk is full"):
        save(run, 1, b"new")
    monkeypatch.undo()
    assert (run.artefact("checkpoints", 1) / "shards" / "model.bin").read_bytes() == b"old"


def test_free_space_is_checked_before_writing(run, monkeypatch):
    run.require_free(1, 0)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 << 30, 8 << 30, 2 << 30))
    run.require_free(1 << 30, 1 << 30)
    with pytest.raises(StoreError, match=r"2.00 GiB free; 1.50 GiB .* 1.00 GiB must stay free") as caught:
        run.require_free(3 << 29, 1 << 30)
    assert "checkpoints.keep" in caught.value.fix
    assert "checkpoints.exports" in caught.value.fix


# --- a real kill ---

WRITE = """
import sys
from values import label
from onlinerl.stores.directory import RunDirectory
run = RunDirectory.open(sys.argv[1])
table = run.labels(1, "t")
start = len(list(table))
for i in range(start, 100000):
    table.append([label(i, 1.0)])
    with run.staged("checkpoints", 1 + i % 2) as path:
        (path / "state").write_bytes(b"%d" % i)
    sys.stdout.write(f"{i}\\n"); sys.stdout.flush()
"""


def with_support() -> dict[str, str]:
    paths = [str(Path(values.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_kill_nine_loses_nothing_that_was_reported(tmp_path):
    make(tmp_path / "r").close()
    for round_ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True, env=with_support()
        )
        try:
            reported = -1
            for _ in range(5 + 7 * round_):
                reported = int(writer.stdout.readline())
        finally:
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read()
            writer.wait()
        with contextlib.suppress(IndexError):
            reported = int(rest.splitlines()[-1])
        with RunDirectory.open(tmp_path / "r") as run:
            stored = [label.prompt_id for label in run.labels(1, "t")]
            assert stored == [f"p{i}" for i in range(len(stored))]
            assert len(stored) > reported
            newest = max(int((run.require("checkpoints", n) / "state").read_text()) for n in (1, 2))
            assert newest >= reported


def test_helpers_refuse_what_json_does_not_know():
    assert _files.finite({"a": (np.float64("inf"), 1, np.array([1.0, np.nan]))}) == {"a": [None, 1, [1.0, None]]}
    with pytest.raises(TypeError):
        _files.plain({1})
