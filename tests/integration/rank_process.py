"""One rank of a real learner, on DeepSpeed or on torch alone, as a plain process: does what a job file says and writes what came out.

    python rank_process.py JOB RANK WORLD_SIZE PORT

One process group serves all cases, so that the heavy imports and the rendezvous are paid once.
"""

from __future__ import annotations

import gc
import importlib
import pickle
import shutil
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from onlinerl.algorithms.dpo import Dpo
from onlinerl.batch import Batch, Outputs
from onlinerl.config import TrainingConfig
from onlinerl.errors import LearnerError
from onlinerl.learners._loading import ModelReader
from onlinerl.learners._rank import Rank
from onlinerl.learners._self_test import combine
from onlinerl.learners.deepspeed import DeepSpeed
from onlinerl.learners.torch import Torch
from onlinerl.loss import LossOutput
from onlinerl.ops.batching import plan_step
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.learner import RankSettings
from onlinerl.types import SelfTest, TrainItem

WEIGHTS = dict[str, np.ndarray]

SELF_TEST_BUDGET = 120
"""Tokens in which two of the self-test's four items fit: one rank has two micro-batches."""


class InfiniteGradient(Dpo):
    """Finite, and with an infinite slope, where a pair's weight is not 1."""

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        out = super().loss(outputs, batch)
        marked = (batch.weight_P != 1).any()
        total = outputs.logprobs_BT.sum()
        return LossOutput(total=out.total + torch.sqrt((total - total.detach()) * marked + ~marked), metrics=out.metrics)


class Ranks:
    """This process's rank in a group, from which learners are made one after the other."""

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=120))
        once = dist.init_process_group

        def init(*args: Any, **kwargs: Any) -> None:
            if not dist.is_initialized():
                once(*args, **kwargs)

        dist.init_process_group = init

    def learner(
        self,
        model: str,
        algorithm: Algorithm,
        *,
        stage: int | str,
        dtype: str,
        learner: dict[str, Any] | None = None,
        **training: Any,
    ) -> Rank:
        keys = {"ranks": self.world_size, "dtype": dtype, **(learner or {})}
        config = Torch(**keys) if stage == "torch" else DeepSpeed(zero_stage=stage, **keys)
        settings = RankSettings(
            model=model,
            algorithm=algorithm,
            training=TrainingConfig(**{"learning_rate": 1e-3, **training}),
            world_size=self.world_size,
            device="cpu",
            temperature=1.0,
            seed=0,
        )
        return config.rank(settings, rank=self.rank, store=self.store, address="127.0.0.1")

    def mine(self, items: list[TrainItem], budget: int) -> list[list[TrainItem]]:
        return plan_step(items, self.world_size, budget)[self.rank]

    def step(self, learner: Rank, items: list[TrainItem], budget: int = 100_000, lr: float = 1e-3) -> dict[str, float]:
        return learner.step(self.mine(items, budget), sum(i.count(learner.algorithm.unit) for i in items), lr)


def weights(learner: Rank) -> WEIGHTS:
    return {name: array(tensor) for name, tensor in learner.weight_source(torch.float32)}


def array(tensor: torch.Tensor) -> np.ndarray:
    """Copied before NumPy sees it: memory that NumPy has shared once cannot be emptied any more."""
    return tensor.detach().to(torch.float32, copy=True).numpy().copy()


def innermost(learner: Rank) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's wrappers."""
    if hasattr(learner, "_optimizer"):
        return learner._optimizer
    inner = learner._engine.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    return inner


def optimizer_state(learner: Rank) -> dict[str, float]:
    """Largest moment and Adam's own step counts, wherever the wrappers keep them."""
    states = [s for s in innermost(learner).state.values() if s]
    moments = [float(s[k].abs().max()) for s in states for k in ("exp_avg", "exp_avg_sq") if s[k].numel()]
    return {"moment": max(moments, default=0.0), "step": max((float(s["step"]) for s in states), default=0.0)}


def first_moments(learner: Rank) -> WEIGHTS:
    """Adam's running mean of the gradients as they were after clipping, whole, by parameter. Collective."""
    if hasattr(learner, "_stepped"):
        state = learner._optimizer.state
        return {n: array(state[learner._stepped[p]]["exp_avg"]) for n, p in learner._policy.model.named_parameters()}
    from deepspeed.utils import safe_get_full_optimizer_state

    wrapper, inner = learner._engine.optimizer, innermost(learner)
    copies: dict[torch.Tensor, torch.Tensor] = {}
    if hasattr(wrapper, "fp32_groups"):  # without ZeRO nothing is cut up, but in bfloat16 the states are those of fp32 copies
        for lows, highs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            copies |= zip(lows, highs, strict=True)
    if hasattr(
        wrapper, "_hp_optimizer_states_linked"
    ):  # ZeRO 1 and 2 link the first group's states only, before there are others
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()

    def moment(parameter: torch.nn.Parameter) -> torch.Tensor:
        state = inner.state.get(copies.get(parameter, parameter))
        return state["exp_avg"] if state else safe_get_full_optimizer_state(parameter, "exp_avg")

    return {n: array(moment(p)) for n, p in learner._policy.model.named_parameters()}


def scored(learner: Rank, items: list[TrainItem], model: str, temperature: float) -> list[np.ndarray]:
    """Log-probs of all sequences, on every rank, batched in another way than a step would."""
    (arrays,) = learner.logprobs([[s for item in items for s in item.sequences]], model, temperature)
    return arrays


def with_arrays(items: list[TrainItem], **arrays: list[np.ndarray]) -> list[TrainItem]:
    rows = iter(dict(zip(arrays, row, strict=True)) for row in zip(*arrays.values(), strict=True))
    return [replace(item, sequences=tuple(s.with_(**next(rows)) for s in item.sequences)) for item in items]


def self_tests(
    ranks: Ranks, learner: Rank, items: list[TrainItem], names: tuple[str, ...], base: str, other: str
) -> dict[Any, SelfTest]:
    """The self-test of items as they should be, and with each of their arrays spoiled in every way."""

    def ask(**arrays: list[np.ndarray]) -> SelfTest:
        annotated = with_arrays(items, **arrays)
        parts = learner.self_test(ranks.mine(annotated, SELF_TEST_BUDGET), base)
        return combine(parts, annotated, learner.algorithm)

    own = scored(learner, items, "policy", learner.temperature)
    sound = dict.fromkeys(names, own)
    spoiled = {
        "shifted": [np.roll(a, 1) for a in own],
        "permuted": own[1:] + own[:1],
        "temperature": scored(learner, items, "policy", learner.temperature * 1.25),
        "model": scored(learner, items, other, learner.temperature),
    }
    results: dict[Any, SelfTest] = {"sound": ask(**sound)}
    for name, (how, arrays) in product(names, spoiled.items()):
        results[name, how] = ask(**{**sound, name: arrays})
    results["base"] = combine(
        learner.self_test(ranks.mine(with_arrays(items, **sound), SELF_TEST_BUDGET), other), items, learner.algorithm
    )
    return results


def gradients(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Gradients of every loss, cut up in every way; the first one again at the end, to see that nothing is left over."""
    first, *_ = job["losses"].values()
    learner = ranks.learner(job["model"], first["algorithm"], stage=case["stage"], dtype=case["dtype"])
    results = {}
    for name, loss in [*job["losses"].items(), ("again", first)]:
        learner.algorithm, learner.needs = loss["algorithm"], loss["algorithm"].needs
        for cut, budget in loss["budgets"].items():
            micro = ranks.mine(loss["items"], budget)
            count = sum(i.count(learner.algorithm.unit) for i in loss["items"])
            results[name, cut] = {"gradients": learner.gradients(micro, count), "micro_batches": len(micro)}
    # Many more response tokens in one micro-batch than fit into a chunk, at another temperature than 1.
    learner.algorithm, learner.needs = job["long"]["algorithm"], job["long"]["algorithm"].needs
    learner.temperature = job["long"]["temperature"]
    items = job["long"]["items"]
    count = sum(i.count(learner.algorithm.unit) for i in items)
    results["long", "gradients"] = learner.gradients(ranks.mine(items, 100_000), count)
    results["long", "scores"] = scored(learner, items, "policy", learner.temperature)
    return results | beside_a_reference(ranks, learner, job)


def beside_a_reference(ranks: Ranks, learner: Rank, job: dict[str, Any]) -> dict[Any, Any]:
    """Gradients of a loss that reads the KL of another model, in many pieces and with a rank that has no data; and its self-tests."""
    loss, results = job["beside"], {}
    learner.algorithm, learner.needs = loss["algorithm"], loss["algorithm"].needs
    learner.temperature = loss["temperature"]
    learner.set_reference(job["untied"])
    for name, items in loss["items"].items():
        micro = ranks.mine(items, 100_000)
        results["beside", name] = learner.gradients(micro, len(items))
    own = scored(learner, job["self_test_items"], "policy", learner.temperature)
    annotated = with_arrays(job["self_test_items"], reference_logprobs=own)
    for reference in ("untied", "model"):
        learner.set_reference(job[reference])
        parts = learner.self_test(ranks.mine(annotated, SELF_TEST_BUDGET), job["model"])
        results["beside", "self-test", reference] = combine(parts, annotated, learner.algorithm)
    return results


def critic_gradients(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """With a second network and second parameter groups: self-tests, gradients, a checkpoint, and a step of the critic alone."""
    loss = job["critic_loss"]
    learner = ranks.learner(
        job["model"],
        loss["algorithm"],
        stage=case["stage"],
        dtype=case["dtype"],
        learner={"gradient_checkpointing": case["recompute"], "attn_implementation": case["attention"]},
        learning_rate=0.0,
        weight_decay=0.1,
    )
    assert learner._policy.model.config._attn_implementation == case["attention"]
    count = sum(i.count(learner.algorithm.unit) for i in loss["items"])
    result: dict[str, Any] = {}
    if case["recompute"]:
        learner.temperature = 0.8
        arguments = ranks, learner, job["self_test_items"], ("old_logprobs", "reference_logprobs"), job["model"], job["untied"]
        result["self_tests"] = self_tests(*arguments)
        learner.temperature = 1.0

    def all_gradients() -> dict[Any, Any]:
        calls: list[int] = []
        hooks = [
            backbone.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
            for backbone in (learner._policy.model.base_model, learner._policy.critic)
        ]
        found: dict[Any, Any] = {
            cut: learner.gradients(ranks.mine(loss["items"], budget), count) for cut, budget in loss["budgets"].items()
        }
        for hook in hooks:
            hook.remove()
        micro_batches = sum(len(ranks.mine(loss["items"], budget)) for budget in loss["budgets"].values())
        return found | {"passes": len(calls) / len(hooks) / micro_batches}

    result |= all_gradients()
    here = Path(job["directory"]) / "critic-{}-{}-{}".format(ranks.world_size, case["stage"], case["recompute"])
    here.mkdir(exist_ok=True)
    learner.save(str(here))
    learner.load(str(here))
    result["loaded"] = all_gradients()

    before = parameters(learner)
    metrics = ranks.step(learner, loss["items"], lr=0.0)
    after = parameters(learner)
    result["critic_step"] = {"metrics": metrics, "before": before, "after": after}
    # The value head is no longer 0, so that values of different tokens differ.
    items = job["self_test_items"]
    (values,) = learner.values([[s for item in items for s in item.sequences]])
    own = scored(learner, items, "policy", 1.0)
    for how, arrays in (("sound", values), ("shifted", [np.roll(a, 1) for a in values]), ("permuted", values[1:] + values[:1])):
        annotated = with_arrays(items, old_logprobs=own, reference_logprobs=own, values=arrays)
        parts = learner.self_test(ranks.mine(annotated, SELF_TEST_BUDGET), job["model"])
        result["values", how] = combine(parts, annotated, learner.algorithm)
    return result


def critic_model(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Values of a critic that begins as a reward model, with its head and without, and after a checkpoint."""
    sequences = [[s for item in job["steps"][0] for s in item.sequences]]
    loss, found = job["critic_loss"], {}
    for name, normalize in (("as scores are", False), ("normalized", True)):
        algorithm = loss["algorithm"].model_copy(update={"critic_model": job["reward"], "normalize_scores": normalize})
        learner = ranks.learner(job["model"], algorithm, stage=case["stage"], dtype=case["dtype"])
        (found[name],) = learner.values(sequences)
    found["backbone"] = {n.removeprefix("critic."): p for n, p in parameters(learner).items() if n.startswith("critic.")}
    ranks.step(learner, loss["items"])
    (trained,) = learner.values(sequences)
    here = Path(job["directory"]) / "critic-model-{}-{}".format(ranks.world_size, case["stage"])
    here.mkdir(exist_ok=True)
    learner.save(str(here))
    again = ranks.learner(job["model"], algorithm, stage=case["stage"], dtype=case["dtype"])
    again.load(str(here))
    (loaded,) = again.values(sequences)
    found["resumed"] = all(map(np.array_equal, trained, loaded)) and any(np.abs(values).max() > 0 for values in trained)
    return found


def kept_state(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """What a loss keeps, by rank: after each step, after what must not advance it, and in a learner that has loaded it."""
    kept = job["kept"][case["kept"]]
    steps, budget = kept["steps"], kept["budget"]

    def made() -> Rank:
        return ranks.learner(job["model"], kept["algorithm"], stage=case["stage"], dtype=case["dtype"])

    def everywhere(learner: Rank) -> list[dict[str, float]]:
        states: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(states, learner._state)
        return states

    learner = made()
    found: dict[str, Any] = {"steps": []}
    for items in steps:
        metrics = ranks.step(learner, items, budget)
        found["steps"].append((everywhere(learner), metrics[case["kept"]]))
    learner.gradients(ranks.mine(steps[0], budget), len(steps[0]))
    found["after a gradient"] = everywhere(learner)
    learner.self_test(ranks.mine(steps[0], budget), job["model"])
    found["after a self-test"] = everywhere(learner)
    found["skipped"] = ranks.step(learner, kept["bad"], budget)["skipped"]
    found["after a step that was skipped"] = everywhere(learner)
    here = Path(job["directory"]) / "kept-{}-{}-{}".format(case["kept"], ranks.world_size, case["stage"])
    here.mkdir(exist_ok=True)
    found["written"] = learner.save(str(here))
    fresh = made()
    fresh.load(str(here))
    found["loaded"] = everywhere(fresh)
    found["continued"] = []
    for one in (learner, fresh):
        ranks.step(one, steps[0], budget)
        found["continued"].append(everywhere(one))
    return found


def target_kl(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Three steps, before the last of which the policy has moved: with a target that it has exceeded, then with one that it has not, each
    of which one rank alone would have decided otherwise; and the same three steps without any."""
    items, budget = job["steps"][0][:-1], 60  # an odd number: one rank has a micro-batch more, or an empty one

    def made() -> Rank:
        return ranks.learner(job["model"], job["losses"]["dpo"]["algorithm"], stage=case["stage"], dtype=case["dtype"])

    def step(learner: Rank, target: float | None) -> dict[str, float]:
        return learner.step(ranks.mine(items, budget), len(items), 1e-3, target)

    def everywhere(value: Any) -> list[Any]:
        values: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(values, value)
        return values

    learner = made()
    items = with_arrays(items, old_logprobs=scored(learner, items, "policy", 1.0))
    found: dict[str, Any] = {"kl_old": [step(learner, 1e9)["kl_old"] for _ in range(2)], "weights": weights(learner)}
    now = with_arrays(items, reference_logprobs=scored(learner, items, "policy", 1.0))
    own = {id(item) for micro in plan_step(now, ranks.world_size, budget)[ranks.rank] for item in micro}
    moved = [np.concatenate([s.reference_logprobs - s.old_logprobs for s in item.sequences]) for item in now if id(item) in own]
    found["shares"] = everywhere(np.concatenate(moved))
    every = np.concatenate(found["shares"])
    means = [float(np.mean(np.exp(-d) - 1 + d)) for d in (every, *found["shares"])]
    low, high = (min(means) + means[0]) / 2, (max(means) + means[0]) / 2
    targets = {"exceeded": low, "not exceeded": high} if low < high else {"exceeded": 0.9 * low, "not exceeded": 1.1 * low}
    found["means"], found["targets"] = means, targets
    for name, target in targets.items():
        metrics = step(learner, target)
        found[name] = {"metrics": everywhere(metrics), "weights": weights(learner)}
    plain = made()
    for _ in range(3):
        step(plain, None)
    found["without"] = weights(plain)
    return found


def shared_critic(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Gradients of a policy whose critic is a head on its own trunk, after a step: a head that is still 0 asks nothing of the trunk."""
    loss = job["shared_critic_loss"]
    learner = ranks.learner(job["model"], loss["algorithm"], stage=case["stage"], dtype=case["dtype"])
    ranks.step(learner, loss["items"], lr=1e-2)
    count = sum(i.count(learner.algorithm.unit) for i in loss["items"])
    found: dict[Any, Any] = {
        cut: learner.gradients(ranks.mine(loss["items"], budget), count) for cut, budget in loss["budgets"].items()
    }
    return found | {"parameters": parameters(learner)}


def parameters(learner: Rank) -> WEIGHTS:
    """All of them, the critic's too, whole. Collective."""
    import deepspeed

    found = {}
    for name, parameter in learner._policy.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None, enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().float().cpu().numpy().copy()
    return found


def other_optimizer(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Steps of RMSprop with weight decay."""
    learner = ranks.learner(
        job["model"],
        job["losses"]["dpo"]["algorithm"],
        stage=case["stage"],
        dtype=case["dtype"],
        optimizer="rmsprop",
        weight_decay=0.1,
    )
    after = []
    for items in job["steps"]:
        ranks.step(learner, items)
        after.append(weights(learner))
    return {"after": after}


def absent_rank(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """One rank takes no part in a step. Must be the last case, because no collective works afterwards."""
    algorithm = job["losses"]["dpo"]["algorithm"]
    learner = ranks.learner(
        job["model"], algorithm, stage=case["stage"], dtype=case["dtype"], learner={"step_timeout_s": case["timeout_s"]}
    )
    if ranks.rank > 0:
        ranks.store.wait(["given up"], timedelta(seconds=120))
        return {}
    try:
        ranks.step(learner, job["steps"][0])
    except RuntimeError as error:
        return {"message": str(error)}
    finally:
        ranks.store.set("given up", "yes")
    return {"message": "no error"}


def steps(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Optimizer steps, a bad one, a checkpoint, a reset."""
    dpo = job["losses"]["dpo"]
    learner = ranks.learner(
        job["model"], dpo["algorithm"], stage=case["stage"], dtype=case["dtype"], max_grad_norm=job["max_grad_norm"]
    )
    source = learner.weight_source(torch.float32)
    metas = source.metadata()
    yielded = list(source)
    result: dict[str, Any] = {
        "source": {
            "declared": [(m.name, m.dtype, m.shape) for m in metas],
            "yielded": [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in yielded],
        },
        "initial": weights(learner),
        "self_tests": self_tests(
            ranks, learner, job["self_test_items"], ("reference_logprobs", "anchor_logprobs"), job["model"], job["untied"]
        ),
        "metrics": [],
        "after": [],
    }
    budget = max(dpo["budgets"].values())
    for items in job["steps"]:
        result["metrics"].append(ranks.step(learner, items, budget))
        result["after"].append(weights(learner))
    result["moments"] = first_moments(learner)

    result["bad"] = {}
    for name, items in job["bad_steps"].items():
        learner.algorithm = InfiniteGradient() if "infinite gradient" in name else dpo["algorithm"]
        metrics = ranks.step(learner, items, min(dpo["budgets"].values()))
        result["bad"][name] = {"metrics": metrics, "weights": weights(learner)}
    learner.algorithm = dpo["algorithm"]

    here = Path(job["directory"]) / f"checkpoint-{ranks.world_size}-{case['stage']}-{case['dtype']}"
    here.mkdir(exist_ok=True)
    written = learner.save(str(here))
    torch.rand(3)  # what draws random numbers after saving must not matter
    result["continued"] = [ranks.step(learner, job["steps"][0], budget), weights(learner)]
    learner.load(str(here))
    result["loaded"] = weights(learner)
    result["loaded_continued"] = [ranks.step(learner, job["steps"][0], budget), weights(learner)]
    fresh = ranks.learner(
        job["model"], dpo["algorithm"], stage=case["stage"], dtype=case["dtype"], max_grad_norm=job["max_grad_norm"]
    )
    fresh.load(str(here))
    result["fresh_continued"] = [ranks.step(fresh, job["steps"][0], budget), weights(fresh)]

    result["written"] = written
    result["before_reset"] = optimizer_state(fresh)
    fresh.reset_optimizer()
    result["after_reset"] = optimizer_state(fresh)
    result["reset_weights"] = weights(fresh)
    ranks.step(fresh, job["steps"][1], budget)
    result["reset_continued"] = weights(fresh)
    result["reset_continued_state"] = optimizer_state(fresh)
    files = {"torch": ["state"], 0: ["state/*model_states"]}.get(case["stage"], ["state/*model_states", "state/*optim_states"])
    result["planted"] = {file: planted(ranks, fresh, here, file) for file in files}
    return result


class Bomb:
    """Unpickling it writes a file: it stands for any code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def planted(ranks: Ranks, learner: Rank, checkpoint: Path, files: str) -> dict[str, Any]:
    """What a rank says to a checkpoint in which a file of every rank holds something else, and whether that has run."""
    folder = checkpoint.with_name(f"{checkpoint.name}-{files.rpartition('*')[2]}")
    mark = folder / "ran"
    if ranks.rank == 0:
        shutil.copytree(checkpoint, folder)
        for file in folder.glob(f"{files}.pt"):
            torch.save({"module": Bomb(mark), "optimizer_state_dict": Bomb(mark)}, file)
    dist.barrier()
    try:
        learner.load(str(folder))
        said = "nothing"
    except LearnerError as error:
        said = str(error)
    dist.barrier()
    return {"said": said, "ran": mark.exists()}


def export(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """A trained model on disk."""
    model = job[case["model"]]
    learner = ranks.learner(model, job["losses"]["dpo"]["algorithm"], stage=case["stage"], dtype=case["dtype"])
    ranks.step(learner, job["steps"][0])
    path = Path(job["directory"]) / "export-{}-{}-{}-{}".format(
        ranks.world_size, *(case[k] for k in ("stage", "dtype", "model"))
    )
    path.mkdir(exist_ok=True)
    learner.export(str(path), model)
    source = learner.weight_source(torch.float32)
    micro = [[s for i in job["steps"][0] for s in i.sequences], []]  # a rank that ran short only takes part
    scores = learner.logprobs(micro, "policy", 1.0)
    # Base and previous take turns as reference.
    references = {where: learner.logprobs(micro, where, 1.0)[0] for where in (model, str(path), model)}
    # Ranks have different numbers of prompts, of different lengths, and one of them has an empty micro-batch.
    draws = [job["draws"][ranks.rank :: ranks.world_size], [] if ranks.rank else job["draws"][:1]]
    mixed = learner.sample_mixture(draws, job["mixture_sampling"], model, job["mixture_weight"], [2])
    result = {
        "path": str(path),
        "references": references,
        "mixed": list(zip([d for micro in draws for d in micro], [d for micro in mixed for d in micro], strict=True)),
        "resident": resident(learner._reader.frozen(model)),
        "buffers": {n: b.numpy().copy() for n, b in learner._reader.frozen(model).named_buffers()},
        "weights": weights(learner),
        "scores": scores,
        "hidden": learner.hidden_sums(micro),
        "source": {
            "declared": [(m.name, m.dtype, m.shape) for m in source.metadata()],
            "yielded": [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source],
        },
    }
    return result | averages(ranks, learner, job, model, path)


def averages(ranks: Ranks, learner: Rank, job: dict[str, Any], model: str, path: Path) -> dict[str, Any]:
    """The base model and two iterates in one, then a copy of the last one, each with the weights that it took in."""
    made, reference = [], model
    for number, weight in enumerate((0.25, 0.25, 1.0)):
        if number == 1:
            ranks.step(learner, job["steps"][1])
        average = path.with_name(f"{path.name}-average-{number}")
        average.mkdir(exist_ok=True)
        learner.average(reference, weight, str(average))
        reference = str(average)
        made.append({"path": reference, "weight": weight, "policy": weights(learner)})
    micro = [[s for i in job["steps"][0] for s in i.sequences], []]
    return {"averages": made, "average_scores": learner.logprobs(micro, made[1]["path"], 1.0)[0]}


def resident(policy: torch.nn.Module) -> tuple[int, int]:
    """Elements of its parameters that this rank holds, and those of the whole model."""
    parameters = list(policy.parameters())
    held = sum(p.data.numel() + (p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0) for p in parameters)
    return held, sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def memory() -> dict[int, tuple[int, str]]:
    """Every piece of memory of at least 256 bytes that a tensor of this process has: its size, and the tensor's description."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu":
            storage = one.untyped_storage()
            if storage.nbytes() >= 256:
                found[storage._cdata] = (storage.nbytes(), f"{one.dtype} {tuple(one.shape)}")
    return found


def offload(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Memory that is given away between two steps and taken back, beside the same two steps without it."""
    dpo, first, second = job["losses"]["dpo"], job["steps"][0], job["steps"][1]
    sequences = [[s for item in first for s in item.sequences]]
    read_model = ModelReader._read

    def read(self: ModelReader, *args: Any) -> torch.nn.Module:
        """On a GPU, weights are copied from the file that is mapped into memory; so they are here."""
        model = read_model(self, *args)
        for parameter in model.parameters():
            if not hasattr(parameter, "ds_id"):  # what ZeRO-3 has cut up is copied already
                parameter.data = parameter.data.clone()
        return model

    ModelReader._read = read  # type: ignore[method-assign]
    before = memory()
    learner = ranks.learner(job["model"], dpo["algorithm"], stage=case["stage"], dtype=case["dtype"])
    learner.logprobs(sequences, job["model"], 1.0)  # now it keeps a reference, too
    ranks.step(learner, first)
    result: dict[str, Any] = {
        "weights": weights(learner),
        "scores": learner.logprobs(sequences, "policy", 1.0),
        "state": optimizer_tensors(learner),
        "loaded": sum(size for key, (size, _) in memory().items() if key not in before),
    }
    learner.offload("optimizer")
    result["weights_for_a_push"] = weights(learner)
    result["moments_left"] = [tensor.untyped_storage().nbytes() for _, tensor in moments(learner)]
    learner.offload("all")
    kept = {t.untyped_storage()._cdata for t in learner._host_memory.contents()}
    result["left"] = {k: v for k, v in memory().items() if k not in before and k not in kept}
    result["kept"] = sum(t.numel() for t in learner._host_memory.contents())
    learner.reload()
    result["reloaded"] = {
        "weights": weights(learner),
        "scores": learner.logprobs(sequences, "policy", 1.0),
        "state": optimizer_tensors(learner),
    }
    result["next"] = [ranks.step(learner, second), weights(learner)]
    plain = ranks.learner(job["model"], dpo["algorithm"], stage=case["stage"], dtype=case["dtype"])
    ranks.step(plain, first)
    result["next_without"] = [ranks.step(plain, second), weights(plain)]
    ModelReader._read = read_model  # type: ignore[method-assign]
    return result


def moments(learner: Rank) -> list[tuple[str, torch.Tensor]]:
    """What the optimizer itself keeps."""
    states = innermost(learner).state.values()
    return [(f"{name} {i}", v) for i, state in enumerate(states) for name, v in state.items() if torch.is_tensor(v)]


def optimizer_tensors(learner: Rank) -> WEIGHTS:
    """And the weights that it steps: under a wrapper, a master copy."""
    stepped = [p for group in innermost(learner).param_groups for p in group["params"]]
    found = [*moments(learner), *((f"master {i}", p) for i, p in enumerate(stepped))]
    return {name: array(tensor) for name, tensor in found}


KINDS = {
    f.__name__: f
    for f in (
        gradients,
        critic_gradients,
        shared_critic,
        steps,
        export,
        offload,
        other_optimizer,
        critic_model,
        kept_state,
        target_kl,
        absent_rank,
    )
}


def main(job_file: str, rank: str, world_size: str, port: str) -> None:
    job = pickle.loads(Path(job_file).read_bytes())
    torch.set_num_threads(1)
    for late in (
        "deepspeed",
        "onlinerl.learners.deepspeed.rank",
        "onlinerl.learners.torch.rank",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(late)
    gc.collect()
    gc.freeze()  # what the imports have left: every case collects garbage many times, and `memory` looks through all objects
    ranks = Ranks(int(rank), int(world_size), int(port))
    for i, case in enumerate(job["cases"]):
        began = time.monotonic()
        try:
            result = KINDS[case["kind"]](ranks, job, case)
        except Exception:  # noqa: BLE001  the test that needs it reports it
            result = {"error": traceback.format_exc()}
        if ranks.rank == 0 or "error" in result:
            Path(f"{job_file}.{i}.{ranks.rank}").write_bytes(pickle.dumps(result))
        print(f"{case} done in {time.monotonic() - began:.1f} s", flush=True)
        if "error" in result:
            print(result["error"], flush=True)
            break  # the other ranks may wait for this one: no further case can be trusted


if __name__ == "__main__":
    main(*sys.argv[1:])
