"""Keys that were called otherwise in earlier versions: refused where somebody writes one, read as the new key where a run stored it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from onlinerl import config as configuration
from onlinerl import registry, synonyms
from onlinerl.errors import ConfigError
from onlinerl.protocols.algorithm import Algorithm

BASE: dict[str, Any] = {
    "name": "demo",
    "model": "org/name-7B",
    "iterations": 3,
    "algorithm": {"name": "dpo"},
    "oracle": {"name": "sentiment"},
    "prompts": {"train": "a.jsonl", "heldout": "b.jsonl"},
}


def algorithms_with(key: str) -> list[str]:
    section, _, leaf = key.partition(".")
    found = [name for name in registry.names("algorithms") if leaf in registry.load("algorithms", name, Algorithm).model_fields]
    return found if section == "algorithm" else ["dpo"]


CASES = [(old, new, name) for old, new in synonyms.RENAMED.items() for name in algorithms_with(new)]
VALUES: dict[str, Any] = {
    "algorithm.clip_range": 0.3,
    "algorithm.clip_range_high": 0.3,
    "algorithm.clip_range_low": 0.3,
    "algorithm.clip_range_value": 0.3,
    "algorithm.importance_sampling_cap": 3.0,
    "algorithm.kl_coef": 0.3,
    "algorithm.pairs": "all",
    "engine.max_num_seqs": 3,
    "learner.attn_implementation": "eager",
    "training.batch_size": 3,
    "training.lr_scheduler_type": "cosine",
    "training.warmup_ratio": 0.3,
}
"""None of them the default."""


def tree(algorithm: str, key: str | None = None) -> dict[str, Any]:
    """A configuration, and one more key with the value of the one that it is called now."""
    made = {name: dict(value) if isinstance(value, dict) else value for name, value in BASE.items()}
    made["algorithm"] = {"name": algorithm}
    if key is not None:
        section, _, leaf = key.partition(".")
        made.setdefault(section, {})[leaf] = VALUES[synonyms.RENAMED.get(key, key)]
    return made


def write(folder: Path, content: dict[str, Any], name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return path


def test_every_entry_leads_to_a_key_of_the_same_section():
    assert {new for _, new, _ in CASES} == set(synonyms.RENAMED.values())
    for old, new in synonyms.RENAMED.items():
        assert old.partition(".")[0] == new.partition(".")[0]


@pytest.mark.parametrize(("old", "new", "algorithm"), CASES)
def test_an_old_key_is_refused_with_the_new_one(tmp_path, old, new, algorithm):
    file = write(tmp_path, tree(algorithm, old))
    top = write(tmp_path, {"extends": "c.yaml", "seed": 1}, "top.yaml")
    fresh = write(tmp_path, tree(algorithm), "fresh.yaml")
    for path, overrides, where in (
        (file, [], f", in {file}"),
        (top, [], f", in {file}"),
        (fresh, [f"{old}={VALUES[new]}"], ""),
    ):
        with pytest.raises(ConfigError) as refused:
            configuration.load(path, overrides)
        assert (refused.value.field, refused.value.cause) == (old, "was renamed")
        assert refused.value.fix == f"write {new}{where}"


@pytest.mark.parametrize(("old", "new", "algorithm"), CASES)
def test_what_a_run_stored_under_an_old_key_is_read_as_the_new_one(tmp_path, old, new, algorithm):
    stored = configuration.load(write(tmp_path, tree(algorithm, old)), stored=True)
    now = configuration.load(write(tmp_path, tree(algorithm, new)))
    assert configuration.dump(stored) == configuration.dump(now)
    with pytest.raises(ConfigError, match="was renamed"):  # what a resume changes is not stored
        configuration.load(write(tmp_path, tree(algorithm, old)), [f"{old}={VALUES[new]}"], stored=True)


@pytest.mark.parametrize(("old", "new", "algorithm"), [case for case in CASES if not case[0].startswith("engine.")])
def test_a_fingerprint_with_an_old_key_is_that_of_the_new_one(tmp_path, old, new, algorithm):
    config = configuration.load(write(tmp_path, tree(algorithm, new)))
    stored = configuration.fingerprint(config)
    stored[old] = stored.pop(new)
    assert configuration.changes(stored, config) == {}
    stored[old] = "another"
    assert list(configuration.changes(stored, config)) == [new]


OWN = """
from onlinerl.algorithms.dpo import Dpo


class Mine(Dpo):
    kl: float = 0.1
    kl_coef: float = 0.2
"""


def test_a_class_of_the_users_own_may_have_a_key_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "own_kl.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = write(tmp_path, tree("own_kl.Mine") | {"algorithm": {"name": "own_kl.Mine", "kl": 0.5}})
    for stored in (False, True):
        config = configuration.load(file, stored=stored)
        assert config.algorithm == {"name": "own_kl.Mine", "kl": 0.5}
        assert configuration.changes(configuration.fingerprint(config), config) == {}


def test_both_keys_at_once_are_refused(tmp_path):
    both = tree("ppo", "algorithm.kl")
    both["algorithm"]["kl_coef"] = 0.1
    with pytest.raises(ConfigError, match="was renamed"):
        configuration.load(write(tmp_path, both))


@pytest.mark.parametrize("key", synonyms.EARLIER)
def test_a_run_of_before_a_key_goes_on_as_it_was(tmp_path, key):
    """What a run has stored without the key means what it meant, and a resume that says otherwise is another run."""
    section, _, leaf = key.partition(".")
    file = write(tmp_path, tree("dpo") | {section: {"name": "best_worst"}})
    older = configuration.load(file, stored=True)
    assert getattr(older, section)[leaf] == synonyms.EARLIER[key]
    new = configuration.load(file)
    assert configuration.resolved(new)[section][leaf] != synonyms.EARLIER[key]
    fingerprint = {k: v for k, v in configuration.fingerprint(new).items() if k != key}
    assert configuration.changes(fingerprint, older) == {}
    assert list(configuration.changes(fingerprint, new)) == [key]
    said = write(tmp_path, tree("dpo") | {section: {"name": "best_worst", leaf: 0.1}}, "said.yaml")
    assert getattr(configuration.load(said, stored=True), section)[leaf] == 0.1
