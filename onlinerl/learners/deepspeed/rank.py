"""One rank of the learner on DeepSpeed, ZeRO 0 to 3, on CPU over gloo or on GPUs over NCCL."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from onlinerl.errors import LearnerError
from onlinerl.learners._optimizer import build_optimizer, parameter_groups
from onlinerl.learners._rank import Rank
from onlinerl.learners.deepspeed.extensions import use_own_folder, without_abandoned_locks
from onlinerl.learners.deepspeed.loading import ShardedReader
from onlinerl.learners.deepspeed.memory import BUCKET
from onlinerl.learners.deepspeed.weights import ShardedSource, gathered
from onlinerl.types import TrainItem

if TYPE_CHECKING:
    from onlinerl.learners.deepspeed import DeepSpeed

__all__ = ["DeepSpeedRank"]

_TAG = "state"


class DeepSpeedRank(Rank):
    """Holds this rank's share of the policy and its optimizer; see `Rank`."""

    config: DeepSpeed
    _source = ShardedSource

    def _build(self, model: str) -> None:
        import deepspeed

        from onlinerl.learners.deepspeed.checkpoint import PlainCheckpointEngine

        use_own_folder()
        with without_abandoned_locks():  # it compiles an extension for CPUs
            deepspeed.init_distributed(
                dist_backend="nccl" if self.device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=self.config.start_timeout_s),
                verbose=False,
            )
        attention, packed = self.config.attn_implementation, self.config.padding_free
        self._reader = ShardedReader(self.dtype, attention, self.device, self._deepspeed_config(), padding_free=packed)
        self._read_policy(model)
        optimizer = build_optimizer(parameter_groups(self._policy, self.training), self.training, checked=self._bare)
        self._engine, *_ = deepspeed.initialize(
            model=self._policy, optimizer=optimizer, config=self._deepspeed_config(), dist_init_required=False
        )
        self._engine.checkpoint_engine = self._files = PlainCheckpointEngine()
        if self._adapters is not None:
            self._files.only = frozenset(name for name, p in self._policy.named_parameters() if p.requires_grad)
        self._engine.eval()
        if self.config.gradient_checkpointing:
            self._policy.recompute_activations()
        self.reset_optimizer()  # a wrapper's trial step counts as one for Adam

    @property
    def _network(self) -> nn.Module:
        engine: nn.Module = self._engine
        return engine

    @property
    def _groups(self) -> Sequence[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

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

    def _accumulate(self, total: Tensor, count: float) -> None:
        # DeepSpeed averages over ranks; a sum divided by the global count needs the sum over ranks.
        self._engine.backward(total * (self.world_size / count))

    def _apply(self) -> tuple[float, bool]:
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()

    def gradients(self, micro: Sequence[Sequence[TrainItem]], count: float) -> dict[str, np.ndarray]:
        """The gradient that `step` would use, by parameter name, and no step: for parity tests."""
        from deepspeed.utils import safe_get_full_grad

        self._backward(micro, count)
        grads: dict[str, np.ndarray] = {}
        original = self._engine.optimizer.step

        def capture(*args: Any, **kwargs: Any) -> None:
            for name, parameter in self._policy.named_parameters():
                grad = safe_get_full_grad(parameter) if parameter.requires_grad else None
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
        found: torch.optim.Optimizer = inner
        return found

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments and how many steps it took. In place: ZeRO's wrappers hold on to these tensors."""
        for state in self._inner_optimizer().state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _gathered(self, parameters: list[nn.Parameter], *, write: bool = False) -> AbstractContextManager[Any]:
        return gathered(parameters, write=write)

    def _weights(self) -> Iterator[Tensor]:
        yield from super()._weights()
        yield from (p.ds_tensor for p in self._policy.parameters() if hasattr(p, "ds_tensor"))  # ZeRO-3: this rank's share

    def _owners(self) -> Sequence[object]:
        return (self._engine,)

    def _write(self, path: Path) -> Sequence[Path]:
        self._files.written.clear()
        self._engine.save_checkpoint(str(path), tag=_TAG, client_state={}, exclude_frozen_parameters=self._adapters is not None)
        return self._files.written

    def _read(self, path: Path) -> None:
        # What is frozen is not in it; `Adapters.require_same` has seen that it is of these adapters.
        loaded, _ = self._engine.load_checkpoint(str(path), tag=_TAG, load_module_strict=self._adapters is None)
        if loaded is None:
            raise LearnerError(f"DeepSpeed found nothing to load in {path}", fix="resume from an older checkpoint")
        self._own_moments()
        gc.collect()  # DeepSpeed's copies of the state refer to each other, and hold on to the mapped file
        self._engine.eval()

    def _own_moments(self) -> None:
        """Copy the optimizer's moments out of the mapped checkpoint file, one by one: the file may be deleted, and is not needed."""
        for state in self._inner_optimizer().state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.clone()
        if hasattr(self._engine.optimizer, "_link_all_hp_params"):  # ZeRO's wrappers hold on to the tensors that are replaced
            self._engine.optimizer._link_all_hp_params()
