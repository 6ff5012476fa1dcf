"""One rank of the learner on DeepSpeed, ZeRO 0 to 3, on CPU over gloo or on GPUs over NCCL.

The ranks are told what to do by one group (the cluster's business): each call is collective, and every rank gets the same number
of micro-batches. Losses arrive as sums and are divided by the global count given with them, so the gradient does not depend on
how the items were cut up.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from onlinerl.batch import Batch, Mean, Outputs
from onlinerl.config import LearnerConfig, TrainingConfig
from onlinerl.errors import LearnerError
from onlinerl.learners._extensions import without_abandoned_locks
from onlinerl.learners._loading import ModelReader, give_back
from onlinerl.learners._offload import HostMemory, tensors_of
from onlinerl.learners._optimizer import build_optimizer, critic_rate, parameter_groups
from onlinerl.learners._plain import load_generators, save_generators
from onlinerl.learners._self_test import Sums, compare
from onlinerl.memory import BUCKET
from onlinerl.network import choose_interface
from onlinerl.ops.batching import collate
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import TrainItem, TrainSequence

__all__ = ["DeepSpeedRank"]

_TAG = "state"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def environment(config: LearnerConfig, device: str, threads: int) -> dict[str, str]:
    """Environment variables a rank's process must start with."""
    env = {
        "TOKENIZERS_PARALLELISM": "false",
        "DEEPSPEED_LOG_LEVEL": "WARNING",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "ONLINERL_DIE_WITH_PARENT": "1",
    }
    if device == "cpu":
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    return env


class DeepSpeedRank:
    """Holds this rank's share of the policy and its optimizer.

    Args:
        model: directory or hub id of the model to start from.
        algorithm: whose loss is minimised.
        config, training: their sections.
        rank, world_size: of this process.
        store, address: where the ranks meet; rank 0 hosts the store.
        device: "cpu" or "cuda" (then the one visible GPU).
        temperature: at which log-probs are taken in the loss: the sampling temperature for policy gradients, else 1.
        seed: of everything random.
    """

    def __init__(
        self,
        model: str,
        algorithm: Algorithm,
        config: LearnerConfig,
        training: TrainingConfig,
        *,
        rank: int,
        world_size: int,
        store: dist.TCPStore,
        address: str,
        device: str,
        temperature: float,
        seed: int,
    ) -> None:
        import deepspeed

        from onlinerl.learners._checkpoint import PlainCheckpointEngine

        self.algorithm, self.config, self.training = algorithm, config, training
        self.rank, self.world_size, self.temperature = rank, world_size, temperature
        self.device = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
        seed_everything(seed)
        choose_interface(address)
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
        backend = "nccl" if device == "cuda" else "gloo"
        timeout = timedelta(seconds=config.start_timeout_s)
        # The object collectives of metrics and the barriers of CPU work go over gloo on GPU machines too.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        with without_abandoned_locks():  # it compiles an extension for CPUs
            deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        self.needs = algorithm.needs
        self._reader = ModelReader(DTYPES[config.dtype], config.attention, self.device, self._deepspeed_config())
        self._policy = self._reader.trained(model, self.needs.critic)
        # Dropout stays off: log-probs of one and the same policy must not differ from pass to pass (R-E5).
        self._policy.eval()
        optimizer = build_optimizer(parameter_groups(self._policy, training), training, checked=self._bare)
        self._engine, *_ = deepspeed.initialize(
            model=self._policy, optimizer=optimizer, config=self._deepspeed_config(), dist_init_required=False
        )
        self._engine.checkpoint_engine = self._files = PlainCheckpointEngine()
        self._engine.eval()
        if config.gradient_checkpointing:
            self._policy.recompute_activations()
        self.reset_optimizer()  # a wrapper's trial step counts as one for Adam
        _bound_collectives(timedelta(seconds=config.step_timeout_s))
        self._sender: Any = None
        self._host_memory = HostMemory(self.device)
        give_back()

    @property
    def _bare(self) -> bool:
        """True where DeepSpeed calls the optimizer itself, without a wrapper that clips and looks for non-finite gradients."""
        return self.config.zero_stage == 0 and self.config.dtype == "float32"

    def _deepspeed_config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # Steps hold as many micro-batches as their tokens need: backward() accumulates, step() reduces and updates.
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0 if self._bare else self.training.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.config.zero_stage,
                "overlap_comm": False,
                "reduce_scatter": self.device.type == "cuda",  # gloo has none
                # DeepSpeed's own sizes (500 million elements and more) make no difference between a rank and a whole small model.
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
                "sub_group_size": BUCKET,
                "stage3_param_persistence_threshold": 0 if self.device.type == "cpu" else 100_000,
                "stage3_prefetch_bucket_size": 0 if self.device.type == "cpu" else BUCKET,
                "stage3_max_live_parameters": BUCKET,
                "stage3_max_reuse_distance": 0,
            },
            "bf16": {"enabled": self.config.dtype == "bfloat16"},
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }

    # --- scoring ---

    def score(self, micro: Sequence[Sequence[TrainSequence]], model: str, temperature: float) -> list[list[np.ndarray]]:
        """Log-probs f32[T] per sequence per micro-batch, under "policy" or a saved model."""
        return [out for out, _ in self._infer(micro, model, temperature, values=False)]

    def values(self, micro: Sequence[Sequence[TrainSequence]]) -> list[list[np.ndarray]]:
        """Critic values f32[T] per sequence per micro-batch."""
        return [values for _, values in self._infer(micro, "policy", self.temperature, values=True)]

    @torch.no_grad()
    def _infer(
        self, micro: Any, model: str, temperature: float, values: bool
    ) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
        network = self._engine if model == "policy" else self._reader.frozen(model)
        results = []
        for sequences in micro:
            items = [TrainItem(prompt_id="", sequences=(s,)) for s in sequences]
            batch = collate(items).to(self.device)
            outputs = network(batch, temperature=temperature, values=values)
            results.append((_rows(outputs.logprobs_BT, sequences), _rows(outputs.values_BT, sequences) if values else []))
        return results

    # --- training ---

    def step(self, micro: Sequence[Sequence[TrainItem]], count: int, learning_rate: float) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches.

        Args:
            micro: micro-batches of this rank; an empty one only takes part in collectives.
            count: units of the loss in the whole step, all ranks.
            learning_rate: for this step.

        Returns:
            Loss, gradient norm and the algorithm's metrics, averaged over all ranks; "skipped" is 1 if nothing was updated.
        """
        of_critic = critic_rate(learning_rate, self.training, self.needs.critic_learning_rate)
        rates = {"policy": learning_rate, "critic": of_critic}
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rates[group["part"]]
        totals = self._backward(micro, count)
        give_back()
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        metrics = self._reduce(totals, count)
        metrics["grad_norm"] = float(norm)
        metrics["learning_rate"] = learning_rate
        metrics["skipped"] = float(not self._engine.was_step_applied())
        return metrics

    def _backward(self, micro: Sequence[Sequence[TrainItem]], count: int) -> dict[str, Tensor]:
        """Accumulate the gradient of this rank's share; returns sum and count of each metric.

        A loss that is not finite gets a gradient that is not finite either, whatever its formula says: the optimizer then drops the
        whole step, on all ranks (R-E6).
        """
        totals: dict[str, Tensor] = {}
        for items in micro:
            batch = collate(items).to(self.device)
            outputs = self._engine(batch, temperature=self.temperature, values=self.needs.values, entropy=self.needs.entropy)
            loss = self.algorithm.loss(outputs, batch) if items else None
            total = loss.total if loss is not None else outputs.logprobs_BT.sum() * 0.0 + _zero(outputs.values_BT)
            # DeepSpeed averages over ranks; a sum divided by the global count needs the sum over ranks.
            scale = self.world_size / count if total.isfinite() else float("nan")
            self._engine.backward(total * scale)
            _add(totals, "loss", Mean(total=total.detach().float(), count=torch.tensor(float(0))))
            for name, mean in (loss.metrics if loss else {}).items():
                _add(totals, name, mean)
        return totals

    def _reduce(self, totals: dict[str, Tensor], count: int) -> dict[str, float]:
        """Sums and counts of all ranks -> means. Ranks without items know no metric names, so the names travel first."""
        names: list[list[str]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(names, sorted(totals))
        union = sorted({n for part in names for n in part})
        table = torch.stack([totals.get(n, torch.zeros(2)) for n in union]).double()
        table = table.to(self.device) if self.device.type == "cuda" else table
        dist.all_reduce(table)
        means = {n: (row[0] / row[1]).item() if row[1] > 0 else float("nan") for n, row in zip(union, table.cpu(), strict=True)}
        means["loss"] = table[union.index("loss"), 0].item() / count
        return means

    def gradients(self, micro: Sequence[Sequence[TrainItem]], count: int) -> dict[str, np.ndarray]:
        """The gradient that `step` would use, by parameter name, and no step: for parity tests (R-E7)."""
        from deepspeed.utils import safe_get_full_grad

        self._backward(micro, count)
        grads: dict[str, np.ndarray] = {}
        original = self._engine.optimizer.step

        def capture(*args: Any, **kwargs: Any) -> None:
            for name, parameter in self._policy.named_parameters():
                grad = safe_get_full_grad(parameter)
                if grad is not None:
                    grads[name] = grad.detach().float().cpu().numpy().copy()

        self._engine.optimizer.step = capture
        try:
            self._engine.step()
        finally:
            self._engine.optimizer.step = original
        return grads

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        inner = self._engine.optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        return inner

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments and how many steps it took. In place: ZeRO's wrappers hold on to these tensors."""
        for state in self._inner_optimizer().state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def self_test(self, micro: Sequence[Sequence[TrainItem]], base_model: str) -> list[Sums]:
        """See `SelfTest`; what each rank found about its micro-batches, by rank. Collective."""

        def forward(batch: Batch) -> Outputs:
            return self._engine(batch, temperature=self.temperature, values=self.needs.values, entropy=self.needs.entropy)

        def base(batch: Batch) -> Tensor:
            return self._reader.frozen(base_model)(batch, temperature=self.temperature).logprobs_BT

        longest = getattr(self._policy.model.config.get_text_config(), "max_position_embeddings", None)
        found = compare(forward, base, self.algorithm, micro, self.device, longest)
        parts = [found] * self.world_size
        dist.all_gather_object(parts, found)
        return parts

    # --- weights out ---

    def weight_source(self, dtype: torch.dtype) -> Any:
        """The policy as a vLLM WeightSource in the engine's dtype."""
        from onlinerl.learners._weights import PolicySource

        return PolicySource(self._policy.model, dtype)

    def open_sync(self, init_info: Any, client: Any, dtype: str) -> None:
        """Meet the replicas. Called on every rank; `init_info` says which transport."""
        from onlinerl.sync.sender import open_sender

        self.source = self.weight_source(getattr(torch, dtype))
        self._sender = open_sender(init_info, client, self.source)

    def send_weights(self, version: int) -> None:
        """Send everything to everyone. No training collective may be in flight, so the ranks meet before and after (R-A2)."""
        dist.barrier()
        self._sender.client.version = version
        self._sender.send_weights()
        dist.barrier()

    def parameter_names(self) -> list[str]:
        """Names on the wire, in order."""
        return [m.name for m in self.source.metadata()]

    def wire_bytes(self) -> int:
        """Size of one full transfer."""
        return sum(int(np.prod(m.shape)) * m.dtype.itemsize for m in self.source.metadata())

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """Checksums of these tensors as this learner holds them, in the wire dtype. Collective under ZeRO-3."""
        from onlinerl.sync.proof import digest

        wanted = set(names)
        return {name: digest(tensor) for name, tensor in self.source if name in wanted}

    # --- memory that is shared with an engine ---

    def offload(self, what: str) -> None:
        """Move to host memory and give the device's back: "optimizer" is all but the policy's weights, "all" is all."""
        parameters = list(self._policy.parameters())
        parts = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]  # under ZeRO-3, this rank's share
        stay = [*parameters, *parts, *self._policy.buffers()] if what == "optimizer" else []
        self._host_memory.take(tensors_of(self._engine, self._policy, self._reader.kept), leave=stay)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Take the device's memory back and put everything where it was."""
        self._host_memory.give_back()

    # --- disk ---

    def save(self, path: str) -> dict[str, int]:
        """Weights, optimizer state and generators, one file or more per rank.

        Returns:
            What this rank wrote: bytes by path relative to `path`.
        """
        self._files.written.clear()
        self._engine.save_checkpoint(path, tag=_TAG, client_state={}, exclude_frozen_parameters=False)
        mine = Path(path) / f"rng_{self.rank}.json"
        save_generators(mine)
        dist.barrier()
        return {str(file.relative_to(path)): file.stat().st_size for file in (*self._files.written, mine)}

    def load(self, path: str) -> None:
        """The reverse of `save`.

        Raises:
            LearnerError: if the checkpoint is not complete for this number of ranks.
        """
        count = len({file.stem for file in Path(path).glob("rng_*")})
        if count != self.world_size:
            raise LearnerError(
                f"{path} was written by {count} ranks, and this run has {self.world_size}",
                field="learner.ranks",
                fix=f"resume with learner.ranks={count}",
            )
        loaded, _ = self._engine.load_checkpoint(path, tag=_TAG)
        if loaded is None:
            raise LearnerError(f"DeepSpeed found nothing to load in {path}", fix="resume from an older checkpoint")
        self._own_moments()
        gc.collect()  # DeepSpeed's copies of the state refer to each other, and hold on to the mapped file
        load_generators(Path(path) / f"rng_{self.rank}.json")
        self._engine.eval()

    def _own_moments(self) -> None:
        """Copy the optimizer's moments out of the mapped checkpoint file, one by one: the file may be deleted, and is not needed."""
        for state in self._inner_optimizer().state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.clone()
        if hasattr(self._engine.optimizer, "_link_all_hp_params"):  # ZeRO's wrappers hold on to the tensors that are replaced
            self._engine.optimizer._link_all_hp_params()

    def export(self, path: str, tokenizer: str) -> None:
        """The policy as a Hugging Face model with its tokenizer. Collective; rank 0 writes."""
        from onlinerl.learners._export import export_weights

        model = self._policy.model
        export_weights(model, Path(path), DTYPES[self.config.dtype], writer=self.rank == 0)
        if self.rank == 0:
            from transformers import AutoTokenizer

            model.config.save_pretrained(path)
            if model.can_generate():
                model.generation_config.save_pretrained(path)
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
        dist.barrier()

    def shutdown(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _bound_collectives(timeout: timedelta) -> None:
    """From now on a rank that waits longer than this for the others fails. Everything before belongs to the start, and its time.

    For all groups, because DeepSpeed makes some of its own, with torch's default. torch has no public name for this.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _rows(values_BT: Tensor, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
    table = values_BT.float().cpu().numpy()
    return [table[b, : len(s.response_ids)].copy() for b, s in enumerate(sequences)]


def _zero(values: Tensor | None) -> Tensor | float:
    return 0.0 if values is None else values.sum() * 0.0


def _add(totals: dict[str, Tensor], name: str, mean: Mean) -> None:
    part = torch.stack([mean.total.detach().float().cpu(), mean.count.detach().float().cpu()])
    totals[name] = totals[name] + part if name in totals else part
