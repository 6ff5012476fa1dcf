"""Wait until a Ray cluster has exactly as many nodes as were asked for: `wait_for_nodes.py ADDRESS NODES [SECONDS]`."""

from __future__ import annotations

import os
import sys
import time

os.environ.setdefault("RAY_AUTH_MODE", "token")  # as auth.sh has it; Ray reads this when it is imported

import ray


def main() -> int:
    """0 when the nodes are there, 1 with a message when they are not in time or are too many."""
    address, expected = sys.argv[1], int(sys.argv[2])
    patience = float(sys.argv[3]) if len(sys.argv) > 3 else 300.0
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
