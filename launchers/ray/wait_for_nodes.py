"""Wait until a Ray cluster has exactly as many nodes as were asked for: `wait_for_nodes.py ADDRESS NODES [SECONDS]`."""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("RAY_AUTH_MODE", "token")  # as auth.sh has it; Ray reads this when it is imported


def main() -> int:
    """0 when the nodes are there, 1 with a message when they are not in time or are too many."""
    parser = argparse.ArgumentParser(description="Wait until a Ray cluster has exactly as many nodes as were asked for.")
    parser.add_argument("address", metavar="ADDRESS", help="HOST:PORT of the head")
    parser.add_argument("nodes", metavar="NODES", type=int)
    parser.add_argument("seconds", metavar="SECONDS", type=float, nargs="?", default=300.0, help="to wait (300)")
    given = parser.parse_args()
    address, expected, patience = given.address, given.nodes, given.seconds

    import ray  # takes seconds, which usage need not wait for

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    deadline = time.monotonic() + patience
    while True:
        alive = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
        if len(alive) == expected:
            return 0
        # More than asked for means that someone else's nodes have joined: their shape is not what was planned.
        if len(alive) > expected or time.monotonic() > deadline:
            sys.stderr.write(f"{len(alive)} Ray nodes at {address} ({', '.join(alive)}), expected {expected}\n")
            return 1
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
