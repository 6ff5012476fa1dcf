"""The benchmark of reward models and of the run that learns from one, at tiny sizes: models of a tiny Llama, oracles on a real cluster, the toy
engine and learner."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from preference_rows import taste

from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "configs"
INTERVAL = r"-?\d+\.\d{3} \[-?\d+\.\d{3}, -?\d+\.\d{3}\]"

pytestmark = [pytest.mark.engine, pytest.mark.long]


def write(path: Path, tree: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))


@pytest.fixture(scope="module")
def benchmark(tiny_model, tmp_path_factory):
    """The program in a folder of its own, with the shipped configurations made small, and its data."""
    folder = tmp_path_factory.mktemp("benchmark")
    small = {
        "extends": str(SHIPPED / "reward_models/hh.yaml"),
        "model": str(tiny_model),
        "preferences": {"apply_chat_template": False, "max_length": 64},
        "training": {"batch_size": 16, "learning_rate": 0.003, "epochs": 2},
        "learner": {"dtype": "float32", "threads": 1},
        "checkpoints": {"min_free_gib": 0.0},
        "cluster": {"device": "cpu"},
    }
    write(folder / "configs/reward_models/hh.yaml", small)
    (folder / "configs/reward_models/hh_watch.yaml").write_text((SHIPPED / "reward_models/hh_watch.yaml").read_text())
    toy = {
        "extends": str(SHIPPED / "rm_loop/hh.yaml"),
        "model": str(tiny_model),
        "iterations": 2,
        "engine": {"name": "toy"},
        "learner": {"name": "toy"},
        "prompts": {"apply_chat_template": False, "per_iteration": 6, "max_tokens": 16},
        "sampling": {"max_new_tokens": 8},
        "evaluation": {"prompts": 12},
        "training": {"batch_size": 4, "learning_rate": 0.2},
        "checkpoints": {"min_free_gib": 0.0},
        "cluster": {"device": "cpu"},
        "metrics": {"prometheus": False},
    }
    write(folder / "configs/rm_loop/hh.yaml", toy)
    (folder / "docs").mkdir()
    (folder / "docs/results.md").write_text((ROOT / "docs/results.md").read_text())
    (folder / "data/hh_rlhf").mkdir(parents=True)
    with gzip.open(folder / "data/hh_rlhf/harmless_base.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in taste(200))
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    import reward_models

    for name, value in {"ROOT": folder, "CONFIGS": folder / "configs", "RESULTS": folder / "docs/results.md"}.items():
        patch.setattr(reward_models, name, value)
    yield reward_models
    patch.undo()


def done(program: ModuleType, part: str) -> list[str]:
    """The lines that it writes into the document."""
    program.main([part, "--data", str(program.ROOT / "data")])
    place = program.PARTS[part][1]
    found = re.search(rf"<!-- figures: {place} -->\n(.*?)\n<!-- /figures -->", program.RESULTS.read_text(), re.DOTALL)
    return found[1].splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def models(benchmark):
    return done(benchmark, "models")


@pytest.fixture(scope="module")
def loop(benchmark, models):
    return done(benchmark, "loop")


def report(program: ModuleType, name: str) -> dict:
    return json.loads((program.ROOT / "reward_models" / name / "report.json").read_text())


def test_both_models_are_measured_on_what_none_was_trained_on(benchmark, models):
    first, second = (cells(line) for line in models[4:6])
    assert (first[0], second[0]) == ("bradley_terry", "general_preference")
    for row, name in ((first, "hh"), (second, "hh-gpm")):
        said = report(benchmark, name)
        assert row[1:3] == [f"90 in {said['steps']} steps", "60"]
        assert re.fullmatch(INTERVAL, row[3])
        assert float(row[3].split()[0]) == pytest.approx(said["heldout"]["accuracy"]["value"], abs=5e-4)
        assert float(row[4]) == pytest.approx(said["heldout"]["calibration"]["ece"], abs=5e-4)
        assert re.fullmatch(r"\d\.\d{3} / \d\.\d{3}", row[5])
    by = [cells(line) for line in models[9:]]
    assert [row[0] for row in by] == ["bradley_terry"] * 6 + ["general_preference"] * 6
    assert sum("tokens" in row[1] for row in by) == 8
    assert {row[1] for row in by if "tokens" not in row[1]} == {"source even", "source odd"}
    assert sum(int(row[3]) for row in by[:4]) == sum(int(row[3]) for row in by[4:6]) == 60


def test_the_two_oracles_are_of_different_pairs(benchmark, loop):
    """And the prompts of the run are of rows that neither was trained on."""
    read = yaml.safe_load
    split = {
        name: read((benchmark.ROOT / "reward_models" / name / "config.yaml").read_text())["preferences"]["train_split"]
        for name in ("hh", "hh-watch")
    }
    assert split == {"hh": "train[:45%]", "hh-watch": "train[45%:70%]"}
    rows = [row["prompt"] for row in taste(200)]
    with RunDirectory.open(benchmark.ROOT / "runs/rm-loop-hh") as run:
        sampled = {row["prompt_id"] for t in (1, 2) for row in run.read(t, "rollouts")}
        texts = {prompt.id: prompt.text for prompt in run.prompts("train")}
    assert sampled
    assert {texts[name] for name in sampled} <= {*rows[140:164]}


def test_the_one_is_trained_on_and_the_other_watches(benchmark, loop):
    """The score that trains is that of the first model alone, and both curves are those that the run has measured."""
    directory = benchmark.ROOT / "runs/rm-loop-hh"
    with RunDirectory.open(directory) as run:
        verdicts = run.read(1, "verdicts")
    for verdict in verdicts:
        named = {each["name"]: each["scores"] for each in verdict["components"]}
        assert verdict["scores"] == pytest.approx(named["trained"])
        assert named["watch"] != pytest.approx(named["trained"])
    rows = summarise(directory)["iterations"]
    table = [cells(line) for line in loop[4:]]
    assert [row[0] for row in table] == ["0", "1", "2"]
    assert (table[0][2], table[0][4], table[0][5]) == ("-", "-", "0")
    for row, found in zip(table[1:], rows[1:], strict=True):
        assert all(re.fullmatch(INTERVAL, cell) for cell in row[1:6]), row
        for place, member, what in (
            (1, "trained", "score"),
            (2, "trained", "win_rate"),
            (3, "watch", "score"),
            (4, "watch", "win_rate"),
        ):
            assert float(row[place].split()[0]) == pytest.approx(found["components"][member][what]["value"], abs=5e-4)
        assert float(row[5].split()[0]) == pytest.approx(found["kl_ref"], abs=5e-4)
        assert found["components"]["trained"]["score"]["value"] == pytest.approx(found["reward"])
        assert found["components"]["trained"]["win_rate"] == found["win_rate"]
    assert benchmark.shown(report(benchmark, "hh-watch")["heldout"]["accuracy"]) in loop[0]


def test_what_is_finished_is_read(benchmark, models, loop, monkeypatch):
    asked, real = [], benchmark.onlinerl
    files = [*benchmark.ROOT.glob("reward_models/*/steps.jsonl"), *benchmark.ROOT.glob("runs/*/iterations/*/manifest.json")]
    before = {file: file.stat().st_mtime_ns for file in files}
    monkeypatch.setattr(benchmark, "onlinerl", lambda *command: asked.append(command[0]) or real(*command))
    assert done(benchmark, "models") == models
    assert done(benchmark, "loop") == loop
    assert asked == ["train-rm", "train-rm", "train-rm", "train-rm", "resume"]
    assert len(files) == 6
    assert {file: file.stat().st_mtime_ns for file in files} == before


def test_what_fails_ends_it_and_nothing_is_recorded(benchmark, models, monkeypatch, tmp_path, capfd):
    before = benchmark.RESULTS.read_text()
    with pytest.raises(SystemExit, match=r"there is no .*harmless_base.jsonl.gz: give a directory"):
        benchmark.main(["models", "--data", str(tmp_path)])
    monkeypatch.setitem(benchmark.MODELS, "hh-gpm", ("hh.yaml", ["name=other", "preferences.max_length=1"]))
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["models", "--data", str(benchmark.ROOT / "data")])
    assert ended.value.code == 2
    assert "preferences.max_length" in capfd.readouterr().err
    assert benchmark.RESULTS.read_text() == before
