"""The real wiring: Ray, two vLLM replicas, two DeepSpeed ranks, one controller; and what happens when one of them is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from onlinerl import hardware
from onlinerl.graph import NAMES

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

HOOKS = Path(__file__).resolve().parents[1] / "support" / "hooks.py"
GONE_WITHIN_S = 30.0
WORDS = "old new long short slow fast dark light".split()  # noqa: SIM905


def write_config(folder: Path, model: Path, **changes: Any) -> Path:
    train = [
        {"id": f"t{i}", "text": f"the {a} film was {b} and"} for i, (a, b) in enumerate(zip(WORDS, WORDS[::-1], strict=True))
    ]
    heldout = [{"id": f"h{i}", "text": f"the {word} story was"} for i, word in enumerate(WORDS[:4])]
    for name, rows in (("train", train), ("heldout", heldout)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config: dict[str, Any] = {
        "name": "run",
        "runs": str(folder / "runs"),
        "model": str(model),
        "iterations": 1,
        "algorithm": {"name": "dpo"},
        "oracle": {"name": "sentiment"},
        "prompts": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl"), "per_iteration": 8},
        "sampling": {"samples_per_prompt": 4, "max_new_tokens": 24},
        "training": {"batch_size": 4, "learning_rate": 1.0e-3},
        "engine": {
            "replicas": 2,
            "cpus": 0,
            "threads": 1,
            "kv_cache_gib": 0.1,
            "dtype": "float32",
            "max_num_seqs": 8,
            "max_model_len": 256,
        },
        "learner": {"ranks": 2, "zero_stage": 2, "cpus": 0, "threads": 1, "dtype": "float32"},
        "sync": {"canary_tolerance_nats": 0.001, "timeout_s": 120},
        "cluster": {"device": "cpu"},
        "metrics": {"prometheus": False},
        "schedule": {},
        "checkpoints": {"min_free_gib": 0},
    }
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Controller:
    """A controller in a session of its own, and every process that has ever been below it. `hooks`: see support/hooks.py."""

    def __init__(self, folder: Path, *arguments: object, **hooks: object) -> None:
        self.log = folder / f"controller-{time.monotonic_ns()}.log"
        command = [str(HOOKS), json.dumps(hooks)] if hooks else ["-m", "onlinerl.cli"]
        path = os.pathsep.join(filter(None, [".", os.environ.get("PYTHONPATH", "")]))
        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
        env["SPT_NOENV"] = "1"  # or a process that gives itself a longer name writes it over its environment
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *command, *map(str, arguments)],
                cwd=folder,
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.seen: dict[tuple[int, float], psutil.Process] = {}
        self.vllm: set[int] = set()
        self.keeping: set[str] = set()
        """Kinds of processes that were started to keep their memory."""

    def look(self) -> None:
        """All descendants now come on the list of those that must not survive."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        for each in found:
            try:
                self.seen.setdefault((each.pid, each.create_time()), each)
                name = " ".join(each.cmdline())
                if "VLLM" in name:
                    self.vllm.add(each.pid)
                if each.environ().items() >= hardware.keeping_memory().items():
                    self.keeping |= {kind for kind in ("VLLM::Worker", "RankActor") if kind in name}
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

    def wait(self, timeout_s: float = 400) -> int:
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            self.look()
            assert time.monotonic() < deadline, f"still running after {timeout_s} s:\n{self.text}"
            time.sleep(0.5)
        return self.process.returncode

    def survivors(self) -> list[str]:
        alive = []
        for each in self.seen.values():
            try:
                if each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                    alive.append(f"{each.pid} {' '.join(each.cmdline())[:100] or each.name()}")
            except psutil.NoSuchProcess:
                continue
        return alive

    def assert_nothing_survives(self, within_s: float = GONE_WITHIN_S) -> None:
        deadline = time.monotonic() + within_s
        while (left := self.survivors()) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert left == []

    @property
    def text(self) -> str:
        return self.log.read_text()[-6000:]

    def clean_up(self) -> None:
        """Only what this controller started."""
        self.look()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for each in self.seen.values():
            try:
                if each.is_running():
                    each.kill()
            except psutil.NoSuchProcess:
                continue


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Controller]]:
    started: list[Controller] = []

    def begin(*arguments: object, **hooks: object) -> Controller:
        started.append(Controller(tmp_path, *arguments, **hooks))
        return started[-1]

    yield begin
    for each in started:
        each.clean_up()


def show(run: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "onlinerl.cli", "show", str(run), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


def rows(run: Path, iteration: int, table: str) -> list[dict[str, Any]]:
    from onlinerl.stores.directory import RunDirectory

    store = RunDirectory.open(run)
    try:
        return store.read(iteration, table)
    finally:
        store.close()


def finished_phases(run: Path) -> list[str]:
    """Of iteration 1."""
    from onlinerl.stores.directory import RunDirectory

    with RunDirectory.open(run) as store:
        return [*store.phases(1)]


def sampled(run: Path) -> int:
    """Groups of iteration 1 on disk, while a controller owns the run."""
    from onlinerl.stores._tables import TableFiles

    return len(TableFiles(run / "iterations" / "0001", "rollouts").ids())


def assert_finished(run: Path, samples: int, algorithm: str = "dpo") -> None:
    """The contract of `show --json`, and every sample different."""
    report = show(run)
    assert report["algorithm"] == algorithm
    assert [i["iteration"] for i in report["iterations"]] == [0, 1]
    for i in report["iterations"]:
        assert set(i) >= {
            "iteration", "reward", "kl_ref", "kl_prev", "win_rate", "phases", "sync", "samples", "oracle_calls", "status"
        }  # fmt: skip
        assert i["sync"]["proved"] is True
        assert i["sync"]["bytes"] > 0
        assert i["sync"]["seconds"] > 0
    last = report["iterations"][1]
    assert last["status"] == "promoted"
    assert last["samples"] == samples
    assert set(last["win_rate"]) >= {"value", "low", "high", "n"}
    assert set(last["phases"]) >= {*NAMES}
    groups = rows(run, 1, "rollouts")
    assert len({g["prompt_id"] for g in groups}) == len(groups) == 8


# Iteration 1 has 8 prompts and 4 held-out ones; the base model is measured before it. What is counted starts anew with each process.
PROMPTS, HELDOUT, GROUPS_PER_CALL = 8, 4, 4
PROBE = [" It was good.", " It was bad, the answer is 7."]
RESUMABLE = 75
"""The exit code that means "requeue"."""
ATTEMPTS: list[tuple[str, dict[str, Any], int]] = [
    ("sample", {"kill": ["generate", HELDOUT + 3]}, -signal.SIGKILL),
    ("sample", {"stop": ["generate", 2]}, RESUMABLE),  # a signal, which arrives while the controller waits for Ray
    ("train", {"strikes": [("RankActor", "update", 1, "SIGKILL")]}, RESUMABLE),
]
"""In which a replica, a rank, or both are in the middle of something; the toys show the other phases."""
PUSH: list[tuple[str, dict[str, Any], int]] = [
    ("sync", {"kill": ["push", 2]}, -signal.SIGKILL)
]  # the base model is pushed first


@pytest.mark.parametrize("attempts", [ATTEMPTS, pytest.param(PUSH, marks=pytest.mark.long)], ids=["work", "push"])
def test_killed_or_stopped_wherever_a_replica_or_a_rank_works(
    start: Callable[..., Controller], tiny_llama: Path, tmp_path: Path, attempts: list[tuple[str, dict[str, Any], int]]
) -> None:
    """On the real parts too: nothing survives, no prompt is generated and no label requested twice, as engine and oracle count them."""
    oracle = {"name": "python", "function": "hooks.judge", "groups_per_call": GROUPS_PER_CALL}
    in_turn = {"stream": False, "evaluate_beside": False}  # so that it is known what is finished when
    one_by_one = {"replicas": 1, "max_num_seqs": 4}  # one prompt after the other: there are some left when the signal comes
    config = write_config(
        tmp_path,
        tiny_llama,
        engine=one_by_one,
        learner={"ranks": 1},
        oracle=oracle,
        schedule=in_turn,
        sampling={"max_new_tokens": 100},
    )
    run, log = tmp_path / "runs" / "run", tmp_path / "events"
    hooks = {"log": str(log), "parts": "real"}

    for phase, blow, code in attempts:
        command = ("resume", run) if run.exists() else ("run", config)
        controller = start(*command, **hooks, **blow)
        assert controller.wait() == code, f"{phase}, {blow}: {controller.text}"
        assert len(controller.vllm) >= 2, "what must go was seen"
        controller.assert_nothing_survives()
        assert finished_phases(run) == [*NAMES[: NAMES.index(phase)]], "struck at another moment than meant"
        if "stop" in blow:
            assert 2 < sampled(run) < PROMPTS
    last = start("resume", run, **hooks)
    assert last.wait() == 0, last.text
    last.assert_nothing_survives()

    assert_finished(run, PROMPTS * 4)
    happened = [json.loads(line) for line in log.read_text().splitlines()]
    answered = Counter((e["prompt"], *e["seeds"], e["version"]) for e in happened if e["kind"] == "generate")
    expected = PROMPTS + 2 * HELDOUT
    # The answer in hand at the instant of a kill or a signal is lost with the process.
    assert len(answered) == expected
    assert sum(answered.values()) <= expected + sum(phase == "sample" for phase, *_ in attempts)
    asked = [one for e in happened if e["kind"] == "judge" for one in e["asked"] if one[1:] != PROBE]
    assert len(asked) == expected


def test_two_replicas_and_two_ranks(
    start: Callable[..., Controller], tiny_llama: Path, tiny_reward_model: Path, tmp_path: Path
) -> None:
    """With an algorithm in a file of the user's own, which the ranks must find as the controller does, and a reward model."""
    (tmp_path / "mine.py").write_text("from onlinerl.algorithms.dpo import Dpo\n\n\nclass Mine(Dpo):\n    pass\n")
    oracle = {"name": "reward_model", "path": str(tiny_reward_model)}
    config = write_config(tmp_path, tiny_llama, algorithm={"name": "mine.Mine"}, oracle=oracle)
    run = tmp_path / "runs" / "run"

    controller = start("run", config)

    assert controller.wait() == 0, controller.text
    controller.assert_nothing_survives()
    assert controller.keeping == {"VLLM::Worker", "RankActor"}
    assert_finished(run, 8 * 4, algorithm="mine.Mine")
    for row in rows(run, 1, "rollouts"):
        assert len({tuple(tokens) for tokens in row["token_ids"]}) == 4
        assert len(set(row["seeds"])) == 4
    assert {row["annotator"] for row in rows(run, 1, "verdicts")} == {f"reward_model:{tiny_reward_model.name}"}


@pytest.mark.long
def test_the_torch_learner_in_place_of_deepspeed(start: Callable[..., Controller], tiny_llama: Path, tmp_path: Path) -> None:
    """Nothing else changes: samples, pushes with proof, checkpoints."""
    config = write_config(tmp_path, tiny_llama, engine={"replicas": 1})

    controller = start("run", config, "learner.name=torch", "learner.ranks=1")

    assert controller.wait() == 0, controller.text
    controller.assert_nothing_survives()
    run = tmp_path / "runs" / "run"
    assert_finished(run, 8 * 4)
    assert {file.name for file in (run / "checkpoints" / "0001").glob("*.pt")} == {"state.pt"}


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [[], ["schedule.max_lag=1"], ["algorithm.name=onpo", "algorithm.eta=1.0"]],
    ids=["alone", "with lag", "with auxiliary weights"],
)
def test_adapters_killed_in_training_and_resumed(
    start: Callable[..., Controller], tiny_llama: Path, tmp_path: Path, more: list[str]
) -> None:
    """Of two ranks that divide everything: pushed with proof, killed in the second iteration, and resumed to the same weights, dropout
    included. The base model is the policy without them, and no export is read as a second model."""
    import torch
    from safetensors.torch import load_file

    config = write_config(tmp_path, tiny_llama, engine={"replicas": 1})
    keys = [
        "iterations=2",
        "prompts.per_iteration=4",
        "learner.zero_stage=3",
        "learner.lora.rank=4",
        "learner.lora.dropout=0.1",
        "training.learning_rate=0.01",
        *more,
    ]
    straight = start("run", config, *keys, "name=straight")
    assert straight.wait() == 0, straight.text
    killed = start("run", config, *keys, log=str(tmp_path / "events"), parts="real", kill=["push", 3])
    assert killed.wait() == -signal.SIGKILL, killed.text
    killed.assert_nothing_survives()
    resumed = start("resume", tmp_path / "runs" / "run")
    assert resumed.wait() == 0, resumed.text
    resumed.assert_nothing_survives()

    assert "M of adapters trained" in straight.text
    base = load_file(tiny_llama / "model.safetensors")
    for run in (tmp_path / "runs" / name for name in ("straight", "run")):
        assert [i["sync"]["proved"] for i in show(run)["iterations"]] == [True] * 3
        assert show(run)["iterations"][2]["kl_ref"] > 0
        first, second = (load_file(run / f"exports/000{t}/model.safetensors") for t in (1, 2))
        moved = {name for name, tensor in base.items() if not torch.equal(second[name], tensor)}
        assert moved == {name for name in base if "_proj" in name}
        assert all(not torch.equal(first[name], second[name]) for name in moved)
    for file in ("exports/0002/model.safetensors", "exports/0002/adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / "runs" / name / file) for name in ("run", "straight"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.long
def test_a_reference_that_is_an_average_and_a_model_beyond_the_last_iterate(
    start: Callable[..., Controller], tiny_llama: Path, tmp_path: Path
) -> None:
    """Of real weights: killed in between, the average goes on; what is extrapolated is a model."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = write_config(tmp_path, tiny_llama, engine={"replicas": 1})
    keys = (
        "learner.name=torch",
        "learner.ranks=1",
        "iterations=2",
        "prompts.reuse=true",
        "reference.schedule=ema",
        "reference.mixup_alpha=0.25",
    )
    killed = start("run", config, *keys, log=str(tmp_path / "events"), parts="real", kill=["before 2 train", 1])
    assert killed.wait() == -signal.SIGKILL, killed.text
    killed.assert_nothing_survives()
    run = tmp_path / "runs" / "run"
    resumed = start("resume", run)
    assert resumed.wait() == 0, resumed.text
    resumed.assert_nothing_survives()

    files = ("references/0001", "references/0002", "exports/0001", "exports/0002")
    first, second, one, two = (load_file(run / file / "model.safetensors") for file in files)
    base = load_file(tiny_llama / "model.safetensors")
    for name in two:
        assert torch.equal(first[name], torch.lerp(base[name], one[name], 0.25))
        assert torch.equal(second[name], torch.lerp(first[name], two[name], 0.25))
    assert any(not torch.equal(base[name], two[name]) for name in two)

    command = [sys.executable, "-m", "onlinerl.cli", "extrapolate", str(run), str(tmp_path / "beyond"), "--alpha", "0.5"]
    subprocess.run(command, check=True, timeout=120)
    beyond = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "beyond/alpha-0.5", dtype=torch.float32).named_parameters())
    for name in two:
        torch.testing.assert_close(beyond[name].detach(), two[name] + 0.5 * (two[name] - base[name]), rtol=1e-5, atol=1e-7)


@pytest.mark.long
def test_weights_that_travel_through_files(start: Callable[..., Controller], tiny_llama: Path, tmp_path: Path) -> None:
    """The same run with `sync.backend=disk`: replicas load what the checkpoint wrote, and prove it like every push."""
    config = write_config(tmp_path, tiny_llama, engine={"replicas": 1}, learner={"ranks": 1})

    controller = start("run", config, "sync.backend=disk")

    assert controller.wait() == 0, controller.text
    controller.assert_nothing_survives()
    run = tmp_path / "runs" / "run"
    assert_finished(run, 8 * 4)
    assert pushes(run) == [("disk", 1)] * 2


def test_vllm_serve_and_the_torch_learner(start: Callable[..., Controller], tiny_llama: Path, tmp_path: Path) -> None:
    """An engine behind HTTP and a learner without DeepSpeed, which know nothing of each other: nothing else changes."""
    config = write_config(tmp_path, tiny_llama, engine={"name": "openai", "replicas": 1})

    controller = start("run", config, "learner.name=torch", "learner.ranks=1")

    assert controller.wait() == 0, controller.text
    controller.assert_nothing_survives()
    run = tmp_path / "runs" / "run"
    assert_finished(run, 8 * 4)
    assert pushes(run) == [("disk", 1)] * 2
    for row in rows(run, 1, "rollouts"):
        assert len({tuple(tokens) for tokens in row["token_ids"]}) == 4


@pytest.mark.long
def test_a_server_that_is_killed_is_started_again(start: Callable[..., Controller], tiny_llama: Path, tmp_path: Path) -> None:
    """The replica's own process lives, and says what became of its server."""
    engine = {"name": "openai", "replicas": 1, "max_num_seqs": 4}
    config = write_config(tmp_path, tiny_llama, engine=engine, learner={"ranks": 1}, sampling={"max_new_tokens": 100})
    run, log = tmp_path / "runs" / "run", tmp_path / "events"

    controller = start(
        "run", config, log=str(log), parts="real", strikes=[("openai.server", "generate", HELDOUT + 2, "SIGKILL")]
    )

    assert controller.wait(timeout_s=800) == 0, controller.text
    controller.assert_nothing_survives()
    assert_finished(run, PROMPTS * 4)
    said = controller.log.read_text()
    assert "the server of this replica ended with exit code -9" in said
    assert said.count("serves again: version 0 from disk, proved by") == 1


def pushes(run: Path) -> list[tuple[str, int]]:
    """Through what, and into how many replicas, each iteration was pushed."""
    from onlinerl.stores.directory import RunDirectory

    with RunDirectory.open(run) as store:
        records = [store.phases(iteration)["sync"] for iteration in (0, 1)]
    assert all(record["proved"] and record["tensors_checked"] > 8 for record in records)
    return [(record["backend"], record["replicas"]) for record in records]


MANY_HELDOUT = 12
# Two of three replicas in each phase that uses them, one killed and one stopped, and then two again. Events are counted over the run: the
# base model and each iterate answer `MANY_HELDOUT` prompts, an iteration samples `PROMPTS`.
STRIKES = {
    "sample": ("generate", MANY_HELDOUT, 2 * MANY_HELDOUT + 8),
    "answer": ("generate", MANY_HELDOUT + 8, 2 * MANY_HELDOUT + 2 * 8),
    "sync": ("push: watching", 1, 2),
}


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("phase", STRIKES)
def test_two_of_three_replicas_are_killed_and_stopped_twice_and_the_run_ends_as_if_nothing_had_happened(
    start: Callable[..., Controller], tiny_llama: Path, tmp_path: Path, phase: str
) -> None:
    """While they sample and while they answer, in two iterations one after the other; in a push, and again when it is repeated."""
    config = write_config(
        tmp_path,
        tiny_llama,
        iterations=2,
        prompts={"reuse": True},
        engine={"replicas": 3, "min_replicas": 2, "max_num_seqs": 2, "generate_timeout_s": 40, "max_restarts": 8},
        learner={"ranks": 1},
        sampling={"max_new_tokens": 100},
        schedule={"stream": False, "evaluate_beside": False},
        sync={"timeout_s": 60},
    )
    texts = [f"the {word} {what} was" for what in ("story", "plot") for word in WORDS]
    heldout = [{"id": f"h{i}", "text": text} for i, text in enumerate(texts[:MANY_HELDOUT])]
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, heldout)))
    run, log = tmp_path / "runs" / "run", tmp_path / "events"
    event, *counts = STRIKES[phase]
    strikes = [
        ("EngineCore", event, count + (1 if event == "push: watching" else i), how)
        for count in counts
        for i, how in enumerate(("SIGKILL", "SIGSTOP"), start=1)
    ]

    controller = start("run", config, log=str(log), parts="real", strikes=strikes)

    assert controller.wait(timeout_s=1500) == 0, controller.text
    controller.assert_nothing_survives()
    said = controller.log.read_text()
    happened = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["how"] for e in happened if e["kind"] == "strike"] == ["SIGKILL", "SIGSTOP"] * 2
    # The last blow of a push may hit one that is being started again, which nobody has to give up: it has not joined yet.
    assert len(re.findall(r"is given up \((?:died|hung|push)\)", said)) >= (3 if phase == "sync" else 4), said
    report = show(run)["iterations"]
    assert [(i["status"], i["sync"]["proved"]) for i in report[1:]] == [("promoted", True)] * 2
    answered = [(e["prompt"], e["version"]) for e in happened if e["kind"] == "generate"]
    assert len(set(answered)) == len(answered) == 2 * PROMPTS + 3 * MANY_HELDOUT, "nobody was asked twice, or by two versions"


@pytest.mark.long
@pytest.mark.parametrize(("how", "said"), [("SIGSTOP", "did not finish within 60 s"), ("SIGKILL", "its process died during")])
def test_one_of_two_ranks_that_is_lost_ends_the_attempt_and_a_resume_goes_on(
    start: Callable[..., Controller], tiny_llama: Path, tmp_path: Path, how: str, said: str
) -> None:
    """In training: the other one waits for it, or fails first because it is gone. The attempt ends with the code that means "requeue"."""
    learner = {"ranks": 2, "step_timeout_s": 60}
    config = write_config(tmp_path, tiny_llama, engine={"replicas": 1}, learner=learner)
    run, log = tmp_path / "runs" / "run", tmp_path / "events"

    controller = start("run", config, log=str(log), parts="real", strikes=[("RankActor", "update", 1, how)])

    assert controller.wait(timeout_s=600) == RESUMABLE, controller.text
    assert said in controller.log.read_text()
    controller.assert_nothing_survives()
    again = start("resume", run, "learner.step_timeout_s=3600")
    assert again.wait(timeout_s=600) == 0, again.text
    again.assert_nothing_survives()
    assert_finished(run, PROMPTS * 4)
