"""A language model behind an OpenAI-compatible chat endpoint as a judge: what comparing and scoring have in common."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from onlinerl import http_client
from onlinerl.budget import Account
from onlinerl.errors import BudgetError, ConfigError, OracleError
from onlinerl.oracles._judge import abilities, kept, own_server, reading, templates
from onlinerl.oracles._judge.abilities import Abilities
from onlinerl.oracles._judge.endpoint import Endpoint, digest
from onlinerl.oracles._judge.kept import Kept
from onlinerl.oracles._judge.loop_thread import LoopThread
from onlinerl.oracles._judge.own_server import OwnServer, Served
from onlinerl.oracles._judge.questions import Price, Question, Said
from onlinerl.oracles._judge.reading import Form
from onlinerl.protocols.keys import Resumable, Seconds
from onlinerl.types import Cost, Failure, Message, Prompt, Query, Verdict, derive_seed

SHOWN = 300
"""Characters of each rationale that are kept."""
SHORT_ANSWER = 16
"""Tokens that a verdict without rationale may take."""
CHARACTERS_PER_TOKEN = 3
TOP_LOGPROBS = 20
"""As many as OpenAI's servers and vLLM give."""
TRIAL = Prompt(id="trial", text="", token_ids=(), messages=(Message(role="user", content="What is 2 + 2?"),))
_TEXTS = ("template", "rubric", "constitution")


class Judge(Served):
    """Knobs and machinery of every LLM judge."""

    max_concurrent: Resumable[int] = Field(8, ge=1)
    call_timeout_s: Resumable[Seconds] = 3600.0  # each request has a deadline of its own
    temperature: float = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(1024, ge=1)
    """Longest reply. A reply that is cut is a failure."""
    votes: int = Field(1, ge=1)
    """How often each question is asked; the mean counts. More than one needs a temperature."""
    rationale: bool = True
    """Whether the judge gives reasons before its verdict. They are kept, shortened."""
    rubric: str | None = None
    """What to judge by: a text, or a file. The default is `COMPARE` or `RUBRICS` in onlinerl/oracles/_judge/templates.py."""
    template: str | None = None
    """The whole question, with its places: a text, or a file. The defaults are `PAIR`, `ONE` and `LIST` in the same file."""
    constitution: str | None = None
    """A file with one principle per line, which are added to the rubric."""
    reference: bool = True
    """Whether the judge is shown the reference answer of a prompt that has one."""
    read_from: Literal["auto", "logprobs", "text"] = "auto"
    """Where the verdict is read: from the log-probs of the token that says it, or from the text alone. `auto` takes log-probs where the
    server gives them."""
    response_format: Literal["auto", "json_schema", "text"] = "auto"
    """How the reply is written: as JSON that the server keeps to a schema, or as words whose last line is the verdict. `auto` takes a schema
    where the server has them."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """What else each request says, e.g. {chat_template_kwargs: {enable_thinking: false}}."""
    request_timeout_s: Resumable[Seconds] = 120.0
    """Longest wait for one answer of the server; `retries` is how often a request that failed is sent again."""
    price_per_million_tokens: Resumable[Price | None] = None
    """In dollars, {input: 0.15, output: 0.6}."""
    price_per_request: Resumable[float] = Field(0.0, ge=0)
    """In dollars, beside the tokens or instead of them. What the server does not answer is free."""

    _own: OwnServer | None = PrivateAttr(None)
    _thread: Any = PrivateAttr(None)
    _endpoint: Any = PrivateAttr(None)
    _abilities: Abilities | None = PrivateAttr(None)
    _kept: Kept | None = PrivateAttr(None)
    _folder: Path | None = PrivateAttr(None)
    _under_way: dict[Any, Any] = PrivateAttr(default_factory=dict)
    _read: dict[str, str] = PrivateAttr(default_factory=dict)
    _opening_cost: Cost = PrivateAttr(default_factory=Cost)
    _account: Account = PrivateAttr(default_factory=Account)
    _keys: dict[Any, list[str]] = PrivateAttr(default_factory=dict)
    _opening: Any = PrivateAttr(default_factory=threading.RLock)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.votes > 1 and self.temperature == 0:
            raise ConfigError(
                f"is {self.votes}, and at temperature 0 each vote would say the same",
                field="oracle.votes",
                fix="set oracle.temperature, e.g. to 0.7, or leave votes out",
            )
        if reserved := sorted(
            self.extra_body.keys() & {"model", "messages", "temperature", "max_tokens", "n", "seed", "stream"}
        ):
            raise ConfigError(
                f"holds {reserved[0]}", field="oracle.extra_body", fix="leave it out; the oracle's own keys say it"
            )
        for name in _TEXTS:
            self._pinned(name)
        templates.require_places(self._words["template"], self._places)
        return self

    def _pinned(self, name: str) -> None:
        """A path by its whole self; set past the freeze, as a validator may."""
        self.__dict__[name] = templates.absolute(getattr(self, name), f"oracle.{name}")

    def _text(self, name: str) -> str:
        value, field = getattr(self, name), f"oracle.{name}"
        if name == "constitution" and not Path(value).is_file():
            raise ConfigError(f"there is no file {value}", field=field, fix="give a file with one principle per line")
        return templates.text_or_file(value, field)

    # --- what a judge says of itself ---

    @property
    def _places(self) -> tuple[str, ...]:
        """Of its template, beside those that every template has."""
        raise NotImplementedError

    @property
    def _defaults(self) -> tuple[str, str]:
        """Template and rubric that it has without others."""
        raise NotImplementedError

    def _questions(self, prompt: Prompt, responses: Sequence[str]) -> dict[Any, list[Question]]:
        """What is asked about a group, by what it is asked about."""
        raise NotImplementedError

    def _verdict(self, query: Query, said: Mapping[Any, Sequence[Said]]) -> Verdict | None:
        """What the replies say together; None if nothing."""
        raise NotImplementedError

    @property
    def _reads(self) -> Literal["auto", "logprobs", "text"]:
        return self.read_from

    @property
    def _may_be_cut(self) -> bool:
        """Whether a reply says all that counts before its end."""
        return False

    def _schema(self, k: int) -> Mapping[str, Any]:
        """JSON schema of the verdict, of k responses."""
        raise NotImplementedError

    def _identity(self) -> Mapping[str, Any]:
        """What else could change a verdict."""
        raise NotImplementedError

    # --- opening and closing ---

    def remember(self, folder: Path) -> None:
        """Keep replies there until their verdict is complete."""
        with self._opening:
            self._folder = folder
            if self._abilities is not None and self._kept is None:
                self._kept = Kept(folder)

    def open(self) -> None:
        """Find out, with one question or a few, what the server can do. Idempotent; `judge` calls it too.

        Raises:
            OracleError: if it cannot be reached, refuses, or cannot do what is asked for.
        """
        with self._opening:
            if self._abilities is not None:
                return
            self._start()
            try:
                if self._own is not None:
                    self._thread.call(self._own.up())
                finding = abilities.found(self._endpoint, self._reads, self.response_format, self._first_question)
                self._abilities, paid = self._thread.call(finding)
                self._opening_cost = self._opening_cost.plus(paid)
                if self._folder is not None:
                    self._kept = Kept(self._folder)
            except BaseException:
                self.close()
                raise

    def _start(self) -> None:
        if not http_client.installed():
            raise OracleError("aiohttp is not installed", field="oracle.name", fix="pip install aiohttp")
        self._thread = LoopThread()
        price = self.price_per_million_tokens or Price()
        try:
            self._own = OwnServer(self) if self.base_url is None else None
            self._endpoint = Endpoint(
                self.base_url or own_server.ROOT,
                self.api_key_env,
                timeout_s=self.request_timeout_s,
                retries=self.retries,
                at_once=self.max_requests,
                price=(price.input, price.output, self.price_per_request),
                account=self._account,
                own=self._own,
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all connections, and whatever is still asked."""
        with self._opening:
            thread, endpoint, replies, own = self._thread, self._endpoint, self._kept, self._own
            self._thread = self._endpoint = self._abilities = self._kept = self._own = None
        if thread is not None:
            thread.end(endpoint.close if endpoint is not None else None)
        if own is not None:
            own.end()
        if replies is not None:
            replies.close()

    def _first_question(self, wished: Abilities) -> dict[str, Any]:
        """One of the usual kind, for a server that does what is wished for."""
        self._abilities = wished
        question = next(iter(self._questions(TRIAL, ("4", "5")).values()))[0]
        body = self._body(question, 2)
        self._abilities = None
        return body

    # --- identity and cost ---

    @property
    def opening_cost(self) -> Cost:
        """Of one question, where the server can do all that is wished for."""
        return self._opening_cost

    def charge(self, account: Account) -> bool:
        """It does, before each request."""
        with self._opening:
            self._account = account
            if self._endpoint is not None:
                self._endpoint.account = account
        return True

    def unlabelled(self, folder: Path) -> Cost:
        """Of replies to groups that were not complete when a run ended."""
        return kept.paid(folder)

    def recorded(self, answers: Sequence[tuple[Query, Verdict | Failure]]) -> None:
        """Their replies need not be kept; those of a failure are, and have been paid for."""
        for query, result in answers:
            keys = self._keys.pop((query.prompt.id, query.responses), [])
            if self._kept is not None:
                (self._kept.done if isinstance(result, Verdict) else self._kept.counted)(keys)

    @property
    def version(self) -> str:
        """The model's name, and a hash of every word that it is shown, of how it decodes and of how it is read; not of where it is."""
        self.open()
        said = {
            "words": dict(self._words),
            "decoding": [self.temperature, self.max_tokens, self.votes, self.rationale, self.extra_body],
            "reference": self.reference,
            "abilities": [self._can.schema, self._can.logprobs],
            **self._identity(),
        }
        if self.base_url is None:
            said["weights"] = self._of_weights
        return f"{self._named}-{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]}"

    @property
    def _can(self) -> Abilities:
        assert self._abilities is not None
        return self._abilities

    def most_usd(self, prompt_tokens: float, response_tokens: float, responses: int) -> float | None:
        """By `price_per_million_tokens`, if every reply is as long as it may be and three characters of the template are a token."""
        requests = self.requests(responses)
        if requests is None or (self.price_per_million_tokens is None and not self.price_per_request):
            return None
        price = self.price_per_million_tokens or Price()
        own = sum(map(len, self._words.values())) / CHARACTERS_PER_TOKEN
        read = own + prompt_tokens + self._shown(responses) * response_tokens
        tokens = read * price.input + self._most_tokens(responses) * price.output
        return requests * (tokens / 1e6 + self.price_per_request)

    def _shown(self, responses: int) -> int:
        """How many responses one question shows."""
        raise NotImplementedError

    def _most_tokens(self, k: int) -> int:
        return self.max_tokens if self.rationale else min(self.max_tokens, SHORT_ANSWER + 4 * k)

    # --- judging ---

    def judge(self, queries: Sequence[Query]) -> Iterable[Verdict | Failure]:
        """One result per query, in order, each as soon as it is known.

        Raises:
            OracleError: if the server would refuse any question (401, 403, 404).
        """
        if not queries:
            return []
        self.open()
        return self._in_order([self._thread.begin(self._joined(query)) for query in queries])

    def _in_order(self, asked: Sequence[Future[Verdict | Failure]]) -> Iterator[Verdict | Failure]:
        try:
            for one in asked:
                yield one.result()
        finally:
            for one in asked:
                one.cancel()

    async def _joined(self, query: Query) -> Verdict | Failure:
        """Whoever asks again about a group that is still under way, having lost patience, pays nothing twice."""
        key = (query.prompt.id, query.responses)
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.ensure_future(self._group(query))
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        result: Verdict | Failure = await asyncio.shield(task)
        return result

    async def _group(self, query: Query) -> Verdict | Failure:
        questions = self._questions(query.prompt, query.responses)
        tasks = {
            about: [asyncio.ensure_future(self._ask(one, len(query.responses))) for one in asked]
            for about, asked in questions.items()
        }
        everything = [task for asked in tasks.values() for task in asked]
        try:
            await asyncio.gather(*everything)
        except BudgetError:  # what is under way is paid for, and kept
            await asyncio.gather(*everything, return_exceptions=True)
            raise
        except BaseException:
            for task in everything:
                task.cancel()
            raise
        said = {about: [task.result() for task in asked] for about, asked in tasks.items()}
        cost = reduce(Cost.plus, (task.result().cost for task in everything), Cost())
        given = [one.key for votes in said.values() for one in votes if one.status == "ok"]
        self._keys[query.prompt.id, query.responses] = given
        verdict = self._verdict(query, said)
        if verdict is None:
            return self._nothing(query, said, cost)
        raw = "\n".join(_line(about, one) for about, votes in said.items() for one in votes)
        return replace(verdict, cost=cost, raw=raw or None, oracle_version=self.version)

    def _nothing(self, query: Query, said: Mapping[Any, Sequence[Said]], cost: Cost) -> Failure:
        """Of a group of which too little was judged."""
        every = [one for votes in said.values() for one in votes]
        failed = [one for one in every if one.status != "ok"]
        kinds = [one.status for one in failed]
        kind: Any = max(sorted(set(kinds)), key=kinds.count)
        first = next(one for one in failed if one.status == kind)
        message = (
            f"prompt {query.prompt.id!r}: {len(failed)} of {len(every)} replies are no verdict; first {kind}: {first.words}"
        )
        return Failure(kind=kind, message=message, cost=cost)

    async def _ask(self, question: Question, k: int) -> Said:
        body = self._body(question, k)
        key = digest(body)
        reply = None if self._kept is None else self._kept.take(key)
        fresh = reply is None
        if reply is None:
            reply = await self._endpoint.ask(body)
        if reply.status != "ok":
            return Said(status=reply.status, words=reply.text, cost=reply.cost)
        found = None if reply.cut and not self._may_be_cut else question.read(reply)
        if found is None:
            why = "cut at max_tokens" if reply.cut else "no verdict"
            return Said(status="parse_fail", words=f"{why}: {reply.text[-SHOWN:]!r}", cost=reply.cost)
        if fresh and self._kept is not None:
            await self._kept.put(key, reading.pruned(question.form, reply))
        values, log_odds, words = found
        return Said(status="ok", values=values, log_odds=log_odds, words=words[:SHOWN], cost=reply.cost, key=key)

    def _body(self, question: Question, k: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question.text}],
            "temperature": self.temperature,
            "max_tokens": self._most_tokens(k),
            **self.extra_body,
        }
        if self.temperature > 0:
            body["seed"] = question.seed
        if self._can.logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if self._can.schema:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": self._whole_schema(question.form.key, k)},
            }
        return body

    def _whole_schema(self, key: str, k: int) -> dict[str, Any]:
        properties: dict[str, Any] = {"rationale": {"type": "string"}} if self.rationale else {}
        properties[key] = self._schema(k)
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    def _form(self, key: str) -> Form:
        return Form(key=key, json=self._can.schema, rationale=self.rationale)

    @property
    def _words(self) -> Mapping[str, str]:
        """Template and rubric, as they are put into every question: read once, whatever becomes of the files."""
        if not self._read:
            texts = {name: None if getattr(self, name) is None else self._text(name) for name in _TEXTS}
            template, rubric = (
                own or default for own, default in zip((texts["template"], texts["rubric"]), self._defaults, strict=True)
            )
            self._read.update(template=template, rubric=rubric + templates.principles(texts["constitution"]))
        return self._read

    def _filled(self, prompt: Prompt, form: str, **texts: str) -> str:
        answer = prompt.reference_answer if self.reference else None
        common = {"prompt": templates.shown(prompt), "reference": templates.reference_block(answer), "form": form}
        return templates.filled(self._words["template"], {"rubric": self._words["rubric"], **common, **texts})

    def _seed(self, *parts: object) -> int:
        return derive_seed("judge", *map(ascii, parts))  # half a surrogate pair has no UTF-8


def _line(about: Any, said: Said) -> str:
    """For people: what was asked, and what came of it."""
    what = " before ".join(str(i) for i in about) if isinstance(about, tuple) else str(about)
    found = " ".join(f"{value:g}" for value in said.values) if said.status == "ok" else said.status
    return f"{what}: {found}" + (f": {' '.join(said.words.split())}" if said.words else "")
