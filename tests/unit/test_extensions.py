"""A build of an extension that was killed must not stop every later run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from torch.utils.file_baton import FileBaton

from onlinerl.learners.deepspeed import extensions as _extensions


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The path of an extension's lock, as PyTorch makes it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "shm_comm").mkdir()
    return tmp_path / "shm_comm" / "lock"


def test_each_environment_compiles_into_a_folder_of_its_own(monkeypatch):
    """Unless the user has named one."""
    folders = set()
    for prefix in ("/one/.venv", "/two/.venv"):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setattr(sys, "prefix", prefix)
        _extensions.use_own_folder()
        folders.add(os.environ["TORCH_EXTENSIONS_DIR"])
    assert len(folders) == 2
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/mine")
    _extensions.use_own_folder()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/mine"


def builds(lock, then: str) -> subprocess.Popen:
    """A process that has begun to compile."""
    code = f"from torch.utils.file_baton import FileBaton as F; f = F({str(lock)!r}); assert f.try_acquire(); print(flush=True); {then}"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def age(lock, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(lock, (then, then))


def test_the_lock_of_a_build_that_goes_on_is_left_alone(lock):
    process = builds(lock, "input()")
    try:
        age(lock, 1e5)
        assert _extensions.remove_abandoned_locks() == []
        assert lock.exists()
    finally:
        process.kill()
        process.wait()


def test_the_lock_of_a_killed_build_is_removed_when_it_is_old_enough(lock, monkeypatch):
    builds(lock, "import os; os.kill(os.getpid(), 9)").wait()
    assert lock.exists(), "the fault that this is there for"
    assert _extensions.remove_abandoned_locks() == [], "somebody whom this process cannot see may be building"
    age(lock, _extensions.PATIENCE_S + 10)
    monkeypatch.setattr(_extensions, "network_mount", lambda path: ("nfs4", "rw"))
    assert _extensions.remove_abandoned_locks() == [], "or on another machine"
    monkeypatch.undo()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(lock.parents[1])
    try:
        assert _extensions.remove_abandoned_locks() == [lock]
    finally:
        del os.environ["TORCH_EXTENSIONS_DIR"]
    assert not lock.exists()


def test_one_that_is_abandoned_while_others_wait_for_it(lock, monkeypatch):
    monkeypatch.setattr(_extensions, "LOOK_S", 0.05)
    process = builds(lock, "input()")
    waiting = threading.Thread(target=FileBaton(str(lock)).wait, daemon=True)
    with _extensions.without_abandoned_locks():
        age(lock, _extensions.PATIENCE_S + 10)
        waiting.start()
        process.kill()
        process.wait()
        waiting.join(timeout=30)
        assert not waiting.is_alive(), "it would have waited for ever"
