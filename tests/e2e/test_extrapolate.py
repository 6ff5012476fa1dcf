"""`onlinerl extrapolate`: models beyond the iterates of a run, made of real ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from onlinerl import config as configuration
from onlinerl import extrapolation, preflight
from onlinerl.errors import ConfigError, StoreError
from onlinerl.extrapolation import extrapolate
from onlinerl.learners._export import export_weights
from onlinerl.learners._weights import PolicySource
from onlinerl.stores.directory import RunDirectory

REFUSED = 2
DTYPE = torch.bfloat16


def read(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def iterates(base: Path) -> Iterator[PreTrainedModel]:
    """As training leaves them: each a little away from the one before."""
    model = read(base)
    torch.manual_seed(1)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        yield model


@pytest.fixture
def run(toy_config, tiny_model, tmp_path) -> Path:
    """A run with two iterates in bfloat16, exported as a learner exports them; its base model is in float32."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = configuration.load(toy_config(tmp_path, {"model": str(base)}))
    manifest = {"name": "toy", "config_digest": "d", "fingerprint": {}, "reference": preflight.identity(str(base))}
    path = tmp_path / "runs/toy"
    with RunDirectory.create(path, config_yaml=configuration.dump(config), manifest=manifest) as store:
        for number, model in enumerate(iterates(base), start=1):
            with store.staged("exports", number) as folder:
                export_weights(PolicySource(model, DTYPE), folder, DTYPE, writer=True)
                model.config.save_pretrained(folder)
                AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        store.update_manifest(status="finished")
    return path


def tensors(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def test_each_model_is_the_end_and_so_much_of_the_way_to_it_again(run, tmp_path):
    lines: list[str] = []
    made = extrapolate(run, tmp_path / "beyond", [-1, 0, 0.3], tell=lines.append)
    assert made == [tmp_path / "beyond" / f"alpha-{alpha}" for alpha in ("-1", "0", "0.3")]
    base, last = tensors(tmp_path / "base"), tensors(run / "exports/0002")
    assert (made[1] / "model.safetensors").read_bytes() == (run / "exports/0002/model.safetensors").read_bytes()
    start, far = tensors(made[0]), tensors(made[2])
    assert start.keys() == far.keys() == last.keys()
    for name, end in last.items():
        assert torch.equal(start[name], base[name].to(DTYPE))
        exact = end.double() + 0.3 * (end.double() - base[name].double())
        assert far[name].dtype == DTYPE
        rounded = (far[name].float() - exact.float()).abs()
        assert bool((rounded <= 2**-8 * exact.float().abs() + 1e-7).all()), "rounded once, at the end"
    assert lines == [
        f"{model}: iterate 2 + {alpha} * (iterate 2 - the base model)"
        for model, alpha in zip(made, ("-1", "0", "0.3"), strict=True)
    ]


def test_it_is_an_ordinary_model_that_says_what_it_is(run, tmp_path):
    (made,) = extrapolate(run, tmp_path / "beyond", [0.5], start=1)
    assert json.loads((made / extrapolation.DESCRIPTION).read_text()) == {"run": str(run), "start": 1, "end": 2, "alpha": 0.5}
    model = read(made)
    assert AutoTokenizer.from_pretrained(made).eos_token == "[end]"
    start, end = (read(run / f"exports/000{t}") for t in (1, 2))
    for ours, a, b in zip(model.parameters(), start.parameters(), end.parameters(), strict=True):
        torch.testing.assert_close(ours, b + 0.5 * (b - a), rtol=2**-8, atol=1e-6)
    assert {path.name for path in made.iterdir()} == {
        *(path.name for path in (run / "exports/0002").iterdir()),
        extrapolation.DESCRIPTION,
    } - {"complete.json"}


def test_the_run_is_left_as_it_was(run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    extrapolate(run, tmp_path / "beyond", [0.1, 0.3])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_while_the_run_goes_on(run, tmp_path):
    with RunDirectory.open(run):
        assert len(extrapolate(run, tmp_path / "beyond", [0.1])) == 1


@pytest.mark.parametrize(
    ("options", "field", "cause"),
    [
        ({"alphas": []}, "alpha", "is missing"),
        ({"alphas": [-1.5]}, "alpha", "is -1.5"),
        ({"alphas": [float("nan")]}, "alpha", "is nan"),
        ({"alphas": [0.3, 0.3000001]}, "alpha", "the same to six digits: 0.3, 0.3000001"),
        ({"start": 2}, "start", "is 2, which is not before the other iterate, 2"),
        ({"start": -1}, "start", "is -1"),
        ({"start": 2, "end": 1}, "start", "is 2"),
        ({"end": 3}, "exports", "has no export of iterate 3"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(run, tmp_path, options, field, cause):
    with pytest.raises((ConfigError, StoreError), match=cause) as caught:
        extrapolate(run, tmp_path / "beyond", options.pop("alphas", [0.3]), **options)
    assert caught.value.field == field
    assert caught.value.fix
    assert not (tmp_path / "beyond").exists()


def test_what_is_there_is_not_written_over(run, tmp_path):
    extrapolate(run, tmp_path / "beyond", [0.3])
    with pytest.raises(ConfigError, match=r"alpha-0\.3 is there already"):
        extrapolate(run, tmp_path / "beyond", [0.5, 0.3])
    assert [path.name for path in (tmp_path / "beyond").iterdir()] == ["alpha-0.3"]
    with pytest.raises(ConfigError, match="only the run itself writes there"):
        extrapolate(run, run / "exports", [0.3])


def test_another_base_model_is_refused(run, tmp_path):
    config = tmp_path / "base/config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ConfigError, match="is not the model the run began with") as caught:
        extrapolate(run, tmp_path / "beyond", [0.3])
    assert "--start 1" in caught.value.fix
    assert extrapolate(run, tmp_path / "beyond", [0.3], start=1)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigError, match="is no longer at"):
        extrapolate(run, tmp_path / "other", [0.3])


def test_a_damaged_iterate_is_refused(run, tmp_path):
    file = run / "exports/0001/model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match="does not agree with its checksum"):
        extrapolate(run, tmp_path / "beyond", [0.3], start=1)
    assert not (tmp_path / "beyond").exists()


def test_models_that_do_not_fit_are_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(StoreError, match=r"GiB, and .* has 0\.00 GiB free"):
        extrapolate(run, tmp_path / "beyond", [0.3])
    assert not (tmp_path / "beyond").exists()


def test_the_command(run, onlinerl, tmp_path):
    code, message = onlinerl("extrapolate", run, "beyond", "--alpha", "0.1", "--alpha", "-1", "--end", "1")
    assert code == 0, message
    assert {path.name for path in (tmp_path / "beyond").iterdir()} == {"alpha-0.1", "alpha--1"}
    code, message = onlinerl("extrapolate", run, "beyond", "--alpha", "0.1")
    assert code == REFUSED
    assert "config: folder: beyond/alpha-0.1 is there already\n  fix: remove it, or choose another folder" in message
    assert onlinerl("extrapolate", run, "more")[0] == REFUSED
    code, message = onlinerl("extrapolate", tmp_path / "runs", "more", "--alpha", "0.1")
    assert code == REFUSED
    assert "holds no run" in message


def test_a_run_of_the_toy_learner_has_no_models(toy_config, onlinerl, tmp_path):
    assert onlinerl("run", toy_config(tmp_path, {"iterations": 1}))[0] == 0
    code, message = onlinerl("extrapolate", "runs/toy", "beyond", "--alpha", "0.1")
    assert code == REFUSED
    assert "holds no safetensors files" in message
