"""What several test files share: a tiny model made in code, toy configurations, and ways to run the command line.

`cli` is the real thing, a new interpreter. `warm_cli` runs the same entry point in a process forked from one that has imported
everything already, so a test can afford dozens of runs; it can also install hooks in that process (`support/hooks.py`) that log what
is generated and judged, and kill it at a chosen point.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from digits import count_in_digits

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several files run at once. Threads that wait for each other on cores that are taken would slow all of them down.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

HEAVY = {"e2e", "gpu", "integration"}
"""Folders in which `make test` looks for tests with engines and ranks."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("engine") and item.path.parent.name not in HEAVY:
            raise pytest.UsageError(
                f"{item.nodeid} is marked `engine`, and `make test` would not find it: move it to one of {HEAVY}"
            )


SUPPORT = Path(__file__).parent / "support"
PACKAGE = Path(__file__).parents[1] / "onlinerl"

POSITIVE = ["good", "great", "wonderful", "excellent", "lovely", "superb", "happy", "best"]
NEGATIVE = ["bad", "awful", "terrible", "horrible", "worst", "sad", "hate", "dreadful"]
NEUTRAL = ["the", "a", "film", "movie", "story", "plot", "actor", "scene", "was", "is", "and", "with", "it", "that", "in", "on"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ROLES = ["user", "assistant", "system", ":"]
END = "[end]"
WORDS = ["[unk]", *POSITIVE, *NEGATIVE, *NEUTRAL, *NUMBERS, *ROLES, END]
"""The end token comes last, where the toy engine expects it; it is the padding token too."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' [end] ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def save_tokenizer(path: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[unk]", eos_token=END, pad_token=END)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Directory of a randomly initialised two-layer Llama over `WORDS`. Read only: a test that alters it must copy it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tokenizer(path)
    torch.manual_seed(0)
    end = len(WORDS) - 1
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def counting_model(tiny_model, tmp_path_factory) -> Path:
    """The same, but it knows the numbers from 1 to 10 as digits instead of words, as prompts with goals have them."""
    path = tmp_path_factory.mktemp("models") / "counting"
    shutil.copytree(tiny_model, path)
    count_in_digits(path, NUMBERS[:10])
    return path


def write_prompts(path: Path, count: int, *, start: int = 0, answer: str | None = None) -> Path:
    """`count` different prompts of words without sentiment, numbered from `start`; all with the same answer, if there is one."""
    answered = {} if answer is None else {"reference_answer": answer}
    with path.open("w") as file:
        for i in range(start, start + count):
            tens, ones = divmod(i, len(NUMBERS))
            words = f"the {NEUTRAL[2 + tens % 6]} {NUMBERS[ones]} was"
            file.write(json.dumps({"id": f"p{i:03d}", "text": words if tens < 6 else f"in {words}", **answered}) + "\n")
    return path


def nested(flat: Mapping[str, object]) -> dict:
    """Dotted keys -> nested mappings."""
    tree: dict = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


@pytest.fixture(scope="session")
def toy_config(tiny_model):
    """Makes a configuration of the toy engine and learner, and its prompts, in a folder; returns the path of the YAML file.

    Keyword arguments and `overrides` (dotted keys) replace the defaults below; a value of None leaves the key out. `answer` is stored with
    every training prompt.
    """

    def make(
        folder: Path,
        overrides: Mapping[str, object] | None = None,
        *,
        file: str = "toy.yaml",
        answer: str | None = None,
        **more: object,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "train.jsonl").exists():
            write_prompts(folder / "train.jsonl", 40, answer=answer)
            write_prompts(folder / "heldout.jsonl", 10, start=60)
        flat: dict[str, object] = {
            "name": "toy",
            "model": str(tiny_model),
            "iterations": 3,
            "seed": 0,
            "runs": str(folder / "runs"),
            "algorithm.name": "dpo",
            "oracle.name": "sentiment",
            "prompts.train": str(folder / "train.jsonl"),
            "prompts.heldout": str(folder / "heldout.jsonl"),
            "prompts.per_iteration": 8,
            "prompts.max_tokens": 16,
            "sampling.samples_per_prompt": 4,
            "sampling.max_new_tokens": 12,
            "training.batch_size": 4,
            "training.learning_rate": 0.2,
            "engine.name": "toy",
            "learner.name": "toy",
            "schedule.stream": False,  # tests that count what has happened at some moment need one order of events
            "schedule.evaluate_beside": False,
            "metrics.prometheus_port": 0,
            "checkpoints.min_free_gib": 0.0,
        }
        flat |= {**(overrides or {}), **more}
        path = folder / file
        path.write_text(yaml.safe_dump(nested({k: v for k, v in flat.items() if v is not None}), sort_keys=False))
        return path

    return make


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a run of the command line ended."""

    returncode: int
    """Negative: the number of the signal that ended it."""
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        """Everything it said, for the message of a failed assertion."""
        return f"exit code {self.returncode}\n{self.stdout}\n{self.stderr}"


@pytest.fixture
def cli(tmp_path):
    """Runs `onlinerl ARGUMENTS` in a new interpreter, in the test's folder."""

    def run(*arguments: object, python: tuple[str, ...] = ("-m", "onlinerl.cli"), timeout: float = 120) -> Finished:
        command = [sys.executable, *python, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, env=environment(tmp_path), check=False
        )
        return Finished(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)

    return run


def environment(folder: Path) -> dict[str, str]:
    """The environment of a test's process: modules in its folder can be imported, and output is not wrapped."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}


# What every warm process has imported before it starts.
PRELOADED = [
    "onlinerl.cli",
    "onlinerl.app",
    "onlinerl.engines.toy",
    "onlinerl.learners.toy",
    "onlinerl.trackers.prometheus",
    "onlinerl.oracles.python",
    "onlinerl.oracles.sentiment",
    "onlinerl.pairing.best_worst",
    *(f"onlinerl.algorithms.{file.stem}" for file in (PACKAGE / "algorithms").glob("[a-z]*.py")),
    "datasets",
    "pandas",  # which pyarrow imports where it is there
    "pyarrow.parquet",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
    "vaderSentiment.vaderSentiment",
]


class WarmCli:
    """The command line in forked processes, in one folder."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, folder: Path) -> None:
        self._context, self._folder = context, folder
        self._started: list[multiprocessing.process.BaseProcess] = []

    def start(self, *arguments: object, **spec: object) -> tuple[multiprocessing.process.BaseProcess, str]:
        """Start a command; returns its process and the prefix of its output files. `log=PATH` installs the hooks."""
        import hooks

        out = f"out{len(self._started)}."
        settings = {"out": out, **{k: str(v) if isinstance(v, Path) else v for k, v in spec.items()}}
        process = self._context.Process(target=hooks.forked, args=([str(a) for a in arguments], str(self._folder), settings))
        process.start()
        self._started.append(process)
        return process, out

    def finish(self, process: multiprocessing.process.BaseProcess, out: str, timeout: float = 60) -> Finished:
        """Wait for its end."""
        process.join(timeout)
        assert process.exitcode is not None, f"still running after {timeout} s"
        said = {name: (self._folder / f"{out}{name}").read_text() for name in ("stdout", "stderr")}
        return Finished(returncode=process.exitcode, **said)

    def __call__(self, *arguments: object, **spec: object) -> Finished:
        """Run a command to its end."""
        return self.finish(*self.start(*arguments, **spec))

    def wait_for(self, log: Path, kind: str, timeout: float = 30) -> None:
        """Until an event of this kind is in the log."""
        deadline = time.monotonic() + timeout
        while not any(e["kind"] == kind for e in read_events(log)):
            assert time.monotonic() < deadline, f"no {kind!r} in {log} after {timeout} s"
            time.sleep(0.02)

    def close(self) -> None:
        """End what is left of our own processes."""
        for process in self._started:
            if process.is_alive():
                process.kill()
            process.join(10)


def read_events(log: Path) -> list[dict]:
    """What the hooks logged; a half-written last line is left out."""
    if not log.exists():
        return []
    lines = log.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def warm_context():
    sys.path.insert(0, str(SUPPORT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    yield context
    sys.path.remove(str(SUPPORT))


@pytest.fixture(scope="session")
def warm_cli_in(warm_context):
    """Makes a `WarmCli` for a folder."""
    runners: list[WarmCli] = []

    def make(folder: Path) -> WarmCli:
        runners.append(WarmCli(warm_context, folder))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


@pytest.fixture
def warm_cli(warm_cli_in, tmp_path):
    """Runs `onlinerl ARGUMENTS` in a warm forked process, in the test's folder; see `WarmCli`."""
    runner = warm_cli_in(tmp_path)
    yield runner
    runner.close()
