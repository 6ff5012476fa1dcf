"""Oracles that ask others: how those are written in the configuration, and how they are asked."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, Field, PlainSerializer, PrivateAttr, ValidationInfo

from onlinerl.budget import Account
from onlinerl.config.roles import build
from onlinerl.errors import ConfigError, OnlineRLError, OracleError
from onlinerl.oracle_calls import Caller
from onlinerl.protocols.keys import Resumable, Seconds
from onlinerl.protocols.oracle import Oracle, moved
from onlinerl.types import Cost, Failure, Query, Replies, Verdict
from onlinerl.types.directions import Directions
from onlinerl.types.labels import COMPONENT, RESERVED

Result = Verdict | Failure


def _built(spec: Any, section: str) -> Any:
    if not isinstance(spec, Mapping):
        if isinstance(spec, Oracle):
            return spec
        fix = f"it is a section: write {section}={{name: {spec if isinstance(spec, str) else 'math_verifier'}}}"
        raise ConfigError(f"is {spec!r}", field=section, fix=fix)
    try:
        return build(spec, "oracle")
    except ConfigError as error:
        raise moved(error, section) from None


def _one(spec: Any, info: ValidationInfo) -> Any:
    return _built(spec, f"oracle.{info.field_name}")


def _one_or_none(spec: Any, info: ValidationInfo) -> Any:
    return None if spec is None else _one(spec, info)


def _several(specs: Any, info: ValidationInfo) -> Any:
    key = f"oracle.{info.field_name}"
    if not isinstance(specs, Mapping):
        what = "a list" if isinstance(specs, list) else repr(specs)
        fix = "give each a name of your own: {correct: {name: math_verifier}, helpful: {name: reward_model, path: ...}}"
        raise ConfigError(f"is {what}", field=key, fix=fix)
    for name in specs:
        if not isinstance(name, str) or not COMPONENT.fullmatch(name) or name in RESERVED:
            cause = f"{name!r} is no name for an oracle: lower-case letters, digits and _, and not {' or '.join(RESERVED)}"
            raise ConfigError(cause, field=key, fix="choose another one")
    return {name: _built(spec, f"{key}.{name}") for name, spec in specs.items()}


def _written(oracle: Oracle) -> dict[str, Any]:
    """As the configuration has it, with every default."""
    kind = type(oracle)
    home, _, file = kind.__module__.rpartition(".")
    return {"name": file if home == __package__ else f"{kind.__module__}.{kind.__qualname__}", **oracle.model_dump(mode="json")}


def _written_or_none(oracle: Oracle | None) -> dict[str, Any] | None:
    return None if oracle is None else _written(oracle)


_AS_WRITTEN = PlainSerializer(_written)
Inner = Annotated[Oracle, BeforeValidator(_one), _AS_WRITTEN]
"""A key that holds an oracle: `name` and the keys of that oracle."""
MaybeInner = Annotated[Oracle | None, BeforeValidator(_one_or_none), PlainSerializer(_written_or_none)]
"""The same where there need be none."""
Members = Annotated[dict[str, Annotated[Oracle, _AS_WRITTEN]], BeforeValidator(_several), Field(min_length=1)]
"""A key that holds several, each by a name of its own."""


class Container(Oracle):
    """Base of oracles that ask others. Those are asked as they would be alone: with their own calls, deadlines and further tries, and
    never with more calls at a time than they allow."""

    groups_per_call: Resumable[int] = Field(16, ge=1)
    """Groups that are asked about together. Each inner oracle gets them in calls of its own `groups_per_call`."""
    max_concurrent: Resumable[int] = Field(8, ge=1)
    call_timeout_s: Resumable[Seconds] = 86400.0  # each inner oracle has a deadline of its own
    retries: Resumable[Literal[0]] = 0
    """Each inner oracle has its own."""

    _slots: dict[str, threading.BoundedSemaphore] = PrivateAttr(default_factory=dict)
    _slots_lock: Any = PrivateAttr(default_factory=threading.Lock)
    _callers: dict[str, Caller] = PrivateAttr(default_factory=dict)

    def located(self, folders: Sequence[Path]) -> Self:
        """The same, with every inner oracle located."""
        return self.with_inner({key: each.located(folders) for key, each in self.inner().items()})

    def open(self) -> None:
        """Open the inner oracles. Idempotent.

        Raises:
            OracleError: of one of them, in its section.
        """
        for key, each in self.inner().items():
            with _in_section(key):
                each.open()

    def close(self) -> None:
        """Close them."""
        for each in self.inner().values():
            each.close()

    def remember(self, folder: Path) -> None:
        """Each gets a folder of its own."""
        for key, each in self.inner().items():
            each.remember(folder / key)

    def recall(self, folder: Path) -> None:
        """Each from its own."""
        for key, each in self.inner().items():
            each.recall(folder / key)

    def charge(self, account: Account) -> bool:
        """Each inner oracle is paid for on its own."""
        self._callers = {key: Caller(each, account) for key, each in self.inner().items()}
        return True

    def unlabelled(self, folder: Path) -> Cost:
        """Of all of them."""
        return total(each.unlabelled(folder / key) for key, each in self.inner().items())

    def recorded(self, answers: Sequence[tuple[Query, Result]]) -> None:
        """Each was asked the same, or less."""
        for each in self.inner().values():
            each.recorded(answers)

    def requests(self, responses: int) -> int | None:
        """Of all of them together."""
        counts = [each.requests(responses) for each in self.inner().values()]
        known = [one for one in counts if one is not None]
        return sum(known) if known else None

    @property
    def opening_cost(self) -> Cost:
        """Of all of them."""
        return total(each.opening_cost for each in self.inner().values())

    def most_usd(self, prompt_tokens: float, response_tokens: float, responses: int) -> float | None:
        """Of all of them together."""
        prices = [each.most_usd(prompt_tokens, response_tokens, responses) for each in self.inner().values()]
        known = [one for one in prices if one is not None]
        return sum(known) if known else None

    @property
    def needs_reference_answer(self) -> bool:
        """If one of them does."""
        return any(each.needs_reference_answer for each in self.inner().values())

    @property
    def remarks(self) -> Sequence[str]:
        """Of all of them."""
        return [f"{key}: {remark}" for key, each in self.inner().items() for remark in each.remarks]

    def _version(self, **own: Any) -> str:
        """A hash of the versions inside and of what else could change a verdict."""
        inner = {key: each.version for key, each in sorted(self.inner().items())}
        temperatures = {key: each.preference_temperature for key, each in sorted(self.inner().items())}
        said = json.dumps([inner, temperatures, own], sort_keys=True, default=str)
        return f"{type(self).__name__.lower()}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"

    def _ask(self, key: str, queries: Sequence[Query]) -> list[Result]:
        """What an inner oracle says, one result per query.

        Raises:
            OracleError: as it raised it, in its section.
        """
        if not queries:
            return []
        oracle = self.inner()[key]
        with self._slots_lock:
            slots = self._slots.setdefault(key, threading.BoundedSemaphore(oracle.max_concurrent))
        calls = [queries[i : i + oracle.groups_per_call] for i in range(0, len(queries), oracle.groups_per_call)]
        with _in_section(key):
            caller = self._callers.get(key) or Caller(oracle)
            return [result for one in _all(caller, calls, slots) for result in one]

    def _ask_all(self, queries: Sequence[Query]) -> list[dict[str, Result]]:
        """What each inner oracle says, by its key, for each query."""
        answers = {key: self._ask(key, queries) for key in self.inner()}
        return [{key: said[i] for key, said in answers.items()} for i in range(len(queries))]


class OnBase(Container):
    """Base of those that say what one oracle says, changed in some way: what is said, and about what, is as there."""

    base: Inner
    """The oracle that is asked."""

    @property
    def components(self) -> tuple[str, ...] | None:
        """Those of `base`."""
        return self.base.components

    @property
    def compares(self) -> bool | None:
        """As `base`."""
        return self.base.compares

    @property
    def gives_uncertainty(self) -> bool | None:
        """As `base`."""
        return self.base.gives_uncertainty

    @property
    def directions(self) -> Directions | None:
        """Those of `base`."""
        return self.base.directions


class Chooser(Container):
    """Base of those of which a different one judges each group: their scores have no common scale, so its verdicts are preferences."""

    @property
    def components(self) -> tuple[str, ...]:
        """None: nobody scores every group."""
        return ()

    @property
    def compares(self) -> bool:
        """Always."""
        return True

    @property
    def gives_uncertainty(self) -> bool:
        """Never."""
        return False


def _all(caller: Caller, calls: Sequence[Sequence[Query]], slots: threading.BoundedSemaphore) -> list[list[Result]]:
    """The results of several calls, as many at a time as the oracle allows."""
    results: list[list[Result]] = [[] for _ in calls]
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(calls)):
        todo.put(i)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not errors:
                i = todo.get_nowait()
                with slots:
                    results[i] = [result for answers in caller.call(calls[i]) for _, result in answers]
        except queue.Empty:
            pass
        except BaseException as error:  # noqa: BLE001  (raised again where the answers are waited for)
            errors.append(error)

    # Daemons, which do not hold up the end of the process; the last one is this thread.
    others = [
        threading.Thread(target=work, name="asking", daemon=True)
        for _ in range(min(len(calls), caller.oracle.max_concurrent) - 1)
    ]
    for each in others:
        each.start()
    work()
    for each in others:
        each.join()
    if errors:
        raise errors[0]
    return results


@contextmanager
def _in_section(key: str) -> Iterator[None]:
    try:
        yield
    except OnlineRLError as error:
        raise moved(error, f"oracle.{key}") from error.__cause__


def total(costs: Iterable[Cost]) -> Cost:
    """Of all of them together."""
    return reduce(Cost.plus, costs, Cost())


def cost_of(results: Mapping[str, Result]) -> Cost:
    """Of all of them together."""
    return total(each.cost for each in results.values())


def replies_of(results: Mapping[str, Result]) -> Replies:
    """Of all of them together."""
    return reduce(Replies.plus, (each.replies for each in results.values()), Replies())


def failed(results: Mapping[str, Result]) -> Failure | None:
    """The first failure among the results of one group, with what all have cost; None if there is none."""
    for key, each in results.items():
        if isinstance(each, Failure):
            return replace(each, message=f"{key}: {each.message}", cost=cost_of(results), replies=replies_of(results))
    return None


def verdicts(results: Mapping[str, Result]) -> dict[str, Verdict]:
    """Of a group of which none has failed; by the last part of the key."""
    return {key.rpartition(".")[2]: cast(Verdict, each) for key, each in results.items()}


def words(results: Mapping[str, Verdict]) -> str | None:
    """What the inner oracles said in words, for people."""
    return "\n".join(f"{key}: {each.raw}" for key, each in results.items() if each.raw) or None


def keep(file: Path, said: Mapping[str, Any]) -> None:
    """Write a JSON file that is whole, and on the disk, when it is there at all.

    Raises:
        OracleError: if the disk does not take it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        with new.open("w") as opened:
            json.dump({"said": said, "sha256": _checksum(said)}, opened, indent=1)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(new, file)
    except OSError as error:
        raise OracleError(f"{file} cannot be written: {error}", field="runs", fix="make room, then resume") from error


def kept(file: Path) -> dict[str, Any] | None:
    """What `keep` has written; None if it has not.

    Raises:
        OracleError: if it cannot be read, or does not agree with its checksum.
    """
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("it does not hold an object")
        if found.keys() & {"said", "sha256"}:  # older versions wrote no checksum
            if found.keys() != {"said", "sha256"} or found["sha256"] != _checksum(found["said"]):
                raise ValueError("its content does not agree with its checksum")
            found = found["said"]
    except (OSError, ValueError) as error:
        raise OracleError(f"{file} is damaged or cannot be read: {error}", field="runs", fix="restore or remove it") from error
    said: dict[str, Any] = found
    return said


def _checksum(said: Any) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
