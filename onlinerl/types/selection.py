"""Which prompts an iteration samples: what is chosen from, what is known of each, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onlinerl.types.prompts import Prompt, RawPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Selected:
    """A prompt that an iteration may sample."""

    prompt_id: str
    probability: float
    """With which it was drawn at its turn, given those before it; 1 where nothing was drawn."""
    reason: str
    """Why, in a few words, for people."""
    reused_from: int | None = None
    """The iteration whose responses to the prompt are trained on once more, with what was said of them (`Visit.sampled_in`); None: it is
    sampled now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What the oracle said of the responses to a prompt when it was trained on."""

    iteration: int
    scores: tuple[float, ...]
    """Finite, one for each judged response of the policy; at least one."""
    components: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Other scores of the same responses that the selector reads, by name; what the oracle did not give is not there."""
    reused_from: int | None = None
    """The iteration in which the responses were sampled, if that was an earlier one."""

    @property
    def sampled_in(self) -> int:
        """The iteration in which the responses were sampled."""
        return self.iteration if self.reused_from is None else self.reused_from


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What a selector chooses from, and all that it may know: nothing else, so that a resume chooses the same."""

    prompts: Sequence[Prompt]
    """All training prompts, in an order of no meaning."""
    iteration: int
    """From 1 on."""
    seed: int
    """The run's."""
    per_iteration: int
    """How many it must choose at least."""
    most: int
    """How many are asked for: with dynamic sampling, those that take the place of others come behind the first `per_iteration`."""
    reuse: bool
    """Whether a prompt may be sampled in more than one iteration."""
    asked: Mapping[str, int]
    """In how many earlier iterations each prompt was sampled; none is not there."""
    visits: Mapping[str, Visit]
    """The last time that each prompt was sampled and judged before the weights that sample now were trained: with `schedule.max_lag: 1` the
    iteration before is not in it. What was never judged is not there."""
    first_visits: Mapping[str, Visit] = field(default_factory=dict)
    """The first time, for selectors that say `reads_first_visits`."""

    @property
    def open(self) -> list[Prompt]:
        """Those that may be sampled now."""
        return [prompt for prompt in self.prompts if self.reuse or not self.asked.get(prompt.id)]


@dataclass(frozen=True, kw_only=True)
class SelectionPlan:
    """What a selector is told of a run before it starts."""

    prompts: Sequence[Prompt] | Sequence[RawPrompt]
    """All training prompts; as they are written, where the model that tokenises them is not on this machine."""
    iterations: int
    seed: int
    per_iteration: int
    rounds: int
    """How often so many are sampled in an iteration at most: more than once with dynamic sampling."""
    samples_per_prompt: int
    reuse: bool
    max_lag: int = 0
    """By how many iterations `Pool.visits` are behind the one before, at most."""


def content(prompt: Prompt | RawPrompt) -> str:
    """What is asked, whatever its id: the same before and after a prompt is rendered."""
    said = [f"{message.role}\x1f{message.content}" for message in prompt.messages]
    return "\x1e".join(said) if said else prompt.text
