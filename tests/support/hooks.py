"""Runs the command line in this process, with hooks that log what happens and can kill it anywhere."""

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import cache

EVENTS = Counter()
COUNTING = (
    threading.Lock()
)  # phases run in threads of their own: the number of an event is the one that it raised the counter to
SPEC = {}


def event(kind, **facts):
    """One thing happened: log it durably, then die, be stopped or wait here if that is asked for. Returns how many of its kind there were."""
    with COUNTING:
        EVENTS[kind] += 1
        number = EVENTS[kind]
        line = json.dumps({"pid": os.getpid(), "kind": kind, **facts}) + "\n"
        with open(SPEC["log"], "a") as file:
            file.write(line)
        if SPEC.get("kill") == [kind, number]:
            os.kill(os.getpid(), signal.SIGKILL)
    if SPEC.get("stop") == [kind, number]:
        # As `timeout` and batch systems do it, where the group is this run's alone.
        os.kill(-os.getpid() if os.getpgrp() == os.getpid() else os.getpid(), signal.SIGTERM)
    for name, *moment, how in SPEC.get("strikes", ()):
        if moment == [kind, number]:
            strike(name, how)
    if SPEC.get("wait") == [kind, number]:
        with open(SPEC["log"], "a") as file:
            file.write(json.dumps({"kind": "waiting"}) + "\n")
        time.sleep(60)
    return number


STRUCK = set()


def strike(name, how):
    """Send a signal to the oldest process of this run with such a command line that has not been struck yet."""
    import psutil

    def is_one(process):
        try:
            return process.pid not in STRUCK and name in " ".join(process.cmdline())
        except psutil.Error:  # it has just ended
            return False

    victim = min(filter(is_one, psutil.Process().children(recursive=True)), key=lambda p: p.create_time())
    STRUCK.add(victim.pid)
    victim.send_signal(signal.Signals[how])
    with open(SPEC["log"], "a") as file:
        file.write(json.dumps({"kind": "strike", "pid": victim.pid, "how": how}) + "\n")


@cache
def analyzer():
    """VADER, whose lexicon is read once a process."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def judge(queries):
    """An oracle that counts: VADER on the response, as the sentiment oracle with include_prompt=false."""
    number = event("judge", asked=[[q["prompt"], *q["responses"]] for q in queries])
    if SPEC.get("down") == ["judge", number]:
        return [None for _ in queries]
    tied = SPEC.get("tied", ())
    score = analyzer().polarity_scores
    return [[0.5 if q["prompt"] in tied else score(r)["compound"] for r in q["responses"]] for q in queries]


def doubt(queries):
    """The same oracle, and three judges who make more or less of a difference."""
    from math import exp

    scored = judge(queries)
    members = [[[[1 / (1 + exp(-c * (a - b))) for b in scores] for a in scores] for c in (3, 4, 5)] for scores in scored]
    return [{"scores": scores, "members": three} for scores, three in zip(scored, members, strict=True)]


def spread(queries):
    """The same oracle, and that longer responses are judged less alike."""
    return [
        {"score": scores, "std": [len(r) / 100 for r in q["responses"]]}
        for q, scores in zip(queries, judge(queries), strict=True)
    ]


def named(queries):
    """The same oracle with other scores beside its own: how long a response is, and how many vowels it has."""
    scores = zip(queries, judge(queries), strict=True)
    return [
        {
            "score": own,
            "length": [float(len(r)) for r in q["responses"]],
            "vowels": [float(sum(r.count(v) for v in "aeiou")) for r in q["responses"]],
        }
        for q, own in scores
    ]


def compare(queries):
    """The same oracle, but it only says which of two responses is better, and cannot say anything about one."""
    if any(len(q["responses"]) < 2 for q in queries):
        raise ValueError("there is nothing to compare")
    return [[[0.5 + 0.5 * ((a > b) - (a < b)) for b in scores] for a in scores] for scores in judge(queries)]


def toy_parts():
    """Engine, learner and weight push in one process."""
    from onlinerl.engines.toy import ToyEngine
    from onlinerl.learners.toy import ToyLearner, ToySync

    return ToyEngine, ToyLearner, ToySync


def real_parts():
    """The controller's side of vLLM, DeepSpeed and the push between them."""
    from onlinerl.cluster.group import LearnerGroup
    from onlinerl.cluster.pool import EnginePool
    from onlinerl.cluster.sync import WeightPush

    return EnginePool, LearnerGroup, WeightPush


def install():
    """Wrap what the loop works with."""
    from onlinerl.errors import SyncError
    from onlinerl.stores.directory import RunDirectory

    engine, learner, sync = {"toy": toy_parts, "real": real_parts}[SPEC.get("parts", "toy")]()

    def generate(self, requests, sampling, original=engine.generate):
        groups = (group for finished in original(self, requests, sampling) for group in finished)
        if "arrival" in SPEC:  # as if the engine finished them in another order
            groups = list(groups)
            random.Random(SPEC["arrival"]).shuffle(groups)
        for group in groups:
            if SPEC.get("broken") == "logprobs":  # as an engine whose numbers are not the learner's
                rollouts = tuple(replace(r, logprobs=tuple(x - 0.3 for x in r.logprobs)) for r in group.rollouts)
                group = replace(group, rollouts=rollouts)
            if SPEC.get("broken") == "prefix":  # as an engine that samples whole responses, whatever it is asked
                group = replace(group, rollouts=tuple(replace(r, prefix_ids=()) for r in group.rollouts))
            seeds, (version,) = [r.seed for r in group.rollouts], {r.policy_version for r in group.rollouts}
            event("generate", prompt=group.prompt.id, seeds=seeds, version=version)
            yield [group]

    def update(self, steps, rates, original=learner.update, **more):
        event("update")
        for report in original(self, steps, rates, **more):
            event("step")
            yield replace(report, skipped=1) if SPEC.get("broken") == "step" else report

    def logprobs(self, sequences, original=learner.logprobs, **options):
        event("logprobs")
        return original(self, sequences, **options)

    def sample_mixture(self, draws, sampling, original=learner.sample_mixture, **more):
        made = original(self, draws, sampling, **more)
        if SPEC.get("half") and EVENTS["drawn"] == 1:
            _keep_half()
        else:
            event("drawn")
        return made

    def save(self, path, original=learner.save):
        written = original(self, path)
        event("save")
        return written

    def push(self, version, model="policy", original=sync.push):
        if SPEC.get("broken") == "push" and version > 0:
            raise SyncError("planted", field="sync", fix="none")
        report = original(self, version, model)
        event("push", version=version)
        return report

    def retain(self, kind, keep, original=RunDirectory.retain):
        event("retain")
        original(self, kind, keep)

    def finish_phase(self, iteration, phase, record, original=RunDirectory.finish_phase):
        event(f"before {iteration} {phase}")
        original(self, iteration, phase, record)
        event(f"after {iteration} {phase}")

    if SPEC.get("refresh"):
        _watch_refresh()
    if SPEC.get("slow_end"):
        _end_slowly()
    if SPEC.get("broken") == "state":
        _forget_state()
    engine.generate, learner.update, learner.save, sync.push = generate, update, save, push
    learner.logprobs, learner.sample_mixture = logprobs, sample_mixture
    if SPEC.get("parts") == "real":
        _watch_pushes(sync)
    RunDirectory.retain, RunDirectory.finish_phase = retain, finish_phase


def _watch_pushes(sync):
    """An event after each step of a push."""

    def ask_all(self, asked, timeout_s, what, original=sync._all):
        original(self, asked, timeout_s, what)
        event(f"push: {what}")

    sync._all = ask_all


def _watch_refresh():
    """An event at each thing that renewing the oracle's weights between iterations does; `turned`: it learns the opposite from then on."""
    from onlinerl.learners._group import RankGroup
    from onlinerl.oracles._log_probs import LogProbs
    from onlinerl.oracles.reward_model import RewardModel
    from onlinerl.reward_training import in_a_run, steps

    def update(self, *arguments, original=RankGroup.update, **more):
        yield from original(self, *arguments, **more)
        event("reward step")

    def save(checked, store, learner, step, original=steps.save):
        event("reward save")
        original(checked, store, learner, step)
        event("reward saved")

    def export(store, learner, step, original=steps.export):
        event("reward export")
        return original(store, learner, step)

    def rights(checked, learner, original=in_a_run._rights):
        event("reward measured")
        return original(checked, learner)

    def write(path, document, original=in_a_run.documents.write):
        original(path, document)
        event(f"reward {path.name}")

    def reload(self, path, original=RewardModel.reload):
        original(self, path)
        event("reload")

    def chosen(self, iteration, since, known, original=in_a_run.Trainer._chosen):
        data, new = original(self, iteration, since, known)
        if iteration >= SPEC.get("turned", 99):
            data = data._replace(train=[replace(c, chosen=c.rejected, rejected=c.chosen) for c in data.train])
        return data, new

    def followed(self, path, original=LogProbs.reload):
        original(self, path)
        event("reload")

    LogProbs.reload = followed
    RankGroup.update, RewardModel.reload, in_a_run.Trainer._chosen = update, reload, chosen
    steps.save, steps.export, in_a_run._rights, in_a_run.documents.write = save, export, rights, write


def _keep_half():
    """Of the next groups that are written together, half reach the disk before the end."""
    from onlinerl.stores.tables import StoredTable

    def append(self, values, original=StoredTable.append):
        original(self, values[: len(values) // 2])
        event("drawn")

    StoredTable.append = append


def _forget_state():
    """Checkpoints of the toy learner hold the state that its algorithm begins with."""
    from onlinerl.learners import toy

    def save_state(folder, state, original=toy.save_state):
        return original(folder, None if state is None else dict.fromkeys(state, 0.5))

    toy.save_state = save_state


def _end_slowly():
    """The clean-up of a run waits for something that never comes."""
    from contextlib import contextmanager

    from onlinerl import wiring

    @contextmanager
    def toy(*arguments, original=wiring.in_process):
        with original(*arguments) as parts:
            try:
                yield parts
            finally:
                event("cleaning up")
                time.sleep(60)

    wiring.in_process = toy


def command(arguments, spec):
    """`onlinerl ARGUMENTS` in this process; `spec["log"]` installs the hooks."""
    SPEC.update(spec)
    if "log" in spec:
        install()
    from onlinerl import cli

    sys.argv = ["onlinerl", *arguments]
    cli.main()


def forked(arguments, folder, spec):
    """The same in a process forked from one that has imported everything: in a folder, its output in files there."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(os.path.join(folder, spec["out"] + name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
        setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, closefd=False, encoding=spec.get("encoding")))
    if spec.get("nobody_reads"):
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    os.environ.update(COLUMNS="200", NO_COLOR="1", HF_HUB_OFFLINE="1", **spec.get("env", {}))
    import torch

    torch.set_num_threads(1)
    command(arguments, spec)


if __name__ == "__main__":  # python hooks.py SPEC ARGUMENT...
    sys.modules["hooks"] = sys.modules[__name__]  # whose `judge` the configuration names
    command(sys.argv[2:], json.loads(sys.argv[1]))
