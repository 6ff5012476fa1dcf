"""Whole runs through the command line on the toy engine and learner: what they show, what survives a kill, what a signal does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from each_algorithm import each_algorithm
from recorded import disagreements
from toy_runs import BATCH, COUNTED, HELDOUT, PROBE, PROMPTS, events, everything, weights

from onlinerl import hardware, registry
from onlinerl.graph import NAMES as PHASES
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.stores import labelled
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise
from onlinerl.trackers.jsonl import read_metrics

NOTHING_LEFT, REQUEUE = 4, 75
NUMBER, NONE = (int, float), type(None)
ROW = {
    "iteration": int,
    "reward": NUMBER,
    "kl_ref": NUMBER,
    "kl_prev": NUMBER,
    "win_rate": dict,
    "phases": dict,
    "sync": dict,
    "samples": int,
    "oracle_calls": int,
    "status": str,
    "kl_estimator": str,
    "kl_conflict": bool,
    "insufficient": list,
    "idle": NONE,
    "oracle_versions": list,
}


# --- a whole run ---


def test_show_prints_the_contract(toy_config, cli, tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "HF_TOKEN", "JUDGE_API_KEY"):
        monkeypatch.setenv(name, "sk-3141")
    config = toy_config(tmp_path)
    done = cli("run", config)
    assert done.returncode == 0, done.message
    assert "8 prompts x 4 samples -> at most 8 pairs -> at most 2 optimizer steps an iteration" in done.stdout
    shown = cli("show", "runs/toy", "--json")
    assert shown.returncode == 0, shown.message
    report = json.loads(shown.stdout)
    assert list(report) == ["run", "algorithm", "iterations"]
    assert report["run"] == "toy"
    assert report["algorithm"] == "dpo"
    assert [row["iteration"] for row in report["iterations"]] == [0, 1, 2, 3]
    base, *iterates = report["iterations"]
    assert list(base) == list(ROW)
    assert (base["kl_ref"], base["kl_prev"], base["win_rate"], base["samples"]) == (0, 0, None, None)
    assert list(base["phases"]) == ["sync", "answer", "measure", "commit"]
    assert base["status"] == "promoted"
    assert base["sync"]["proved"] is True
    for row in iterates:
        assert {key: isinstance(row[key], kind) for key, kind in ROW.items()} == dict.fromkeys(ROW, True), row
        assert list(row) == list(ROW)
        assert list(row["win_rate"]) == ["value", "low", "high", "n"]
        assert list(row["sync"]) == ["seconds", "bytes", "proved"]
        assert row["sync"]["proved"] is True
        assert tuple(row["phases"]) == PHASES
        assert row["samples"] == 32
        assert row["oracle_calls"] == 8 + 10
        assert row["kl_ref"] > 0
        assert {"reward", "kl_ref", "win_rate", "length"} <= set(row["insufficient"]), "10 prompts decide nothing"
    assert report["iterations"][-1]["kl_ref"] > report["iterations"][1]["kl_ref"]
    stored = [p for p in (tmp_path / "runs/toy").rglob("*") if p.is_file()]
    assert len(stored) > 20
    assert [p for p in stored if b"sk-3141" in p.read_bytes()] == [], "a secret of the environment was stored"


def test_the_optimizer_s_state_is_kept_or_reset_between_iterations(toy_config, warm_cli, tmp_path):
    import torch

    steps, iterates = {}, {}
    for state in ("keep", "reset"):
        config = toy_config(tmp_path, {"training.optimizer_state": state}, name=state, iterations=2, file=f"{state}.yaml")
        done = warm_cli("run", config)
        assert done.returncode == 0, done.message
        run = tmp_path / "runs" / state
        saved = torch.load(run / "checkpoints" / "0002" / "toy.pt", weights_only=True)
        steps[state] = int(saved["optimizer"]["state"][0]["step"])
        iterates[state] = [weights(run, t) for t in (1, 2)]
    assert steps == {"keep": 4, "reset": 2}
    assert np.array_equal(iterates["keep"][0], iterates["reset"][0])
    assert not np.array_equal(iterates["keep"][1], iterates["reset"][1])


@pytest.mark.parametrize("algorithm", each_algorithm())
def test_every_algorithm_learns(toy_config, warm_cli, tmp_path, counting_model, algorithm):
    # Policy gradients clip their steps, and what imitates the best pushes nothing down: they take theirs more often.
    needs = registry.load("algorithms", algorithm, Algorithm)().needs
    epochs = 2 if needs.sampling_temperature else 1 if needs.reference or needs.pairs else 3
    budget = {"algorithm.name": algorithm, "iterations": 4, "oracle.include_prompt": False, "training.epochs": epochs}
    budget |= {"schedule.stream": True, "prompts.reuse": True} if needs.dynamic_sampling else {}
    # The toy sees no prompt: what it learns for one goal it unlearns for another.
    budget |= {"model": str(counting_model), "algorithm.goal_text": "{goal}"} if needs.goals else {}
    doubts = {"oracle": {"name": "python", "function": "hooks.doubt"}} if needs.uncertainty else {}
    # As long as a response may be: the toy's policy knows no positions, and so ends the more of its responses at once the shorter it is.
    answer = "good great wonderful excellent lovely superb happy best good great lovely" if needs.answers else None
    # Scored for having no end, the toy would learn to end at once; what follows half of an answer has little left to be good at.
    begun = ["algorithm.missing_eos_score=null", "algorithm.p_reset=0.3"] if needs.prefix else []
    done = warm_cli("run", toy_config(tmp_path, budget | doubts, answer=answer), *begun, log=tmp_path / "log")
    assert done.returncode == 0, done.message
    rows = summarise(tmp_path / "runs/toy")["iterations"]
    if needs.goals is None:
        assert rows[-1]["reward"] > rows[0]["reward"] + 0.4, done.message
        assert max(row["win_rate"]["low"] for row in rows[1:]) > 0.5, "of any iterate: there are 10 held-out prompts"
    assert all(row["sync"]["proved"] for row in rows)
    assert disagreements(tmp_path / "runs/toy", algorithm) == [], "with the catalogue, of what was recorded"


def test_a_learning_rate_of_zero_changes_nothing(toy_config, warm_cli, tmp_path):
    done = warm_cli("run", toy_config(tmp_path, {"training.learning_rate": 0.0, "iterations": 2}))
    assert done.returncode == 0, done.message
    rows = summarise(tmp_path / "runs/toy")["iterations"]
    assert np.array_equal(weights(tmp_path / "runs/toy", 2), np.zeros_like(weights(tmp_path / "runs/toy", 2)))
    assert {row["reward"] for row in rows} == {rows[0]["reward"]}
    assert [row["kl_ref"] for row in rows] == [0, 0, 0]
    assert [row["win_rate"]["value"] for row in rows[1:]] == [0.5, 0.5]


@pytest.mark.parametrize("there", [False, True], ids=["to a CPU with bfloat16", "to a CPU without"])
def test_dtypes_are_stored_with_the_run_and_a_resume_on_another_machine_keeps_them(
    toy_config, onlinerl, tmp_path, monkeypatch, there
):
    """Whatever that machine would have decided for a run of its own."""

    def on_machine(computes_bfloat16: bool) -> None:
        monkeypatch.setattr(hardware, "computes_bfloat16", lambda: computes_bfloat16)

    def stored() -> set[str]:
        written = yaml.safe_load((tmp_path / "runs/toy/config.yaml").read_text())
        manifest = json.loads((tmp_path / "runs/toy/manifest.json").read_text())
        kept = [manifest["fingerprint"][f"{section}.dtype"] for section in ("engine", "learner")]
        return {*kept, *(written[section]["dtype"] for section in ("engine", "learner"))}

    chosen = "bfloat16" if there else "float32"
    on_machine(there)
    code, message = onlinerl("run", toy_config(tmp_path, {"iterations": 1, "cluster.device": "cpu"}))
    assert code == 0, message
    assert stored() == {chosen}
    on_machine(not there)
    code, message = onlinerl("resume", "runs/toy", "iterations=2")
    assert code == 0, message
    assert stored() == {chosen}
    code, message = onlinerl("resume", "runs/toy", "iterations=3", "learner.dtype=auto")
    assert code != 0, "it would go on in another dtype"
    assert f"learner.dtype: was '{chosen}' when the run started" in message


# --- killed and resumed ---

# Calls of the oracle in one evaluation and one labelling, with batches of 4.
EVALUATION_CALLS, LABEL_CALLS = 3, 2
# The event during which iteration 2 of the first process is killed, phase by phase.
INSIDE = {
    "sample": ["generate", HELDOUT + PROMPTS + HELDOUT + 3],
    "label": ["judge", 1 + EVALUATION_CALLS + LABEL_CALLS + EVALUATION_CALLS + 2],
    "annotate": ["logprobs", 6],
    "train": ["step", 3],
    "checkpoint": ["save", 2],
    "sync": ["push", 3],
    "answer": ["generate", HELDOUT + 2 * (PROMPTS + HELDOUT) - 5],
    "measure": ["judge", 1 + 2 * (EVALUATION_CALLS + LABEL_CALLS) + 2],
    "commit": ["retain", 2],
}


def finished_phases(run: Path, iteration: int) -> set[str]:
    with RunDirectory.open(run) as opened:
        return {*opened.phases(iteration)}


@pytest.fixture(scope="module")
def straight(toy_config, warm_cli_in, tmp_path_factory):
    """The directory of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = warm_cli_in(folder)("run", toy_config(folder, COUNTED), log=folder / "log")
    assert done.returncode == 0, done.message
    check_counts(folder / "log")
    return folder / "runs/toy"


@pytest.fixture(scope="module")
def uninterrupted(straight):
    """What it reports."""
    return everything(straight)


@pytest.fixture(scope="module")
def prompts_of(straight):
    """The texts of the prompts that each iteration trains on, whatever the oracle says."""
    with RunDirectory.open(straight) as run:
        return {t: [row["prompt"] for row in run.read(t, "rollouts")] for t in (1, 2, 3)}


def check_counts(log: Path, *, generated_twice: int = 0, judged_twice: int = 0) -> None:
    """No prompt was generated and no label requested twice, counted by engine and oracle and not by the store.

    What was in the works at the very instant of a kill was asked for but never answered: `generated_twice` and `judged_twice` say
    how many prompts that is. A prompt sampled by a wrong version would be counted as one too many. A question that was asked before, of
    an answer that an earlier iterate gave too, is not asked again.
    """
    happened = events(log)
    generated = Counter((e["prompt"], *e["seeds"], e["version"]) for e in happened if e["kind"] == "generate")
    asked = [one for e in happened if e["kind"] == "judge" for one in e["asked"] if one[1:] != PROBE]
    expected = 3 * PROMPTS + 4 * HELDOUT
    assert len(generated) == expected
    assert sum(generated.values()) == expected + generated_twice
    questions = {tuple(one) for one in asked}
    assert len(questions) + known(log.parent / "runs/toy") == expected
    assert len(asked) - len(questions) <= judged_twice


def known(run: Path) -> int:
    """Labels that were not asked for, because the same was asked before."""
    return sum(row["reused_from"] is not None for row in labelled.rows(run))


@pytest.fixture
def counted(toy_config, warm_cli, tmp_path):
    """Starts or resumes a run with an oracle that counts; `finish` says whether to wait for its end."""
    config = toy_config(tmp_path, COUNTED)

    def command(name: str, *overrides: str, finish: bool = True, **spec: object):
        target = config if name == "run" else tmp_path / "runs/toy"
        started = warm_cli.start(name, target, *overrides, log=tmp_path / "log", **spec)
        return warm_cli.finish(*started) if finish else started

    return command


@pytest.mark.parametrize("phase", PHASES)
def test_killed_three_times_in_a_phase(counted, uninterrupted, tmp_path, phase):
    """In its middle, when its work is done but not recorded, and when it is recorded; then resumed to the end."""
    run = tmp_path / "runs/toy"
    killed = -signal.SIGKILL
    assert counted("run", kill=INSIDE[phase]).returncode == killed
    assert finished_phases(run, 2) == {*PHASES[: PHASES.index(phase)]}, "killed at another moment than meant"
    assert counted("resume", kill=[f"before 2 {phase}", 1]).returncode == killed
    assert counted("resume", kill=[f"after 2 {phase}", 1]).returncode == killed
    assert phase in finished_phases(run, 2)
    done = counted("resume")
    assert done.returncode == 0, done.message
    check_counts(
        tmp_path / "log",
        generated_twice=1 if phase in ("sample", "answer") else 0,
        judged_twice=BATCH if phase in ("label", "measure") else 0,
    )
    assert everything(run) == uninterrupted
    with RunDirectory.open(run) as opened:
        assert (opened.manifest["status"], opened.manifest["attempt"]) == ("finished", 3)


SIDE_BY_SIDE = ("schedule.stream=true", "schedule.evaluate_beside=true")


@pytest.mark.parametrize("phase", PHASES)
def test_killed_while_phases_run_side_by_side(counted, uninterrupted, tmp_path, phase):
    """Labels follow rollouts, log-probs follow labels, an evaluation runs beside the next sampling: it makes the very same run, and
    loses and repeats as little."""
    killed = -signal.SIGKILL
    assert counted("run", *SIDE_BY_SIDE, kill=INSIDE[phase]).returncode == killed
    assert counted("resume", kill=[f"before 2 {phase}", 1]).returncode in (0, killed)
    done = counted("resume", kill=[f"after 3 {phase}", 1])
    if done.returncode == killed:
        done = counted("resume")
    assert done.returncode in (0, NOTHING_LEFT), done.message
    happened = events(tmp_path / "log")
    generated = Counter((e["prompt"], *e["seeds"], e["version"]) for e in happened if e["kind"] == "generate")
    asked = [one for e in happened if e["kind"] == "judge" for one in e["asked"] if one[1:] != PROBE]
    expected = 3 * PROMPTS + 4 * HELDOUT
    assert len(generated) == expected, "a prompt was sampled by the wrong version"
    assert sum(generated.values()) <= expected + 3 * 2, "at each kill one prompt of two phases may be in the works"
    assert len(asked) <= expected + 3 * BATCH, "at each kill one call may be in the works"
    assert everything(tmp_path / "runs/toy") == uninterrupted


def test_killed_before_the_base_model_was_measured(counted, uninterrupted, tmp_path):
    assert counted("run", kill=["generate", 1]).returncode == -signal.SIGKILL
    assert counted("resume").returncode == 0
    check_counts(tmp_path / "log", generated_twice=1)
    assert everything(tmp_path / "runs/toy") == uninterrupted


def test_an_oracle_that_only_compares(counted, tmp_path):
    """It is never asked about one response, and the questions behind a win rate are labels too.

    Killed in iteration 2, between base and previous iterate.
    """
    run, short = tmp_path / "runs/toy", ["oracle.function=hooks.compare", "iterations=2"]
    before = 1 + 2 * LABEL_CALLS + EVALUATION_CALLS  # iteration 1 asks about the base once, not twice
    assert counted("run", *short, kill=["judge", before + EVALUATION_CALLS + 2]).returncode == -signal.SIGKILL
    done = counted("resume")
    assert done.returncode == 0, done.message
    asked = [one for e in events(tmp_path / "log") if e["kind"] == "judge" for one in e["asked"] if one[1:] != PROBE]
    assert len({tuple(one) for one in asked}) + known(run) == 2 * PROMPTS + 3 * HELDOUT
    assert len(asked) <= 2 * PROMPTS + 3 * HELDOUT + BATCH
    assert min(len(one) for one in asked) == 3, "a prompt and at least two responses"
    rows = summarise(run)["iterations"]
    assert [row["oracle_calls"] for row in rows] == [0, PROMPTS + HELDOUT, PROMPTS + 2 * HELDOUT]
    assert {row["reward"] for row in rows} == {None}
    assert rows[-1]["win_rate"]["value"] > 0.5
    assert not [r for r in read_metrics(run / "metrics.jsonl") if r["name"] == "reward"]


def test_a_repaired_oracle_is_asked_again_and_only_what_it_failed_on(counted, uninterrupted, tmp_path):
    """Failures are no labels. The oracle is down in iteration 2, the run stops, and a resume after the repair goes on."""
    run = tmp_path / "runs/toy"
    labels = 1 + EVALUATION_CALLS + LABEL_CALLS + EVALUATION_CALLS + LABEL_CALLS
    stopped = counted("run", down=["judge", labels])  # the second batch of iteration 2
    assert stopped.returncode == 1, stopped.message
    assert "the oracle failed on 4 of 8 groups" in stopped.stderr
    again = counted("resume", down=["judge", 2])
    assert again.returncode == 1, again.message
    assert (run / "failure.json").exists()
    done = counted("resume")
    assert not (run / "failure.json").exists(), "of an attempt that is over"
    assert done.returncode == 0, done.message
    check_counts(tmp_path / "log", judged_twice=2 * BATCH)
    assert everything(run) == uninterrupted


def test_an_exception_loses_no_label_that_was_paid_for(toy_config, warm_cli, tmp_path):
    """The oracle breaks for good in the middle of labelling; after its repair only what has no answer yet is asked."""
    log, broken = tmp_path / "payments", tmp_path / "broken"
    (tmp_path / "billing.py").write_text(
        "import os\n"
        "def judge(queries):\n"
        "    for query in queries:\n"
        f"        done = open({str(log)!r}).read().count(chr(10)) if os.path.exists({str(log)!r}) else 0\n"
        f"        if done >= 16 and os.path.exists({str(broken)!r}):\n"
        "            raise KeyError('choices')\n"
        f"        with open({str(log)!r}, 'a') as file:\n"
        "            file.write(query['prompt'] + chr(10))\n"
        "    return [[len(r) for r in q['responses']] for q in queries]\n"
    )
    broken.touch()
    overrides = {"oracle.name": "python", "oracle.function": "billing.judge", "iterations": 1}
    stopped = warm_cli("run", toy_config(tmp_path, overrides))
    assert stopped.returncode == 1, stopped.message
    assert "KeyError" in stopped.stderr
    assert summarise(tmp_path / "runs/toy")["iterations"][-1]["phases"].keys() == {"sample"}
    broken.unlink()
    done = warm_cli("resume", tmp_path / "runs/toy")
    assert done.returncode == 0, done.message
    probes = 2  # one at each start
    assert len(log.read_text().splitlines()) == probes + 2 * HELDOUT + PROMPTS, "no label was paid for twice"


EDITED = """
def judge(queries):
    if {broken} and len(queries[0]["responses"]) > 2:
        with open("asked", "a") as file:
            file.write("x")
        if len(open("asked").read()) > 5:
            raise KeyError("choices")
    return [[{sign} len(r) for r in q["responses"]] for q in queries]
"""


def test_a_resume_with_an_edited_oracle_is_said_and_shown(toy_config, warm_cli, tmp_path):
    """What was paid for is kept; a person must know that a batch and the rewards are of two versions."""
    file, run = tmp_path / "taste.py", tmp_path / "runs/toy"
    file.write_text(EDITED.format(broken=True, sign="+"))
    overrides = {"oracle.name": "python", "oracle.function": "taste.judge", "iterations": 2}
    stopped = warm_cli("run", toy_config(tmp_path, overrides))
    assert stopped.returncode == 1, stopped.message
    assert "the oracle is " not in stopped.stdout
    file.write_text(EDITED.format(broken=False, sign="-"))
    done = warm_cli("resume", run)
    assert done.returncode == 0, done.message
    (base,), mixed, (new,) = (row["oracle_versions"] for row in summarise(run)["iterations"])
    assert mixed == [base, new]
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("the oracle is ")]
    assert said.startswith(f"the oracle is {new} now, and this run has verdicts of another version: {HELDOUT + 5} by {base}.")
    assert "iteration 1 may be trained on verdicts of both" in said
    assert "restore the oracle as it was and resume" in said
    shown = " ".join(warm_cli("show", run).stdout.split())
    assert (
        f"not to be compared with what {base} judged alone: iterations 1, 2, judged by another version of the oracle ({new})"
        in shown
    )
    later = warm_cli("resume", run, "iterations=3")
    assert later.returncode == 0, later.message
    assert f"{HELDOUT + 5} by {base}. They are kept. Rewards of" in later.stdout, "of finished iterations, as they recorded it"
    versions = {r["oracle_version"] for r in read_metrics(run / "metrics.jsonl") if r["name"] == "reward"}
    assert versions == {base, new}


def flip(file: Path) -> None:
    """One bit in its middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damaged", ["checkpoints/0002/toy.pt", "exports/0002/logits.npy", "iterations/0003/rollouts.parquet/0001.parquet"]
)
def test_damage_is_found_by_a_resume_and_its_advice_works(counted, uninterrupted, tmp_path, damaged):
    """Nothing goes on from a file that was altered: the error names it, and going back leads to the same run."""
    run = tmp_path / "runs/toy"
    assert counted("run", kill=["before 3 label", 1]).returncode == -signal.SIGKILL
    flip(run / damaged)
    stopped = counted("resume")
    assert stopped.returncode == 1, stopped.message
    assert f"{run / damaged} is damaged or cannot be read: its content does not agree with its checksum" in stopped.stderr
    if damaged.startswith("iterations"):
        assert (
            "remove 0003 and all later numbers from iterations/, checkpoints/, exports/, auxiliary/ and references/"
            in stopped.stderr
        )
        shutil.rmtree(run / "iterations/0003")
    else:
        _, _, removal = stopped.stderr.partition(f"go back to iteration 1, which is whole: in {run}, rm -r ")
        for folder in removal.split(", then resume")[0].split():
            shutil.rmtree(run / folder)
    done = counted("resume")
    assert done.returncode == 0, done.message
    assert everything(run) == uninterrupted


def test_pairs_that_a_kill_tore_are_completed(counted, tmp_path):
    run = tmp_path / "runs/toy"
    assert counted("run", kill=["after 2 label", 1]).returncode == -signal.SIGKILL
    with RunDirectory.open(run) as opened:
        opened.pairs(2).append(list(opened.pairs(1))[:2])
    assert counted("resume").returncode == 0
    with RunDirectory.open(run) as opened:
        assert opened.pairs(2).sealed
        assert len(opened.read(2, "pairs")) == opened.phases(2)["train"]["items"] > 2


def test_nothing_left_to_do_and_more_iterations(toy_config, warm_cli, tmp_path):
    """A finished run says so, with an exit code of its own; more iterations continue it as if they had always been asked for."""
    run = tmp_path / "runs/toy"
    assert warm_cli("run", toy_config(tmp_path, iterations=2)).returncode == 0
    before = (run / "metrics.jsonl").read_bytes()
    again = warm_cli("resume", run)
    assert again.returncode == NOTHING_LEFT, again.message
    assert "nothing left to do" in again.stdout
    assert "iterations" in again.stdout
    assert (run / "metrics.jsonl").read_bytes() == before
    more = warm_cli("resume", run, "iterations=3")
    assert more.returncode == 0, more.message
    assert warm_cli("resume", run).returncode == NOTHING_LEFT  # the 3 is remembered
    assert warm_cli("run", toy_config(tmp_path, name="straight", iterations=3)).returncode == 0
    straight, continued = everything(tmp_path / "runs/straight"), everything(run)
    straight["figures"]["run"] = "toy"
    assert continued == straight


def test_a_renamed_run_continues_where_it_is(toy_config, warm_cli, tmp_path):
    assert warm_cli("run", toy_config(tmp_path, iterations=1)).returncode == 0
    (tmp_path / "runs/toy").rename(tmp_path / "runs/renamed")
    (tmp_path / "7").mkdir()  # a parent that YAML would take for a number
    (tmp_path / "7/[/b]").mkdir(parents=True)  # and one that a console may take for markup
    (tmp_path / "runs/renamed").rename(tmp_path / "7/[/b]/moved")
    done = warm_cli("resume", "7/[/b]/moved", "iterations=2")
    assert done.returncode == 0, done.message
    assert f"model: {tmp_path}/7/[/b]/moved/exports" in done.stdout
    (tmp_path / "7/[/b]/moved").rename(tmp_path / "7/moved")
    assert not (tmp_path / "runs/toy").exists()
    assert not (tmp_path / "7/toy").exists()
    assert max(record["iteration"] for record in read_metrics(tmp_path / "7/moved/metrics.jsonl")) == 2


# --- what an algorithm leaves out, and what it remembers ---


def trained(run: Path, iteration: int) -> dict:
    """The record of the training phase."""
    with RunDirectory.open(run) as opened:
        return opened.phases(iteration)["train"]


def counted_in_metrics(run: Path, name: str) -> dict[str | None, float]:
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["name"] == name and r["iteration"] == 1]
    return {r["labels"].get("reason"): r["value"] for r in records}


def test_pairs_that_an_algorithm_leaves_out_are_counted(toy_config, warm_cli, tmp_path):
    knobs = {"algorithm.name": "dno_prct", "algorithm.margin_student": 1.4, "pairing.name": "best_worst", "iterations": 1}
    assert warm_cli("run", toy_config(tmp_path, knobs)).returncode == 0
    record = trained(tmp_path / "runs/toy", 1)
    assert 0 < record["items"] < PROMPTS
    assert record["dropped"]["gap"] > 0
    assert record["items"] + sum(record["dropped"].values()) == PROMPTS  # one pair of best and worst per prompt
    assert counted_in_metrics(tmp_path / "runs/toy", "pairs_dropped") == record["dropped"]


def test_a_pair_whose_winner_lost_against_its_loser_is_counted(toy_config, warm_cli, tmp_path):
    """The first response has the highest win rate, the second the lowest, and the second beats the first."""
    table = [[None, 0.3, 1.0, 1.0], [0.7, None, 0.0, 0.0], [0.0, 1.0, None, 0.5], [0.0, 1.0, 0.5, None]]
    scored = "[float(r.count('good')) for r in g['responses']]"  # of held-out prompts there is one response
    (tmp_path / "upset.py").write_text(
        f"def judge(groups):\n    return [{table} if len(g['responses']) == 4 else {scored} for g in groups]\n"
    )
    knobs = {"oracle.name": "python", "oracle.function": "upset.judge", "iterations": 1}
    done = warm_cli("run", toy_config(tmp_path, knobs))
    assert done.returncode == 0, done.message
    record = trained(tmp_path / "runs/toy", 1)
    assert (record["items"], record["contradicted"]) == (PROMPTS, PROMPTS)
    assert counted_in_metrics(tmp_path / "runs/toy", "pairs_contradicted") == {None: PROMPTS}


def test_what_an_algorithm_remembers_is_the_same_after_a_resume(toy_config, warm_cli, tmp_path):
    """ppo: scores normalized by all earlier ones, a price adapted to the KL of earlier rollouts, and a critic that learns first."""
    knobs = {"algorithm.name": "ppo", "algorithm.kl_in": "reward", "algorithm.target_kl": 0.05, "algorithm.kl_horizon": 32}
    knobs |= {"algorithm.critic_warmup": 1, "iterations": 4, "metrics.prometheus": False}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert warm_cli("run", toy_config(straight, knobs), log=tmp_path / "log").returncode == 0
    config = toy_config(killed, knobs)
    assert warm_cli("run", config, log=tmp_path / "log2", kill=["before 4 train", 1]).returncode == -signal.SIGKILL
    assert warm_cli("resume", killed / "runs/toy").returncode == 0
    figures = [trained(killed / "runs/toy", t)["figures"] for t in range(1, 5)]
    assert figures == [trained(straight / "runs/toy", t)["figures"] for t in range(1, 5)]
    assert everything(killed / "runs/toy", 4) == everything(straight / "runs/toy", 4)
    assert [f["kl_rollouts"] for f in figures[:2]] == [0, 0]  # the base model, which the warm-up left as it was
    assert not weights(killed / "runs/toy", 1).any()
    assert weights(killed / "runs/toy", 2).any()
    # 0.2 down for each KL of 0, and up for the third, which is above the target.
    assert [f["kl_coef"] for f in figures] == pytest.approx([0.05, 0.04, 0.032, 0.032 * 1.2])
    assert figures[2]["kl_rollouts"] > 0.06


# --- nothing to learn ---


def test_killed_in_every_phase_of_an_iteration_that_gives_nothing_to_learn(
    counted, warm_cli_in, toy_config, prompts_of, tmp_path
):
    """It is committed as `keep` without a step, counted and shown, and a resume inside it changes nothing."""
    tied, folder = prompts_of[2], tmp_path / "straight"
    config = toy_config(folder, COUNTED)
    straight = warm_cli_in(folder)("run", config, log=folder / "log", tied=tied)
    assert straight.returncode == 0, straight.message
    assert "iteration 2 gives nothing to learn, so no step is taken: all 8 groups are ties" in straight.stdout
    assert "iteration 2 gave nothing to learn" in " ".join(straight.stdout.split()), "in the table"
    expected = everything(folder / "runs/toy")
    rows = expected["figures"]["iterations"]
    assert [row["status"] for row in rows] == ["promoted", "promoted", "keep", "promoted"]
    assert rows[2]["idle"].startswith("all 8 groups are ties")
    assert expected["weights"][1] == expected["weights"][0]
    assert expected["weights"][2] != expected["weights"][1]
    assert rows[2]["kl_prev"] == 0
    idle = [r["value"] for r in read_metrics(folder / "runs/toy/metrics.jsonl") if r["name"] == "idle_iterations"]
    assert idle == [0, 1, 0]
    assert Counter(e["kind"] for e in events(folder / "log"))["step"] == 2 * 2

    for command, phase in zip(["run", *["resume"] * (len(PHASES) - 1)], PHASES, strict=True):
        assert counted(command, tied=tied, kill=[f"before 2 {phase}", 1]).returncode == -signal.SIGKILL
    done = counted("resume", tied=tied, kill=["after 2 commit", 1])
    assert done.returncode == -signal.SIGKILL
    done = counted("resume", tied=tied)
    assert done.returncode == 0, done.message
    check_counts(tmp_path / "log")
    assert everything(tmp_path / "runs/toy") == expected


def test_the_self_test_waits_for_the_first_step(counted, prompts_of, tmp_path):
    """The first two iterations give nothing to learn; a resume in between forgets nothing."""
    tied = prompts_of[1] + prompts_of[2]
    first = counted("run", tied=tied, kill=["after 2 commit", 1])
    assert first.returncode == -signal.SIGKILL
    assert "self-test" not in first.stdout
    assert not weights(tmp_path / "runs/toy", 2).any()
    done = counted("resume", tied=tied)
    assert done.returncode == 0, done.message
    assert done.stdout.count("self-test: loss 0.693147") == 1
    assert [row["status"] for row in summarise(tmp_path / "runs/toy")["iterations"]] == ["promoted", "keep", "keep", "promoted"]
    more = counted("resume", "iterations=4")
    assert more.returncode == 0, more.message
    assert "self-test" not in more.stdout


# --- what a run keeps ---


def test_training_does_not_depend_on_arrival(counted, straight, uninterrupted, tmp_path):
    """Whatever order the engine finishes in: the same weights to the last bit, the same pairs, the same figures."""
    done = counted("run", arrival=1)
    assert done.returncode == 0, done.message
    orders = []
    for path in (straight, tmp_path / "runs/toy"):
        with RunDirectory.open(path) as run:
            orders.append([row["prompt_id"] for row in run.read(1, "rollouts")])
    assert orders[0] != orders[1], "the order of arrival was not changed"
    assert everything(tmp_path / "runs/toy") == uninterrupted


def test_a_run_keeps_its_prompts(counted, uninterrupted, tmp_path):
    """Whatever becomes of the files, a resumed run goes on with the prompts it started with, and says what has changed."""
    assert counted("run", kill=["after 1 commit", 1]).returncode == -signal.SIGKILL
    train, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    before = train.read_text().splitlines(keepends=True)
    altered = json.dumps({"id": "p001", "text": "something else"}) + "\n"
    more = [json.dumps({"id": f"new{i}", "text": f"new film {i}"}) + "\n" for i in range(200)]
    train.write_text("".join([altered, *before[2:], *more]))
    again = counted("resume", kill=["after 2 sample", 1])
    assert again.returncode == -signal.SIGKILL
    assert "prompts.train has changed since the run started: 200 added ('new0', 'new1', 'new2', ...), 1 removed ('p000'), " in (
        again.stdout
    )
    assert "1 altered ('p001'); the run goes on with the prompts that it keeps" in again.stdout
    assert "prompts.heldout" not in again.stdout
    train.unlink()
    heldout.write_text("")
    done = counted("resume")
    assert done.returncode == 0, done.message
    assert "prompts.train has changed since the run started: it cannot be read any more: there is no file" in done.stdout
    assert "prompts.heldout has changed since the run started: it cannot be read any more: " in done.stdout
    check_counts(tmp_path / "log")
    assert everything(tmp_path / "runs/toy") == uninterrupted


def test_more_iterations_than_kept_prompts(counted, tmp_path):
    """Adding prompts to the file is no way to go on; starting over with those that the run keeps is."""
    assert counted("run", "iterations=1").returncode == 0
    with (tmp_path / "train.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"one more film {i}"}) + "\n" for i in range(40))
    refused = counted("resume", "iterations=6")
    assert refused.returncode == 2, refused.message
    assert "6 iterations of 8 fresh prompts need 48, and there are 40" in refused.stderr
    assert "lower iterations to 5, set prompts.reuse=true, or start a new run with more prompts" in refused.stderr
    done = counted("resume", "iterations=6", "prompts.reuse=true")
    assert done.returncode == 0, done.message
    generated = Counter(e["prompt"] for e in events(tmp_path / "log") if e["kind"] == "generate" and len(e["seeds"]) == 4)
    assert sum(generated.values()) == 48
    assert sorted(generated.values()) == [1] * 32 + [2] * 8, "no prompt comes back before all others were used"


def test_damaged_prompts_are_noticed(counted, tmp_path):
    assert counted("run", kill=["after 1 commit", 1]).returncode == -signal.SIGKILL
    folder = tmp_path / "runs/toy/prompts"
    (folder / "train.parquet/0001.parquet").write_bytes((folder / "heldout.parquet/0001.parquet").read_bytes())
    refused = counted("resume")
    assert refused.returncode == 2, refused.message
    assert "train.parquet/0001.parquet is damaged" in refused.stderr


def test_a_stored_configuration_does_not_depend_on_the_working_directory(toy_config, warm_cli_in, tiny_model, tmp_path):
    """Model, prompts and runs are given relative to where the run is started, and it is resumed somewhere else."""
    home, elsewhere = tmp_path / "home", tmp_path / "else/where"
    elsewhere.mkdir(parents=True)
    home.mkdir()
    (home / "model").symlink_to(tiny_model)
    config = toy_config(
        home, {"model": "model", "prompts.train": "train.jsonl", "prompts.heldout": "heldout.jsonl", "runs": "runs"}
    )
    first = warm_cli_in(home)("run", config, log=home / "log", kill=["after 1 commit", 1])
    assert first.returncode == -signal.SIGKILL
    done = warm_cli_in(elsewhere)("resume", "../../home/runs/toy")
    assert done.returncode == 0, done.message
    assert "has changed" not in done.stdout, "the files are found too"
    stored = yaml.safe_load((home / "runs/toy/config.yaml").read_text())
    for path in (stored["model"], stored["runs"], stored["prompts"]["train"], stored["prompts"]["heldout"]):
        assert Path(path).is_absolute()


# --- signals ---


@pytest.mark.parametrize("schedule", [(), SIDE_BY_SIDE], ids=["in-turn", "side-by-side"])
@pytest.mark.parametrize(
    ("number", "where"),
    [
        (signal.SIGINT, INSIDE["sample"]),
        (signal.SIGTERM, INSIDE["label"]),  # inside the user's own function
        (signal.SIGTERM, INSIDE["train"]),
        (signal.SIGINT, ["before 2 sync", 1]),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value[0].replace(" ", "-"),
)
def test_a_signal_ends_it_resumably(counted, warm_cli, uninterrupted, tmp_path, number, where, schedule):
    """Wherever it is, the run ends with the code that means "requeue", and a resume finishes it as if nothing had happened."""
    run = tmp_path / "runs/toy"
    process, out = counted("run", *schedule, wait=where, finish=False)
    warm_cli.wait_for(tmp_path / "log", "waiting")
    assert summarise(run)["iterations"][-1]["status"] == "running"
    process_id = process.pid
    assert process_id is not None
    os.kill(process_id, number)
    stopped = warm_cli.finish(process, out)
    assert stopped.returncode == REQUEUE, stopped.message
    assert f"stopped by {number.name}" in stopped.stderr
    assert f"onlinerl resume {run}" in stopped.stdout
    assert f"onlinerl resume {run}" in stopped.stderr
    assert summarise(run)["iterations"][-1]["status"] == "unfinished"
    with RunDirectory.open(run) as opened:
        assert opened.manifest["status"] == "interrupted"
    assert not (run / "failure.json").exists()
    done = counted("resume")
    assert done.returncode == 0, done.message
    assert everything(run) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_before_anything_has_begun(warm_cli, toy_config, tmp_path, number):
    """While the configuration is checked: a launcher must know that the job may be queued again."""
    (tmp_path / "slow.py").write_text("import time\nopen('there', 'w').close()\ntime.sleep(60)\n")
    config = toy_config(tmp_path, {"oracle.name": "python", "oracle.function": "slow.judge"})
    process, out = warm_cli.start("run", config)
    deadline = time.monotonic() + 60
    while not (tmp_path / "there").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    stopped = warm_cli.finish(process, out)
    assert stopped.returncode == REQUEUE, stopped.message
    assert f"stopped by {number.name}" in stopped.stderr
    assert "Traceback" not in stopped.stderr


def test_a_second_signal_ends_it_at_once(counted, warm_cli, uninterrupted, tmp_path):
    """Although the clean-up that the first one began never ends; a resume finishes the run."""
    process, out = counted("run", wait=INSIDE["train"], slow_end=True, finish=False)
    warm_cli.wait_for(tmp_path / "log", "waiting")
    os.kill(process.pid, signal.SIGINT)
    warm_cli.wait_for(tmp_path / "log", "cleaning up")
    os.kill(process.pid, signal.SIGINT)
    stopped = warm_cli.finish(process, out, timeout=20)
    assert stopped.returncode == REQUEUE, stopped.message
    assert "stopping; a second signal ends it at once" in stopped.stderr
    assert counted("resume").returncode == 0
    assert everything(tmp_path / "runs/toy") == uninterrupted


@pytest.mark.parametrize("spec", [{"nobody_reads": True}, {"encoding": "ascii"}], ids=["broken-pipe", "ascii"])
def test_a_console_that_fails_does_not_end_a_run(toy_config, warm_cli, tmp_path, spec):
    """`onlinerl run ... | head`, and a terminal that does not know all letters of a path."""
    done = warm_cli("run", toy_config(tmp_path, {"runs": str(tmp_path / "läufe"), "iterations": 1}), **spec)
    assert done.returncode == 0, done.message
    assert [row["status"] for row in summarise(tmp_path / "läufe/toy")["iterations"]] == ["promoted"] * 2
    if "encoding" in spec:
        assert "l?ufe" in done.stdout
    else:
        assert done.stderr.count("stdout takes no more text, and the run goes on without it") == 1
    assert "Traceback" not in done.message


def test_one_process_at_a_time(counted, warm_cli, tmp_path):
    process, out = counted("run", wait=["generate", 5], finish=False)
    warm_cli.wait_for(tmp_path / "log", "waiting")
    second = counted("resume")
    assert second.returncode == 2, second.message
    assert f"is in use by process {process.pid}" in second.stderr
    os.kill(process.pid, signal.SIGTERM)
    assert warm_cli.finish(process, out).returncode == REQUEUE


# --- the reference ---


def test_the_reference_stays_the_same(toy_config, warm_cli, tiny_model, tmp_path):
    """Resume refuses another base model, and the KL goes on from where it was instead of starting at 0 again.

    The same model at another place is no other model.
    """
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    run, log = tmp_path / "runs/toy", tmp_path / "log"
    config = toy_config(tmp_path, {"model": str(model), "reference.schedule": "fixed"})
    assert warm_cli("run", config, log=log, kill=["before 2 answer", 1]).returncode == -signal.SIGKILL
    with RunDirectory.open(run) as opened:
        before = opened.manifest["reference"]
    assert before["checksum"]

    file = model / "model.safetensors"
    original = file.read_bytes()
    file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    refused = warm_cli("resume", run)
    assert refused.returncode == 2, refused.message
    assert "config: model: the base model on disk is not the one this run started from" in refused.stderr
    assert "fix: restore it" in refused.stderr

    file.write_bytes(original)
    moved = model.rename(tmp_path / "moved")
    refused = warm_cli("resume", run)
    assert refused.returncode == 2, refused.message
    assert f"config: model: the base model is no longer at {model}" in refused.stderr
    assert "say where it is now with model=..." in refused.stderr
    other = shutil.copytree(moved, tmp_path / "other")
    (other / "tokenizer_config.json").write_text("{}")
    refused = warm_cli("resume", run, f"model={other}")
    assert refused.returncode == 2, refused.message
    assert f"config: model: was '{model}' when the run started and is now '{other}'" in refused.stderr

    done = warm_cli("resume", run, f"model={moved}")
    assert done.returncode == 0, done.message
    with RunDirectory.open(run) as opened:
        assert opened.manifest["reference"] == before
        assert [opened.phases(t)["train"]["reference"] for t in (1, 2, 3)] == [0, 0, 0]
    drifts = [row["kl_ref"] for row in summarise(run)["iterations"]]
    assert drifts[0] == 0
    assert drifts[1] > 0.1
    assert drifts[2] > drifts[1], "measured by the resumed process"
    assert drifts[3] > drifts[1]
