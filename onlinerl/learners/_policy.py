"""The trained network: a causal language model, its per-token log-probs in bounded memory, and an optional critic."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from onlinerl.batch import Batch, Outputs
from onlinerl.errors import LearnerError
from onlinerl.families import LogitRule, check_packing, logit_rule
from onlinerl.learners._experts import Routed, routed
from onlinerl.learners._logits import logits as fp32_logits
from onlinerl.learners._mixture import Step
from onlinerl.learners._packing import PackedRow, prepare
from onlinerl.learners._token_terms import Asked, token_terms
from onlinerl.learners._vocabulary import FrozenStates, TokenTerms, rescale

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of so many response tokens exist at a time: 1024 x 150k x 4 bytes is 0.6 GB, whatever the length of the batch.
CHUNK = 1024

Places = tuple[Tensor, Tensor, Tensor]
"""See `_places`."""


class LogProbHead(nn.Module):
    """Hidden states -> what is asked about given tokens, chunk by chunk, recomputed in the backward pass.

    Args:
        output: the module that holds the output matrix.
        rule: what the model's family does to its logits.
    """

    def __init__(self, output: nn.Linear, rule: LogitRule) -> None:
        super().__init__()
        self.rule = rule
        self._output = [output]  # in a list: the matrix belongs to the language model, and must not be registered twice

    @property
    def weight(self) -> Tensor:
        """The output matrix [vocabulary, hidden]."""
        return self._output[0].weight

    @property
    def bias(self) -> Tensor | None:
        """Its bias [vocabulary], where there is one."""
        return getattr(self._output[0], "bias", None)

    def parameters_of_output(self) -> list[nn.Parameter]:
        """What `forward` reads: the output matrix, and its bias where there is one."""
        return list(self._output[0].parameters())

    def forward(
        self,
        hidden_NH: Tensor,
        targets_N: Tensor | None,
        temperature: float,
        *,
        entropy: bool = False,
        collision: bool = False,
        reference: FrozenStates | None = None,
    ) -> TokenTerms | Tensor:
        """Of logits divided by `temperature`: log-probs of `targets_N` and, if asked for, entropies, log sum_v pi_v^2, and the KL of
        the reference to this model. Without targets the logits themselves, [N, V]. Fp32."""
        if targets_N is None:
            return rescale(fp32_logits(hidden_NH, self.weight, self.bias), self.rule, temperature)
        # The logits of both models together are no more than those of one without the other.
        size = CHUNK if reference is None else max(1, CHUNK // 2)
        asked = Asked(self.rule, temperature, entropy, collision, reference, size)
        return token_terms(hidden_NH, targets_N, self.weight, self.bias, asked)


def _zeros(backbone: PreTrainedModel) -> nn.Linear:
    """A head that says 0 of every state."""
    parameter = next(backbone.parameters())
    head = nn.Linear(backbone.config.hidden_size, 1, dtype=parameter.dtype, device=parameter.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class Network(nn.Module):
    """A Hugging Face model that is trained, perhaps with a second backbone beside it.

    Args:
        model: of transformers.
        padding_free: whether sequences are laid one after the other in one row, instead of padded to one length.
    """

    def __init__(self, model: PreTrainedModel, *, padding_free: bool) -> None:
        super().__init__()
        self._recompute = False
        self._padding_free = padding_free
        self.model: PreTrainedModel = model
        self.experts: int | None = None
        """How many experts a token of a mixture goes to, if what routers do is to be kept."""
        self._routed: Routed | None = None
        self.critic: PreTrainedModel | None = None
        self.value_head: nn.Linear | None = None

    def _pack(self) -> None:
        """Of `__init__`: let the backbones go through rows of several sequences, if they are to.

        Raises:
            ConfigError: for a family of models that cannot.
        """
        if self._padding_free:
            for network in filter(None, (self.model, self.critic)):
                check_packing(network.config.to_dict())
                prepare(network)

    def take_routed(self) -> Routed:
        """What the routers of the model did in the last pass. It is not kept any longer, for its gradient holds on to that pass."""
        assert self._routed is not None, "nobody has set `experts`, or there was no pass"
        found, self._routed = self._routed, None
        return found

    def recompute_activations(self) -> None:
        """Keep only the inputs of each layer for the backward pass, of all backbones, from now on."""
        for backbone in filter(None, (self.model, self.critic)):
            backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self._recompute = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As of any module, except that what recomputes goes on recomputing.

        transformers recomputes only in layers that are in training mode, and the policy never is: so the layers themselves
        are switched, not what is inside them, and their own dropout is 0. `eval()`, which loading a checkpoint calls too, comes here.
        """
        super().train(mode)
        if self._recompute:
            from transformers.modeling_layers import GradientCheckpointingLayer

            for layer in self.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True
                    for name, value in vars(layer).items():
                        if "dropout" in name and isinstance(value, float):
                            setattr(layer, name, 0.0)
        return self

    def _states(self, backbone: PreTrainedModel, batch: Batch, rows: Tensor, positions: Tensor) -> Tensor:
        """The last layer's states [N, hidden] at these positions of these rows."""
        keeps = self.experts is not None and backbone is self.model.base_model
        asked: dict[str, Any] = {"use_cache": False, **({"output_router_logits": True} if keeps else {})}
        if self._padding_free:
            row = PackedRow.of(batch)
            found = backbone(**row.arguments(backbone.config._attn_implementation), **asked)
            states: Tensor = found.last_hidden_state[0, row.starts_B[rows] + positions]
        else:
            mask_BS = batch.sequence_mask_BS
            # Without padding no mask is needed, and attention kernels are faster without one.
            attention_mask = None if bool(mask_BS.all()) else mask_BS.long()
            found = backbone(input_ids=batch.tokens_BS, attention_mask=attention_mask, **asked)
            states = found.last_hidden_state[rows, positions]
        if keeps:
            assert self.experts is not None
            mask_BS = batch.sequence_mask_BS
            counts_N = mask_BS[mask_BS] if self._padding_free else mask_BS.flatten()
            # Nothing of the dummy of a rank without data counts.
            self._routed = routed(found.router_logits, self.experts, counts_N * (len(batch.lists_GK) > 0))
        return states


class Policy(Network):
    """A causal language model that answers with log-probs instead of logits.

    Args:
        model: a Hugging Face causal language model.
        critic: "separate" adds a second backbone with a value head, "shared" a head on the policy's own trunk, None nothing.
        critic_backbone: of a separate critic; a copy of the model's own by default.
        value_head: what makes values [..., 1] of the critic's states; one of zeros by default.
        padding_free: whether sequences are laid one after the other in one row, instead of padded to one length.

    Raises:
        ConfigError: for a model family that rescales its logits in a way that is not known, or that cannot be `padding_free`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        critic: Literal["separate", "shared"] | None = None,
        critic_backbone: PreTrainedModel | None = None,
        value_head: nn.Linear | None = None,
        *,
        padding_free: bool = False,
    ) -> None:
        super().__init__(model, padding_free=padding_free)
        self.head = LogProbHead(model.get_output_embeddings(), logit_rule(model.config.to_dict()))
        if critic is not None:
            self.critic = (critic_backbone or copy.deepcopy(model.base_model)) if critic == "separate" else None
            self.value_head = value_head or _zeros(self.critic or model)
        self._pack()

    def forward(
        self,
        batch: Batch | None,
        temperature: float = 1.0,
        values: bool = False,
        entropy: bool = False,
        collision: bool = False,
        reference: FrozenStates | None = None,
        hidden: bool = False,
        states_only: bool = False,
        step: Step | None = None,
    ) -> Outputs | Tensor:
        """One pass over all rows; see `Outputs`. Positions where mask_BT is false hold zeros.

        Args:
            batch: of B rows.
            temperature: that logits are divided by.
            values, entropy, collision, hidden: whether they are asked for.
            reference: states of the same batch in the model that `Outputs.reference_kl_BT` is from; None asks for none.
            states_only: return nothing but the state before each response token, [N, hidden].
            step: what is decoded, instead of a batch: then the next logits [B, V] after it, fp32. Here, because ways to cut a model up put its
                weights together around this method.
        """
        if batch is None:
            assert step is not None, "there is neither a batch nor a step"
            return self._decoded(step, temperature)
        places = rows, steps, positions = _places(batch)
        hidden_NH = self._run(self.model.base_model, batch, places)
        if states_only:
            return hidden_NH
        targets_N = batch.tokens_BS[rows, positions + 1]
        terms = self.head(hidden_NH, targets_N, temperature, entropy=entropy, collision=collision, reference=reference)

        def spread(flat: Tensor) -> Tensor:
            table_BT = torch.zeros(batch.mask_BT.shape, dtype=torch.float32, device=flat.device)
            return table_BT.index_put((rows, steps), flat)

        def spread_if_any(flat: Tensor | None) -> Tensor | None:
            return None if flat is None else spread(flat)

        values_BT = None
        if values:
            assert self.value_head is not None, "this policy was built without a critic"
            state_NH = hidden_NH if self.critic is None else self._run(self.critic, batch, places)
            values_BT = spread(self.value_head(state_NH).squeeze(-1).float())
        return Outputs(
            logprobs_BT=spread(terms.logprobs),
            values_BT=values_BT,
            entropy_BT=spread_if_any(terms.entropy),
            collision_BT=spread_if_any(terms.collision),
            reference_kl_BT=spread_if_any(terms.reference_kl),
            hidden_BH=_row_sums(hidden_NH, rows, len(batch.tokens_BS)) if hidden else None,
        )

    def _decoded(self, step: Step, temperature: float) -> Tensor:
        with self._keeping():
            return self._next_logits(step, temperature)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Inside, layers keep what a cache is for: transformers takes it away from those that recompute."""
        recompute, self._recompute = self._recompute, False
        self.train(self.training)
        try:
            yield
        finally:
            self._recompute = recompute
            self.train(self.training)

    def _next_logits(self, step: Step, temperature: float) -> Tensor:
        hidden_BLH = self.model.base_model(
            input_ids=step.tokens_BL,
            attention_mask=step.mask_BL,
            position_ids=step.positions_BL,
            past_key_values=step.cache,
            use_cache=True,
        ).last_hidden_state
        if step.cache.get_seq_length() != step.mask_BL.shape[1]:  # or the next token would be one after nothing
            raise LearnerError(
                f"this model kept {step.cache.get_seq_length()} of {step.mask_BL.shape[1]} tokens while it decoded",
                field="model",
                fix="its family cannot be sampled by the learner: choose an algorithm that asks the engine only",
            )
        logits_BV: Tensor = self.head(hidden_BLH[:, -1], None, temperature)
        return logits_BV

    def _run(self, backbone: PreTrainedModel, batch: Batch, places: Places) -> Tensor:
        """The states [N, hidden] before the response tokens at `places`."""
        rows, _, positions = places
        return self._states(backbone, batch, rows, positions)


def _row_sums(states_NH: Tensor, rows_N: Tensor, rows: int) -> Tensor:
    """The states of each row added up, fp32[B, H]."""
    sums_BH = torch.zeros(rows, states_NH.shape[1], dtype=torch.float32, device=states_NH.device)
    return sums_BH.index_add(0, rows_N, states_NH.float())


def _places(batch: Batch) -> Places:
    """Of all N response tokens of a batch: their rows, which token of the response they are, and the position of the state before."""
    rows, steps = batch.mask_BT.nonzero(as_tuple=True)
    if len(rows) == 0:  # a rank that ran short still has to take part in every collective
        rows = steps = torch.zeros(1, dtype=torch.long, device=batch.mask_BT.device)
    # The state before response token t of row b sits at position prompt_length + t - 1.
    return rows, steps, batch.prompt_lengths_B[rows] + steps - 1
