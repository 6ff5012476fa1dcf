"""What processes on CPU are told about the machine."""

import os
import platform
import subprocess
import sys

import pytest

from onlinerl import hardware

TWICE = """
import resource
made = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes(bytearray(b"x") * 2**27)
    made.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(made[1] * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such variables")
@pytest.mark.parametrize("told", [True, False])
def test_memory_that_was_freed_is_used_again_without_asking_the_system(told):
    """Two arrays of 128 MiB at a time, twice. A wrong name or number would change nothing, without a word."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    env = found | (hardware.keeping_memory() if told else {})
    asked = int(subprocess.run([sys.executable, "-c", TWICE], env=env, capture_output=True, check=True, text=True).stdout)
    assert asked < 2**22 if told else asked > 2**27


def test_what_the_user_says_about_memory_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert hardware.keeping_memory()["MALLOC_TRIM_THRESHOLD_"] == "1000"
