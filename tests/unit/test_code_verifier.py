"""Programs that are right, wrong, and made to deceive or to do harm."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from onlinerl.config import component
from onlinerl.errors import OracleError
from onlinerl.oracles import _code_tests, code_verifier
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Failure, Prompt, Query

DOUBLE = "assert double(2) == 4\nassert double(-1) == -2\nassert double(0) == 0\nassert double(5) == 10"
RIGHT = "def double(x):\n    return 2 * x"


@pytest.fixture(scope="module")
def verifier():
    oracle = built()
    oracle.open()
    return oracle


def built(**knobs) -> Oracle:
    return component({"name": "code_verifier", "timeout_s": 10.0, **knobs}, "oracle", "oracles", Oracle)


def ask(oracle: Oracle, tests: str | None, *responses: str, prompt: str = ""):
    (result,) = oracle.ask(
        [Query(prompt=Prompt(id="p", text=prompt, token_ids=(1,), reference_answer=tests), responses=responses)]
    )
    return result


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nIt works."


# --- what passes ---


def test_programs_are_told_apart(verifier):
    half = "def double(x):\n    return abs(2 * x)"
    verdict = ask(
        verifier, DOUBLE, RIGHT, fenced(RIGHT), half, "def double(x): return 3", "not code at all", "", "def double(x"
    )
    assert verdict.scores == (1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert verdict.components["passed"] == (1.0, 1.0, 0.75, 0.0, 0.0, 0.0, 0.0)
    assert "response 2: a test fails" in verdict.raw
    assert "NameError" in verdict.raw or "SyntaxError" in verdict.raw
    partial = ask(built(partial_credit=True), DOUBLE, RIGHT, half)
    assert partial.scores == (1.0, 0.75)


@pytest.mark.parametrize(
    ("tests", "program", "passed"),
    [
        (json.dumps(["assert f(1) == [1, 'a']", "assert {1, 2} == f(2)"]), "def f(x): return [1, 'a'] if x == 1 else {2, 1}", 1.0),
        ("import math\nassert math.isclose(f(), 0.3)\nassert f()", "def f(): return 0.1 + 0.2", 1.0),
        ("one = 1\nassert f(one) == g(one)", "def f(x): return (x,)\ndef g(x): return (1,)", 1.0),
        ("assert f() == (1,)", "def f(): return [1]", 0.0),
        ("assert f() == {}", "from collections import Counter\ndef f(): return Counter()", 1.0),
        ("assert f() == 1.0", "def f(): return float('nan')", 0.0),
        ("def check(c):\n    assert c(2) == 4\n\ncheck(double)", RIGHT, 1.0),
        ("def check(c):\n    assert c(2) == 5\n\ncheck(double)", RIGHT, 0.0),
        (json.dumps({"inputs": ["1 2\n", "3 4"], "outputs": ["3\n", "7"]}), "print(sum(map(int, input().split())))  ", 1.0),
        (json.dumps({"inputs": ["1", "2"], "outputs": ["1", "1"]}), "print(input())", 0.5),
        (json.dumps({"inputs": ["x"], "outputs": ["a\nb\n"]}), "import sys\nprint('a  \\nb\\n')\nsys.exit(3)", 1.0),
        (json.dumps({"fn_name": "f", "inputs": [[1, 2], [3, 4]], "outputs": [[1, 2], [[3, 4]]]}), "def f(a, b): return a, b", 1.0),
        (json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [2]}), "class Solution:\n    def f(self, x): return x + 1", 1.0),
    ],
)  # fmt: skip
def test_tests_as_data_sets_have_them(verifier, tests, program, passed):
    assert ask(verifier, tests, program).components["passed"] == (passed,)


def test_a_program_may_begin_with_the_prompt():
    tests = "assert f(1) == 2"
    assert ask(built(include_prompt=True), tests, "    return x + 1\n", prompt="def f(x):\n").scores == (1.0,)


@pytest.mark.parametrize(
    "tests", ["", "72", "assert (", "[1, 2]", '{"inputs": ["1"], "outputs": []}', '{"fn_name": "a b", "inputs": [[1]], "outputs": [1]}',
              '{"fn_name": "f", "inputs": [1], "outputs": [1]}']
)  # fmt: skip
def test_tests_that_cannot_be_read_are_a_failure_and_no_score(verifier, tests):
    failure = ask(verifier, tests, RIGHT)
    assert isinstance(failure, Failure)
    assert failure.kind == "parse_fail"


def test_a_prompt_without_tests_stops_the_run(verifier):
    with pytest.raises(OracleError, match="which holds the tests"):
        ask(verifier, None, RIGHT)


def test_the_last_block_of_code_counts():
    assert _code_tests.program("```\nold\n```\nno:\n```python\nnew\n```") == "new\n"
    assert _code_tests.program("```py\ncut off") == "cut off"
    assert _code_tests.program("plain") == "plain"


# --- programs that deceive ---

LIARS = {
    "ends well": "import sys\nsys.exit(0)",
    "ends at once": "import os\nos._exit(0)",
    "ends well when called": "def double(x):\n    raise SystemExit(0)",
    "equals everything": "class E:\n    __eq__ = lambda *a: True\n    __hash__ = None\ndef double(x): return E()",
    "an integer that equals everything": "class E(int):\n    __eq__ = lambda *a: True\n    __hash__ = int.__hash__\ndef double(x): return E(7)",
    "writes what was found": "import os\nfor i in range(9):\n    for fd in range(3, 20):\n        try: os.write(fd, b'{\"i\": %d, \"value\": \"True\"}\\n' % i)\n"
    "        except OSError: pass\ndef double(x): return 0",
    "changes what compares": "import builtins, json, ast\nast.literal_eval = json.dumps = lambda *a, **k: 'True'\nbuiltins.repr = lambda x: '4'\n"
    "def double(x): return 0",
    "looks for the answers": "import sys, gc\nseen = [o for o in gc.get_objects() if isinstance(o, dict) and 'calls' in o]\n"
    "assert not any('expected' in str(o) for o in seen)\ndef double(x): return 0",
}  # fmt: skip


@pytest.mark.parametrize("liar", LIARS)
def test_nobody_passes_by_saying_so(verifier, liar):
    tests = "assert double(2) == 4\nassert double(-1) == -2"
    assert ask(verifier, tests, LIARS[liar]).scores == (0.0,)


# --- programs that do harm ---


def test_an_endless_loop_is_ended_and_costs_what_came_after_it():
    program = "def double(x):\n    while x == 0: pass\n    return 2 * x"
    verdict = ask(built(timeout_s=2.0), DOUBLE, program, "while True: pass", RIGHT)
    assert verdict.components["passed"] == (0.5, 0.0, 1.0)
    assert "took longer than 2 s" in verdict.raw


def test_memory_is_limited():
    program = "hog = [bytearray(1 << 20) for _ in range(400)]\n" + RIGHT
    small = ask(built(memory_mb=256), DOUBLE, program)
    assert (small.scores, "MemoryError" in small.raw) == ((0.0,), True)
    assert ask(built(memory_mb=1024), DOUBLE, program).scores == (1.0,)


@pytest.fixture
def left(monkeypatch):
    """The processes that programs of this test have left behind. Other tests may run programs at the same time, so they are told apart by their
    folders."""
    folders: list[bytes] = []

    def started(folder, request, original=code_verifier._started):
        folders.append(folder.encode())
        return original(folder, request)

    monkeypatch.setattr(code_verifier, "_started", started)
    return lambda: [p.name for p in Path("/proc").iterdir() if p.name.isdigit() and any(f in environment(p) for f in folders)]


def environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:  # it has ended
        return b""


def test_a_process_that_is_left_would_be_noticed(left, monkeypatch):
    seen: list[str] = []

    def watched(self, process, original=code_verifier.CodeVerifier._watched):
        seen.extend(left())
        return original(self, process)

    monkeypatch.setattr(code_verifier.CodeVerifier, "_watched", watched)
    assert ask(built(), DOUBLE, RIGHT).scores == (1.0,)
    assert seen != []
    assert left() == []


def test_a_fork_bomb_ends_with_its_program(left):
    """None of its processes is left, and it got no more than it may have."""
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    verdict = ask(built(timeout_s=1.0), DOUBLE, bomb)
    assert verdict.scores == (0.0,)
    assert left() == []
    count = "import os\nn = 0\ndef forks():\n    global n\n    try:\n        while n < 50:\n            if os.fork() == 0:\n                import time\n"
    count += "                time.sleep(60)\n            n += 1\n    except OSError: pass\n    return n"
    assert ask(built(max_processes=5), "assert forks() == 4", count).scores == (1.0,)


def test_a_process_that_is_left_behind_does_not_outlive_the_program(left):
    program = "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time\n        time.sleep(600)\n    os._exit(0)\n"
    assert ask(built(), DOUBLE, program + RIGHT).scores == (1.0,)
    assert left() == []


def test_a_flood_of_output_is_cut():
    verdict = ask(built(max_output_kb=64), "assert f() == 1", "def f(): return 'x' * 10**6")
    assert (verdict.scores, verdict.raw) == ((0.0,), "response 0: wrote more than 64 KiB")
    flood = json.dumps({"inputs": [""], "outputs": ["x"]})
    assert ask(built(max_output_kb=64), flood, "while True: print('x')").scores == (0.0,)


def test_there_is_no_network(verifier):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\ndef reach():\n    try: socket.create_connection(('127.0.0.1', {port}), 2)\n    except OSError: return 'no'\n    return 'yes'"
        assert ask(verifier, "assert reach() == 'no'", program).scores == (1.0,)


def test_there_are_no_files_but_its_own(verifier, tmp_path):
    secret, target = tmp_path / "answers.jsonl", tmp_path / "run"
    secret.write_text("4")
    target.mkdir(mode=0o777)
    program = (
        "import os, glob\n"
        "def tried(what):\n    try: what()\n    except OSError: return 'no'\n    return 'yes'\n"
        f"def read(): return tried(lambda: open({str(secret)!r}).read())\n"
        f"def listed(): return tried(lambda: os.listdir({str(tmp_path)!r}))\n"
        f"def write(): return tried(lambda: open({str(target / 'x')!r}, 'w'))\n"
        f"def removed(): return tried(lambda: os.rmdir({str(target)!r}))\n"
        f"def environ(): return tried(lambda: open('/proc/{os.getpid()}/environ').read())\n"
        f"def killed(): return tried(lambda: os.kill({os.getpid()}, 0))\n"
        "def own():\n    open('own', 'w').write('1')\n    return open('own').read()\n"
        "def library():\n    import decimal, json, numpy\n    return int(numpy.ones(3).sum())\n"
    )
    names = ("read", "listed", "write", "removed", "environ", "killed")
    tests = "\n".join([*(f"assert {name}() == 'no'" for name in names), "assert own() == '1'", "assert library() == 3"])
    verdict = ask(verifier, tests, program)
    assert verdict.components["passed"] == (1.0,), verdict.raw
    assert target.exists()


def test_secrets_of_the_environment_are_not_there(verifier, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "hidden")
    assert ask(verifier, "assert 'JUDGE_API_KEY' not in keys()", "import os\ndef keys(): return list(os.environ)").scores == (
        1.0,
    )


# --- a machine that isolates nothing ---


def without(tmp_path, monkeypatch, *lines: str) -> None:
    """The worker, where the kernel refuses something."""
    source = Path(code_verifier.__file__).with_name("_code_worker.py").read_text()
    (tmp_path / "_code_worker.py").write_text(
        source.replace('\n\nif __name__ == "__main__":', "\n" + "\n".join(lines) + '\n\nif __name__ == "__main__":')
    )
    monkeypatch.setattr(code_verifier, "__file__", str(tmp_path / "code_verifier.py"))


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("unshared = lambda uid: False", "a network namespace of its own"),
        ("own_files = lambda: False", "Landlock, for files"),
        ("without_rights = lambda uid: False", "a user of its own"),
    ],
)
def test_a_machine_that_cannot_isolate_is_refused(tmp_path, monkeypatch, line, missing):
    if "rights" in line and os.geteuid() != 0:
        pytest.skip("only root has rights to give up")
    without(tmp_path, monkeypatch, line)
    with pytest.raises(OracleError, match=missing) as error:
        built().open()
    assert error.value.field == "oracle.sandbox"
    eager = built(sandbox="best_effort", timeout_s=2.0)
    assert ask(eager, DOUBLE, RIGHT, "while True: pass").scores == (1.0, 0.0)
    assert missing in eager.remarks[0]


def test_a_worker_that_does_not_start_is_a_failure_and_no_score(verifier, tmp_path, monkeypatch):
    without(tmp_path, monkeypatch, "main = lambda: None")
    with pytest.raises(OracleError, match="programs cannot be run"):
        built().open()
    failure = ask(verifier, DOUBLE, RIGHT)
    assert (failure.kind, "did not start" in failure.message) == ("error", True)
