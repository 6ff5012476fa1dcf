"""Configuration: where values come from, what is refused, and what identifies a run."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import yaml

from onlinerl import config as configuration
from onlinerl.config import RunConfig
from onlinerl.errors import ConfigError

BASE = {
    "name": "demo",
    "model": "org/name-7B",
    "iterations": 3,
    "algorithm": {"name": "dpo", "beta": 0.2},
    "oracle": {"name": "sentiment"},
    "prompts": {"train": "a.jsonl", "heldout": "b.jsonl"},
}
ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(path for path in ROOT.rglob("*.yaml") if path.parent.name not in ("sweeps", "reward_models"))


@pytest.fixture
def write(tmp_path):
    def write(name: str, tree: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return write


def changed(**sections: object) -> RunConfig:
    return configuration.parse(copy.deepcopy(BASE) | sections)


# --- files ---


def test_extends_is_relative_to_the_file_that_says_so(write):
    write("base.yaml", BASE)
    write("middle.yaml", {"extends": "base.yaml", "prompts": {"per_iteration": 7}})
    config = configuration.load(write("sub/top.yaml", {"extends": "../middle.yaml", "name": "top", "prompts": {"train": "c"}}))
    assert (config.name, config.iterations) == ("top", 3)
    assert (config.prompts.train, config.prompts.heldout, config.prompts.per_iteration) == ("c", "b.jsonl", 7)


def test_extends_with_another_implementation_takes_none_of_its_knobs(write):
    write("base.yaml", BASE)
    other = configuration.load(write("a.yaml", {"extends": "base.yaml", "algorithm": {"name": "grpo"}}))
    same = configuration.load(write("b.yaml", {"extends": "base.yaml", "algorithm": {"label_smoothing": 0.1}}))
    assert other.algorithm == {"name": "grpo"}
    assert same.algorithm == {"name": "dpo", "beta": 0.2, "label_smoothing": 0.1}


def test_extends_in_a_circle(write):
    write("a.yaml", {"extends": "b.yaml"})
    with pytest.raises(ConfigError, match="extends itself") as error:
        configuration.load(write("b.yaml", {"extends": "a.yaml"}))
    assert error.value.field == "extends"


def test_extends_a_file_that_is_not_there(write):
    write("base.yaml", BASE)
    with pytest.raises(ConfigError, match=r"there is no file .*bas\.yaml") as error:
        configuration.load(write("top.yaml", {"extends": "bas.yaml"}))
    assert "base.yaml" in error.value.fix


def test_a_key_that_is_given_twice_is_refused(write):
    """YAML would take the last one in silence."""
    text = yaml.safe_dump(BASE) + "training:\n  learning_rate: 1.0e-5\n  epochs: 2\n  learning_rate: 1.0e-6\n"
    path = write("twice.yaml", text)
    with pytest.raises(ConfigError, match=rf"is given twice in {path}, in lines \d+ and \d+") as error:
        configuration.load(path)
    assert error.value.field == "learning_rate"
    with pytest.raises(ConfigError, match="is given twice"):
        configuration.load(write("base.yaml", BASE), ["training={epochs: 1, epochs: 2}"])
    same_name_elsewhere = configuration.load(write("base.yaml", {**BASE, "engine": {"dtype": "float32"}}))
    assert same_name_elsewhere.learner.dtype == "auto"


# --- overrides ---


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "1.e-5", "0.00001", "+1e-5"])
def test_floats_as_people_write_them(write, text):
    """YAML 1.1 takes 1e-5 for a string, on the command line and in a file."""
    path = write("base.yaml", BASE)
    assert configuration.load(path, [f"training.learning_rate={text}"]).training.learning_rate == 1e-5
    path = write("file.yaml", yaml.safe_dump(BASE) + f"training:\n  learning_rate: {text}\n")
    assert configuration.load(path).training.learning_rate == 1e-5


@pytest.mark.parametrize("text", ["010", "0x10", "1:30", "-012"])
def test_whole_numbers_are_decimal(write, text):
    """YAML 1.1 takes 010 for 8 and 1:30 for 90."""
    path = write("base.yaml", BASE)
    with pytest.raises(ConfigError, match=f"iterations: input should be a valid integer, got '{text}'"):
        configuration.load(path, [f"iterations={text}"])
    assert configuration.load(path, ["name=007", "iterations=1_000", "seed=0"]).name == "007"
    assert configuration.load(path, ["iterations=1_000"]).iterations == 1000


def test_overrides_are_typed_and_nested(write):
    path = write("base.yaml", BASE)
    config = configuration.load(
        path,
        [
            "iterations=5",
            "prompts.reuse=true",
            "engine.resources.rollout_node=1",
            "engine.resources={other: 0.5}",
            "cluster.address=null",
            "name=a=b".replace("=b", "-b"),
            "model=org/nan-1e5",
        ],
    )
    assert config.iterations == 5
    assert config.prompts.reuse is True
    assert config.engine.resources == {"other": 0.5}
    assert config.cluster.address is None
    assert (config.name, config.model) == ("a-b", "org/nan-1e5")


def test_a_run_may_be_called_by_a_number(write):
    path = write("base.yaml", BASE | {"name": 123})
    assert configuration.load(path).name == "123"
    assert configuration.load(path, ["name=2024"]).directory == Path("runs/2024")
    assert yaml.safe_load(configuration.dump(configuration.load(path)))["name"] == "123"
    with pytest.raises(ConfigError, match="name"):
        configuration.load(path, ["name=true"])


@pytest.mark.parametrize("name", ["nan", "inf", "infinity", "e5"])
def test_words_stay_words(write, name):
    assert configuration.load(write("base.yaml", BASE), [f"name={name}"]).name == name


def test_another_implementation_forgets_the_old_knobs(write):
    path = write("base.yaml", BASE)
    assert configuration.load(path, ["algorithm.name=grpo"]).algorithm == {"name": "grpo"}
    assert configuration.load(path, ["algorithm.name=dpo"]).algorithm == {"name": "dpo", "beta": 0.2}
    assert configuration.load(path, ["algorithm.name=grpo", "algorithm.clip_range_low=0.1"]).algorithm["clip_range_low"] == 0.1


def test_overrides_may_come_in_any_order(write):
    """A knob typed before the name of the implementation is not lost."""
    path = write("base.yaml", BASE)
    assert configuration.load(path, ["algorithm.clip_range_low=0.1", "algorithm.name=grpo"]).algorithm["clip_range_low"] == 0.1


def test_another_engine_or_learner_keeps_the_keys_that_all_of_them_have(write):
    """And forgets those of the one that it replaces."""
    path = write("base.yaml", BASE | {"learner": {"ranks": 2, "zero_stage": 2}})
    config = configuration.load(path, ["learner.name=toy", "engine.name=toy", "engine.replicas=3"])
    assert (config.learner.name, config.learner.ranks, config.engine.replicas) == ("toy", 2, 3)
    assert "zero_stage" not in configuration.fingerprint(config)
    same = configuration.load(path, ["learner.name=deepspeed"])
    assert configuration.fingerprint(same)["learner.zero_stage"] == 2
    over = write("over.yaml", {"extends": "base.yaml", "learner": {"name": "toy"}})
    assert configuration.load(over).learner.ranks == 2


@pytest.mark.parametrize(
    ("section", "fix"),
    [
        ({"learner": {"name": "toy", "zero_stage": 2}}, "known keys: attn_implementation, "),
        ({"learner": {"zero": 2}}, "did you mean 'zero_stage'?"),
        ({"engine": {"kv_cache": 2}}, "did you mean 'kv_cache_gib'?"),
        ({"engine": {"tp": 2}}, "did you mean 'tensor_parallel_size'?"),
        ({"engine": "vllm"}, "it is a section: write engine.name=vllm"),
        ({"learner": {"name": "fsdp"}}, "choose one of deepspeed, torch, toy"),
    ],
)
def test_each_engine_and_learner_refuses_the_keys_of_others(section, fix):
    with pytest.raises(ConfigError) as error:
        changed(**section)
    assert error.value.field is not None
    assert error.value.field.partition(".")[0] in section
    assert fix in error.value.fix


def test_what_an_older_version_filled_in_for_every_engine_and_learner_changes_nothing(write):
    """It wrote the keys of vllm and deepspeed into every run."""
    toys = {"engine": {"name": "toy"}, "learner": {"name": "toy"}}
    config = changed(**toys)
    tree = yaml.safe_load(configuration.dump(config))
    tree["engine"] |= {"kv_cache_gib": 1.0, "gpu_memory_utilization": 0.85}
    tree["learner"] |= {"zero_stage": 0}
    path = write("stored.yaml", tree)
    assert configuration.dump(configuration.load(path, stored=True)) == configuration.dump(config)
    with pytest.raises(ConfigError, match="is not a known key"):
        configuration.load(path)
    with pytest.raises(ConfigError, match="is not a known key"):
        configuration.load(path, ["learner.zero_stage=1"], stored=True)
    stored = {**configuration.fingerprint(config), "learner.zero_stage": 0}
    assert configuration.changes(stored, config) == {}
    real = changed()
    stored = {**configuration.fingerprint(real), "learner.zero_stage": 1}
    assert set(configuration.changes(stored, real)) == {"learner.zero_stage"}


# --- types ---


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iterations", "3"),
        ("iterations", 3.0),
        ("iterations", True),
        ("seed", -1),
        ("prompts.reuse", "yes"),
        ("prompts.reuse", 1),
        ("sampling.temperature", "1.0"),
        ("sampling.temperature", 0),
        ("sync.timeout_s", 1e10),  # no timer can be set to it
        ("oracle.call_timeout_s", 1e10),
        ("sampling.temperature", 0.009),  # vLLM would sample at 0.01
        ("seed", 2**32),  # numpy takes no more, and vLLM seeds it
        ("name", "a" * 101),  # a file name ends somewhere
        ("engine.resources", {"CPU": 2.0}),  # is engine.cpus
        ("learner.resources", {"GPU": 0.0}),
        ("learner.resources", {"learner_node": -1.0}),
        ("name", 7.5),
        ("runs", ["a"]),
        ("algorithm.beta", "0.1"),
        ("algorithm", "dpo"),
        ("training", 5),
        ("training.learning_rate", float("nan")),
        ("training.learning_rate", 1e300),
    ],
)
def test_types_are_strict(write, key, value):
    tree = copy.deepcopy(BASE)
    *parents, leaf = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
    node[leaf] = value
    with pytest.raises(ConfigError) as error:
        configuration.load(write("bad.yaml", tree))
    assert error.value.field == key
    assert error.value.fix


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", ["engine.generate_timeout_s", "engine.resources.node", "algorithm.beta", "cluster.wait_s"])
def test_numbers_are_finite(write, key, value):
    with pytest.raises(ConfigError, match=value.strip("-.")) as error:
        configuration.load(write("base.yaml", BASE), [f"{key}={value}"])
    assert error.value.field == key
    assert error.value.fix == "give a finite number"


def test_whole_numbers_are_numbers():
    assert changed(sampling={"temperature": 1}).sampling.temperature == 1.0


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        changed().iterations = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("tree", "field", "fix"),
    [
        ({"iteration": 3}, "iteration", "did you mean 'iterations'?"),
        ({"sampling": {"sample_per_prompt": 2}}, "sampling.sample_per_prompt", "did you mean 'samples_per_prompt'?"),
        ({"algorithm": {"name": "dpo", "bata": 1}}, "algorithm.bata", "did you mean 'beta'?"),
        ({"algorithm": {"name": "dpo", "nam": "dpo"}}, "algorithm.nam", "did you mean 'name'?"),
        ({"algorithm": {"nam": "dpo"}}, "algorithm.nam", "did you mean 'name'?"),
        ({"pairing": {"name": "best_wurst"}}, "pairing.name", "did you mean 'best_worst'?"),
        ({"oracle": {"include_prompt": True}}, "oracle.name", "choose one of"),
    ],
)
def test_suggestions(tree, field, fix):
    """An unknown key is an error that says which one may be meant."""
    with pytest.raises(ConfigError) as error:
        changed(**tree)
    assert error.value.field == field
    assert fix in error.value.fix


# --- secrets ---

JUDGE = """
from onlinerl.protocols.oracle import Oracle


class Judge(Oracle):
    api_key: str = ""
    api_key_env: str = "JUDGE_API_KEY"
    base_url: str = ""
    yes_word: str = "yes"
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """An oracle of the user's own that wants a key."""
    (tmp_path / "secret_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {"name": "secret_judge.Judge"}


@pytest.mark.parametrize(
    ("options", "field", "fix"),
    [
        ({"api_key": "sk-3141"}, "oracle.api_key", "`api_key_env`"),
        ({"api_key_env": "sk-3141"}, "oracle.api_key_env", "not its value"),
        ({"base_url": "https://me:sk-3141@judge.example/v1"}, "oracle.base_url", "without it"),
        ({"headers": {"X_Token": "sk-3141"}}, "oracle.headers.X_Token", "`x_token_env`"),
        ({"passwords": ["sk-3141"]}, "oracle.passwords", "`passwords_env`"),
        ({"apiKey": "sk-3141"}, "oracle.apiKey", "`api_key_env`"),
        ({"accessToken": "sk-3141"}, "oracle.accessToken", "`access_token_env`"),
        ({"headers": {"x-api-key": "sk-3141"}}, "oracle.headers.x-api-key", "`x_api_key_env`"),
        ({"headers": {"Authorization": "sk-3141"}}, "oracle.headers.Authorization", "`authorization_env`"),
        ({"header": "Bearer sk-3141"}, "oracle.header", "environment variable"),
        ({"base_url": "https://judge.example/v1?model=a&api_key=sk-3141"}, "oracle.base_url", "environment variable"),
    ],
)
def test_a_secret_is_never_part_of_a_configuration(judge, options, field, fix):
    with pytest.raises(ConfigError) as error:
        changed(oracle={**judge, **options})
    assert error.value.field == field
    assert fix in error.value.fix
    assert "sk-3141" not in str(error.value)


def test_the_name_of_a_variable_that_holds_a_secret_may_be(judge):
    config = changed(
        oracle={**judge, "api_key_env": "MY_KEY", "base_url": "https://judge.example:8000/v1@2", "yes_word": "the bearer token"}
    )
    assert configuration.oracle(config).api_key_env == "MY_KEY"
    assert "api_key_env: MY_KEY" in configuration.dump(config)


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError) as error:
        changed(
            iterations=0,
            seed=-1,
            engine={"replica": 2, "threads": "two"},
            training={"epochs": 0},
            algorithm={"name": "dpo", "betta": 0.1},
            oracle={"name": "sentimental"},
        )
    said = str(error.value)
    assert [each.field for each in (error.value, *error.value.also)] == [
        line.partition(":")[0] for line in said.split("\n")[::2]
    ]
    assert {each.field for each in (error.value, *error.value.also)} == {
        "iterations", "seed", "engine.replica", "engine.threads", "training.epochs", "algorithm.betta", "oracle.name",
    }  # fmt: skip
    assert said.count("\n  fix: ") == 7
    assert "did you mean 'beta'" in said
    assert str(pickle.loads(pickle.dumps(error.value))) == said


def test_a_section_that_waits_for_another_is_not_blamed():
    """The pairing that an algorithm wants is not known while the algorithm is no good."""
    with pytest.raises(ConfigError) as error:
        changed(algorithm={"name": "dpo", "betta": 0.1})
    assert (error.value.field, error.value.also) == ("algorithm.betta", ())


# --- identity ---


def test_round_trip(write):
    config = changed(training={"learning_rate": 1e-7}, engine={"resources": {"x": 1.0}}, oracle={"name": "sentiment"})
    again = configuration.load(write("dumped.yaml", configuration.dump(config)))
    assert configuration.dump(again) == configuration.dump(config)
    assert configuration.digest(again) == configuration.digest(config)
    assert again.training == config.training


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_round_trip(write, path):
    config = configuration.load(path)
    again = configuration.load(write("dumped.yaml", configuration.dump(config)))
    assert configuration.digest(again) == configuration.digest(config)


def test_what_a_resume_may_change_is_no_part_of_the_identity():
    before = configuration.digest(changed())
    changes: list[dict[str, object]] = [
        {"iterations": 9},
        {"runs": "elsewhere"},
        {"metrics": {"prometheus_port": 0}},
        {"cluster": {"device": "cpu"}},
        {"engine": {"replicas": 4, "threads": 2}},
        {"learner": {"tokens_per_microbatch": 100}},
        {"checkpoints": {"keep": 5}},
    ]
    assert {configuration.digest(changed(**change)) for change in changes} == {before}


def test_what_is_computed_is_part_of_the_identity():
    changes: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"algorithm": {"name": "dpo", "beta": 0.3}},
        {"algorithm": {"name": "grpo"}},
        {"oracle": {"name": "sentiment", "include_prompt": False}},
        {"training": {"batch_size": 4}},
        {"sampling": {"temperature": 0.7}},
        {"engine": {"dtype": "float32"}},
        {"model": "org/other-7B"},
    ]
    assert len({configuration.digest(changed(**change)) for change in changes}) == len(changes)


def test_a_default_written_out_changes_nothing():
    spelled = changed(
        algorithm={"name": "dpo", "beta": 0.2, "label_smoothing": 0.0}, seed=0, sampling={"samples_per_prompt": 4}
    )
    assert configuration.digest(spelled) == configuration.digest(changed())
    assert configuration.fingerprint(spelled)["algorithm.label_smoothing"] == 0.0


def test_a_mark_at_a_field_is_all_that_lets_a_resume_change_it(tmp_path, monkeypatch):
    """In a class of the user's own too."""
    (tmp_path / "marked_judge.py").write_text(MARKED)
    monkeypatch.syspath_prepend(str(tmp_path))
    started = changed(oracle={"name": "marked_judge.Judge"})
    assert {"oracle.workers", "oracle.retries"} <= set(configuration.resumable(started))
    for key, refused in (("workers", set()), ("retries", set()), ("strictness", {"oracle.strictness"})):
        now = changed(oracle={"name": "marked_judge.Judge", key: 7})
        assert set(configuration.changes(configuration.fingerprint(started), now)) == refused


MARKED = """
from onlinerl.protocols.keys import Resumable
from onlinerl.protocols.oracle import Oracle


class Judge(Oracle):
    workers: Resumable[int] = 1
    retries: int = 3
    strictness: int = 1
"""


def test_what_a_resume_may_change():
    """As it is promised to whoever resumes a run: a mark that is forgotten or put at the wrong key shows here."""
    config = changed(oracle={"name": "reward_model", "path": "/models/judge"})
    assert sorted(configuration.resumable(config)) == sorted(RESUMABLE)


RESUMABLE = [
    "runs",
    "iterations",
    "metrics",
    "cluster",
    "checkpoints",
    "sync",
    "engine.replicas",
    "engine.tensor_parallel_size",
    "engine.max_num_seqs",
    "engine.kv_cache_gib",
    "engine.gpu_memory_utilization",
    "engine.enforce_eager",
    "engine.cpus",
    "engine.threads",
    "engine.resources",
    "engine.start_timeout_s",
    "engine.generate_timeout_s",
    "engine.max_rejected",
    "engine.max_restarts",
    "engine.min_replicas",
    "schedule.stream",
    "schedule.evaluate_beside",
    "oracle.groups_per_call",
    "oracle.max_concurrent",
    "oracle.call_timeout_s",
    "oracle.retries",
    "oracle.replicas",
    "oracle.cpus",
    "oracle.threads",
    "oracle.resources",
    "oracle.start_timeout_s",
    "oracle.batch_size",
    "ledger",
    "max_failed_labels",
    "prompts.reuse",
    "evaluation.max_mismatch_k3",
    "training.max_skipped_steps",
    "training.max_idle_iterations",
    "learner.cpus",
    "learner.threads",
    "learner.resources",
    "learner.tokens_per_microbatch",
    "learner.padding_free",
    "learner.gradient_checkpointing",
    "learner.start_timeout_s",
    "learner.step_timeout_s",
]


# --- paths ---


def test_a_function_in_a_file_is_found_in_the_working_directory_then_beside_the_configuration(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
        (folder / "both.py").touch()
    (beside / "own.py").touch()
    tree = {"name": "x", "model": "m", "iterations": 1, "algorithm": {"name": "dpo"}, "prompts": {"train": "a", "heldout": "b"}}
    (beside / "run.yaml").write_text(json.dumps(tree | {"oracle": {"name": "python", "function": "own.py:judge"}}))
    monkeypatch.chdir(here)

    def found(*overrides: str) -> str:
        return configuration.settled(configuration.load(beside / "run.yaml", overrides)).oracle["function"]

    assert found() == f"{beside}/own.py:judge"
    assert found("oracle.function=both.py:judge") == f"{here}/both.py:judge"
    assert found(f"oracle.function={beside}/both.py:judge") == f"{beside}/both.py:judge"
    assert found("oracle.function=nowhere.py:judge") == "nowhere.py:judge", "what is not there is said when it is opened"
    assert found("oracle.function=package.judge") == "package.judge"


def test_located_paths_mean_the_same_everywhere(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    tree = {**BASE, "model": "model", "runs": "out", "prompts": {"train": "a.jsonl", "heldout": "package:film_reviews_heldout"}}
    found = configuration.settled(configuration.parse(tree))
    assert (found.model, found.runs) == (str(tmp_path / "model"), str(tmp_path / "out"))
    assert (found.prompts.train, found.prompts.heldout) == (str(tmp_path / "a.jsonl"), "package:film_reviews_heldout")
    assert configuration.settled(found) == found
    assert configuration.settled(configuration.parse({**tree, "model": "org/name"})).model == "org/name"


def test_a_reward_models_path_means_the_same_everywhere(tmp_path, monkeypatch):
    (tmp_path / "judge").mkdir()
    monkeypatch.chdir(tmp_path)
    stored = configuration.dump(configuration.parse({**BASE, "oracle": {"name": "reward_model", "path": "judge"}}))
    assert f"path: {tmp_path / 'judge'}" in stored


def test_a_key_that_came_with_a_later_version_counts_as_its_default():
    """A run that was started before the key existed goes on; one that sets it to something else does not."""
    config = changed()
    stored = configuration.fingerprint(config)
    assert configuration.changes(stored, config) == {}
    for key in ("training.warmup_ratio", "algorithm.label_smoothing", "prompts.reuse", "evaluation.prompts"):
        older = {k: v for k, v in stored.items() if k != key}
        assert configuration.changes(older, config) == {}, key
    older = {k: v for k, v in stored.items() if k != "training.warmup_ratio"}
    assert configuration.changes(older, changed(training={"warmup_ratio": 0.5})) == {
        "training.warmup_ratio": "was 0.0 when the run started and is now 0.5"
    }
    assert list(configuration.changes({k: v for k, v in stored.items() if k != "seed"}, changed(seed=3))) == ["seed"]


def test_a_pairing_that_was_left_out_is_the_default_where_pairs_are_trained():
    config = changed()
    assert config.pairing is None
    assert configuration.fingerprint(config)["pairing.name"] == "best_worst"
    common = {"tie_within": 0.02, "ties": "drop", "uncertainty_filter": {"mu": 0.0, "within": 0.0, "unfiltered": 0.1}}
    stored = configuration.parse(yaml.safe_load(configuration.dump(config))).pairing
    assert stored == {"name": "best_worst", "against": "worst", "min_gap": 0.0, **common}
    assert configuration.digest(changed(pairing={"name": "best_worst"})) == configuration.digest(config)
    assert configuration.digest(changed(pairing={"name": "ranked"})) != configuration.digest(config)


def test_a_pairing_that_an_older_version_filled_in_changes_nothing():
    """It was stored whether or not the algorithm trains pairs; setting one now is another thing."""
    config = changed(algorithm={"name": "grpo"})
    assert "pairing" not in yaml.safe_load(configuration.dump(config))
    stored = {**configuration.fingerprint(config), "pairing.name": "best_worst", "pairing.min_gap": 0.0}
    older = changed(algorithm={"name": "grpo"}, pairing={"name": "best_worst"})
    assert configuration.without_unread(older) == config
    assert configuration.changes(stored, config) == {}
    assert set(configuration.changes(stored, changed(algorithm={"name": "grpo"}, pairing={"name": "ranked"}))) == {
        "pairing.name"
    }
    pairs = changed(pairing={"name": "ranked"})
    assert configuration.without_unread(pairs) == pairs


def test_a_key_that_is_gone_is_named():
    stored = {**configuration.fingerprint(changed()), "training.momentum": 0.5, "algorithm.beta": 0.1}
    assert configuration.changes(stored, changed()) == {
        "algorithm.beta": "was 0.1 when the run started and is now 0.2",
        "training.momentum": "was 0.5 when the run started, and this version has no such key",
    }


def test_of_the_schedule_only_the_lag_is_fixed_for_a_run():
    assert [key for key in configuration.fingerprint(changed()) if key.startswith("schedule")] == ["schedule.max_lag"]
