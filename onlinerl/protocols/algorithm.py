"""The role of algorithms: hyper-parameters, what they need, and a pure loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from onlinerl.protocols.component import Component
from onlinerl.types.goals import Goals
from onlinerl.types.training import TrainItem, TrainSequence, Unit

if TYPE_CHECKING:  # torch stays out of everything that only passes batches along, and labels out of losses
    from onlinerl.batch import Batch, LossOutput, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.plan import Objection, Plan

Value = TypeVar("Value")
Reference = Literal["fixed", "previous", "none"]
"""A schedule: the base model, the policy at the start of the iteration, or nothing."""
OffPolicy = Literal["valid", "corrected", "approximate", "refused"]


def by_knobs(of: Callable[[Any], Value]) -> Value:
    """A declaration that depends on the knobs: a property, of which type checkers see what it returns."""
    return property(of)  # type: ignore[return-value]


class Needs(BaseModel):
    """What an algorithm must be given: all that loop, learner and checks read of it. Nothing is computed that nobody asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: bool = False
    """Pairs built by the configured pair builder."""
    reference: bool = False
    """A reference model, and `reference_logprobs`, what it says."""
    kl_in_reward: bool = False
    """The KL to the reference is paid inside the reward, so it is that of the policy that sampled."""
    old_logprobs: bool = False
    """Log-probs of the weights that training starts from."""
    critic: Literal["separate", "shared"] | None = None
    """Values of a critic, which has a backbone of its own or is a head on the policy's."""
    critic_warmup: int = 0
    """Iterations at the start in which only the critic learns."""
    critic_learning_rate: float | None = None
    """Peak of the critic's learning rate; the policy's if None."""
    critic_model: str | None = None
    """Reward model whose backbone a separate critic begins with; None: a copy of the policy's own."""
    critic_head: bool = False
    """The reward model's head too, because values are in the units of its scores; else values begin at 0."""
    entropy: bool = False
    """The entropy of the next-token distribution at each response token."""
    sampling_temperature: bool = False
    """Log-probs at the temperature of the sampling, as ratios of probabilities must be; preference losses take them at 1."""
    min_samples: int = 1
    """Fewest responses per prompt that make sense."""
    off_policy: OffPolicy = "approximate"
    """What the loss makes of responses of an older policy than the one that training starts from (`schedule.max_lag`, `selection`): it is right for
    them (`valid`), right by weighing them (`corrected`), near enough (`approximate`), or takes them for the newer one's (`refused`)."""
    preferences: bool = False
    """How probable it is that one response beats another (win rates, soft labels); scores alone only imply it."""
    uncertainty: bool = False
    """How far several judgements of one pair disagree (`Verdict.uncertainty`)."""
    components: tuple[str, ...] = ()
    """Other scores that the oracle must give each response beside the score, by name (`Verdict.components`)."""
    collision: bool = False
    """log sum_v pi_v^2 of the next-token distribution at each response token, without gradient."""
    reference_kl: bool = False
    """KL(reference || policy) of the next-token distributions at each response token: the reference itself runs beside the policy."""
    dynamic_sampling: bool = False
    """Only prompts whose responses the oracle tells apart, unless `sampling.dynamic` says otherwise."""
    anchor: bool = False
    """The base model as a second reference, and `anchor_logprobs`, what it says, whatever iterate the reference is."""
    auxiliary: bool = False
    """Auxiliary weights beside the policy's: an iteration trains them first, from where the one before left them, and then the policy from
    them, on the same items. `reference_logprobs` are those of the weights that a pass starts from, so there is no `reference`."""
    stage_reference: Literal["keep", "reset"] | None = None
    """The reference of a stage (`order`) is the policy that the one before ended with, and the optimizer's moments go on or begin anew with each."""
    ches: bool = False
    """How alike the hidden states of the two responses of a pair are (`TrainSequence.ches`), of the policy that training starts from."""
    answers: bool = False
    """The stored answer of each training prompt, as tokens (`Prompt.answer_ids`)."""
    goals: Goals | None = None
    """How prompts tell the model which score its response shall have. Training prompts have the tokens of each goal (`Prompt.goal_ids`); what
    is sampled and evaluated is asked for the highest."""
    prefix: float = 0.0
    """Share of prompts whose responses begin with a part of the stored answer (`Prompt.answer_ids`), so there are `answers`."""
    labels: bool = True
    """Differences in what the oracle says: without any there is nothing to learn."""
    pairing: str | None = None
    """The pair builder where `pairing.name` is left out; None leaves it at the usual one."""
    greedy: bool = False
    """The greedy response (temperature 0) of the policy that samples. It joins the samples of its prompt, and is judged with them."""
    teacher: bool = False
    """The stored answer of each prompt joins the samples, and is judged with them. Such an algorithm needs `answers` too."""
    carried: bool = False
    """Both responses of the last pair that was trained of a prompt join the samples where it comes again, and are judged with them."""
    replay: tuple[float, ...] = ()
    """By how many iterations old they are, 1 first: at most how many items of earlier iterations are trained once more, as a share of the new
    ones. They are not sampled or judged again; log-probs are those of the present reference."""
    reference_samples: int = 0
    """So many responses of the base model to each prompt, which join the samples too."""
    reward_head: tuple[int, dict[str, Any]] | None = None
    """In place of a policy, a classifier with so many outputs (`Outputs.rewards_BD`), whose configuration says this (`RewardHead`)."""
    mixture_samples: int = 0
    """So many responses to each prompt that are drawn, token by token, from the geometric mixture of policy and reference: softmax of
    (1 - `mixture_weight`) policy logits + `mixture_weight` reference logits. The learner, which holds both, draws them; they join the samples."""
    mixture_weight: float = 0.0
    """That of the reference."""

    @property
    def beside_samples(self) -> tuple[str, ...]:
        """Sources of the responses of a group beside those that `sampling.samples_per_prompt` counts."""
        beside = ("greedy",) * self.greedy + ("reference",) * self.reference_samples
        return beside + ("mixture",) * self.mixture_samples + ("teacher",) * self.teacher + ("carried",) * (2 * self.carried)

    @property
    def reference_logprobs(self) -> bool:
        """Whether there are any: of a reference model, or of the weights that a pass starts from."""
        return self.reference or self.auxiliary

    @property
    def values(self) -> bool:
        """Whether there is a critic to ask."""
        return self.critic is not None

    def temperature(self, sampling: float) -> float:
        """At which log-probs are taken where responses are sampled at temperature `sampling`."""
        return sampling if self.sampling_temperature else 1.0


class Reported(NamedTuple):
    """A metric that few algorithms have, from `loss` at each optimizer step or from `figures` for each iteration."""

    name: str
    help: str
    unit: str
    origin: Literal["step", "iteration"] = "step"


class Algorithm(Component):
    """An algorithm is its hyper-parameters plus a pure loss. It is stateless and frozen: the configuration is the algorithm.

    Subclasses declare the class attributes and implement `items` and `loss`; the other methods are optional. A declaration that
    depends on a knob is a method of the same name under `by_knobs`.
    """

    metrics: ClassVar[tuple[Reported, ...]] = ()
    """What its loss and `figures` report and the catalogue (onlinerl/metrics) does not have."""
    unit: ClassVar[Unit]
    """What the summed loss is divided by the global count of."""
    needs: ClassVar[Needs]
    """What must be computed before `loss` can run."""
    reference: ClassVar[Reference]
    """The reference schedule that its paper uses."""
    loss_at_reference: ClassVar[float | None] = None
    """The loss per unit when policy and reference are the same, if the formula fixes it; the step-0 self-test checks it."""
    weighable: ClassVar[bool] = True
    """Whether what an item counts may be multiplied (`training.sample_weights`)."""

    def objection(self, plan: Plan) -> Objection | None:
        """What makes it pointless to run this as planned; None if nothing does."""
        return None

    def remarks(self, plan: Plan) -> list[str]:
        """What the knobs mean in this plan, where that is not what one might think."""
        return []

    def most_items(self, samples: int, pairs: int) -> int:
        """Upper bound of what `items` returns for a group of `samples` responses of which the builder makes at most `pairs`."""
        return pairs if self.needs.pairs else samples

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Mapping[str, int]]:
        """What one judged group trains, and how much was left out for which reason. `pairs` is empty unless `needs.pairs`."""
        raise NotImplementedError

    def score(self, sequence: TrainSequence) -> float:
        """What a response earns: the oracle's score, unless the algorithm puts another one in its place."""
        return sequence.score

    def select(self, items: Sequence[TrainItem]) -> tuple[Sequence[int], Mapping[str, int]]:
        """Places of the items of the iteration that are trained, in their order, and how many were left out for which reason: what can be said
        only once log-probs are filled in, or all items are known. `prepare` gets those that are left."""
        return range(len(items)), {}

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterable[TrainItem]:
        """See all items of the iteration, with log-probs and values filled in: advantages, whitening, weights.

        `past` is what `figures` said in each earlier iteration, oldest first, read from the run directory. Items are on the disk and read
        when they are asked for: go through them as often as needed rather than keep them, and yield one by one what becomes of them.
        """
        return items

    def order(self, items: Sequence[TrainItem]) -> Sequence[Sequence[int]]:
        """Places of the items of each stage, every item in one: a stage is shuffled, cut into optimizer steps and trained
        `training.epochs` times before the next one. `items` are those that `prepare` made."""
        return [range(len(items))]

    def figures(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Mapping[str, float]:
        """Finite figures of the whole iteration, from its items as `prepare` got them: reported, and kept for later iterations. What an
        algorithm must remember from one iteration to the next goes here, so that a resume remembers exactly the same."""
        return {}

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """The loss of one micro-batch as a sum over units."""
        raise NotImplementedError
