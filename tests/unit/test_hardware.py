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
def test_a_process_keeps_the_memory_that_it_has_freed(told):
    """An array of 256 MiB. A wrong name or number would change nothing, without a word."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    env = found | (hardware.keeping_memory() if told else {})
    kept = int(subprocess.run([sys.executable, "-c", FREED], env=env, capture_output=True, check=True, text=True).stdout)
    assert kept > 2**27 if told else kept < 2**27


def test_what_the_user_says_about_memory_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert hardware.keeping_memory()["MALLOC_TRIM_THRESHOLD_"] == "1000"
