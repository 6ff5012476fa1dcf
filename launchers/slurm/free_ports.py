"""The first of three free ports in a row for a job's Ray cluster: `free_ports.py JOB`.

Jobs with neighbouring numbers may share a node, and Ray takes three ports each, so every job has its own three to begin with.
"""

from __future__ import annotations

import argparse
import socket
import sys

FIRST, PER_JOB, JOBS = 10000, 3, 7000
"""Below 32768, where most systems begin to give out ports of their own accord."""
STRIDE = 997
"""To whose ports a job turns when its own are taken: not its neighbour's, which may be about to start."""


def start(job: int) -> int:
    """Where the ports of a job begin if they are free."""
    return FIRST + PER_JOB * (job % JOBS)


def is_free(port: int) -> bool:
    """True if this machine can listen there on all of its addresses."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def main() -> int:
    """0 with the port on standard output, 1 with a message when none is free."""
    parser = argparse.ArgumentParser(description="The first of three free ports in a row for a job's Ray cluster.")
    parser.add_argument("job", metavar="JOB", type=int, help="number of the job")
    job = parser.parse_args().job
    for turn in range(JOBS):
        port = start(job + turn * STRIDE)
        if all(is_free(port + i) for i in range(PER_JOB)):
            sys.stdout.write(f"{port}\n")
            return 0
    sys.stderr.write(f"no {PER_JOB} free ports in a row from {FIRST} on\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
