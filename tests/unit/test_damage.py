"""A run directory whose files were altered: every flipped bit is noticed, and the error names the file and the way out."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onlinerl.errors import StoreError
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.rows import group_row
from onlinerl.stores.summary import samples, summarise
from onlinerl.types import Group, Prompt, Rollout, Sampling

FLIPS = 300
WORDS = 'the film was a good story and it \\ " { } naïve'.split()  # noqa: SIM905


def rollouts(count: int) -> list[dict]:
    """Rows as a run stores them."""
    rng = np.random.default_rng(0)

    def response() -> Rollout:
        length = int(rng.integers(1, 20))
        return Rollout(
            token_ids=tuple(map(int, rng.integers(0, 50_000, length))),
            logprobs=tuple(map(float, rng.normal(-2, 1, length))),
            text=" ".join(rng.choice(WORDS, length)),
            finish_reason="stop",
            policy_version=1,
            sampler=Sampling(max_new_tokens=20),
            seed=int(rng.integers(2**31)),
        )

    prompts = [Prompt(id=f"p{i}", text=f"the film {i} was", token_ids=(1, 2, i)) for i in range(count)]
    return [group_row(Group(prompt=p, rollouts=(response(), response()))) for p in prompts]


@pytest.fixture
def run(tmp_path):
    """A run with a growing table, a sealed one, finished phases, checkpoints and an export."""
    manifest = {"name": "r", "config_digest": "abc", "fingerprint": {"seed": 1, "algorithm.name": "dpo"}}
    with RunDirectory.create(tmp_path / "r", config_yaml="name: r\n", manifest=manifest) as run:
        run.append(1, "rollouts", rollouts(20))
        run.seal(1, "rollouts")
        run.finish_phase(1, "sample", {"seconds": 1.5, "samples": 40})
        run.append(2, "rollouts", rollouts(20))
        for number in (1, 2, 3):
            save(run, "checkpoints", number)
        save(run, "exports", 1)
        yield run


def save(run: RunDirectory, kind, number: int, ranks: int = 2) -> None:
    with run.staged(kind, number) as path:
        (path / "state").mkdir()
        for rank in range(ranks):
            (path / "state" / f"rank_{rank}.bin").write_bytes(bytes(range(256)) * 8)


def flips(file: Path) -> Iterator[int]:
    """Flips one bit of a file at a time, at random places, its first and last bytes among them; yields where."""
    original = file.read_bytes()
    bits = 8 * len(original)
    rng = random.Random(0)
    ends = [*range(64), *range(bits - 160, bits)]
    chosen = [*ends, *(rng.randrange(bits) for _ in range(FLIPS - len(ends)))]
    for bit in chosen:
        altered = bytearray(original)
        altered[bit // 8] ^= 1 << bit % 8
        file.write_bytes(altered)
        yield bit
    file.write_bytes(original)


def unnoticed(file: Path, read) -> list[int]:
    """Bits that may flip without an error that names the file and the fix."""
    missed = []
    for bit in flips(file):
        noticed = False
        try:
            read()
        except StoreError as error:
            noticed = str(file) in error.cause and bool(error.fix)
        if not noticed:
            missed.append(bit)
    read()
    return missed


def test_every_flipped_bit_of_a_sealed_table_is_noticed(run):
    file = run.path / "iterations/0001/rollouts.parquet"
    assert unnoticed(file, lambda: run.read(1, "rollouts")) == []


def test_every_flipped_bit_of_the_kept_prompts_is_noticed(run):
    prompts = [Prompt(id=f"p{i}", text=f"the film {i} was", token_ids=(1, 2, i)) for i in range(20)]
    run.keep_prompts(train=prompts, heldout=prompts[:3])
    file = run.path / "prompts/train.parquet"
    assert unnoticed(file, lambda: run.prompts("train")) == []
    file.unlink()
    with pytest.raises(StoreError, match="is gone") as caught:
        run.prompts("train")
    assert "remove" not in caught.value.fix, "no iteration makes the prompts again"


def test_every_flipped_bit_of_a_journal_is_noticed(run):
    file = run.path / "iterations/0002/rollouts.jsonl"
    assert unnoticed(file, lambda: run.read(2, "rollouts")) == []


def test_every_flipped_bit_of_an_iterations_manifest_is_noticed(run):
    assert unnoticed(run.path / "iterations/0001/manifest.json", lambda: run.phases(1)) == []


def test_every_flipped_bit_of_the_runs_manifest_is_noticed(run):
    run.close()

    def reopen() -> None:
        RunDirectory.open(run.path).close()

    assert unnoticed(run.path / "manifest.json", reopen) == []
    assert unnoticed(run.path / "manifest.json", lambda: summarise(run.path)) == []


@pytest.mark.parametrize("file", ["state/rank_1.bin", "complete.json"])
@pytest.mark.parametrize("kind", ["checkpoints", "exports"])
def test_every_flipped_bit_of_a_checkpoint_or_export_is_noticed(run, kind, file):
    assert unnoticed(run.path / kind / "0001" / file, lambda: run.require(kind, 1)) == []


def test_a_large_file_is_hashed_whole(run):
    """Its middle, too, whatever its size."""
    with run.staged("checkpoints", 4) as path, (path / "weights").open("wb") as file:
        file.truncate(80 << 20)
    weights = run.path / "checkpoints/0004/weights"
    run.require("checkpoints", 4)
    with weights.open("r+b") as file:
        file.seek(40 << 20)
        file.write(b"\x01")
    with pytest.raises(StoreError, match="weights is damaged"):
        run.require("checkpoints", 4)


def test_a_damaged_checkpoint_says_what_one_can_go_back_to(run):
    (run.path / "checkpoints/0003/state/rank_0.bin").write_bytes(b"x" * 2048)
    (run.path / "checkpoints/0002/state/rank_1.bin").write_bytes(b"x" * 2048)  # no way back: it is damaged, too
    with pytest.raises(StoreError, match=r"checkpoints/0003/state/rank_0\.bin is damaged") as caught:
        run.require("checkpoints", 3)
    assert "go back to iteration 1" in caught.value.fix
    assert "rm -r iterations/0002 checkpoints/0002 checkpoints/0003, then resume" in caught.value.fix


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p / "state/rank_1.bin").unlink(), r"state/rank_1\.bin is damaged or cannot be read: it is not there"),
        (lambda p: (p / "state/rank_1.bin").write_bytes(b"half"), "it had 2048 bytes and has 4"),
        (lambda p: (p / "complete.json").unlink(), r"complete\.json is damaged or cannot be read: it is not there"),
        (lambda p: (p / "complete.json").write_text('{"files": []}'), "does not list the files"),
        (shutil.rmtree, "checkpoints/0002 is not there"),
    ],
)
def test_a_checkpoint_that_lacks_something(run, damage, says):
    damage(run.path / "checkpoints/0002")
    with pytest.raises(StoreError, match=says) as caught:
        run.require("checkpoints", 2)
    assert "go back to iteration 1" in caught.value.fix


@pytest.mark.parametrize(("size", "says"), [(None, "is not there"), (3, "has 3")])
def test_a_shard_that_did_not_arrive_makes_no_checkpoint(run, size, says):
    """A rank says that it wrote its shard, and the controller sees none, or less."""

    def checkpoint() -> None:
        with run.staged("checkpoints", 5) as path:
            (path / "rank_0.bin").write_bytes(b"weights")
            if size is not None:
                (path / "rank_1.bin").write_bytes(b"x" * size)
            run.require_files(path, {"rank_0.bin": 7, "rank_1.bin": 7})

    with pytest.raises(StoreError, match=rf"rank_1\.bin was written with 7 bytes, and {says}") as caught:
        checkpoint()
    assert "a disk that all nodes share" in caught.value.fix
    assert run.artefact("checkpoints", 5) is None


def test_a_table_that_was_complete_and_is_gone_is_noticed(run):
    (run.path / "iterations/0001/rollouts.parquet").unlink()
    with pytest.raises(StoreError, match=r"rollouts\.parquet is damaged .* is gone"):
        run.read(1, "rollouts")
    with pytest.raises(StoreError, match="is gone"):
        samples(run.path, 1, 5)


def test_a_table_that_is_written_at_once_replaces_what_a_kill_left(run):
    """A journal with the first rows only is not the table."""
    rows = [{"a": i, "b": (1, 2)} for i in range(5)]
    run.append(2, "pairs", rows[:2])
    run.write(2, "pairs", rows)
    assert run.sealed(2, "pairs")
    assert run.read(2, "pairs") == [{"a": i, "b": [1, 2]} for i in range(5)]
    assert not (run.path / "iterations/0002/pairs.jsonl").exists()
    with pytest.raises(StoreError, match="takes no more rows"):
        run.write(2, "pairs", rows)


# --- runs from before there were checksums ---


def test_a_run_of_format_1_opens_and_goes_on(tmp_path):
    path = tmp_path / "old"
    folder = path / "iterations/0001"
    folder.mkdir(parents=True)
    manifest = {"format": 1, "name": "old", "fingerprint": {"seed": 0}, "status": "interrupted", "attempt": 0}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2))
    (path / "config.yaml").write_text("name: old\n")
    (folder / "manifest.json").write_text(json.dumps({"iteration": 1, "phases": {"sample": {"seconds": 1.0}}}))
    pq.write_table(pa.table({"a": [1, 2]}), folder / "rollouts.parquet")
    (folder / "verdicts.jsonl").write_text('{"a":1}\n{"a":2}\n{"a"')
    saved = path / "checkpoints/0001"
    saved.mkdir(parents=True)
    (saved / "model").write_bytes(b"weights")
    entry = {"bytes": 7, "sha256": "9f7d25bdf5d40a81acb6183ae45de4a8c1aa1fcd5c2e7ab17e6ea3a1e7d6f2b0"}
    (saved / "complete.json").write_text(json.dumps({"files": {"model": entry}}))

    with RunDirectory.open(path) as run:
        assert run.manifest["format"] == 1
        assert run.read(1, "rollouts") == [{"a": 1}, {"a": 2}]
        assert run.read(1, "verdicts") == [{"a": 1}, {"a": 2}]
        assert list(run.phases(1)) == ["sample"]
        run.update_manifest(status="running")
        assert run.manifest["format"] == 3, "an older version must not go on with it"
        run.append(1, "verdicts", [{"a": 3}])
        assert run.read(1, "verdicts") == [{"a": 1}, {"a": 2}, {"a": 3}]
        run.seal(1, "verdicts")
        assert run.read(1, "verdicts") == [{"a": 1}, {"a": 2}, {"a": 3}]
        run.finish_phase(1, "label", {})
        assert run.read(1, "rollouts") == [{"a": 1}, {"a": 2}]
        assert run.artefact("checkpoints", 1) is not None
        with pytest.raises(StoreError, match="model is damaged"):  # that checksum is of something else
            run.require("checkpoints", 1)


@pytest.mark.parametrize("lacking", ["name", "fingerprint"])
def test_a_manifest_that_lacks_what_a_resume_needs(run, lacking):
    run.close()
    manifest = json.loads((run.path / "manifest.json").read_text())
    manifest.pop("sha256")
    (run.path / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != lacking} | {"format": 1}))
    with pytest.raises(StoreError, match=f"does not say {lacking} of the run"):
        RunDirectory.open(run.path)
