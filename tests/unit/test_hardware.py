"""What processes on CPU are told about the machine."""

import os
import platform
import subprocess
import sys

import pytest

from onlinerl import hardware

FREED = """
import resource


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


before = resident()
bytearray(b"x") * 2**28
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such variables")
@pytest.mark.parametrize("told", [True, False])
def test_a_process_keeps_the_memory_that_it_has_freed(monkeypatch, told):
    """An array of 256 MiB. A wrong name or number would change nothing, without a word."""
    others = ("MALLOC_", "GLIBC_", "LD_PRELOAD", "PYTHONMALLOC")
    for name in [name for name in os.environ if name.startswith(others)]:
        monkeypatch.delenv(name)
    env = {**os.environ} | (hardware.keeping_memory() if told else {})
    kept = int(subprocess.run([sys.executable, "-c", FREED], env=env, capture_output=True, check=True, text=True).stdout)
    assert kept > 2**27 if told else kept < 2**27


@pytest.mark.parametrize("name", ["MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"])
def test_what_the_user_says_about_memory_stays(monkeypatch, name):
    """Half of it and half of ours would be neither."""
    monkeypatch.setenv(name, "1000")
    assert hardware.keeping_memory() == {}
