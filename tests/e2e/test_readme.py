"""What the documents print can be done: every block of code, every command, every link."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import documents
import numpy as np
import pytest
import typer
from preference_rows import taste, write_rows
from rich.console import Console

from onlinerl import cli as command_line
from onlinerl import config as configuration
from onlinerl import registry
from onlinerl.config.roles import build
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.oracle import Oracle
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.protocols.tracker import Tracked
from onlinerl.stores.summary import summarise
from onlinerl.trackers._fanout import FanoutTracker
from onlinerl.trackers.console import render_table
from onlinerl.types import Group, Judged, Pool, Prompt, Query, Request, Rollout, Sampling, Verdict

ROOT = documents.ROOT
README = ROOT / "README.md"
GUIDES = [document for document in documents.DOCUMENTS if documents.blocks(document)]
QUERY = Query(prompt=Prompt(id="p", text="It was", token_ids=(1,)), responses=(" good good", " long and bad", " so"))
# Shown, not run: what a program prints, prompts (the test of the README writes them), a drawing.
SHOWN = {"text", "json", "mermaid"}
ELSEWHERE = {"python-api.md"}
"""Documents whose scripts have a test of their own."""
PATIENCE_S = 300


def name_of(document: Path) -> str:
    return document.name


# --- every block and every command ---


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=name_of)
def test_every_block_is_of_a_kind_that_is_tried(document):
    for block in documents.blocks(document):
        assert block.language in {"python", "sh", "yaml", "toml", *SHOWN}, f"{document.name}, line {block.line}"
        assert block.language not in ("yaml", "toml") or block.file, f"{document.name}, line {block.line}: say which file it is"


@pytest.mark.parametrize("document", GUIDES, ids=name_of)
def test_its_commands_and_scripts_run_as_printed(document, sandbox, warm_cli):
    documents.write(document, sandbox)
    write_prompts(sandbox)
    names: dict[str, object] = {}
    for block in documents.blocks(document):
        where = f"{document.name}, line {block.line}"
        for command in block.commands if block.language == "sh" else []:
            problem = tried(command, sandbox, warm_cli)
            assert problem is None, f"{where}: {command}: {problem}"
        if block.language == "python" and block.file is None and document.name not in ELSEWHERE:
            documents.execute(document, block, names)


def write_prompts(folder: Path) -> None:
    """The prompts of the README, and as many more as a run needs."""
    [printed] = [block.text for block in documents.blocks(README) if block.language == "json"]
    more = [f'{{"id": "m{i}", "text": "Film {i} was"}}\n' for i in range(60)]
    (folder / "my-prompts.jsonl").write_text(printed + "".join(more[:40]))
    (folder / "my-heldout.jsonl").write_text("".join(more[40:]))
    write_rows(folder / "known-pairs.jsonl", taste(20))


def tried(command: str, folder: Path, warm_cli) -> str | None:
    """Do what the command does, or, where that is expensive, what shows that it would; returns what went wrong."""
    program, *arguments = shlex.split(command.removeprefix("PYTHONPATH=. "))
    if program == "onlinerl":
        done = warm_cli.finish(*warm_cli.start(*arguments), timeout=PATIENCE_S)
        return None if done.returncode == 0 else done.message
    if program == "make":
        return made(arguments, folder, warm_cli)
    if program == "export":
        return None
    if arguments[:2] == ["-m", "venv"]:
        extra = re.search(r"'\.\[(\w+)\]'", command)
        assert extra is not None
        return (
            None
            if extra[1] in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            else extra[1]
        )
    if arguments[:2] == ["-m", "pytest"]:  # run by the test of the guide
        files = [file for file in arguments if file.endswith(".py")]
        return next((file for file in files if not ((ROOT / file).exists() or (folder / file).exists())), None)
    if arguments and (ROOT / arguments[0]).suffix == ".py":
        return None if (ROOT / arguments[0]).is_file() else f"there is no {arguments[0]}"
    return "nothing here knows how to try it"


def made(arguments: list[str], folder: Path, warm_cli) -> str | None:
    """What `make` would do; the runs of onlinerl among it are done."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return done.stderr
    for line in done.stdout.splitlines():
        if line.startswith(".venv/bin/onlinerl "):
            problem = tried(line.removeprefix(".venv/bin/"), folder, warm_cli)
            if problem is not None:
                return problem
    return None


def test_a_command_that_does_not_work_would_be_noticed(sandbox, warm_cli):
    assert "there is no 'grpoo'" in str(tried("onlinerl check configs/quickstart.yaml algorithm.name=grpoo", sandbox, warm_cli))
    assert "No rule to make target" in str(tried("make demonstration", sandbox, warm_cli))
    assert tried("onlinerl-launch x", sandbox, warm_cli) == "nothing here knows how to try it"
    assert tried("python benchmarks/nothing.py", sandbox, warm_cli) == "there is no benchmarks/nothing.py"


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=name_of)
def test_commands_within_sentences_have_the_options_that_they_name(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    group = typer.main.get_command(command_line.app)
    for said in re.findall(r"`(?:PYTHONPATH=\. )?onlinerl ([^`]*)`", text):
        name, *arguments = said.split()
        command = group.commands.get(name)  # type: ignore[attr-defined]
        assert command is not None, said
        options = {option for parameter in command.params for option in parameter.opts}
        assert {argument.partition("=")[0] for argument in arguments if argument.startswith("--")} <= options, said


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=name_of)
def test_links_and_named_files_are_there(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / target).exists(), target
    for named in re.findall(r"`((?:onlinerl|docs|tests|benchmarks|configs|launchers|tools|dashboards)/[\w./-]+\.\w+)`", text):
        shown = {*documents.files(document)}
        assert (ROOT / named).exists() or named in shown, named


# --- what the README shows of a run ---


def test_the_readme_is_read_in_two_minutes():
    prose = re.sub(r"^```.*?^```$", "", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(prose.split()) < 500


def test_the_output_of_the_demo_has_the_form_of_what_is_printed():
    """Its numbers are of a real run; a change of the program's output must not leave it behind."""
    [block] = [block for block in documents.blocks(README) if block.language == "text"]
    finished, header, rule, *rows = block.text.splitlines()
    assert re.fullmatch(r"iteration 4  sync {9,}\d+\.\d s", finished)
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    seconds = dict.fromkeys(("sample", "annotate", "train", "checkpoint", "sync", "answer", "measure"), 1.0)
    row = {
        "iteration": 0,
        "reward": 0.1,
        "kl_ref": 0.0,
        "win_rate": rate,
        "length": 9.0,
        "phases": seconds,
        "status": "promoted",
    }
    table = render_table({"run": "quickstart", "algorithm": "dpo", "iterations": [row]})
    assert header.split() == " ".join(str(column.header) for column in table.columns).split()
    assert {*rule} == {"─"}
    assert [line.split()[0] for line in rows] == ["0", "1", "2", "3", "4"]


# --- the code that it shows ---


@pytest.fixture
def files(sandbox):
    documents.write(README, sandbox)
    documents.write(ROOT / "docs/add-an-oracle.md", sandbox)
    return sandbox


def test_the_guides_show_the_same_files_as_the_readme():
    shown = documents.files(README)
    assert set(shown) == {"my.yaml", "brevity.py", "hinge.py"}
    assert documents.files(ROOT / "docs/add-an-oracle.md")["brevity.py"] == shown["brevity.py"]
    assert documents.files(ROOT / "docs/add-an-algorithm.md")["hinge.py"] == shown["hinge.py"]


def oracle(**spec):
    built = configuration.component(spec, "oracle", "oracles", Oracle)
    built.open()
    return built


def test_oracle_function(files):
    [by_file] = oracle(name="python", function=f"{files}/brevity.py:judge").judge([QUERY])
    [by_module] = oracle(name="python", function="brevity.judge").judge([QUERY])
    assert isinstance(by_file, Verdict)
    assert by_file.scores == by_module.scores == (-10.0, -13.0, -3.0)


def test_oracle_class(files):
    words = oracle(name="wordcount.WordCount", word="bad")
    [verdict] = words.judge([QUERY])
    assert verdict.scores == (0.0, 1.0, 0.0)
    assert words.version == "wordcount-bad"


def test_oracle_that_compares(files):
    [verdict] = oracle(name="shorter.Shorter").ask([QUERY])
    assert isinstance(verdict, Verdict), verdict
    assert [row[2] for row in verdict.preferences[:2]] == [0.0, 0.0]
    assert verdict.preferences[0][1] == 1.0


def test_oracle_that_may_fail(files):
    asked = oracle(name="asked.Asked")
    silent = Query(prompt=QUERY.prompt, responses=(" good", " so?"))
    verdict, failure = asked.ask([QUERY, silent])
    assert verdict.scores == (0.0, 3.0, 3.0)
    assert verdict.cost.calls == 3
    assert failure.kind == "parse_fail"


def test_an_oracle_of_another_package_by_its_name(files):
    documents.install(documents.files(ROOT / "docs/add-an-oracle.md")["pyproject.toml"], files)
    assert "shorter" in registry.names("oracles")
    assert oracle(name="shorter").version == "shorter-1"


def test_a_pair_builder(sandbox):
    documents.write(ROOT / "docs/add-a-part.md", sandbox)
    builder = registry.load("pairing", "middle.BestMiddle", PairBuilder)(min_gap=0.01)
    nan = float("nan")
    rollouts = (
        Rollout(token_ids=(1,), logprobs=(-1.0,), text="x", finish_reason="stop", policy_version=0, sampler=Sampling(), seed=0),
    )
    group = Group(prompt=QUERY.prompt, rollouts=rollouts * 5)

    def pairs(**verdict):
        return builder.build(Judged(group=group, verdict=Verdict(annotator="j", oracle_version="1", **verdict)))

    [pair], dropped = pairs(scores=(1.0, 5.0, 3.0, 2.0, 4.0))
    assert (pair.chosen, pair.rejected, dropped) == (1, 2, {})
    assert pair.prob > 0.5
    assert pairs(scores=(1.0,) * 5) == ([], {"tie": 1})
    unknown = tuple(tuple(0.9 if (i, j) == (0, 1) else nan for j in range(5)) for i in range(5))
    [pair], _ = pairs(preferences=unknown)
    assert (pair.chosen, pair.rejected) == (0, 1), "nobody judged the others"


def test_a_prompt_selector(sandbox):
    documents.write(ROOT / "docs/add-a-part.md", sandbox)
    shortest = build({"name": "shortest.Shortest", "share": 0.3}, "selection")
    prompts = [Prompt(id=str(n), text="", token_ids=(1,) * n) for n in range(1, 11)]
    pool = Pool(prompts=prompts, iteration=1, seed=0, per_iteration=2, most=2, reuse=False, asked={"1": 1}, visits={})
    chosen = shortest.select(pool)
    assert {one.prompt_id for one in chosen} <= {"2", "3"}
    assert [one.probability for one in chosen] == [0.5, 1.0]


def test_a_tracker(sandbox):
    documents.write(ROOT / "docs/add-a-part.md", sandbox)
    run = Tracked(name="r", directory=sandbox, catalogue=CATALOGUE, earlier=[], console=Console())
    tracker = FanoutTracker([build({"name": "slow.Slow", "seconds": 10.0}, "tracker").open(run)])
    tracker.phase_started(1, "train", 64, "items")
    tracker.phase_finished(1, "sample", 2.0)
    tracker.phase_finished(1, "train", 12.0)
    tracker.ended("finished")
    tracker.close()
    assert (sandbox / "slow.txt").read_text() == "iteration 1 train: 12 s\n"


def test_an_engine_draws_from_the_distribution_that_it_reports(sandbox):
    documents.write(ROOT / "docs/add-an-engine.md", sandbox)
    engine = build({"name": "gumbel.Gumbel"}, "engine").open(3, lambda tokens: " ".join(map(str, tokens)))
    engine.load(np.log([0.6, 0.3, 0.1]), 7)
    [[group]] = engine.generate([Request(prompt=QUERY.prompt, seeds=tuple(range(500)))], Sampling(max_new_tokens=4))
    tokens = [token for rollout in group.rollouts for token in rollout.token_ids]
    assert np.bincount(tokens) / len(tokens) == pytest.approx([0.6, 0.3, 0.1], abs=0.05)
    first = group.rollouts[0]
    assert (first.policy_version, first.seed) == (7, 0)
    assert np.allclose(engine.logprobs([((1,), first.token_ids)])[0], first.logprobs)
    assert {rollout.finish_reason for rollout in group.rollouts} == {"stop", "length"}


def test_algorithm_trains_the_toy(files):
    import torch

    from onlinerl.learners.toy import ToyLearner
    from onlinerl.types import TrainItem, TrainSequence

    hinge = registry.load("algorithms", "hinge.Hinge", Algorithm)(beta=0.5)
    assert isinstance(hinge, Algorithm)
    learner = ToyLearner(4, hinge, base="base")
    reference = np.full(2, np.log(1 / 4), dtype=np.float32)
    chosen = TrainSequence(prompt_ids=(0,), response_ids=(1, 1), reference_logprobs=reference)
    rejected = TrainSequence(prompt_ids=(0,), response_ids=(2, 2), reference_logprobs=reference)
    item = TrainItem(prompt_id="p", sequences=(chosen, rejected))
    losses = [report.metrics[0]["loss"] for report in learner.update([[item]] * 20, [0.1] * 20)]
    assert losses[0] == pytest.approx(1.0)  # the hinge at margin 0
    assert losses[-1] < 0.2
    with torch.no_grad():
        assert learner.logits[1] > learner.logits[2]


# --- figures ---


def test_figures_are_written_into_the_documents_by_a_program(sandbox, warm_cli, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme_figures

    done = warm_cli.finish(*warm_cli.start("run", "configs/quickstart.yaml"), timeout=PATIENCE_S)
    assert done.returncode == 0, done.message
    for name in ("README.md", "docs/results.md"):
        (sandbox / name).parent.mkdir(exist_ok=True)
        (sandbox / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(readme_figures, "ROOT", sandbox)
    for kind in ("quickstart", "layouts", "demo"):
        readme_figures.main(kind, "runs/quickstart")
    [base, last] = summarise("runs/quickstart")["iterations"]
    results, readme = (sandbox / "docs/results.md").read_text(), (sandbox / "README.md").read_text()
    rate = f"{last['win_rate']['value']:.2f} [{last['win_rate']['low']:.2f}, {last['win_rate']['high']:.2f}]"
    assert f"| 1 | {last['reward']:.2f} | {last['kl_ref']:.2f} | {rate} |" in results
    assert (
        f"| 1 replica, 1 rank, ZeRO-0 | {base['reward']:.2f} | {last['reward']:.2f} | {last['kl_ref']:.1f} | {rate} |"
        in results
    )
    [*_, curve] = readme_figures.curves([Path("runs/quickstart"), Path("runs/quickstart")])  # as of two seeds
    assert curve.startswith(f"| `dpo` | 1 | {last['reward']:.2f} [{last['reward']:.2f}, {last['reward']:.2f}] | ")
    [block] = [found for found in documents.blocks(sandbox / "README.md") if found.language == "text"]
    assert f"{last['reward']:.3f}" in block.text
    assert rate in block.text
    assert len(readme) > 1000
    with pytest.raises(SystemExit, match="no block 'nothing'"):
        readme_figures.write("nothing", ["x"], sandbox / "README.md")
