"""Responses of earlier iterations that are trained on once more, instead of sampling a prompt anew.

They are copied into the iteration's own table of responses, each with the version that sampled it. So whoever comes after reads them like
any others: the oracle is asked the same question, which the ledger knows, and log-probs are those of the present models.

Source: "OPTune: Efficient Online Preference Tuning" (arXiv 2406.07657).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from onlinerl.controller.iteration import Iteration
from onlinerl.controller.parts import batched
from onlinerl.controller.replay import earlier
from onlinerl.controller.tally import Sampled
from onlinerl.errors import StoreError
from onlinerl.types import Group, Prompt

AT_ONCE = 64
"""Prompts whose responses are read and written together."""


class Reused:
    """The responses of an iteration that are not sampled."""

    def __init__(self, it: Iteration) -> None:
        self._it = it
        self.taken: dict[str, Sampled] = {}
        """What they are, by prompt."""

    def take(self, prompts: Sequence[Prompt]) -> list[str]:
        """Put those of these prompts into the table of the iteration; returns the prompts whose responses were not there yet.

        Raises:
            StoreError: if an earlier iteration does not have them.
        """
        reused, table, added = self._it.reused, self._it.groups(), list[str]()
        wanted = sorted((p.id for p in prompts if p.id in reused), key=lambda prompt_id: reused[prompt_id])
        for number, ids in groupby(wanted, key=lambda prompt_id: reused[prompt_id]):
            for some in batched(list(ids), AT_ONCE):
                groups = [self._of(number, prompt_id, group) for prompt_id, group in self._stored(number, some)]
                self.taken |= {group.prompt.id: Sampled.of(group) for group in groups}
                missing = table.missing(some)
                table.append([group for group in groups if group.prompt.id in missing])
                added += missing
                self._it.check_stop()
        return added

    @property
    def by_age(self) -> dict[str, int]:
        """How many prompts, by how many iterations ago their responses were sampled."""
        ages = Counter(self._it.number - self._it.reused[prompt_id] for prompt_id in self.taken)
        return {str(age): ages[age] for age in sorted(ages)}

    @property
    def tokens(self) -> int:
        """Of all these responses."""
        return sum(one.tokens for one in self.taken.values())

    def _stored(self, number: int, prompt_ids: Sequence[str]) -> list[tuple[str, Group | None]]:
        return list(zip(prompt_ids, earlier(self._it, number).groups().select(prompt_ids), strict=True))

    @staticmethod
    def _of(number: int, prompt_id: str, group: Group | None) -> Group:
        if group is None:
            raise StoreError(
                f"the responses of iteration {number} to prompt {prompt_id!r}, which are to be trained on once more, are not there",
                field="rollouts",
                fix=f"restore iteration {number} of the run",
            )
        return replace(group, rejected=())  # what was thrown away then is counted there
