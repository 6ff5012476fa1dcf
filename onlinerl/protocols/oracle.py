"""The role of oracles: they judge groups of responses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pydantic import Field

from onlinerl.budget import Account
from onlinerl.errors import OnlineRLError, OracleError
from onlinerl.protocols.component import Component
from onlinerl.protocols.keys import CustomResources, Resumable, Seconds
from onlinerl.types import Cost, Failure, Query, Verdict

if TYPE_CHECKING:
    from onlinerl.protocols.refreshing import Refreshing, Reloads
    from onlinerl.types.directions import Directions


class Figure(NamedTuple):
    """A metric of the catalogue."""

    name: str
    value: float
    n: int = 1
    """Answers that it was counted in; the interval of a share (unit `ratio`) follows from them."""
    labels: Mapping[str, str] | None = None
    se: float | None = None
    """Standard error, of what is no share."""


class Trainable(NamedTuple):
    """Weights of an oracle that a training can replace."""

    objective: str
    """What they are trained for, see `onlinerl.preference_models`."""
    path: str
    """Of those that it was configured with."""
    max_length: int
    """Of a sequence, in tokens."""


class Oracle(Component):
    """Judges groups of responses. Configured like an algorithm; heavy state is loaded by `open`, never at import.

    One that returns preferences without scores only compares: it is never asked about a single response.
    """

    preference_temperature: float = Field(1.0, gt=0)
    """Where scores must stand in for preferences, P(i beats j) = sigmoid((s_i - s_j) / preference_temperature): Bradley-Terry. 1 suits
    a reward model, whose scores are log-odds by training; an oracle with other units needs another. Comparisons do not read it, but
    for those that an oracle gives as log-odds, which are divided by it."""
    groups_per_call: Resumable[int] = Field(1, ge=1)
    """Groups that one call of `judge` gets. A call that fails is asked again as a whole: keep it at 1 where answers cost money."""
    max_concurrent: Resumable[int] = Field(1, ge=1)
    """Calls that may be under way at the same time, each in a thread of its own: more than one needs an oracle that allows it."""
    call_timeout_s: Resumable[Seconds] = 120.0
    """Longest wait for the next answer of a call."""
    retries: Resumable[int] = Field(2, ge=0)
    """How often a call is tried again after a missed deadline, a lost connection or an HTTP status that may pass (408, 429, 5xx)."""

    if not TYPE_CHECKING:  # type checkers know that fields are frozen, and which there are

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_"):
                what = "is a knob that only the configuration sets" if name in type(self).model_fields else "is no knob"
                raise OracleError(
                    f"{type(self).__name__} sets `self.{name}`, which {what}",
                    field="oracle",
                    fix=f"keep state that is no knob private: `_{name}: Any = PrivateAttr(None)` in the class (from pydantic), "
                    f"set in `open` as `self._{name}`",
                )
            super().__setattr__(name, value)

    def located(self, folders: Sequence[Path]) -> Self:
        """The same, so that it means the same in every working directory: relative paths are looked for in these folders, in order."""
        return self

    def of_policy(self, model: str) -> Self:
        """The same in a run that begins with this model (directory or hub id): keys that mean the policy itself where they are left out mean it
        from now on."""
        asked = ((key, each, each.of_policy(model)) for key, each in self.inner().items())
        changed = {key: found for key, each, found in asked if found is not each}
        return self.with_inner(changed) if changed else self

    @property
    def starts(self) -> str | None:
        """What `open` starts on this machine, in words, where that is too much for a check that nobody follows by a run; None if nothing."""
        return None

    def inspect(self) -> None:
        """Find out what is wrong without opening anything.

        Raises:
            OracleError: naming field, cause and fix.
        """

    def open(self) -> None:
        """Load models, open connections. Called once in the process that will judge, but not in the thread that `judge` runs in."""

    def close(self) -> None:
        """Release what `open` took."""

    def remember(self, folder: Path) -> None:
        """Where it may keep what it has paid for before a verdict is complete: a folder of the run, which a resume gives again. Called
        before `open`; nothing need be kept."""

    def recall(self, folder: Path) -> None:
        """Where an earlier attempt of the run has kept what `open` would find out again; called before `open`, when a run is resumed."""

    def requests(self, responses: int) -> int | None:
        """How many questions one group of so many responses costs, if nothing fails; None where that is nobody's concern."""
        return None

    @property
    def asks_as_needed(self) -> bool:
        """Whether `requests` is an upper bound, because what a group needs shows when it is judged."""
        return any(each.asks_as_needed for each in self.inner().values())

    @property
    def opening_cost(self) -> Cost:
        """What the questions of `open` have cost."""
        return Cost()

    def charge(self, account: Account) -> bool:
        """Whether it asks this account before each question of its own. If not, whoever asks it does so for whole groups, and cannot know
        before the first one what a group costs, but for its `requests`."""
        return False

    def unlabelled(self, folder: Path) -> Cost:
        """What the answers have cost that it keeps in a folder (`remember`) and that are no part of a label yet."""
        return Cost()

    def recorded(self, answers: Sequence[tuple[Query, Verdict | Failure]]) -> None:
        """These are on the disk as labels, with what they have cost: nothing need be kept of them."""

    def most_usd(self, prompt_tokens: float, response_tokens: float, responses: int) -> float | None:
        """About what one group costs at most, in dollars, with prompts and responses of so many tokens each, where that is known."""
        return None

    @property
    def asks_people(self) -> bool:
        """Whether it has a queue of comparisons for people, in the folder that `remember` names."""
        return False

    def people(self, groups: int, responses: int, *, heldout: bool = False) -> int:
        """How many comparisons people are asked for at most about so many groups of one iteration; `heldout`: answers to held-out prompts."""
        return sum(each.people(groups, responses, heldout=heldout) for each in self.inner().values())

    def figures(self) -> Sequence[Figure]:
        """What a run records of it whenever an iteration is labelled, beside what its verdicts show."""
        return [figure for each in self.inner().values() for figure in each.figures()]

    @property
    def version(self) -> str:
        """Hash or name of everything that could change a verdict."""
        raise NotImplementedError

    @property
    def needs_reference_answer(self) -> bool:
        """True if prompts must carry a reference answer."""
        return False

    @property
    def directions(self) -> Directions | None:
        """What each prompt must say of how its responses are judged; None where all are judged alike."""
        return None

    @property
    def refreshing(self) -> Refreshing | None:
        """How its reward model is trained further between iterations; None where it stays as it is."""
        return None

    @property
    def following(self) -> Reloads | None:
        """What takes on the weights of the iterate that each iteration samples from; None where they stay."""
        return None

    @property
    def components(self) -> tuple[str, ...] | None:
        """Names of the scores that it gives beside the score (`Verdict.components`); None where only a verdict shows it."""
        return None

    @property
    def compares(self) -> bool | None:
        """Whether it only compares responses with each other (preferences without scores); None where only a verdict shows it."""
        return None

    @property
    def gives_uncertainty(self) -> bool | None:
        """Whether its verdicts say how far several judgements disagree (`Verdict.uncertainty`); None where only a verdict shows it."""
        return None

    @property
    def remarks(self) -> Sequence[str]:
        """What to know about it before a run, once it is open; `check` says it."""
        return ()

    def inner(self) -> dict[str, Oracle]:
        """The oracles that it asks, each by the key that holds it, e.g. `members.helpful`: fields that are oracles, or mappings of them."""
        found: dict[str, Oracle] = {}
        for field in type(self).model_fields:
            value = getattr(self, field)
            if isinstance(value, Oracle):
                found[field] = value
            elif isinstance(value, Mapping):
                found |= {f"{field}.{key}": each for key, each in value.items() if isinstance(each, Oracle)}
        return found

    def with_inner(self, inner: Mapping[str, Oracle]) -> Self:
        """The same, asking these instead; keys as `inner` gives them."""
        update: dict[str, Any] = {}
        for key, oracle in inner.items():
            field, _, name = key.partition(".")
            update[field] = {**update.get(field, getattr(self, field)), name: oracle} if name else oracle
        return self.model_copy(update=update)

    def judge(self, queries: Sequence[Query]) -> Iterable[Verdict | Failure]:
        """One result per query, in order: a list, or an iterator that yields each as soon as it is known.

        What an iterator has yielded is on disk before the next one is waited for, so that nothing paid for is lost. Where there is
        no judgement, the result is a Failure, which is counted. An exception becomes one too, after another try if its cause may
        pass; an OracleError stops the run.
        """
        raise NotImplementedError

    def ask(self, queries: Sequence[Query]) -> list[Verdict | Failure] | Iterator[Verdict | Failure]:
        """`judge` as the rest of the system calls it: every answer is checked before anybody believes it.

        A list where `judge` gives one, else an iterator. A Verdict with bad numbers becomes a Failure; a good one gets the temperature of
        this oracle.

        Raises:
            OracleError: if `judge` answers with something that is no list of Verdicts and Failures, one per query.
        """
        results = self.judge(queries)
        checked = self._checked(queries, results)
        return list(checked) if isinstance(results, list | tuple) else checked

    def _checked(self, queries: Sequence[Query], results: Iterable[Verdict | Failure]) -> Iterator[Verdict | Failure]:
        answered = 0
        if isinstance(results, Sized) and len(results) != len(queries):  # no telling which answer belongs to which query
            raise self._miscounted(len(results), len(queries))
        for answered, result in enumerate(results, start=1):
            if answered > len(queries):
                break
            if not isinstance(result, Verdict | Failure):
                raise OracleError(
                    f"{type(self).__name__} returned a {type(result).__name__}",
                    field="oracle",
                    fix="return a Verdict or a Failure (onlinerl.types) for each query",
                )
            if isinstance(result, Verdict):
                problem = result.problem(len(queries[answered - 1].responses))
                yield problem or replace(result, temperature=self.preference_temperature)
            else:
                yield result
        if answered != len(queries):
            raise self._miscounted(answered, len(queries))

    def _miscounted(self, results: int, queries: int) -> OracleError:
        return OracleError(
            f"{type(self).__name__} returned {results} results for {queries} queries",
            field="oracle",
            fix="return one result per query, in order",
        )


class ModelOracle(Oracle):
    """An oracle that loads weights. On a cluster it runs in processes of its own, for which room is reserved before anything is
    loaded; each gets an equal share of the groups."""

    max_concurrent: Resumable[Literal[1]] = 1  # a model computes one call at a time; see `replicas`
    replicas: Resumable[int] = Field(1, ge=1)
    """Processes that judge in parallel, each with a copy of the weights."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """`auto` takes a whole GPU per replica where the run uses GPUs."""
    cpus: Resumable[int] = Field(0, ge=0)
    """CPUs reserved per replica; 0 shares those of engine and learner, which work at other times."""
    threads: Resumable[int | None] = Field(None, ge=1)
    """Threads that a replica on a CPU computes with; the cores of its machine divided by the replicas by default."""
    resources: Resumable[CustomResources] = Field(default_factory=dict)
    """Extra Ray resources per replica, e.g. {oracle_node: 1} to choose a node."""
    start_timeout_s: Resumable[Seconds] = 900.0

    def paths(self) -> dict[str, str]:
        """Directories or hub ids of what it is made of, by the keys that name them, where it is made of models alone."""
        return {}

    def absent(self) -> str | None:
        """The hub id of its weights if they are not on this machine: a run fetches them, a check goes on without them."""
        return None

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the scores that it gives beside the score (`Verdict.components`)."""
        return ()

    @property
    def trainable(self) -> Trainable | None:
        """Of weights that `reload` can replace by what they were trained to; None where they stay."""
        return None

    def reload(self, path: str) -> None:
        """Answer with these weights of the same kind from now on; they are read when they are needed. The version is another one."""
        raise NotImplementedError

    def inspect(self) -> None:
        """Find out what is wrong without loading the weights.

        Raises:
            OracleError: if they cannot be those of such an oracle.
        """
        raise NotImplementedError


def leaves(oracle: Oracle, section: str = "oracle") -> dict[str, Oracle]:
    """The oracles that ask no other one, by their section of the configuration: of `composite`, `oracle.members.helpful` and so on; any
    other is its own only leaf."""
    inner = oracle.inner()
    if not inner:
        return {section: oracle}
    return {key: leaf for name, each in inner.items() for key, leaf in leaves(each, f"{section}.{name}").items()}


def with_weights(oracle: Oracle) -> dict[str, ModelOracle]:
    """Those of the leaves that load weights, by their section, in the order in which they are placed."""
    return {section: leaf for section, leaf in leaves(oracle).items() if isinstance(leaf, ModelOracle)}


def moved(error: OnlineRLError, section: str) -> OnlineRLError:
    """An error of an oracle in another section than `oracle`, e.g. `oracle.members.helpful`: with the keys that it names where they are."""
    if error.field is None or section == "oracle" or not re.match(r"oracle\b", error.field):
        return error
    field, fix = section + error.field.removeprefix("oracle"), re.sub(r"\boracle\.(?=[a-z])", f"{section}.", error.fix or "")
    same: OnlineRLError = type(error)(error.cause, field=field, fix=fix or None)
    return same
