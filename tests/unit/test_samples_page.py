"""The page of samples: what it says, how long it is, and that nothing a model wrote reaches the terminal as a command."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Sequence

import pytest
from rich.console import Console

from onlinerl.stores import summary
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.directory import RunDirectory
from onlinerl.types import Failure, Group, Label, Pair, Prompt, Rollout, Sampling, Step, TrainedPair, Verdict
from onlinerl.views import samples

HARMFUL = [
    "\x1b[2J\x1b[31m",  # clears the screen and goes on in red
    "\x1b]0;title\x07",  # sets the window's title
    "\x9b31m",  # the same as ESC [ in one byte
    "over\rwritten",
    "\x08\x08\x08gone",
    "\u202egnirts",  # what follows is shown from right to left
    "\ufeff\u2066hidden",
    "\u2028line",
]
MARKUP = "[red]not red[/red] [/] [link=http://x]here[/link] :boom: \\[x]"


def group(identity: str, prompt: str, texts: list[str], finish: str = "stop") -> Group:
    rollouts = tuple(
        Rollout(
            token_ids=(1,) * (k + 1),
            logprobs=(-1.0,) * (k + 1),
            text=text,
            finish_reason=finish if k == 0 else "stop",
            policy_version=0,
            sampler=Sampling(),
            seed=k,
        )
        for k, text in enumerate(texts)
    )
    return Group(prompt=Prompt(id=identity, text=prompt, token_ids=(1,)), rollouts=rollouts)


@pytest.fixture
def run(tmp_path):
    manifest = {"name": "demo", "config_digest": "x", "fingerprint": {"algorithm.name": "dpo"}}
    with RunDirectory.create(tmp_path / "demo", config_yaml="", manifest=manifest) as run:
        yield run


def keep(run, groups, results=(), pairs=(), iteration=1):
    labels = [Label(prompt_id=each.prompt.id, result=result) for each, result in zip(groups, results, strict=False)]
    run.groups(iteration, "rollouts").append(groups)
    run.labels(iteration, "verdicts").append(labels)
    run.pairs(iteration).append(pairs)


def trained(own: Group, pairs: Sequence[Pair]) -> list[TrainedPair]:
    texts = [rollout.text for rollout in own.rollouts]
    return [
        TrainedPair(
            prompt_id=own.prompt.id,
            pair=pair,
            chosen_text=texts[pair.chosen],
            rejected_text=texts[pair.rejected],
            policy_version=0,
        )
        for pair in pairs
    ]


def shown(run, iteration=1, limit=5, width=80, *, heldout=False, full=False) -> list[str]:
    lines = samples.page(run.path, iteration, limit, heldout=heldout, width=width, full=full)
    return [line.plain for line in lines]


def test_a_page(run):
    groups = [group("p0", "Once upon", ["a time", "a mattress", "", "a table"], "length"), group("p1", "Twice", ["x", "y"])]
    verdict = Verdict(annotator="judge", oracle_version="1", scores=(0.5, -1.0, 0.0, 2.0), raw="the fourth one")
    pairs = trained(groups[0], [Pair(chosen=3, rejected=1, prob=0.95, gap=3.0), Pair(chosen=0, rejected=1, prob=0.8, gap=1.5)])
    keep(run, groups, [verdict, Failure(kind="timeout", message="60 s")], pairs)
    assert shown(run) == [
        "iteration 1: what was sampled to train on; choose another one with --iteration: 1",
        "",
        "prompt p0",
        "    Once upon",
        "judged by judge",
        "  #3  score 2.000  win rate 0.79  4 tokens  chosen over #1",
        "    a table",
        "  #0  score 0.500  win rate 0.53  1 tokens  truncated  chosen over #1",
        "    a time",
        "  #2  score 0.000  win rate 0.43  3 tokens",
        "    (empty)",
        "  #1  score -1.000  win rate 0.25  2 tokens  rejected for #3, #0",
        "    a mattress",
        "the judge's words",
        "    the fourth one",
        "",
        "prompt p1",
        "    Twice",
        "not judged: timeout: 60 s",
        "  #0  1 tokens",
        "    x",
        "  #1  2 tokens",
        "    y",
    ]


def test_answers_without_scores_are_ranked_by_their_win_rates_and_what_is_not_judged_comes_last(run):
    nan = float("nan")
    wins = ((nan, nan, 0.9), (nan,) * 3, (0.1, nan, nan))
    keep(run, [group("p", "x", ["a", "b", "c"])], [Verdict(annotator="j", oracle_version="1", preferences=wins)])
    assert [line.split()[0] for line in shown(run) if line.startswith("  #")] == ["#0", "#2", "#1"]
    keep(run, [group("q", "x", ["a", "b"])], iteration=2)
    assert "not judged yet" in shown(run, 2)
    assert shown(run, 2)[0].endswith("--iteration: 1, 2")


def test_which_iterations_there_are_is_known_without_reading_them(run, monkeypatch):
    for iteration in (1, 2):
        keep(run, [group("p", "x", ["a", "b"])], iteration=iteration)
        run.finish_phase(iteration, "sample", {"samples": 2})
    keep(run, [group("p", "x", ["a", "b"])], iteration=3)
    read: list[int] = []

    class Counted(TableFiles):
        def ids(self):
            read.append(int(self.folder.name))
            return super().ids()

    monkeypatch.setattr(summary, "TableFiles", Counted)
    assert summary.sampled(run.path) == [1, 2, 3]
    assert read == [3]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_long_texts_are_shortened_at_the_width_of_the_terminal(run, width):
    prompt = "Begin. " + "word " * 2000 + "What is the capital of France?"
    answer = "First. " + "thing " * 2000 + "Last."
    keep(run, [group("p", prompt, [answer])], [Verdict(annotator="j", oracle_version="1", scores=(1.0,))])
    lines = shown(run, width=width)
    assert max(len(line) for line in lines if line.startswith("    ")) <= width
    page = "\n".join(lines)
    assert "Begin." in page, "how it begins"
    assert re.search(r"capital\s+of\s+France\?", page), "and what it leads up to"
    assert "First." in page
    assert "Last." not in page
    assert len(lines) == 2 + 1 + samples.PROMPT_LINES + 2 + samples.ANSWER_LINES
    assert page.count("more lines; see --full]") == 2
    whole = "\n".join(shown(run, width=width, full=True))
    assert whole.count("thing") == 2000
    assert "Last." in whole


def test_an_answer_in_many_pairs_names_a_few(run):
    own = group("p", "x", list("abcdefgh"))
    pairs = trained(own, [Pair(chosen=0, rejected=k, prob=0.9, gap=1.0) for k in range(1, 8)])
    keep(run, [own], [Verdict(annotator="j", oracle_version="1", scores=tuple(map(float, range(8, 0, -1))))], pairs)
    assert any(line.endswith("chosen over #1, #2, #3, #4 and 3 more") for line in shown(run))


def test_a_pair_of_steps_says_where_they_begin(run):
    own = group("p", "x", ["abcd", "abef"])
    steps = (Step(start=2, end=4, leaves=(1,)), Step(start=2, end=4, leaves=(0,)))
    pairs = trained(own, [Pair(chosen=1, rejected=0, prob=0.9, gap=1.0, steps=steps)])
    keep(run, [own], [Verdict(annotator="j", oracle_version="1", scores=(0.0, 1.0))], pairs)
    page = shown(run)
    assert any(line.endswith("chosen over #0 from token 3") for line in page)
    assert any(line.endswith("rejected for #1 from token 3") for line in page)


@pytest.mark.parametrize("text", HARMFUL)
def test_nothing_that_a_model_wrote_commands_the_terminal(run, text):
    own = group("p" + text, "prompt " + text, ["answer " + text])
    keep(run, [own], [Verdict(annotator="j" + text, oracle_version="1", scores=(1.0,), raw="raw " + text)])
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, markup=False, color_system=None)
    for line in samples.page(run.path, 1, 5, heldout=False, width=80):
        console.print(line, highlight=False, soft_wrap=True)
    page = file.getvalue()
    assert not [letter for letter in page if letter != "\n" and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert "\\" in page, "it is shown as an escape"
    assert page.count("\n") <= 12


def test_markup_is_text(run):
    keep(run, [group("p", MARKUP, [MARKUP])], [Verdict(annotator="j", oracle_version="1", scores=(1.0,))])
    assert sum(MARKUP in line for line in shown(run, width=200)) == 2


def test_letters_of_all_languages_stay(run):
    text = "naïve 日本語 हिन्दी 👩‍👩‍👧 \u0627\u0644\u0639\u0631\u0628\u064a\u0629"
    assert samples.visible(text) == text
    assert samples.visible("a\tb\r\nc") == "a   b\nc"


def test_the_command_line_has_both(run, cli):
    keep(
        run,
        [group("p", "Once \x1b[31m" + MARKUP, ["a \x9b time"])],
        [Verdict(annotator="j", oracle_version="1", scores=(1.0,))],
    )
    run.groups(0, "evaluation").append([group("h", "Held out", ["the base model"])])
    run.close()
    page = cli("show", run.path, "--samples")
    assert page.returncode == 0, page.message
    assert "Once \\x1b[31m" + MARKUP in page.stdout
    assert "score 1.000" in page.stdout
    assert "Held out" in cli("show", run.path, "--heldout").stdout
    machines = cli("show", run.path, "--samples", "--json", "--iteration", "1").stdout
    assert machines.isascii()
    [found] = json.loads(machines)
    assert found["responses"][0]["text"] == "a \x9b time"
    wrong = cli("show", run.path, "--samples", "--iteration", "7")
    assert wrong.returncode == 2
    assert "choose one of 1" in wrong.stderr
