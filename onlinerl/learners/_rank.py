"""One rank of a learner: what every way to step has in common.

The ranks are told what to do by one group (the cluster's business): each call is collective, and every rank gets the same number
of micro-batches. Losses arrive as sums and are divided by the global count given with them, so the gradient does not depend on
how the items were cut up.
"""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from onlinerl.batch import Batch, Outputs
from onlinerl.errors import LearnerError
from onlinerl.families import check_experts
from onlinerl.learners._collectives import bound_collectives, every, mean_of_ranks, means
from onlinerl.learners._experts import Balance, Routed
from onlinerl.learners._loading import give_back
from onlinerl.learners._loss import kl_old, loss_of
from onlinerl.learners._mixture import MixtureSampling
from onlinerl.learners._models import Models
from onlinerl.learners._offload import HostMemory, tensors_of
from onlinerl.learners._optimizer import critic_rate
from onlinerl.learners._plain import load_generators, save_generators
from onlinerl.learners._self_test import Sums, compare
from onlinerl.learners._weights import Switched
from onlinerl.learners._whole_step import first_pass, initial_state, load_state, save_state, state_metrics
from onlinerl.loss import Mean
from onlinerl.network import choose_interface
from onlinerl.ops.batching import collate
from onlinerl.ops.whole_step import Rows, State, WholeStep
from onlinerl.protocols.keys import decided
from onlinerl.protocols.learner import LearnerConfig, RankSettings
from onlinerl.protocols.transport import Meeting, Replicas, Sender, TransportConfig
from onlinerl.types import TrainItem, TrainSequence

AFTER_CONTROLLER_S = 10.0
"""Ranks that wait for one that hangs give up so much later than the controller: it then knows that none of them has failed by itself."""
_ADAPTERS = "adapters.json"
"""Of a checkpoint: which adapters it is of."""


class Rank(Models, MixtureSampling):
    """Holds this rank's share of the policy and its optimizer. A subclass says how it steps and what it writes to disk.

    Args:
        config: the learner section.
        settings: what else all ranks are told.
        rank: of this process.
        store, address: where the ranks meet; rank 0 hosts the store.

    Raises:
        ConfigError: if it is not decided which dtype it computes in, or what is installed here computes wrongly.
    """

    _state: State | None = None
    """What the algorithm keeps from one step to the next."""
    _next_state: State | None = None
    """What it keeps once the step is taken whose gradient was made last."""

    def __init__(self, config: LearnerConfig, settings: RankSettings, *, rank: int, store: dist.TCPStore, address: str) -> None:
        config.check()  # what is installed here counts, whatever the machine has on which the run was checked
        self.dtype: torch.dtype = getattr(torch, decided(config.dtype, "learner.dtype"))
        self.algorithm, self.config, self.training = settings.algorithm, config, settings.training
        self.rank, self.world_size, self.temperature = rank, settings.world_size, settings.temperature
        self.device = torch.device("cuda", 0) if settings.device == "cuda" else torch.device("cpu")
        self.needs = self.algorithm.needs
        self._base = self._reference = settings.model
        self._state = self._next_state = initial_state(self.algorithm)
        self._seed = settings.seed
        seed_everything(settings.seed)
        choose_interface(address)
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(self.world_size))
        # The object collectives of metrics and the barriers of CPU work go over gloo on GPU machines too.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=config.start_timeout_s),
        )
        self._build(settings.model)
        if self.training.aux_loss_coef:
            description = self._policy.model.config.to_dict()
            check_experts(description)
            self._policy.experts = description["num_experts_per_tok"]
        bound_collectives(timedelta(seconds=config.step_timeout_s + AFTER_CONTROLLER_S))
        self._sender: Sender | None = None
        self._host_memory = HostMemory(self.device)
        give_back()

    # --- what each way to step says for itself ---

    def _build(self, model: str) -> None:
        """Read the model and make the optimizer. Dropout stays off: log-probs of one and the same policy must not differ from pass
        to pass."""
        raise NotImplementedError

    @property
    def _groups(self) -> Sequence[dict[str, Any]]:
        """The optimizer's parameter groups, see `parameter_groups`."""
        raise NotImplementedError

    def _accumulate(self, total: Tensor, count: float) -> None:
        """Add the gradient of `total` divided by `count`, which is NaN for a loss that is not finite, to that of this step."""
        raise NotImplementedError

    def _apply(self) -> tuple[float, bool]:
        """Sum the gradient over ranks, clip it, and take the step unless it is not finite. Returns its norm, and whether it did."""
        raise NotImplementedError

    def gradients(self, micro: Sequence[Sequence[TrainItem]], count: float) -> dict[str, np.ndarray]:
        """The gradient that `step` would use, by parameter name, and no step: for parity tests."""
        raise NotImplementedError

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments and how many steps it took."""
        raise NotImplementedError

    def keep_weights(self) -> None:
        """Remember the weights as they are now, for `merge`. Only of learners that say so (`LearnerConfig.merges`)."""
        raise NotImplementedError

    def merge(self, seed: int) -> None:
        """What has changed since then, merged as `training.online_merging` says."""
        raise NotImplementedError

    def _write(self, path: Path) -> Sequence[Path]:
        """Weights and optimizer state. Collective; returns the files that this rank wrote."""
        raise NotImplementedError

    def _read(self, path: Path) -> None:
        """The reverse of `_write`."""
        raise NotImplementedError

    # --- log-probs and values ---

    def logprobs(self, micro: Sequence[Sequence[TrainSequence]], model: str, temperature: float) -> list[list[np.ndarray]]:
        """Log-probs f32[T] per sequence per micro-batch, under "policy" or a saved model."""
        return [out for out, _ in self._infer(micro, model, temperature, values=False)]

    def values(self, micro: Sequence[Sequence[TrainSequence]]) -> list[list[np.ndarray]]:
        """Critic values f32[T] per sequence per micro-batch."""
        return [values for _, values in self._infer(micro, "policy", self.temperature, values=True)]

    @torch.no_grad()
    def hidden_sums(self, micro: Sequence[Sequence[TrainSequence]]) -> list[list[np.ndarray]]:
        """See `Learner.hidden_sums`."""
        batches = (collate([TrainItem(prompt_id="", sequences=(s,)) for s in own]).to(self.device) for own in micro)
        sums = [self._network(batch, hidden=True).hidden_BH.float().cpu().numpy() for batch in batches]
        return [list(rows[: len(own)]) for rows, own in zip(sums, micro, strict=True)]

    @torch.no_grad()
    def rewards(self, micro: Sequence[Sequence[TrainSequence]]) -> list[list[np.ndarray]]:
        """See `RewardLearner.rewards`."""
        batches = (collate([TrainItem(prompt_id="", sequences=(s,)) for s in own]).to(self.device) for own in micro)
        said = [self._network(batch).rewards_BD.cpu().numpy() for batch in batches]
        return [list(rows[: len(own)]) for rows, own in zip(said, micro, strict=True)]

    @torch.no_grad()
    def _infer(
        self, micro: Any, model: str, temperature: float, values: bool
    ) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
        results = []
        with self._as(model) as network:
            for sequences in micro:
                items = [TrainItem(prompt_id="", sequences=(s,)) for s in sequences]
                batch = collate(items).to(self.device)
                outputs = network(batch, temperature=temperature, values=values)
                results.append((_rows(outputs.logprobs_BT, sequences), _rows(outputs.values_BT, sequences) if values else []))
        return results

    # --- training ---

    def step(
        self, micro: Sequence[Sequence[TrainItem]], count: float, learning_rate: float, target_kl: float | None = None
    ) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches.

        Args:
            micro: micro-batches of this rank; an empty one only takes part in collectives.
            count: units of the loss in the whole step, all ranks.
            learning_rate: for this step.
            target_kl: in nats per token; where the policy is further from `old_logprobs` the step is not taken.

        Returns:
            Loss, gradient norm and the algorithm's metrics, averaged over all ranks; "skipped" is 1 if nothing was updated because the
            gradient is not finite, "stopped", with `target_kl`, 1 if because of that.
        """
        of_critic = critic_rate(learning_rate, self.training, self.needs.critic_learning_rate)
        rates = {"policy": learning_rate, "critic": of_critic}
        for group in self._groups:
            group["lr"] = rates[group["part"]]
        with self._dropout.on():
            totals, stopped = self._backward(micro, count, target_kl)
        give_back()
        norm, applied = self._apply()
        if applied:
            self._state = self._next_state
        metrics = state_metrics(self.algorithm, self._state) | self._reduce(totals, count)
        metrics["grad_norm"] = norm
        metrics["learning_rate"] = learning_rate
        metrics["skipped"] = float(not applied and not stopped)
        return metrics if target_kl is None else metrics | {"stopped": float(stopped)}

    def _backward(
        self, micro: Sequence[Sequence[TrainItem]], count: float, target_kl: float | None = None
    ) -> tuple[dict[str, Tensor], bool]:
        """Accumulate the gradient of this rank's share; returns sum and count of each metric, and whether `target_kl` is exceeded.

        A loss that is not finite gets a gradient that is not finite either, whatever its formula says: the optimizer then drops the
        whole step, on all ranks. So it is made to where the policy has moved too far, which is known with the last micro-batch.
        """
        totals: dict[str, Tensor] = {}
        stopped, balance = False, self._balance(micro)
        forward = self._dropout.numbered(self._forward)
        for number, (items, batch) in enumerate(zip(micro, self._batches(micro), strict=True), start=1):
            outputs = forward(batch)
            loss = loss_of(self.algorithm, outputs, batch, trained=True) if items else None
            nothing = outputs.logprobs_BT.sum() * 0.0 + sum(
                _zero(each) for each in (outputs.values_BT, outputs.reference_kl_BT, outputs.rewards_BD)
            )
            total = nothing if loss is None else loss.total
            _add(totals, "loss", Mean(total=total.detach().float(), count=torch.tensor(float(0))))
            metrics = loss.metrics if loss else {}
            for name, mean in (metrics if target_kl is None else metrics | kl_old(outputs, batch)).items():
                _add(totals, name, mean)
            if balance is not None:
                aux = balance.loss(self._policy.take_routed())
                _add(totals, "aux_loss", Mean(total=aux, count=torch.tensor(float(self.rank == 0 and number == 1))))
                total = total + self.training.aux_loss_coef * count * aux
            if target_kl is not None and number == len(micro):
                stopped = mean_of_ranks(totals["kl_old"], self.world_size) > target_kl
            self._accumulate(total, count if total.isfinite() and not stopped else float("nan"))
        return totals, stopped

    def _balance(self, micro: Sequence[Sequence[TrainItem]]) -> Balance | None:
        """What the routers choose in the whole step, if they are to be kept in balance; a forward pass of its own."""
        if not self.training.aux_loss_coef:
            return None
        own: list[Routed] = []
        forward = self._dropout.numbered(lambda batch: self._network(batch, states_only=True))
        with torch.no_grad():
            for items in micro:
                forward(collate(items).to(self.device))
                own.append(Routed(*(part.detach().double().cpu() for part in self._policy.take_routed())))
        return Balance.of([part for parts in every(own, self.world_size) for part in parts])

    def _batches(self, micro: Sequence[Sequence[TrainItem]]) -> Iterator[Batch]:
        """One after the other, unless the loss looks at all of them first."""
        batches = (collate(items).to(self.device) for items in micro)
        if not isinstance(self.algorithm, WholeStep):
            yield from batches
            return
        forward = self._dropout.numbered(self._forward)
        filled, self._next_state = first_pass(self.algorithm, list(batches), forward, self._gather, self._state)
        yield from filled

    def _gather(self, own: list[Rows]) -> tuple[list[list[Rows]], int]:
        """The rows of every rank, and which one this is."""
        return every(own, self.world_size), self.rank

    def set_reference(self, model: str) -> None:
        """Which saved model `Needs.reference_kl` is about; until this is called the one that training began with."""
        self._reference = model

    def _forward(self, batch: Batch) -> Outputs:
        """As the loss gets it. The reference is not the policy even where they are the same iterate, because the policy moves."""
        outputs: Outputs = self._network(
            batch,
            temperature=self.temperature,
            values=self.needs.values,
            entropy=self.needs.entropy,
            collision=self.needs.collision,
            reference=self._reference_states(batch) if self.needs.reference_kl else None,
        )
        return outputs

    def _reduce(self, totals: dict[str, Tensor], count: float) -> dict[str, float]:
        """Sums and counts of all ranks -> means."""
        return means(totals, count, self.world_size, self.device)

    def self_test(self, micro: Sequence[Sequence[TrainItem]], base_model: str) -> list[Sums]:
        """See `SelfTest`; what each rank found about its micro-batches, by rank. Collective."""

        def base(batch: Batch) -> Tensor:
            with self._as(base_model) as network:
                outputs: Outputs = network(batch, temperature=self.temperature)
            return outputs.logprobs_BT

        longest = getattr(self._policy.model.config.get_text_config(), "max_position_embeddings", None)
        packed = self.config.padding_free
        found = compare(self._forward, base, self.algorithm, micro, self.device, longest, padding_free=packed)
        return every(found, self.world_size)

    # --- weights out ---

    def open_sync(self, transport: TransportConfig, meeting: Meeting, replicas: Replicas) -> None:
        """Open the sending half and meet the replicas. Called on every rank."""
        self._wire_dtype: torch.dtype = getattr(torch, meeting.dtypes[-1])
        self.source = Switched(self.weight_source(self._wire_dtype))
        self._sender = transport.sender(meeting, replicas, self.source)

    def send_weights(self, version: int, path: str | None, model: str) -> None:
        """Send everything of the policy, or of a saved model, to everyone. No training collective may be in flight, so the ranks meet before and after."""
        dist.barrier()
        assert self._sender is not None, "open_sync() comes first"
        with self.source.to(self.weight_source(self._wire_dtype, model)):
            self._sender.send(version, path)
        dist.barrier()

    def parameter_names(self) -> list[str]:
        """Names on the wire, in order."""
        return [m.name for m in self.source.metadata()]

    def wire_bytes(self) -> int:
        """Size of one full transfer."""
        return sum(int(np.prod(m.shape)) * m.dtype.itemsize for m in self.source.metadata())

    def digests(self, names: Sequence[str], model: str) -> dict[str, str]:
        """Checksums of these tensors as this learner holds them, in the wire dtype. Collective where weights are cut up."""
        from onlinerl.transports._proof import digest

        wanted = set(names)
        source = self.weight_source(self._wire_dtype, model)
        return {name: digest(tensor) for name, tensor in source if name in wanted}

    # --- memory that is shared with an engine ---

    def offload(self, what: str) -> None:
        """Move to host memory and give the device's back: "optimizer" is all but the policy's weights, "all" is all."""
        stay = list(self._weights()) if what == "optimizer" else []
        self._host_memory.take(tensors_of(*self._owners(), self._policy, self._reader.kept), leave=stay)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Take the device's memory back and put everything where it was."""
        self._host_memory.give_back()

    def _weights(self) -> Iterator[Tensor]:
        """The tensors that a push reads."""
        yield from self._policy.parameters()
        yield from self._policy.buffers()

    def _owners(self) -> Sequence[object]:
        """What else holds tensors on the device: optimizers and wrappers."""
        raise NotImplementedError

    # --- disk ---

    def save(self, path: str) -> dict[str, int]:
        """Weights, optimizer state, the algorithm's state and generators, one file or more per rank.

        Returns:
            What this rank wrote: bytes by path relative to `path`.
        """
        written = [*self._write(Path(path)), *(self._save_kept(Path(path)) if self.rank == 0 else ())]
        mine = Path(path) / f"rng_{self.rank}.json"
        save_generators(mine)
        dist.barrier()
        return {str(file.relative_to(path)): file.stat().st_size for file in (*written, mine)}

    def _save_kept(self, path: Path) -> list[Path]:
        """What is the same on all ranks: the algorithm's state, and what adapters stand beside."""
        written = save_state(path, self._state)
        if self._adapters is not None:
            self._adapters.require_frozen()
            (path / _ADAPTERS).write_text(json.dumps(self._adapters.identity | {"dropout_steps": self._dropout.steps}))
            written.append(path / _ADAPTERS)
        return written

    def load(self, path: str) -> None:
        """The reverse of `save`.

        Raises:
            LearnerError: if the checkpoint is not complete for this number of ranks and this algorithm.
        """
        count = len({file.stem for file in Path(path).glob("rng_*")})
        if count != self.world_size:
            raise LearnerError(
                f"{path} was written by {count} ranks, and this run has {self.world_size}",
                field="learner.ranks",
                fix=f"resume with learner.ranks={count}",
            )
        self._state = load_state(Path(path), self.algorithm)
        if self._adapters is not None:
            file = Path(path) / _ADAPTERS
            stored = json.loads(file.read_text()) if file.is_file() else {}
            self._adapters.require_same(stored)
            self._dropout.steps = int(stored["dropout_steps"])
        self._read(Path(path))
        load_generators(Path(path) / f"rng_{self.rank}.json")

    def shutdown(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


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
