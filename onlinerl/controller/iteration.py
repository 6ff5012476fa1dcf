"""One iteration as a resumable object: phases in a fixed order, each durable before the next one starts.

    iteration 0:   sync - evaluate - commit
    iteration t:   sample - label - train - checkpoint - sync - evaluate - commit

A crash anywhere resumes at the first unfinished phase. Inside `sample`, `label` and `evaluate` every group is on disk as soon as it
is there, so nothing is generated or labelled twice.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from onlinerl.controller import evaluation, health
from onlinerl.controller.asking import answers
from onlinerl.controller.parts import Parts, learning_rates, reference_iteration
from onlinerl.controller.report import Reporter
from onlinerl.errors import LearnerError, StoreError
from onlinerl.ops.schedule import schedule
from onlinerl.stores.rows import (
    EVALUATION,
    EVALUATION_VERDICTS,
    PAIRS,
    ROLLOUTS,
    VERDICTS,
    group_from_row,
    group_row,
    pair_rows,
    result_from_row,
    result_row,
)
from onlinerl.types import Failure, Group, Judged, Pair, Prompt, Query, Request, Sampling, TrainItem, Verdict, derive_seed

SELF_TEST_ITEMS = 4


@dataclass
class Weights:
    """Which version is where. The engine knows nothing at start, so the first push always happens (R-D2)."""

    learner: int = 0
    engine: int | None = None


@dataclass
class Iteration:
    """Runs what is left of iteration `number`."""

    parts: Parts
    number: int
    weights: Weights
    report: Reporter
    cursor: int = 0
    """Where the prompts of this iteration start."""

    def run(self) -> None:
        """Every phase that is not finished yet."""
        first = self.number == 0
        phases: Sequence[tuple[str, Callable[[], dict[str, Any]]]] = [
            *(
                []
                if first
                else [("sample", self.sample), ("label", self.label), ("train", self.train), ("checkpoint", self.checkpoint)]
            ),
            ("sync", self.sync),
            ("evaluate", self.evaluate),
            ("commit", self.commit),
        ]
        done = self.parts.store.phases(self.number)
        # Training changes weights in memory only: it counts from the moment its checkpoint is complete.
        if "train" in done and "checkpoint" not in done:
            done.pop("train")
        for name, phase in phases:
            if name in done:
                continue
            started = time.monotonic()
            record = phase()
            seconds = time.monotonic() - started
            self.parts.store.finish_phase(self.number, name, {"seconds": seconds, **record})
            self.parts.tracker.phase_finished(self.number, name, seconds)
            self.report.phase(self.number, name, seconds, record)

    # --- sample ---

    def sample(self) -> dict[str, Any]:
        """Fresh prompts, K responses each."""
        config = self.parts.config
        prompts, next_cursor = self._prompts()
        self._ensure_engine()
        k = config.sampling.samples_per_prompt
        requests = [
            Request(prompt=p, seeds=tuple(derive_seed(config.seed, self.number, p.id, i) for i in range(k))) for p in prompts
        ]
        groups = self._generate(requests, config.sampling.spec(), ROLLOUTS, "sample")
        rollouts = [r for g in groups for r in g.rollouts]
        tokens = sum(len(r.token_ids) for r in rollouts)
        self.report.sampled(self.number, groups)
        return {"samples": len(rollouts), "tokens": tokens, "prompts": len(groups), "next_cursor": next_cursor}

    def _prompts(self) -> tuple[list[Prompt], int]:
        return self.parts.train_prompts.take(self.parts.config.prompts.per_iteration, self.cursor)

    def _generate(self, requests: Sequence[Request], sampling: Sampling, table: str, phase: str) -> list[Group]:
        """All groups of a table, in the order of the requests; only those not on disk yet are generated."""
        store, tracker = self.parts.store, self.parts.tracker
        by_id = {r.prompt.id: r.prompt for r in requests}
        groups = {row["prompt_id"]: group_from_row(row, by_id) for row in store.read(self.number, table)}
        todo = [r for r in requests if r.prompt.id not in groups]
        tracker.phase_started(self.number, phase, sum(len(r.seeds) for r in requests), "samples")
        tracker.phase_advanced(self.number, phase, sum(len(g.rollouts) for g in groups.values()))
        for group in self.parts.engine.generate(todo, sampling) if todo else ():
            health.check_group(group, self.weights.learner)
            store.append(self.number, table, [group_row(group)])
            groups[group.prompt.id] = group
            tracker.phase_advanced(self.number, phase, len(group.rollouts))
        store.seal(self.number, table)
        return [groups[r.prompt.id] for r in requests]

    # --- label ---

    def label(self) -> dict[str, Any]:
        """A verdict for every group."""
        groups = self._groups()
        calls, results = self._judge(groups, VERDICTS, "label")
        failures = [r for r in results.values() if isinstance(r, Failure)]
        judged = _judged(groups, results)
        health.check_spread(judged, within_groups=self.parts.algorithm.needs().min_samples > 1)
        self.report.labelled(self.number, groups, results, judged)
        return {"oracle_calls": calls, "failures": len(failures)}

    def _groups(self) -> list[Group]:
        prompts, _ = self._prompts()
        by_id = {p.id: p for p in prompts}
        return [group_from_row(row, by_id) for row in self.parts.store.read(self.number, ROLLOUTS)]

    def _judge(self, groups: Sequence[Group], table: str, phase: str) -> tuple[int, dict[str, Verdict | Failure]]:
        """Verdicts by prompt id, and how many of them exist; only those not on disk yet are asked for (R-G1).

        A failure is no answer: until the table is complete it is asked for again, so a repaired oracle gets its chance.
        """
        store, tracker = self.parts.store, self.parts.tracker
        results = dict(result_from_row(row) for row in store.read(self.number, table))
        if not store.sealed(self.number, table):
            results = {prompt_id: result for prompt_id, result in results.items() if isinstance(result, Verdict)}
        todo = [g for g in groups if g.prompt.id not in results]
        tracker.phase_started(self.number, phase, len(groups), "groups")
        tracker.phase_advanced(self.number, phase, len(results))
        queries = [Query(prompt=g.prompt, responses=tuple(r.text for r in g.rollouts)) for g in todo]
        failures: list[Failure] = []
        for arrived in answers(self.parts.oracle, queries):
            store.append(self.number, table, [result_row(query.prompt.id, result) for query, result in arrived])
            results.update({query.prompt.id: result for query, result in arrived})
            tracker.phase_advanced(self.number, phase, len(arrived))
            failures += [result for _, result in arrived if isinstance(result, Failure)]
            health.check_failures(failures, len(groups), self.parts.config.max_failed_labels)
        store.seal(self.number, table)
        return len(results), results

    # --- train ---

    def train(self) -> dict[str, Any]:
        """Items, log-probs that the loss needs, optimizer steps."""
        config, learner, tracker = self.parts.config, self.parts.learner, self.parts.tracker
        groups = self._groups()
        results = dict(result_from_row(row) for row in self.parts.store.read(self.number, VERDICTS))
        self.weights.engine = None
        built_at = time.monotonic()
        items, dropped, useful, contradicted = self._items(_judged(groups, results))
        reference_at = time.monotonic()
        tracker.phase_started(self.number, "reference", None, "")
        items = self._annotate(items)
        past = self._past_figures()
        prepared = self.parts.algorithm.prepare(items, past)
        figures = dict(self.parts.algorithm.figures(items, past))
        if self.number == 1:
            self._self_test(prepared)
        tracker.phase_finished(self.number, "reference", time.monotonic() - reference_at)
        train_at = time.monotonic()
        if config.training.optimizer_state == "reset" and self.number > 1:
            learner.reset_optimizer()
        indices = schedule(
            len(prepared),
            config.training.items_per_step,
            config.training.epochs,
            derive_seed(config.seed, "steps", self.number),
        )
        rates = learning_rates(config, self.number, len(indices))
        tracker.phase_started(self.number, "train", sum(len(s) for s in indices), "items")
        steps: list[Mapping[str, float]] = []
        tokens = skipped = 0
        for chosen, report in zip(
            indices, learner.update([[prepared[i] for i in step] for step in indices], rates), strict=True
        ):
            tracker.phase_advanced(self.number, "train", len(chosen))
            tokens += report.tokens
            skipped += report.skipped
            steps.extend(report.metrics)
            if skipped > config.training.max_skipped_steps:
                raise LearnerError(
                    f"{skipped} optimizer steps had a non-finite loss or gradient",
                    field="training.learning_rate",
                    fix="start a new run from the last export (model=...) with a lower learning rate; a resume would repeat this",
                )
        self.weights.learner = self.number
        self.report.trained(self.number, steps, tokens, dropped, len(items), useful, len(groups), contradicted, figures)
        return {
            "steps": len(steps),
            "tokens": tokens,
            "skipped": skipped,
            "items": len(items),
            "dropped": dict(dropped),
            "contradicted": contradicted,
            "figures": figures,
            "loss_first": steps[0].get("loss"),
            "loss_last": steps[-1].get("loss"),
            "reference": self._reference(),
            "build_seconds": reference_at - built_at,
            "ref_logprob_seconds": train_at - reference_at,
        }

    def _items(self, judged: Sequence[Judged]) -> tuple[list[TrainItem], Counter[str], int, int]:
        """What is trained, what was left out and why, how many groups gave anything, and how many pairs lost their own comparison."""
        config, algorithm = self.parts.config, self.parts.algorithm
        dropped: Counter[str] = Counter()
        useful = contradicted = 0
        items: list[TrainItem] = []
        rows: list[dict[str, Any]] = []
        for one in judged:
            pairs: Sequence[Pair] = []
            if algorithm.needs().pairs:
                pairs, reasons = self.parts.pairing.build(one)
                dropped.update(reasons)
                rows.extend(pair_rows(one.group, pairs))
                contradicted += sum(pair.prob < 0.5 for pair in pairs)
            built, left_out = algorithm.items(one, pairs)
            dropped.update(left_out)
            if config.training.on_truncated == "drop":
                kept = [i for i in built if all(s.finish_reason != "length" for s in i.sequences)]
                dropped["truncated"] += len(built) - len(kept)
                built = kept
            items.extend(built)
            useful += bool(built)
        health.check_items(len(items), len(judged), dropped)
        if rows and not self.parts.store.read(self.number, PAIRS):
            self.parts.store.append(self.number, PAIRS, rows)
            self.parts.store.seal(self.number, PAIRS)
        return items, dropped, useful, contradicted

    def _past_figures(self) -> list[Mapping[str, float]]:
        """What the algorithm said about each earlier iteration: from disk, so that a resume knows exactly what the run knew."""
        return [self.parts.store.phases(t).get("train", {}).get("figures", {}) for t in range(1, self.number)]

    def _reference(self) -> int | None:
        """Which iterate the reference is; None if the algorithm needs none."""
        if not self.parts.algorithm.needs().reference:
            return None
        chosen = self.parts.config.reference
        schedule_name = self.parts.algorithm.default_reference if chosen.schedule == "default" else chosen.schedule
        return reference_iteration(schedule_name, chosen.every, self.number)

    def _model_of(self, iterate: int) -> str:
        """Where the weights of an iterate are: "policy" if the learner holds them, else a path."""
        if iterate == self.weights.learner:
            return "policy"
        if iterate == 0:
            return self.parts.base_model
        path = self.parts.store.artefact("exports", iterate)
        if path is None:
            raise StoreError(
                f"the export of iteration {iterate} is gone, and it is needed as a reference",
                field="checkpoints.exports",
                fix="restore it, or keep all exports",
            )
        return str(path)

    def _annotate(self, items: Sequence[TrainItem]) -> list[TrainItem]:
        """Fill in the log-probs and values that the algorithm asked for; each is computed once per iteration."""
        needs, learner = self.parts.algorithm.needs(), self.parts.learner
        flat = [s for item in items for s in item.sequences]
        temperature = self.parts.config.sampling.temperature if self.parts.algorithm.policy_gradient else 1.0
        extra: dict[str, list[Any]] = {}
        reference = self._reference()
        model = None if reference is None else self._model_of(reference)
        if needs.old or model == "policy":
            extra["old"] = learner.score(flat, model="policy", temperature=temperature)
        if model is not None:
            same = model == "policy"
            extra["reference"] = extra["old"] if same else learner.score(flat, model=model, temperature=temperature)
        if needs.values:
            extra["values"] = learner.values(flat)
        filled = iter([s.with_(**{k: v[i] for k, v in extra.items()}) for i, s in enumerate(flat)])
        return [replace(item, sequences=tuple(next(filled) for _ in item.sequences)) for item in items]

    def _self_test(self, items: Sequence[TrainItem]) -> None:
        """Before the very first step (R-E5)."""
        result = self.parts.learner.self_test(items[:SELF_TEST_ITEMS], self.parts.base_model)
        expected = self.parts.algorithm.loss_at_reference
        # bfloat16 keeps three digits; the reference is read from disk and must agree to that.
        health.check_self_test(result, expected, loss_tolerance=1e-3, gap_limit=0.02)
        self.report.self_test(result)

    # --- checkpoint, sync ---

    def checkpoint(self) -> dict[str, Any]:
        """Everything that resume needs, and the policy for everyone else."""
        config, store, learner = self.parts.config, self.parts.store, self.parts.learner
        store.require_free(self.parts.state_bytes, int(config.checkpoints.min_free_gib * 2**30))
        with store.staged("exports", self.number) as path:
            learner.export(path)
        with store.staged("checkpoints", self.number) as path:
            learner.save(path)
        return {}

    def sync(self) -> dict[str, Any]:
        """Push the learner's weights and prove that they arrived."""
        self.parts.tracker.phase_started(self.number, "sync", None, "")
        report = self.parts.sync.push(self.weights.learner)
        self.weights.engine = self.weights.learner
        self.report.synced(self.number, report)
        return {
            "seconds": report.seconds,
            "bytes": report.bytes,
            "proved": report.proved,
            "backend": report.backend,
            "replicas": report.replicas,
            "tensors_checked": report.tensors_checked,
            "canary_nats": report.canary_nats,
            "parts": dict(report.phases),
        }

    def _ensure_engine(self) -> None:
        """After a restart the replicas hold the base model, whatever was believed before."""
        if self.weights.engine != self.weights.learner:
            self.parts.sync.push(self.weights.learner)
            self.weights.engine = self.weights.learner

    # --- evaluate, commit ---

    def evaluate(self) -> dict[str, Any]:
        """Held-out prompts, one response each, with the same seeds for every iterate."""
        config, learner = self.parts.config, self.parts.learner
        self._ensure_engine()
        sampling = Sampling(
            max_new_tokens=config.sampling.max_new_tokens
        )  # divergences need temperature 1 and the whole vocabulary
        requests = [Request(prompt=p, seeds=(derive_seed(config.seed, "evaluation", p.id),)) for p in self.parts.heldout]
        groups = self._generate(requests, sampling, EVALUATION, "evaluate")
        calls, verdicts = self._judge(groups, EVALUATION_VERDICTS, "evaluate")
        now = evaluation.Evaluated(groups=groups, verdicts=verdicts)
        flat = evaluation.sequences(groups)
        own = learner.score(flat, model="policy", temperature=1.0)
        base_kl = evaluation.drift(now, learner, own, self._other(0))
        prev_kl = base_kl if self.number <= 1 else evaluation.drift(now, learner, own, self._other(self.number - 1))
        rates = {}
        for iterate in sorted({0, self.number - 1}) if self.number > 0 else ():
            judge = partial(self._judge, table=f"comparisons_{iterate:04d}", phase="evaluate")
            rates[iterate], more = evaluation.win_rate(now, self._evaluated(iterate), judge)
            calls += more
        wins = {"base": rates[0], "prev": rates[self.number - 1]} if rates else {}
        sample = groups[: config.evaluation.mismatch_sample]
        gap = evaluation.mismatch(sample, own[: len(sample)])
        health.check_mismatch(gap.k3, config.evaluation.max_mismatch_k3)
        return self.report.evaluated(self.number, now, base_kl, prev_kl, wins, gap) | {"oracle_calls": calls}

    def _other(self, iterate: int) -> str | None:
        model = self._model_of(iterate)
        return None if model == "policy" else model

    def _evaluated(self, iterate: int) -> evaluation.Evaluated:
        """What an earlier iterate answered, from disk."""
        by_id = {p.id: p for p in self.parts.heldout}
        groups = [group_from_row(row, by_id) for row in self.parts.store.read(iterate, EVALUATION)]
        verdicts = dict(result_from_row(row) for row in self.parts.store.read(iterate, EVALUATION_VERDICTS))
        return evaluation.Evaluated(groups=groups, verdicts=verdicts)

    def commit(self) -> dict[str, Any]:
        """The last write of an iteration; then what is no longer needed may go."""
        config, store = self.parts.config, self.parts.store
        if self.number > 0:
            keep = {self.number - i for i in range(config.checkpoints.keep)}
            store.retain("checkpoints", keep)
            if config.checkpoints.exports == "last":
                reference = self._reference()
                store.retain("exports", {self.number, self.number - 1, *([] if reference is None else [reference])})
        return {"status": "promoted"}


def _judged(groups: Sequence[Group], results: dict[str, Verdict | Failure]) -> list[Judged]:
    """Groups with a verdict; a failure is left out, never turned into a score."""
    return [Judged(group=g, verdict=v) for g in groups if isinstance(v := results[g.prompt.id], Verdict)]
