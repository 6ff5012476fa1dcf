"""Comparisons as sequences of tokens: which fit, and the items of each step, made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from onlinerl.errors import ConfigError
from onlinerl.preference_models import Unreadable
from onlinerl.protocols.objective import Objective
from onlinerl.types import RawPrompt, TrainItem, TrainSequence
from onlinerl.types.preferences import Comparison


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Lays prompts and responses out as the model reads them.

    Args:
        objective: of the model.
        tokenizer: of the model.
        model: its path, for messages.
    """

    objective: Objective
    tokenizer: Any
    model: str

    def tokens(self, prompt: RawPrompt, first: str, second: str) -> tuple[list[int], list[int]]:
        """Of the two sequences in which `first` is compared with `second`.

        Raises:
            ConfigError: if the tokenizer cannot lay them out.
        """
        try:
            return self.objective.encode(self.tokenizer, prompt, first, second, self.model)
        except Unreadable as error:
            raise ConfigError(error.cause, field="model", fix=error.fix) from error
        except Exception as error:  # chat templates are programs that raise what they like, e.g. on a role they do not know
            raise ConfigError(
                f"the model's chat template rejects prompt {prompt.id!r}: {error}",
                field="model",
                fix="use roles and turns that the model knows (some know no system message), or another model",
            ) from error

    def sequences(self, prompt: RawPrompt, first: str, second: str) -> tuple[TrainSequence, TrainSequence]:
        """The same as what a learner takes."""
        one, other = self.tokens(prompt, first, second)
        return _sequence(one), _sequence(other)


def _sequence(tokens: Sequence[int]) -> TrainSequence:
    return TrainSequence(prompt_ids=tuple(tokens), response_ids=())


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The comparisons whose sequences are not too long."""

    comparisons: list[Comparison]
    lengths: list[tuple[int, int]]
    """Tokens of the two sequences of each."""
    left_out: int
    highest: int
    """The largest token id."""

    @staticmethod
    def of(comparisons: Sequence[Comparison], reader: Reader, max_length: int) -> Fitting:
        """Goes through all of them once."""
        kept, lengths, highest = [], [], -1
        for each in comparisons:
            first, second = reader.tokens(each.prompt, each.chosen, each.rejected)
            highest = max(highest, *first, *second)
            if max(len(first), len(second)) <= max_length:
                kept.append(each)
                lengths.append((len(first), len(second)))
        return Fitting(comparisons=kept, lengths=lengths, left_out=len(comparisons) - len(kept), highest=highest)


class Items(Sequence[TrainItem]):
    """What is trained: tokens exist for the comparisons of a step only."""

    def __init__(self, comparisons: Sequence[Comparison], reader: Reader) -> None:
        self._comparisons, self._reader = comparisons, reader

    def __len__(self) -> int:
        return len(self._comparisons)

    @overload
    def __getitem__(self, place: int) -> TrainItem: ...
    @overload
    def __getitem__(self, place: slice) -> list[TrainItem]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        one = self._comparisons[place]
        return self._reader.objective.item(one, self._reader.tokens(one.prompt, one.chosen, one.rejected))

    def __iter__(self) -> Iterator[TrainItem]:
        return (self[i] for i in range(len(self)))
