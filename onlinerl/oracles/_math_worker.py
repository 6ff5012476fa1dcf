"""Compares one mathematical answer with another, in a process of its own. Started by math_verifier.py, never imported.

A process, because a pathological expression can keep sympy busy inside one C call that no Python signal handler interrupts, and
because math-verify's own timeout works in a main thread only. Whoever started it sets the deadline and kills it.

Each line on stdin is {"reference": str, "response": str}; each line on stdout {"score": 0 or 1} or {"unreadable": str}; the first
line, {}, says that it is ready.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import sys

MEMORY_BYTES = 4 << 30  # a response such as 9^9^9 must not take the machine down with it
GSM8K = re.compile(r"####\s*(-?\$?[\d,]*\.?\d+)\s*%?\s*$", re.MULTILINE)


def main(longest_s: int) -> None:
    """Answer until stdin is closed; end, should one answer take `longest_s` seconds and nobody be left to kill this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable(logging.CRITICAL)  # math-verify warns that its timeout is off, which is the point of this process
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may write to stdout, which carries the answers
    from math_verify import parse, verify

    answers.write("{}\n")
    answers.flush()
    for line in sys.stdin:
        signal.alarm(longest_s)
        request = json.loads(line)
        known = parse(_final(_delimited(request["reference"])), parsing_timeout=None)
        if known:
            found = parse(_final(request["response"]), parsing_timeout=None)
            answer = {"score": int(bool(found) and verify(known, found, timeout_seconds=None))}
        else:
            answer = {"unreadable": request["reference"]}
        signal.alarm(0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _final(text: str) -> str:
    """GSM8K writes the answer after `####`, on a line of its own; everything else is left to math-verify."""
    found = GSM8K.findall(text)
    return found[-1] if found else text


def _delimited(reference: str) -> str:
    """Bare LaTeX gets the $ that math-verify looks for."""
    bare = "\\" in reference and "$" not in reference and "\\boxed" not in reference
    return f"${reference}$" if bare else reference


if __name__ == "__main__":
    main(longest_s=int(sys.argv[1]))
