"""What an algorithm must be given."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from onlinerl.types.goals import Goals

OffPolicy = Literal["valid", "corrected", "approximate", "refused"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Needs:
    """What an algorithm must be given: all that loop, learner and checks read of it. Nothing is computed that nobody asked for."""

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
