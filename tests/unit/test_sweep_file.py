"""What a sweep file means, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from onlinerl import registry
from onlinerl.errors import ConfigError
from onlinerl.sweeps import file as sweeps

CONFIGS = Path(__file__).parents[2] / "configs/sweeps"


@pytest.fixture
def load(toy_config, tmp_path, monkeypatch):
    """Loads a sweep of these keys, on the toy configuration."""
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str, of_base: dict | None = None, **keys: object) -> sweeps.Sweep:
        toy_config(tmp_path, of_base, file="base.yaml")
        path = tmp_path / "sweep.yaml"
        tree = {"base": "base.yaml", "name": "s", "axes": {"seed": [0]}, **keys}
        path.write_text(yaml.safe_dump({k: v for k, v in tree.items() if v is not None}, sort_keys=False))
        return sweeps.load(path, overrides)

    return make


def names(sweep: sweeps.Sweep) -> list[str]:
    return [c.name for c in sweep.combinations]


def refused(load, *overrides: str, **keys: object) -> str:
    with pytest.raises(ConfigError) as error:
        load(*overrides, **keys)
    return str(error.value)


# --- what it means ---


def test_every_combination_is_a_run_of_its_own_folder(load, tmp_path):
    sweep = load(axes={"algorithm": ["dpo", "grpo"], "training.learning_rate": [0.1, 1e-5], "seed": [3, 4]})
    assert names(sweep)[:3] == ["dpo-learning_rate0.1-seed3", "dpo-learning_rate0.1-seed4", "dpo-learning_rate1e-05-seed3"]
    assert len(names(sweep)) == 8
    last = sweep.combinations[-1].config
    assert (last.algorithm["name"], last.training.learning_rate, last.seed) == ("grpo", 1e-5, 4)
    assert last.directory == tmp_path / "runs/s/grpo-learning_rate1e-05-seed4"
    assert sweep.combinations[-1].choices == {
        "algorithm": "grpo",
        "training.learning_rate": "learning_rate1e-05",
        "seed": "seed4",
    }


def test_a_section_brings_its_knobs_and_leaves_those_of_another_one(load):
    axes = {"algorithm": ["dpo", {"name": "simpo", "beta": 3.0}, "ipo"]}
    sweep = load(axes=axes, of_base={"algorithm.beta": 0.7})
    assert names(sweep) == ["dpo", "simpo-beta3.0", "ipo"]
    dpo, simpo, ipo = (c.config.algorithm for c in sweep.combinations)
    assert dpo == {"name": "dpo", "beta": 0.7}  # as `algorithm.name=dpo` on the command line
    assert simpo == {"name": "simpo", "beta": 3.0}
    assert ipo == {"name": "ipo"}


def test_a_knob_is_an_axis_too_and_what_is_set_for_all_is_set_for_all(load):
    sweep = load(axes={"algorithm": ["dpo", "ipo"], "algorithm.beta": [0.1, 0.2]}, set={"algorithm.length_norm": True})
    assert names(sweep) == ["dpo-beta0.1", "dpo-beta0.2", "ipo-beta0.1", "ipo-beta0.2"]
    assert [c.config.algorithm["beta"] for c in sweep.combinations] == [0.1, 0.2, 0.1, 0.2]
    assert all(c.config.algorithm["length_norm"] is True for c in sweep.combinations)


def test_sections_that_are_left_out_and_names_that_runs_may_have(load):
    sweep = load(axes={"pairing": ["best_worst", None], "sampling.top_k": [-1, 5], "schedule.stream": [True, False]})
    assert names(sweep)[0] == "best_worst-top_k-1-streamtrue"
    assert names(sweep)[-1] == "pairing-none-top_k5-streamfalse"
    assert sweep.combinations[-1].config.pairing is None


def test_values_that_a_name_has_no_room_for_are_told_apart_all_the_same(load):
    long = [f"models/{'a' * 90}/reward-{n}" for n in (1, 2)]
    sweep = load(axes={"algorithm": ["dpo"], "model": long})
    first, second = names(sweep)
    assert first != second
    assert all(len(name) == 100 and name.startswith("dpo-modelmodels-aaa") for name in (first, second))
    assert [c.config.model for c in sweep.combinations] == long


def test_a_sweep_does_not_go_into_a_run(load, tmp_path):
    (tmp_path / "runs/s").mkdir(parents=True)
    (tmp_path / "runs/s/manifest.json").write_text("{}")
    assert "name: is 's', and" in refused(load, axes={"seed": [0]})


def test_all_is_every_name_that_there_is(load):
    sweep = load(axes={"algorithm": "all"})
    assert names(sweep) == registry.names("algorithms")


def test_what_is_set_may_be_dotted_keys_sections_or_the_command_line(load):
    sweep = load("iterations=7", set={"training.batch_size": 2, "sampling": {"temperature": 0.5}})
    config = sweep.combinations[0].config
    assert (config.iterations, config.training.batch_size, config.sampling.temperature) == (7, 2, 0.5)
    assert config.sampling.max_new_tokens == 12, "the rest of the section is the base's"


def test_exclusions(load):
    axes = {"algorithm": ["dpo", {"name": "simpo", "beta": 2.0}], "seed": [0, 1]}
    assert names(load(axes=axes, exclude=[{"algorithm": "simpo", "seed": 1}])) == [
        "dpo-seed0",
        "dpo-seed1",
        "simpo-beta2.0-seed0",
    ]
    assert names(load(axes=axes, exclude=[{"algorithm": {"name": "simpo", "beta": 2.0}}])) == ["dpo-seed0", "dpo-seed1"]


def test_a_budget_of_tokens_gives_as_many_iterations_as_stay_within_it(load):
    # 8 prompts x 4 samples x 12 tokens are 384 tokens an iteration, with 2 samples 192.
    sweep = load(axes={"sampling.samples_per_prompt": [4, 2]}, token_budget=1000)
    assert [c.config.iterations for c in sweep.combinations] == [2, 5]
    assert "is 383, and one iteration may sample 384 tokens" in refused(load, token_budget=383)


def test_an_algorithm_that_samples_more_gets_fewer_prompts_of_the_same_budget(load):
    """`xpo` a response of the base model to each prompt, `ipo_md` two of the mixture, `optune` none, and `spin` a stored one."""
    sweep = load(axes={"algorithm": ["dpo", "xpo", "ipo_md", "spin"]}, token_budget=800)
    found = {c.name: (c.config.iterations, c.config.prompts.per_iteration) for c in sweep.combinations}
    assert found == {"dpo": (2, 8), "xpo": (2, 6), "ipo_md": (2, 5), "spin": (2, 8)}  # 800 / 2 / 12 are 33 responses
    lone = {"prompts.per_iteration": 1, "sampling.samples_per_prompt": 2}
    assert "not one prompt an iteration" in refused(load, axes={"algorithm": ["xpo"]}, token_budget=24, set=lone)


# --- what is wrong with one ---


def test_all_combinations_that_are_no_configuration_are_said_at_once(load):
    axes = {"algorithm": ["dpo", "dpoo", {"name": "ipo", "betta": 1.0}], "seed": [0, -1]}
    said = refused(load, axes=axes)
    assert "axes: 5 of 6 combinations cannot run" in said
    assert "dpoo-seed0, dpoo-seed-1:\n    algorithm.name: there is no 'dpoo'" in said
    assert "algorithm.betta: is not a known key" in said
    assert "did you mean 'beta'?" in said
    assert "dpo-seed-1, dpoo-seed-1, ipo-betta1.0-seed-1:\n    seed: input should be greater" in said


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"base": None}, "base: is missing"),
        ({"base": "nothing.yaml"}, "there is no file"),
        ({"axis": {"seed": [0]}}, "axis: is not a known key"),
        ({"axes": {}}, "axes"),
        ({"axes": {"seed": []}}, "axes.seed"),
        ({"axes": {"seed": "all"}}, "axes.seed: is no section that chooses by name"),
        ({"axes": {"seed": [1, 1]}}, "axes.seed: has two values that would give their runs the same name, 'seed1'"),
        ({"axes": {"name": ["a", "b"]}}, "name: is what the sweep calls its runs"),
        ({"axes": {"runs": ["a"]}}, "runs: is what the sweep calls its runs"),
        ({"set": {"seed": 1}}, "seed: is an axis of the sweep, and set for all runs too"),
        ({"exclude": [{"seed": 5}]}, "exclude.0: {'seed': 5} fits no combination"),
        ({"exclude": [{"sed": 0}]}, "sed is no axis"),
        ({"exclude": [{"seed": 0}]}, "exclude: leaves no combination"),
        ({"token_budget": 1000, "set": {"iterations": 2}}, "iterations: follows from token_budget"),
        ({"token_budget": 1000, "axes": {"iterations": [1, 2]}}, "iterations: follows from token_budget"),
        ({"name": "a b"}, "name:"),
    ],
)
def test_a_file_that_is_none(load, keys, words):
    said = refused(load, **keys)
    assert words in said
    assert "fix:" in said


def test_a_key_of_the_command_line_that_is_an_axis(load):
    assert "seed: is an axis of the sweep" in refused(load, "seed=3")
    assert "algorithm: is an axis of the sweep" in refused(load, "algorithm.name=ipo", axes={"algorithm": ["dpo", "ipo"]})


# --- those that come with onlinerl ---


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_those_in_configs_are_sweeps_on_one_budget(path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[1])
    sweep = sweeps.load(path)
    assert sweep.name == path.stem
    assert names(sweep) == registry.names("algorithms"), "no algorithm needs a knob that has no default"
    for one in sweep.combinations:
        config = one.config
        samples = config.sampling.samples_per_prompt + sweeps.sampled_beside(config)
        sampled = 2 * config.prompts.per_iteration * samples * config.sampling.max_new_tokens
        assert (config.iterations, config.sampling.samples_per_prompt) == (2, 4), one.name
        assert 12288 * 0.95 < sampled <= 12288, one.name
