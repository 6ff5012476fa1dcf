"""The layers hold: as the linter reads them, and as an interpreter sees them."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from onlinerl import registry

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers", "pandas")
LINT = Path(sys.executable).with_name("lint-imports")

# No finder finds these packages, as if they were not installed.
BLOCK = """
import sys

class Blind:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Blind(finder) for finder in sys.meta_path]
"""

needs_linter = pytest.mark.skipif(not LINT.exists(), reason="import-linter is not installed beside this interpreter")


def python(code: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run code in a new interpreter; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def imported_by(*modules: str) -> set[str]:
    """Which of the heavy libraries importing these modules pulls in."""
    code = f"import sys\n{''.join(f'import {m}' + chr(10) for m in modules)}print(*({HEAVY!r} & sys.modules.keys()))"
    return set(python(code.replace(repr(HEAVY), repr(set(HEAVY)))).split())


# --- as the linter reads them ---


@needs_linter
def test_the_contracts_are_kept():
    done = subprocess.run([LINT, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def lint_with(tmp_path: Path, module: str, line: str) -> str:
    """What the linter says of our code with one more line in a module, perhaps a new one."""
    shutil.copytree(ROOT / "onlinerl", tmp_path / "onlinerl", ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "onlinerl" / module
    if not file.parent.exists():
        file.parent.mkdir()
        (file.parent / "__init__.py").touch()
    with file.open("a") as opened:
        opened.write(f"\n{line}\n")
    done = subprocess.run([LINT, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return " ".join(done.stdout.split())


def broken(said: str) -> list[str]:
    """The contracts that it finds broken."""
    return said.split("Contracts:")[0].split("dependencies.")[1].split("BROKEN")[:-1]


@needs_linter
@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("controller/loop.py", "from onlinerl import app"),
        ("pairing/ranked.py", "from onlinerl.prompts import jsonl"),
        ("metrics/catalogue.py", "from onlinerl import protocols"),
    ],
    ids=lambda value: value if "/" in value else "",
)
def test_an_import_that_goes_up_or_sideways_is_noticed(tmp_path, module, line):
    """The contracts are not empty words: each is broken by the import it is there to forbid."""
    said = lint_with(tmp_path, module, line)
    assert any("Imports only go down" in contract for contract in broken(said)), said


@needs_linter
@pytest.mark.parametrize(
    ("module", "line", "chain"),
    [
        ("stores/rows.py", "import torch", "onlinerl.stores.rows -> torch"),
        (
            "controller/health.py",
            "from onlinerl.ops import ratios",
            "onlinerl.controller.health -> onlinerl.ops.ratios -> torch",
        ),
        ("metrics/catalogue.py", "import prometheus_client", "onlinerl.metrics.catalogue -> prometheus_client"),
        ("algorithms/dpo.py", "import deepspeed", "onlinerl.algorithms.dpo -> deepspeed"),
        ("engines/toy.py", "import ray", "onlinerl.engines.toy -> ray"),
        ("cluster/pool.py", "import deepspeed", "onlinerl.cluster.pool -> deepspeed"),
        ("cluster/sync.py", "import vllm", "onlinerl.cluster.sync -> vllm"),
        ("ledger/log.py", "import ray", "onlinerl.ledger.log -> ray"),
        ("ledger/log.py", "import torch", "onlinerl.ledger.log -> torch"),
        ("ledger/log.py", "from onlinerl.learners import _policy", "onlinerl.ledger.log -> onlinerl.learners._policy -> t"),
        ("web.py", "import fastapi", "onlinerl.web -> fastapi"),
    ],
    ids=lambda value: value if "/" in value else "",
)
def test_a_library_outside_of_its_home_is_noticed(tmp_path, module, line, chain):
    """In a module that exists, in a folder that no contract names, and of a library that has no home yet."""
    said = lint_with(tmp_path, module, line)
    assert any("Each library has one home" in contract for contract in broken(said)), said
    assert chain in said


# --- as an interpreter sees them ---


@pytest.mark.parametrize(
    "module",
    [
        "onlinerl.config",
        "onlinerl.controller.loop",
        "onlinerl.preflight",
        "onlinerl.api",
        "onlinerl.app",
        "onlinerl.cli",
        "onlinerl.stores.directory",
        "onlinerl.trackers.prometheus",
    ],
)
def test_the_core_imports_nothing_heavy(module):
    assert imported_by(module) == set()


def test_importing_the_package_imports_nothing_at_all():
    before = python("import sys; print(*sys.modules)").split()
    after = python("import sys, onlinerl; print(*sys.modules)").split()
    assert {*after} - {*before} <= {"onlinerl", *_standard_library(after)}
    assert "onlinerl.api" in python("import sys; from onlinerl import Run, load_config; print(*sys.modules)").split()


def _standard_library(modules: list[str]) -> set[str]:
    return {name for name in modules if name.partition(".")[0].lstrip("_") in {m.lstrip("_") for m in sys.stdlib_module_names}}


def test_algorithms_import_torch_and_nothing_else_that_is_heavy():
    names = registry.names("algorithms")
    assert names
    assert imported_by(*(f"onlinerl.algorithms.{name}" for name in names)) == {"torch"}


def test_each_learner_and_engine_imports_its_own_library_only():
    """`check` of a run imports neither torch nor what the parts work with; the torch learner needs no other library, nor an engine's."""
    assert imported_by("onlinerl.engines.vllm", "onlinerl.learners.deepspeed", "onlinerl.learners.torch") == set()
    assert imported_by("onlinerl.learners.torch.rank") == {"torch"}


@pytest.mark.parametrize("role", ["oracles", "pairing", "prompts", "selection", "trackers", "transports"])
def test_what_is_configured_imports_nothing_heavy(role):
    names = [name for name in registry.names(role) if name != "tensorboard"]  # its package may not be installed
    assert imported_by(*(f"onlinerl.{role}.{name}" for name in names)) == set()


def test_check_needs_no_engine_learner_or_cluster(toy_config, tmp_path):
    """`onlinerl check` of a configuration for vLLM and DeepSpeed, on a machine that has neither of them, nor Ray."""
    config = toy_config(tmp_path, {"engine.name": "vllm", "learner.name": "deepspeed"})
    code = BLOCK.format(blocked={"vllm", "ray", "deepspeed"}) + "from onlinerl.cli import main\nmain()"
    said = python(code, "check", str(config), cwd=tmp_path)
    assert "8 prompts x 4 samples -> at most 8 pairs" in said
    assert "placement" in said
    assert said.rstrip().endswith("ok")


def test_a_toy_run_needs_no_engine_learner_or_cluster(toy_config, tmp_path):
    config = toy_config(tmp_path, iterations=1)
    code = BLOCK.format(blocked={"vllm", "ray", "deepspeed"}) + "from onlinerl.cli import main\nmain()"
    assert "win rate vs base" in python(code, "run", str(config), cwd=tmp_path)


def test_the_loop_is_one_screen():
    controller = ROOT / "onlinerl" / "controller"
    assert len((controller / "loop.py").read_text().splitlines()) <= 100
    for file in (controller / "phases").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 80, f"{file.name}: {node.name}"


def test_no_function_is_too_long():
    longest = {
        f"{file}: {node.name}": node.end_lineno - node.lineno + 1
        for file in (ROOT / "onlinerl").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert len(longest) > 1000
    assert {where: lines for where, lines in longest.items() if lines > LONGEST_FUNCTION} == {}


def test_no_file_is_too_long():
    files = list((ROOT / "onlinerl").rglob("*.py"))
    assert len(files) > 100
    assert {str(file): n for file in files if (n := len(file.read_text().splitlines())) > LONGEST_FILE} == {}


LONGEST_FILE = 450
"""Lines; what is longer is more than one thing."""
LONGEST_FUNCTION = 67
"""Lines, with its docstring."""


# --- no module imports itself, over whatever others ---


def imported(package: Path) -> dict[str, set[str]]:
    """What each module of a package imports of it when it runs, at once or later; not what only a type checker reads."""
    names = {file: ".".join(file.relative_to(package.parent).with_suffix("").parts) for file in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): file for file, name in names.items()}
    return {name: set(_imports(ast.parse(file.read_text()), modules)) - {name} for name, file in modules.items()}


def _imports(node: ast.AST, modules: Collection[str]) -> Iterator[str]:
    match node:
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.ImportFrom(module=str(source), names=taken):
            yield from (
                name
                for one in taken
                if (name := f"{source}.{one.name}" if f"{source}.{one.name}" in modules else source) in modules
            )
        case ast.Import(names=taken):
            yield from (one.name for one in taken if one.name in modules)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, modules)


def test_no_module_imports_itself():
    graph = imported(ROOT / "onlinerl")
    assert "onlinerl.config" in graph["onlinerl.app"]
    TopologicalSorter(graph).prepare()


def test_a_circle_of_imports_is_noticed(tmp_path):
    package = tmp_path / "mine"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "deep" / "__init__.py").write_text("from mine import one\n")
    (package / "one.py").write_text("from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from mine.two import Two\n")
    (package / "two.py").write_text("def load():\n    from mine.deep import one\n")
    TopologicalSorter(imported(package)).prepare()
    (package / "one.py").write_text("import mine.two\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imported(package)).prepare()
