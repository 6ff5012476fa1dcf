"""Dynamic sampling: a prompt whose responses are judged all alike teaches nothing and is replaced by another one.

"DAPO: An Open-Source LLM Reinforcement Learning System at Scale", which samples until there are enough. Here an iteration goes on with what
it has after `sampling.max_rounds`: that a policy solves nearly all prompts, or none, is no reason to end a run.
"""

from __future__ import annotations

from collections.abc import Mapping

from onlinerl.controller import health
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.tally import Sampled
from onlinerl.types import Prompt, Verdict


class Rounds:
    """Which prompts are sampled, `prompts.per_iteration` at a time. Everything depends on verdicts only, and on no order of arrival."""

    def __init__(self, it: Iteration) -> None:
        self._it = it
        self._wanted = it.parts.config.prompts.per_iteration
        self._dealt_with: set[str] = set()
        self.number = 1
        """How many there were, this one included."""
        self.prompts, self.next_cursor = it.prompts(1)
        """All that were asked for, in their order, and the cursor behind them."""
        self._useful: list[str] = []

    @property
    def kept(self) -> list[str]:
        """What the iteration goes on with: the first of the useful prompts, by id."""
        return self._useful[: self._wanted]

    @property
    def useful(self) -> int:
        """Prompts with responses that the oracle tells apart. Those that are not kept are surplus of the last round."""
        return len(self._useful)

    def more(self, sampled: Mapping[str, Sampled]) -> list[Prompt]:
        """The prompts of another round, once everything sampled so far is judged; none if there are enough, or no more may be sampled.

        Args:
            sampled: what was sampled, by prompt.

        Raises:
            Stopped: if the run is being stopped.
        """
        it = self._it
        # The group of a prompt with rejected responses is judged only when nothing is sampled any more, so it cannot be waited for.
        whole = [p.id for p in self.prompts if not sampled[p.id].rejected]
        while not self._dealt_with.issuperset(whole):
            self._dealt_with.update(it.answers.take(len(whole)))
        results = [None if label is None else label.result for label in it.labels().select(whole)]
        self._useful = [
            prompt_id
            for prompt_id, result in zip(whole, results, strict=True)
            if isinstance(result, Verdict) and health.spread(result, it.needs.components) >= health.TIE
        ]
        before = len(self.prompts)
        if self.useful >= self._wanted or self.number == it.most_rounds:
            return []
        prompts, cursor = it.prompts(self.number + 1)
        if len(prompts) > before:
            self.prompts, self.next_cursor, self.number = prompts, cursor, self.number + 1
        return prompts[before:]

    def shortage(self) -> str | None:
        """What is said where there are not enough."""
        if self.useful >= self._wanted:
            return None
        return (
            f"iteration {self._it.number}: of {len(self.prompts)} prompts in {self.number} rounds, the oracle tells the responses to "
            f"{self.useful} apart, and {self._wanted} were wanted; it goes on with these"
        )
