"""DNO as practised: "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences", Algorithm 2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field, ValidationInfo, field_validator

from onlinerl.algorithms.dpo import Dpo
from onlinerl.protocols.algorithm import Reference, by_knobs
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.labels import Judged
    from onlinerl.types.training import TrainItem, TrainSequence


class DnoPrct(Dpo):
    """DPO against the policy of the iteration's start, on all pairs (`pairing.name: all_pairs` by default) whose winner is good and clearly
    better than the loser. The stored answers of a teacher may be among the responses, and pairs of earlier iterations come back, if it is told so.

    `checkpoints.exports: best` keeps the best iterate, which the paper returns. Not the paper's: `floor`, 5 there (of 6); it is in units of the
    oracle's score, so no number suits all. Not the paper's: `margin`, 2 there (of 6); it is in the same units.
    """

    metrics = (
        Reported("teacher_won", "Pairs whose chosen response is the teacher's", "pairs", "iteration"),
        Reported("teacher_lost", "Pairs whose rejected response is the teacher's", "pairs", "iteration"),
        Reported("among_students", "Pairs of two responses of the policy", "pairs", "iteration"),
    )

    floor: float | None = None
    """Lowest score of a winner; None accepts any. In units of the oracle's score (win rates, if it gives none)."""
    margin: float | None = None
    """Smallest score gap between winner and loser; None accepts any."""
    margin_student: float | None = None
    """The same where the winner is the policy's own response; None is half of `margin`, as in the paper."""
    teacher: bool = False
    """The stored answer of each prompt (`reference_answer`) is judged with the samples, and may win or lose."""
    teacher_max_share: float = Field(0.3, ge=0, le=1)
    """At most such a share of the pairs of an iteration has the teacher's answer, on either side; with 0 there is no teacher."""
    teacher_decay: float = Field(0.5, gt=0, le=1)
    """Times that share of one iteration is that of the next one; 1 keeps it."""
    teacher_min_percentile: float = Field(0.05, ge=0, lt=1, validate_default=True)
    """The teacher's answer is chosen only if the reference gives it more log-prob per token than to such a share of the policy's own
    responses, because the policy cannot learn what is too far from it; 0 asks nothing."""
    ngram_repeats: int | None = Field(None, ge=2)
    """A sample in which some `ngram_size` tokens come so often is degenerate: it never wins, and loses to any response above the floor, whatever
    the oracle says; None looks for none. The paper has such a rule and does not say its numbers."""
    ngram_size: int = Field(8, ge=1)
    replay: float = Field(0.3, ge=0, lt=1)
    """At most so many pairs of the iteration before are trained once more, as a share of the new ones."""
    replay_decay: float = Field(0.5, gt=0, le=1)
    """Times the share of one iteration is that of the one before it: 0.3, 0.15, ... in the paper."""
    replay_max_age: int = Field(3, ge=1)
    """From how many iterations pairs come back."""

    @field_validator("teacher_max_share", "teacher_decay", "teacher_min_percentile")
    @classmethod
    def _teaches(cls, value: float, info: ValidationInfo) -> float:
        if value != cls.model_fields[str(info.field_name)].default and info.data.get("teacher") is False:
            raise ValueError("teacher is false, so nothing reads it")
        if (
            info.field_name == "teacher_min_percentile"
            and value
            and info.data.get("teacher")
            and info.data.get("reference_free")
        ):
            raise ValueError(
                "reference_free is set, so there is no reference that could say how probable an answer is; set it to 0"
            )
        return value

    @field_validator("ngram_size")
    @classmethod
    def _looks_for_any(cls, value: int, info: ValidationInfo) -> int:
        if value != cls.model_fields["ngram_size"].default and info.data.get("ngram_repeats", 0) is None:
            raise ValueError("ngram_repeats is null, so nothing reads it")
        return value

    @field_validator("replay_decay", "replay_max_age")
    @classmethod
    def _replays(cls, value: float, info: ValidationInfo) -> float:
        if value != cls.model_fields[str(info.field_name)].default and info.data.get("replay") == 0:
            raise ValueError("replay is 0, so nothing reads it")
        return value

    @by_knobs
    def needs(self) -> Needs:
        """Of DPO, with its own pairs, those of earlier iterations, and the teacher's answers."""
        shares = tuple(self.replay * self.replay_decay**age for age in range(self.replay_max_age) if self.replay)
        plain, taught = super().needs, self.teacher and self.teacher_max_share > 0
        return replace(plain, pairing="all_pairs", replay=shares, answers=taught or plain.answers, teacher=taught)

    @by_knobs
    def reference(self) -> Reference:
        """The policy that the iteration starts from, or none."""
        return "none" if self.reference_free else "previous"

    def select(self, items: Sequence[TrainItem]) -> tuple[Sequence[int], Mapping[str, int]]:
        """The pairs with the teacher's answer that the policy can learn, and not too many. Left out: `teacher_unlikely`, `teacher_share`."""
        kept, dropped = super().select(items)
        if not self.needs.teacher:
            return kept, dropped
        from onlinerl.ops.teachers import guarded

        left, more = guarded(items, kept, self.teacher_min_percentile, self.teacher_max_share, self.teacher_decay)
        return left, {**dropped, **more}

    def augmented(self, judged: Judged, items: Sequence[TrainItem]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs that pass, turned round where the winner is degenerate. Left out: `degenerate` (both are), `gap`, `floor`."""
        kept: list[TrainItem] = []
        dropped: Counter[str] = Counter()
        for item in items:
            winner, loser = item.sequences
            forced = self.degenerate(loser)
            if self.degenerate(winner):
                if forced:
                    dropped["degenerate"] += 1
                    continue
                item, winner, loser, forced = (
                    replace(item, sequences=(loser, winner), prob=1.0 - item.prob),
                    loser,
                    winner,
                    True,
                )
            reason = self.rejects(winner, loser, forced=forced)
            if reason is None:
                kept.append(item)
            else:
                dropped[reason] += 1
        return kept, dropped

    def degenerate(self, sequence: TrainSequence) -> bool:
        """Whether a sample repeats itself."""
        if self.ngram_repeats is None or sequence.source == "teacher":
            return False
        ids, n = tuple(sequence.response_ids), self.ngram_size
        if len(ids) < n + self.ngram_repeats - 1:
            return False
        return max(Counter(ids[i : i + n] for i in range(len(ids) - n + 1)).values()) >= self.ngram_repeats

    def rejects(self, winner: TrainSequence, loser: TrainSequence, *, forced: bool = False) -> str | None:
        """Why a pair does not pass: `gap` (below the margin), `floor` (the winner is too bad); None if it passes. `forced`: no gap is asked of it."""
        of_student = (self.margin and self.margin / 2) if self.margin_student is None else self.margin_student
        margin = self.margin if winner.source == "teacher" else of_student
        if not forced and margin is not None and winner.score - loser.score < margin:
            return "gap"
        return "floor" if self.floor is not None and winner.score < self.floor else None

    def figures(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """Whose responses won."""
        sources = Counter(tuple(s.source == "teacher" for s in item.sequences[:2]) for item in items)
        won, lost, among = sources[True, False], sources[False, True], sources[False, False]
        return {"teacher_won": float(won), "teacher_lost": float(lost), "among_students": float(among)}
