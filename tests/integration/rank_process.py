"""One rank of a real DeepSpeed learner, as a plain process: does what a job file says and writes what came out.

    python rank_process.py JOB RANK WORLD_SIZE PORT

One process group serves all cases, so that the heavy imports and the rendezvous are paid once.
"""

from __future__ import annotations

import gc
import pickle
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from onlinerl.algorithms.dpo import Dpo
from onlinerl.batch import Batch, LossOutput, Outputs
from onlinerl.config import LearnerConfig, TrainingConfig
from onlinerl.learners.deepspeed import DeepSpeedRank
from onlinerl.ops.batching import plan_step
from onlinerl.protocols import Algorithm
from onlinerl.types import TrainItem

WEIGHTS = dict[str, np.ndarray]


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
        self, model: str, algorithm: Algorithm, *, stage: int, dtype: str, recompute: bool = False, **training: Any
    ) -> DeepSpeedRank:
        return DeepSpeedRank(
            model,
            algorithm,
            LearnerConfig(ranks=self.world_size, zero_stage=stage, dtype=dtype, gradient_checkpointing=recompute),
            TrainingConfig(**{"learning_rate": 1e-3, **training}),
            rank=self.rank,
            world_size=self.world_size,
            store=self.store,
            address="127.0.0.1",
            device="cpu",
            temperature=1.0,
            seed=0,
            timeout_s=120,
        )

    def mine(self, items: list[TrainItem], budget: int) -> list[list[TrainItem]]:
        return plan_step(items, self.world_size, budget)[self.rank]

    def step(self, learner: DeepSpeedRank, items: list[TrainItem], budget: int = 100_000, lr: float = 1e-3) -> dict[str, float]:
        return learner.step(self.mine(items, budget), sum(i.count(learner.algorithm.unit) for i in items), lr)


def weights(learner: DeepSpeedRank) -> WEIGHTS:
    return {name: array(tensor) for name, tensor in learner.weight_source(torch.float32)}


def array(tensor: torch.Tensor) -> np.ndarray:
    """Copied before NumPy sees it: memory that NumPy has shared once cannot be emptied any more."""
    return tensor.detach().to(torch.float32, copy=True).numpy().copy()


def innermost(learner: DeepSpeedRank) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's wrappers."""
    inner = learner._engine.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    return inner


def optimizer_state(learner: DeepSpeedRank) -> dict[str, float]:
    """Largest moment and Adam's own step counts, wherever the wrappers keep them."""
    states = [s for s in innermost(learner).state.values() if s]
    moments = [float(s[k].abs().max()) for s in states for k in ("exp_avg", "exp_avg_sq") if s[k].numel()]
    return {"moment": max(moments, default=0.0), "step": max((float(s["step"]) for s in states), default=0.0)}


def gradients(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Gradients of every loss, cut up in every way; the first one again at the end, to see that nothing is left over."""
    first, *_ = job["losses"].values()
    learner = ranks.learner(job["model"], first["algorithm"], stage=case["stage"], dtype=case["dtype"])
    results = {}
    for name, loss in [*job["losses"].items(), ("again", first)]:
        learner.algorithm, learner.needs = loss["algorithm"], loss["algorithm"].needs()
        for cut, budget in loss["budgets"].items():
            micro = ranks.mine(loss["items"], budget)
            count = sum(i.count(learner.algorithm.unit) for i in loss["items"])
            results[name, cut] = {"gradients": learner.gradients(micro, count), "micro_batches": len(micro)}
    return results


def critic_gradients(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Gradients with a second network and a second parameter group."""
    loss = job["critic_loss"]
    learner = ranks.learner(
        job["model"], loss["algorithm"], stage=case["stage"], dtype=case["dtype"], recompute=case["recompute"]
    )
    count = sum(i.count(learner.algorithm.unit) for i in loss["items"])
    return {cut: learner.gradients(ranks.mine(loss["items"], budget), count) for cut, budget in loss["budgets"].items()}


def steps(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Optimizer steps, a bad one, a checkpoint, a reset."""
    dpo = job["losses"]["dpo"]
    learner = ranks.learner(job["model"], dpo["algorithm"], stage=case["stage"], dtype=case["dtype"])
    source = learner.weight_source(torch.float32)
    metas = source.metadata()
    yielded = list(source)
    result: dict[str, Any] = {
        "source": {
            "declared": [(m.name, m.dtype, m.shape) for m in metas],
            "yielded": [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in yielded],
        },
        "initial": weights(learner),
        "metrics": [],
        "after": [],
    }
    budget = max(dpo["budgets"].values())
    for items in job["steps"]:
        result["metrics"].append(ranks.step(learner, items, budget))
        result["after"].append(weights(learner))

    result["bad"] = {}
    for name, items in job["bad_steps"].items():
        learner.algorithm = InfiniteGradient() if "infinite gradient" in name else dpo["algorithm"]
        metrics = ranks.step(learner, items, min(dpo["budgets"].values()))
        result["bad"][name] = {"metrics": metrics, "weights": weights(learner)}
    learner.algorithm = dpo["algorithm"]

    here = Path(job["directory"]) / f"checkpoint-{ranks.world_size}-{case['stage']}-{case['dtype']}"
    here.mkdir(exist_ok=True)
    learner.save(str(here))
    torch.rand(3)  # what draws random numbers after saving must not matter
    result["continued"] = [ranks.step(learner, job["steps"][0], budget), weights(learner)]
    learner.load(str(here))
    result["loaded"] = weights(learner)
    result["loaded_continued"] = [ranks.step(learner, job["steps"][0], budget), weights(learner)]
    fresh = ranks.learner(job["model"], dpo["algorithm"], stage=case["stage"], dtype=case["dtype"])
    fresh.load(str(here))
    result["fresh_continued"] = [ranks.step(fresh, job["steps"][0], budget), weights(fresh)]

    result["before_reset"] = optimizer_state(fresh)
    fresh.reset_optimizer()
    result["after_reset"] = optimizer_state(fresh)
    result["reset_weights"] = weights(fresh)
    ranks.step(fresh, job["steps"][1], budget)
    result["reset_continued"] = weights(fresh)
    result["reset_continued_state"] = optimizer_state(fresh)
    return result


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
    scores = learner.score([[s for i in job["steps"][0] for s in i.sequences]], "policy", 1.0)
    return {
        "path": str(path),
        "weights": weights(learner),
        "scores": scores,
        "source": {
            "declared": [(m.name, m.dtype, m.shape) for m in source.metadata()],
            "yielded": [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source],
        },
    }


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
    before = memory()
    learner = ranks.learner(job["model"], dpo["algorithm"], stage=case["stage"], dtype=case["dtype"])
    learner.score(sequences, job["model"], 1.0)  # now it keeps a reference, too
    ranks.step(learner, first)
    result: dict[str, Any] = {
        "weights": weights(learner),
        "scores": learner.score(sequences, "policy", 1.0),
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
        "scores": learner.score(sequences, "policy", 1.0),
        "state": optimizer_tensors(learner),
    }
    result["next"] = [ranks.step(learner, second), weights(learner)]
    plain = ranks.learner(job["model"], dpo["algorithm"], stage=case["stage"], dtype=case["dtype"])
    ranks.step(plain, first)
    result["next_without"] = [ranks.step(plain, second), weights(plain)]
    return result


def moments(learner: DeepSpeedRank) -> list[tuple[str, torch.Tensor]]:
    """What the optimizer itself keeps."""
    states = innermost(learner).state.values()
    return [(f"{name} {i}", v) for i, state in enumerate(states) for name, v in state.items() if torch.is_tensor(v)]


def optimizer_tensors(learner: DeepSpeedRank) -> WEIGHTS:
    """And the weights that it steps: under a wrapper, a master copy."""
    stepped = [p for group in innermost(learner).param_groups for p in group["params"]]
    found = [*moments(learner), *((f"master {i}", p) for i, p in enumerate(stepped))]
    return {name: array(tensor) for name, tensor in found}


KINDS = {f.__name__: f for f in (gradients, critic_gradients, steps, export, offload)}


def main(job_file: str, rank: str, world_size: str, port: str) -> None:
    job = pickle.loads(Path(job_file).read_bytes())
    torch.set_num_threads(1)
    ranks = Ranks(int(rank), int(world_size), int(port))
    for i, case in enumerate(job["cases"]):
        try:
            result = KINDS[case["kind"]](ranks, job, case)
        except Exception:  # noqa: BLE001  the test that needs it reports it
            result = {"error": traceback.format_exc()}
        if ranks.rank == 0 or "error" in result:
            Path(f"{job_file}.{i}.{ranks.rank}").write_bytes(pickle.dumps(result))
        print(f"{case} done", flush=True)
        if "error" in result:
            print(result["error"], flush=True)
            break  # the other ranks may wait for this one: no further case can be trusted


if __name__ == "__main__":
    main(*sys.argv[1:])
