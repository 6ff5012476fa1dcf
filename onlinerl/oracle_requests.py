"""How many questions an oracle will be asked, for `check` to say before any is paid for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from onlinerl.config import LedgerConfig, RunConfig
from onlinerl.controller.parts import samples_dynamically
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Prompt


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Groups of a run that its oracle is asked about, as (how many groups, responses in each)."""

    start: tuple[int, int]
    label: tuple[int, int]
    """Of each iteration, if it samples all of its prompts."""
    labelled: int
    """The groups of all iterations together that are sampled."""
    evaluation: tuple[int, int]
    """Of all iterations together."""
    anchors: tuple[int, int]
    """The same, of pairs whose better response is known."""
    iterations: int
    more: bool = False
    """Whether these are upper bounds, because what is sampled depends on verdicts."""

    def groups(self) -> list[tuple[int, int]]:
        """Of the whole run with one start."""
        return [self.start, (self.labelled, self.label[1]), self.evaluation, self.anchors]


def planned(
    config: RunConfig,
    algorithm: Algorithm,
    heldout: int,
    *,
    scores: bool,
    anchors: int = 0,
    most_sampled: int | None = None,
) -> Planned:
    """What a run will ask, if no sample and no question fails.

    Args:
        config: the run's.
        algorithm: of it.
        heldout: prompts that are evaluated on.
        scores: whether the oracle scores single responses. One that only compares is asked about the answers of two iterates instead:
            the newest and the base model, and from iteration 2 on the one before too.
        anchors: pairs whose better response is known.
        most_sampled: groups of all iterations that are sampled, where responses are reused, whose labels the ledger knows.
    """
    dynamic = samples_dynamically(config, algorithm)
    sampled = config.prompts.per_iteration * (config.sampling.max_rounds if dynamic else 1)
    drawn = config.sampling.samples_per_prompt + len(algorithm.needs.beside_samples)
    iterates = config.iterations + 1 if scores else max(0, 2 * config.iterations - 1)
    return Planned(
        start=(1, 2),
        label=(sampled, drawn),
        labelled=sampled * config.iterations if most_sampled is None else most_sampled,
        evaluation=(heldout * iterates, 1 if scores else 2),
        anchors=(anchors * examinations(config), 2),
        iterations=config.iterations,
        more=dynamic or config.selection.reuses,
    )


def examinations(config: RunConfig) -> int:
    """How often the oracle is asked about pairs whose better response is known."""
    if config.anchors is None:
        return 0
    return 1 + (config.iterations // config.anchors.every if config.anchors.every else 0)


def of_people(plan: Planned, oracle: Oracle) -> str | None:
    """How many comparisons people are asked for, in words; None where nobody is."""
    groups, drawn = plan.label
    each = oracle.people(groups, drawn)
    heldout, known = (oracle.people(*asked, heldout=True) for asked in (plan.evaluation, plan.anchors))
    if not each + heldout + known:
        return None
    also = f" and {known} of pairs whose better response is known" if known else ""
    return (
        f"people: at most {each} comparisons an iteration, with {heldout} of answers to held-out prompts{also} "
        f"{each * plan.iterations + heldout + known} for the whole run"
    )


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What a run will ask if nothing fails and no label is known, and what that costs at most."""

    text: str
    calls: int
    """Of the whole run, with this start."""
    usd: float | None
    """About; None where no price is known."""

    def beyond(self, ledger: LedgerConfig) -> list[str]:
        """Where a budget is less than that, in words."""
        told = {"calls": (ledger.max_calls, self.calls), "usd": (ledger.max_usd, self.usd)}
        return [
            f"ledger.max_{kind} is {limit:g}, and the run may need {most:g}: it then stops before the question that would be too much, and goes "
            f"on with `onlinerl resume RUN ledger.max_{kind}=...`"
            for kind, (limit, most) in told.items()
            if limit is not None and most is not None and most > limit
        ]


def foretold(plan: Planned, oracle: Oracle, tried: Cost, prompts: Iterable[Prompt], max_new_tokens: int) -> Foretold | None:
    """The plan in requests, and dollars where prices are known; None where requests of this oracle are nobody's concern."""
    per_group = oracle.requests(plan.label[1])
    if per_group is None:
        return None
    start, label, evaluation, anchors = (groups * (oracle.requests(k) or 0) for groups, k in plan.groups())
    each = per_group * plan.label[0]
    begun = oracle.opening_cost.plus(tried)
    start += begun.calls
    bound = "at most " if oracle.asks_as_needed else ""
    most = "at most " if plan.more else bound
    total = start + label + evaluation + anchors
    known = f", {anchors} for pairs whose better response is known" if anchors else ""
    text = (
        f"oracle: {bound}{per_group} requests for {plan.label[1]} responses to a prompt, {most}{each} an iteration; "
        f"with {bound}{evaluation} for evaluation{known} and {start} at this start {most}{total} for the whole run, and more where some fail"
    )
    tokens = fmean(len(prompt.token_ids) for prompt in prompts)
    prices = [oracle.most_usd(tokens, max_new_tokens, k) for _, k in plan.groups()]
    dollars = [groups * price for (groups, _), price in zip(plan.groups(), prices, strict=True) if price is not None]
    usd = sum(dollars) + begun.usd if dollars else None
    return Foretold(text=text if usd is None else f"{text}; about ${usd:.2f} at most", calls=total, usd=usd)


def of_refresh(config: RunConfig, algorithm: Algorithm, oracle: Oracle, prompts: Sequence[Prompt]) -> Foretold | None:
    """What the oracle is asked from which the reward model of a run learns; None where requests of it are nobody's concern, or none learns.

    Args:
        config, algorithm, oracle: of the run.
        prompts: that it trains on.
    """
    plan = oracle.refreshing
    if plan is None:
        return None
    drawn = config.sampling.samples_per_prompt + len(algorithm.needs.beside_samples)
    per_group = plan.labels.requests(drawn)
    if per_group is None:
        return None
    groups = min(plan.prompts, config.prompts.per_iteration)
    each = groups * per_group
    text = (
        f"oracle.labels: {per_group} requests for {drawn} responses to a prompt, at most {each} an iteration and {each * config.iterations} for "
        "the whole run"
    )
    tokens = fmean(len(prompt.token_ids) for prompt in prompts) if prompts else 0.0
    price = plan.labels.most_usd(tokens, config.sampling.max_new_tokens, drawn)
    usd = None if price is None else price * groups * config.iterations
    text = text if usd is None else f"{text}; about ${usd:.2f} at most"
    return Foretold(text=text, calls=each * config.iterations, usd=usd)
