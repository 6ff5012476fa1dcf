"""Asks people which of two responses is better: a durable queue of comparisons beside another oracle, answered at the page of `onlinerl people`.

Sources: "Chatbot Arena: An Open Platform for Evaluating LLMs by Human Preference" (arXiv 2403.04132) for blind comparisons with ties and
"both are bad"; "Hybrid Preferences: Learning to Route Instances for Human vs. AI Feedback" (arXiv 2410.19133) for sharing them out between
people and an AI; "Cultivating Pluralism In Algorithmic Monoculture" (arXiv 2507.09650) for several annotators of one comparison.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from onlinerl.budget import Account
from onlinerl.errors import ConfigError, OracleError, StoreError
from onlinerl.oracles._inner import Chooser, MaybeInner, Result, failed
from onlinerl.oracles._known_pairs import KnownPair, located, read
from onlinerl.oracles._verdicts import as_cells, as_preferences, sure
from onlinerl.people.agreement import figures
from onlinerl.people.queue import Answer, Question, Queue, identity
from onlinerl.protocols.keys import Resumable, Seconds
from onlinerl.protocols.oracle import Figure
from onlinerl.types import Cost, Failure, Query, Verdict, derive_seed

LOOK_S = 0.25
"""How often the answers are looked at while the run waits."""
GOLD_SHARE = 0.02


class Human(Chooser):
    """Compares with people, and with another oracle where they are not asked or do not answer.

    A group that people have answered is judged by them alone: pairs that they were not asked about are not judged. Without a folder of a run, and
    outside of an iteration (a trial), nobody is asked.
    """

    ai: MaybeInner = None
    """The oracle that judges what people do not. Without one, what they do not answer in time has failed."""
    max_wait_s: Resumable[Annotated[float, Field(ge=0, le=9e5)]] = 0.0
    """How long the run waits for an answer after it has asked. Then `ai` judges, or without one the group counts as failed
    (`max_failed_labels`), and a resume asks again. 0 never waits."""
    choose: Literal["all", "random", "unsure"] = "all"
    """Which groups people are asked about: all, a random share, or those that `ai` is not sure of."""
    share: float | None = Field(None, gt=0, le=1)
    """Of `random`, the share of the groups, drawn by prompt and texts."""
    unsure_below: float | None = Field(None, gt=0, le=1)
    """Of `unsure`, how sure `ai` has to be to be believed: the mean of |2 P - 1| over the pairs of a group."""
    per_iteration: Resumable[int | None] = Field(None, ge=1)
    """Comparisons that people are asked for in an iteration at most; those of the groups that arrive first. `ai` judges the rest."""
    pairs_per_group: int = Field(1, ge=1)
    """Comparisons of each group, drawn by prompt and texts; as many as there are at most. Two equal texts are never asked about."""
    answers: Literal["choice", "strength"] = "choice"
    """What is asked: which one is better, or also how much."""
    prob_clear: float = Field(0.95, gt=0.5, le=1)
    """How probable it is that the response wins that is called better, or clearly better."""
    prob_slight: float | None = Field(None, gt=0.5, le=1)
    """Of `strength`, the same of one that is called slightly better; 0.75 by default."""
    n_annotators: int = Field(1, ge=1)
    """People who are asked for each comparison of the share `overlap`; the mean of what they say counts."""
    overlap: float | None = Field(None, gt=0, le=1)
    """With several annotators, the share of the comparisons that they all are asked for, drawn by prompt and texts; all of them by default."""
    heldout: Literal["ai", "people", "nobody"] | None = None
    """Who compares answers to the held-out prompts: by default `ai`, or nobody without one, which leaves the run without win rates."""
    expire_iterations: int = Field(3, ge=1)
    """A question that the run has gone on without is asked for so many iterations more."""
    gold: Resumable[str | None] = Field(None, description="FILE.jsonl", examples=["known-pairs.jsonl"])
    """JSON lines of pairs whose better response is known (`prompt`, `chosen`, `rejected`), about which people are asked too, without knowing it:
    how often each is right shows who reads. Nothing is trained on them, the run does not wait for them, and no budget counts them."""
    gold_share: Resumable[float | None] = Field(None, gt=0, le=1)
    """Of `gold`: so many of them for each comparison of the run, 0.02 by default; each pair once, until there are no more."""
    undo_s: Resumable[Annotated[float, Field(ge=0, le=3600)]] = 5.0
    """How long an answer may be taken back before the run reads it."""
    seed: int = 0
    """Of what is drawn, and of which response is shown on the left."""
    max_concurrent: Resumable[int] = Field(32, ge=1)
    call_timeout_s: Resumable[Seconds] = 1e6  # max_wait_s is the deadline

    _queue: Queue | None = PrivateAttr(None)
    _account: Account = PrivateAttr(default_factory=Account)
    _closed: Any = PrivateAttr(default_factory=threading.Event)
    _due: dict[str, int] = PrivateAttr(default_factory=dict)
    """Answers that are waited for, by question."""
    _putting: Any = PrivateAttr(default_factory=threading.Lock)
    _gold: list[KnownPair] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, choose in (("share", "random"), ("unsure_below", "unsure")):
            if (getattr(self, key) is not None) != (self.choose == choose):
                there = self.choose != choose
                cause = f"belongs to choose={choose}" if there else f"is missing, and choose={choose} reads it"
                raise ConfigError(cause, field=f"oracle.{key}", fix="leave it out" if there else "set it, e.g. to 0.3")
        if self.prob_slight is not None and (self.answers != "strength" or self.prob_slight > self.prob_clear):
            raise ConfigError(
                f"is {self.prob_slight:g}, with answers={self.answers} and prob_clear={self.prob_clear:g}",
                field="oracle.prob_slight",
                fix="set it with answers=strength only, and to no more than oracle.prob_clear",
            )
        if self.overlap is not None and self.n_annotators == 1:
            raise ConfigError("is read with several annotators only", field="oracle.overlap", fix="set oracle.n_annotators=3")
        if self.gold_share is not None and self.gold is None:
            raise ConfigError("is read with gold only", field="oracle.gold_share", fix="set oracle.gold=known-pairs.jsonl")
        if self.max_wait_s >= self.call_timeout_s:
            raise ConfigError(
                "ends before max_wait_s", field="oracle.call_timeout_s", fix="leave it out: oracle.max_wait_s is the deadline"
            )
        if self.ai is None:
            self._alone()
        return self

    def _alone(self) -> None:
        if self.max_wait_s == 0:
            raise ConfigError(
                "is 0, so the run does not wait for people, and there is no other oracle that could judge instead",
                field="oracle.max_wait_s",
                fix="set it, e.g. to 86400 for a day, or give one: oracle.ai={name: judge_pair, ...}",
            )
        asks_ai = {
            "choose": self.choose != "all",
            "per_iteration": self.per_iteration is not None,
            "heldout": self.heldout == "ai",
        }
        for key, needs_it in asks_ai.items():
            if needs_it:
                raise ConfigError(
                    "leaves something for another oracle to judge, and there is none",
                    field=f"oracle.{key}",
                    fix="leave it out, or give one: oracle.ai={name: judge_pair, ...}",
                )

    # --- what it says of itself ---

    @property
    def asks_people(self) -> bool:
        """Always."""
        return True

    @property
    def version(self) -> str:
        """Hash of that of `ai` and of what is asked of whom. How long it waits and budgets are no part of it: each verdict says who gave it."""
        resumable = {
            "max_wait_s",
            "per_iteration",
            "gold",
            "gold_share",
            "undo_s",
            "groups_per_call",
            "max_concurrent",
            "call_timeout_s",
            "retries",
        }
        return self._version(**self.model_dump(exclude={"ai", "preference_temperature", "expire_iterations"} | resumable))

    @property
    def _heldout(self) -> str:
        return self.heldout or ("nobody" if self.ai is None else "ai")

    def people(self, groups: int, responses: int, *, heldout: bool = False) -> int:
        """Those of its pairs, within `per_iteration`; of answers to held-out prompts all or none."""
        pairs = groups * min(self.pairs_per_group, responses * (responses - 1) // 2)
        if heldout:
            return pairs if self._heldout == "people" else 0
        return pairs if self.per_iteration is None else min(pairs, self.per_iteration)

    @property
    def asks_as_needed(self) -> bool:
        """`ai` is asked where people do not judge, or before them."""
        return self.ai is not None

    def requests(self, responses: int) -> int | None:
        """Of `ai`, and the answers of people, each a call, if both judge a group; None without `ai`: `people` says how many are asked for."""
        by_ai = super().requests(responses)
        return None if by_ai is None else by_ai + self.people(1, responses) * self.n_annotators

    @property
    def remarks(self) -> Sequence[str]:
        """How it goes on without people, and how many questions are open."""
        otherwise = "its group counts as failed, and a resume asks again" if self.ai is None else "`ai` judges"
        waits = (
            f"a question waits for people up to {self.max_wait_s:g} s" if self.max_wait_s else "the run never waits for people"
        )
        said = [f"{waits}; without an answer {otherwise}. They answer at the page of `onlinerl people RUN`"]
        if self.n_annotators > 1:
            share = "every comparison" if self.overlap is None else f"{self.overlap:.0%} of the comparisons"
            said.append(f"{share} is complete when {self.n_annotators} people have answered it: so many are needed")
        if self._heldout == "nobody":
            said.append(
                "nobody compares answers to held-out prompts, so there are no win rates, and the newest iterate counts as the best; "
                "oracle.heldout=people asks people"
            )
        if self._queue is not None and (count := len(self._queue.open())):
            said.append(f"{count} questions are open")
        return [*said, *super().remarks]

    def figures(self) -> Sequence[Figure]:
        """How many questions people were asked, how far they agree, and how often they are right where that is known."""
        if self._queue is None:
            return super().figures()
        with _explained():
            self._queue.look()
        return [*figures(self._queue), *super().figures()]

    # --- its life ---

    def located(self, folders: Sequence[Path]) -> Self:
        """With the absolute path of `gold`."""
        found = super().located(folders)
        return found if self.gold is None else found.model_copy(update={"gold": located(self.gold, "oracle.gold", folders)})

    def open(self) -> None:
        """Open `ai`. Idempotent.

        Raises:
            OracleError: if `gold` cannot be read, or names no better response.
        """
        super().open()
        self._closed.clear()
        if self.gold is not None and not self._gold:
            pairs, _ = read(self.gold, "oracle.gold")
            self._gold = [each for each in pairs if each.prob != 0.5 and each.chosen != each.rejected]
            if not self._gold:
                fix = "give pairs of which one response is known to be better"
                raise OracleError(f"{self.gold} names no better response", field="oracle.gold", fix=fix)

    def close(self) -> None:
        """Wait for nobody any more."""
        self._closed.set()
        super().close()

    def remember(self, folder: Path) -> None:
        """Keep the queue there.

        Raises:
            OracleError: if it is damaged.
        """
        super().remember(folder)
        with _explained():
            self._queue = Queue(folder)
            self._queue.look()

    def charge(self, account: Account) -> bool:
        """`ai` is paid for on its own; each answer of a person counts as a call."""
        self._account = account
        return super().charge(account)

    # --- judging ---

    def judge(self, queries: Sequence[Query]) -> Iterator[Result]:
        """One Verdict of preferences per query, in order, as soon as people have given it.

        A Failure where `ai` was asked and failed, and without one where nobody has answered in time.

        Raises:
            OracleError: if the queue cannot be written or read.
            BudgetError: if nothing more may be asked.
        """
        version = self.version if queries else ""
        said = self._by_ai(queries, range(len(queries))) if self.choose == "unsure" else {}
        asked = {i: self._put(query, said.get(i)) for i, query in enumerate(queries)}
        until = time.monotonic() + self.max_wait_s
        said |= self._by_ai(queries, [i for i, questions in asked.items() if not questions and i not in said])
        taken: dict[int, list[Answer]] = {}
        for i, query in enumerate(queries):
            if i not in taken:
                taken[i] = self._waited(asked[i], until)
            verdict = self._verdict(query, taken[i], version, said.get(i))
            if verdict is None and i not in said:
                others = range(i + 1, len(queries)) if time.monotonic() >= until else ()  # their time is over too
                taken |= {j: self._waited(asked[j], until) for j in others if j not in taken}
                said |= self._by_ai(queries, [i, *(j for j in others if not taken[j] and j not in said)])
            yield verdict or self._otherwise(query, said.get(i), version, asked=bool(asked[i]))

    def _by_ai(self, queries: Sequence[Query], which: Sequence[int]) -> dict[int, Result]:
        """What `ai` says about some of them; nothing if there is none."""
        if self.ai is None or not which:
            return {}
        wanted = [i for i in which if not (queries[i].heldout and self._heldout == "nobody")]
        return dict(zip(wanted, self._ask("ai", [queries[i] for i in wanted]), strict=True))

    def _put(self, query: Query, said: Result | None) -> list[str]:
        """Ask people, if they are to be asked; the ids of the questions, none if not."""
        if self._queue is None or query.iteration is None or not self._wants(query, said):
            return []
        pairs = self._pairs(query)
        with self._putting, _explained():
            known = self._queue.put_in(query.iteration)
            questions = [self._question(query, query.iteration, *pair) for pair in pairs]
            new = [one for one in questions if one.id not in known]
            limited = self.per_iteration is not None and not query.heldout
            if limited and len(known) + len(new) > (self.per_iteration or 0):
                return []
            self._owe(questions)
            self._queue.put([*questions, *self._checks(new)])
        return [one.id for one in questions]

    def _owe(self, questions: Sequence[Question]) -> None:
        """Ask for no more answers than may be paid for: those that are still to come count.

        Raises:
            BudgetError: if it is too much.
        """
        assert self._queue is not None
        new = {one.id: one.needed for one in questions if self._queue.status(one.id) != "taken"}
        most = Cost(calls=sum({**self._due, **new}.values()))
        if self._account.reserve(most):
            self._account.settle(most, Cost())  # what is answered is spent when a verdict is made of it
        self._due |= new

    def _wants(self, query: Query, said: Result | None) -> bool:
        if query.heldout:
            return self._heldout == "people"
        if self.choose == "unsure":
            return isinstance(said, Verdict) and sure(said.matrix()) < (self.unsure_below or 0.0)
        return self.choose == "all" or self._drawn(query, "share", *query.responses) < (self.share or 0.0)

    def _drawn(self, query: Query, what: str, *texts: str) -> float:
        """A number in (0, 1) of a prompt and texts, in whatever order they are."""
        return (derive_seed(what, self.seed, ascii(query.prompt.text), *map(ascii, sorted(texts))) + 0.5) / 2**31

    def _pairs(self, query: Query) -> list[tuple[str, str]]:
        """The texts to compare, of as many pairs as are asked for."""
        every = list(combinations(sorted(set(query.responses)), 2))
        return sorted(every, key=lambda pair: self._drawn(query, "pair", *pair))[: self.pairs_per_group]

    def _question(self, query: Query, iteration: int, one: str, other: str) -> Question:
        left, right = (one, other) if self._drawn(query, "side", one, other) < 0.5 else (other, one)
        by_all = self.overlap is None or self._drawn(query, "overlap", one, other) < self.overlap
        return Question(
            id=identity(query.prompt, one, other),
            prompt=query.prompt.text,
            messages=tuple((message.role, message.content) for message in query.prompt.messages),
            left=left,
            right=right,
            iteration=iteration,
            heldout=query.heldout,
            needed=self.n_annotators if by_all else 1,
            strength=self.answers == "strength",
            expires=self.expire_iterations,
        )

    def _checks(self, new: Sequence[Question]) -> Iterator[Question]:
        """Questions whose answer is known, to be put with these."""
        assert self._queue is not None
        put = set[str]()
        for one in new:
            if (derive_seed("gold", self.seed, one.id) + 0.5) / 2**31 >= (self.gold_share or GOLD_SHARE):
                continue
            first = derive_seed("which", self.seed, one.id)
            for place in range(len(self._gold)):
                pair = self._gold[(first + place) % len(self._gold)]
                check = self._question(Query(prompt=pair.prompt, responses=()), one.iteration, pair.chosen, pair.rejected)
                if self._queue.status(check.id) is None and check.id not in put:
                    put.add(check.id)
                    left = (check.left == pair.chosen) == (pair.prob > 0.5)
                    yield replace(check, gold="left" if left else "right")
                    break

    def _waited(self, questions: Sequence[str], until: float) -> list[Answer]:
        """What people have said about them, as soon as it is all, or what there is when the time is over."""
        while questions:
            assert self._queue is not None
            over = time.monotonic() >= until
            with _explained():
                answers = self._queue.take(questions, older_than_s=self.undo_s, whatever=over)
                if over:
                    self._queue.give_up(questions)
            if answers is not None or over:
                with self._putting:
                    for one in questions:
                        self._due.pop(one, None)
                return answers or []
            if self._closed.wait(min(LOOK_S, max(0.0, until - time.monotonic()))):
                raise OracleError("was closed while the run waited for people", field="oracle", fix="resume the run")
        return []

    def _verdict(self, query: Query, answers: Sequence[Answer], version: str, asked: Result | None = None) -> Verdict | None:
        """What people have said as preferences, the response on the left first; None if it is for `ai` to say: they have not answered, or
        have skipped every pair. What `ai` was asked for before is paid too."""
        if not answers or (self.ai is not None and all(answer.choice == "skip" for answer in answers)):
            return None
        assert self._queue is not None
        probs, strengths = dict[tuple[str, str], list[float]](), dict[tuple[str, str], list[float]]()
        for answer in answers:
            if answer.choice != "skip":
                shown = self._queue.question(answer.question)
                sides = shown.left, shown.right
                probs.setdefault(sides, []).append(self._prob(answer))
                strengths.setdefault(sides, []).append(_strength(answer))
        cost = Cost(calls=len(answers), seconds=sum(one.seconds or 0.0 for one in answers))
        self._account.spend(cost)
        said = [{k: getattr(one, k) for k in ("annotator", "choice", "strength", "late")} for one in answers]
        return Verdict(
            annotator=f"human:{'+'.join(sorted({one.annotator for one in answers}))}",
            oracle_version=version,
            preferences=as_cells(query.responses, probs, equal=0.5),
            strength=as_cells(query.responses, strengths, equal=0.0) if self.answers == "strength" else None,
            raw=json.dumps({"by": "people", "answers": said}),
            cost=cost if asked is None else cost.plus(asked.cost),
        )

    def _prob(self, answer: Answer) -> float:
        """That the response on the left wins."""
        if answer.choice not in ("left", "right"):
            return 0.5
        better = (self.prob_slight or 0.75) if answer.strength == "slight" else self.prob_clear
        return better if answer.choice == "left" else 1.0 - better

    def _otherwise(self, query: Query, said: Result | None, version: str, *, asked: bool) -> Result:
        """What is said about a group that people have not judged."""
        if said is not None:
            why = "people have not answered" if asked else "people were not asked"
            return failed({"ai": said}) or _by_ai(said, why, version)
        if asked and self.ai is None:
            return Failure(
                kind="timeout",
                message=f"nobody has answered within {self.max_wait_s:g} s; the question stays open at `onlinerl people RUN`",
            )
        nothing = as_cells(query.responses, {}, equal=0.5)
        return Verdict(annotator="human:nobody", oracle_version=version, preferences=nothing, raw='{"by": "nobody"}')


def _strength(answer: Answer) -> float:
    return {"clear": 2.0, "slight": 1.0}.get(answer.strength or "clear", 2.0) if answer.choice in ("left", "right") else 0.0


def _by_ai(said: Result, why: str, version: str) -> Verdict:
    assert isinstance(said, Verdict)
    return replace(
        as_preferences(said),
        annotator=f"human:ai:{said.annotator}",
        oracle_version=version,
        raw="\n".join(filter(None, (json.dumps({"by": "ai", "because": why}), said.raw))),
    )


@contextmanager
def _explained() -> Iterator[None]:
    """What the disk refuses stops the run, and no other group would go better."""
    try:
        yield
    except StoreError as error:
        raise OracleError(error.cause, field=error.field, fix=error.fix) from error
