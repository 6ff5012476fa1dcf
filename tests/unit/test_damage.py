"""A run directory whose files were altered: every flipped bit is noticed, and the error names the file and the way out."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import older
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from older import append_lines, write_parquet
from values import group, groups, label, labels, logprobs

from onlinerl.errors import StoreError
from onlinerl.stores import _files, _identity, _journal, _parts, _tables
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.rows import LABELS, group_row, label_row
from onlinerl.stores.summary import samples, summarise
from onlinerl.stores.tables import StoredTable
from onlinerl.types import LogProbs, Prompt

FLIPS = 300


@pytest.fixture
def run(tmp_path):
    """A run with a growing table, a sealed one, finished phases, checkpoints and an export."""
    manifest = {"name": "r", "config_digest": "abc", "fingerprint": {"seed": 1, "algorithm.name": "dpo"}}
    with RunDirectory.create(tmp_path / "r", config_yaml="name: r\n", manifest=manifest) as run:
        run.groups(1, "rollouts").append(groups(20))
        run.groups(1, "rollouts").seal()
        run.finish_phase(1, "sample", {"seconds": 1.5, "samples": 40})
        for some in (groups(20)[:10], groups(20)[10:]):
            run.groups(2, "rollouts").append(some)
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


def test_every_flipped_bit_of_a_part_is_noticed(run):
    file = run.path / "iterations/0001/rollouts.parquet/0001.parquet"
    assert unnoticed(file, lambda: list(run.groups(1, "rollouts"))) == []


def test_every_flipped_bit_of_a_part_is_noticed_by_whoever_reads_single_rows(run):
    file = run.path / "iterations/0001/rollouts.parquet/0001.parquet"

    def read() -> None:
        with RunDirectory.open(run.path) as opened:
            assert next(opened.groups(1, "rollouts").select(["p7"])) == group(7)

    run.close()
    assert unnoticed(file, read) == []


def test_every_flipped_bit_of_the_kept_prompts_is_noticed(run):
    prompts = [Prompt(id=f"p{i}", text=f"the film {i} was", token_ids=(1, 2, i)) for i in range(20)]
    run.keep_prompts(train=prompts, heldout=prompts[:3])
    file = run.path / "prompts/train.parquet/0001.parquet"
    assert unnoticed(file, lambda: run.prompts("train")) == []
    file.unlink()
    with pytest.raises(StoreError, match="is gone") as caught:
        run.prompts("train")
    assert "remove" not in caught.value.fix, "no iteration makes the prompts again"


def test_every_flipped_bit_of_a_journal_is_noticed(run):
    """Those of its last frame, too, which is no torn tail."""
    file = run.path / "iterations/0002/rollouts.0001.journal"
    assert unnoticed(file, lambda: list(run.groups(2, "rollouts"))) == []


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


def test_a_part_that_is_gone_is_noticed(run):
    (run.path / "iterations/0001/rollouts.parquet/0001.parquet").unlink()
    with pytest.raises(StoreError, match=r"rollouts\.parquet/0001\.parquet is damaged .* is gone") as caught:
        list(run.groups(1, "rollouts"))
    assert "remove 0001 and all later numbers" in caught.value.fix
    run.close()
    with RunDirectory.open(run.path) as opened, pytest.raises(StoreError, match="is gone"):
        next(opened.groups(1, "rollouts").select(["p3"]))
    with pytest.raises(StoreError, match="is gone"):
        samples(run.path, 1, 5)


# --- runs of earlier formats ---


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_run_of_an_earlier_format_opens_and_goes_on(tmp_path, number):
    path = tmp_path / "old"
    folder = path / "iterations/0001"
    folder.mkdir(parents=True)
    manifest = {"format": number, "name": "old", "fingerprint": {"seed": 0}, "status": "interrupted", "attempt": 0}
    rows = [plain(group_row(g)) for g in groups(20)]
    told = [label_row(one) for one in labels(range(5))]
    entry = write_parquet(folder / "rollouts.parquet", rows)
    append_lines(folder / "verdicts.jsonl", told[:2], checksums=number > 1)
    with (folder / "verdicts.jsonl").open("ab") as journal:
        journal.write(b'{"a"')  # a kill left it torn
    phases = {"iteration": 1, "phases": {"sample": {"seconds": 1.0}}}
    if number == 1:
        (path / "manifest.json").write_text(json.dumps(manifest, indent=2))
        (folder / "manifest.json").write_text(json.dumps(phases))
    else:
        _files.replace_json(path / "manifest.json", manifest)
        _files.replace_json(folder / "manifest.json", {**phases, "format": number, "tables": {"rollouts": entry}})
    (path / "config.yaml").write_text("name: old\n")
    with RunDirectory.open(path) as run:
        assert run.manifest["format"] == number
        sampled, verdicts = run.groups(1, "rollouts"), run.labels(1, "verdicts")
        assert list(sampled) == groups(20)
        assert sampled.sealed
        assert list(sampled.select(["p3", "p19", "p99"])) == [group(3), group(19), None]
        assert list(verdicts) == labels(range(2))
        assert verdicts.missing(["p0", "p1", "p2"]) == ["p2"]
        assert list(run.phases(1)) == ["sample"]
        run.update_manifest(status="running")
        assert run.manifest["format"] == 6, "an older version must not go on with it"
        verdicts.append(labels(range(2, 4)))
        assert list(verdicts) == labels(range(4))
        assert not (folder / "verdicts.jsonl").exists()
        verdicts.append(labels(range(4, 5)))
        verdicts.seal()
        assert list(verdicts) == labels(range(5))
        run.finish_phase(1, "label", {})
        assert list(sampled) == groups(20)
        with pytest.raises(StoreError, match="takes no more rows"):
            sampled.append(groups(1))
    shown = samples(path, 1, 2)
    assert [one["prompt_id"] for one in shown] == ["p0", "p1"]


def plain(row: dict) -> dict:
    return json.loads(json.dumps(row))


@pytest.mark.parametrize("table", ["rollouts", "verdicts"])
def test_damage_to_a_table_of_an_earlier_format_is_noticed(tmp_path, table):
    folder = tmp_path / "0001"
    folder.mkdir()
    entry = write_parquet(folder / "rollouts.parquet", [plain(group_row(g)) for g in groups(20)])
    append_lines(folder / "verdicts.jsonl", [label_row(one) for one in labels(range(20))])
    _files.replace_json(folder / "manifest.json", {"tables": {"rollouts": entry}})
    (file,) = folder.glob(f"{table}.*")
    assert unnoticed(file, lambda: list(TableFiles(folder, table).chunks())) == []
    if table == "rollouts":
        file.unlink()
        with pytest.raises(StoreError, match="is gone"):
            list(TableFiles(folder, table).chunks())


def test_a_conversion_that_was_killed_is_completed(tmp_path, monkeypatch):
    """The journal of an earlier format is the first part, and still there."""
    folder = tmp_path / "0001"
    folder.mkdir()
    append_lines(folder / "verdicts.jsonl", [label_row(one) for one in labels(range(3))])
    with monkeypatch.context() as patch:
        patch.setattr(TableFiles, "_remove_older", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            TableFiles(folder, "verdicts", LABELS.schema).append([label_row(label(3, 1.0))])
    assert (folder / "verdicts.jsonl").exists()
    table = StoredTable(TableFiles(folder, "verdicts", LABELS.schema), LABELS)
    assert list(table) == labels(range(3))
    table.append([label(3, 1.0)])
    assert list(table) == [*labels(range(3)), label(3, 1.0)]
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "verdicts.0002.journal", "verdicts.parquet"]


ALL = ("old_logprobs", "reference_logprobs", "values")
SOME = [logprobs(n, 5, n % 3, names=ALL if n % 4 else ("reference_logprobs",)) for n in range(24)]
"""What two algorithms ask for; a group may have nothing of one array."""


def exactly(values: Iterable[LogProbs]) -> list:
    return [(one.prompt_id, {name: [a.tobytes() for a in own] for name, own in one.arrays.items()}) for one in values]


def column_names(folder: Path) -> dict[str, set[str]]:
    """As they are in the files of a table: which of those of today, and which of those of format 5."""
    files = {p.name: pq.read_schema(p) for p in sorted(folder.glob("logprobs.parquet/*"))}
    files |= {p.name: _journal.Journal(p, pa.schema([])).schema for p in folder.glob("logprobs.*.journal")}
    return {name: set(schema.names) - {"prompt_id", "logprobs", "values", *older.LATER} for name, schema in files.items()}


OLD, NOW = set(older.COLUMNS.values()), set(older.COLUMNS)


@pytest.fixture
def of_format_5(tmp_path, monkeypatch) -> RunDirectory:
    """A run with a complete table of iteration 1 and one that grows, of iteration 2; both have several parts."""
    monkeypatch.setattr(_tables, "PART_BYTES", 1500)
    monkeypatch.setattr(_parts, "ROW_GROUP_BYTES", 300)
    path = tmp_path / "old"
    with RunDirectory.create(path, config_yaml="", manifest={"name": "old", "fingerprint": {}}) as run:
        for one in SOME[:15]:
            run.logprobs(1, "logprobs").append([one])
            run.logprobs(2, "logprobs").append([one])
        run.logprobs(1, "logprobs").seal()
    older.as_format_5(path)
    complete, growing = (column_names(path / "iterations" / t) for t in ("0001", "0002"))
    assert len(growing) > 3
    assert any(name.endswith("journal") for name in growing)
    assert all(names == OLD for names in (*complete.values(), *growing.values()))
    with RunDirectory.open(path) as run:
        assert run.manifest["format"] == 5
        yield run


def test_a_table_of_format_5_is_read_as_it_was_written(of_format_5):
    for t in (1, 2):
        table = of_format_5.logprobs(t, "logprobs")
        assert exactly(table) == exactly(SOME[:15])
        assert exactly(table.select(["p7", "p0", "p14"])) == exactly([SOME[7], SOME[0], SOME[14]])
        assert table.missing(["p3", "p20"]) == ["p20"]
        for row, one in zip(of_format_5.read(t, "logprobs"), SOME[:15], strict=True):  # as people get it
            plain = {name: [a.tolist() for a in own] for name, own in one.arrays.items()}
            assert row == {"prompt_id": one.prompt_id, **dict.fromkeys(("logprobs", *ALL)), **plain}
    with pytest.raises(StoreError, match="takes no more rows"):
        of_format_5.logprobs(1, "logprobs").append(SOME[15:])


@pytest.mark.parametrize("added", [0, 1, 9])
def test_a_table_of_format_5_goes_on_with_the_present_columns(of_format_5, added):
    """Parts of both stand side by side; what is written has the present names, the rows of the older journal among it."""
    folder = of_format_5.path / "iterations/0002"
    before = {part: part.read_bytes() for part in folder.glob("logprobs.parquet/*")}
    table = of_format_5.logprobs(2, "logprobs")
    for n in range(15, 15 + added):
        table.append([SOME[n]])
        assert exactly(table.select(["p7", "p14", f"p{n}"])) == exactly([SOME[7], SOME[14], SOME[n]])
        assert exactly(table) == exactly(SOME[: n + 1])
    table.seal()
    assert exactly(table) == exactly(SOME[: 15 + added])
    assert {part: part.read_bytes() for part in before} == before, "a part never changes"
    names = column_names(folder)
    assert [names.pop(part.name) for part in sorted(before)] == [OLD] * len(before)
    assert names
    assert list(names.values()) == [NOW] * len(names)
    again = RunDirectory(of_format_5.path, of_format_5._lock).logprobs(2, "logprobs")
    assert exactly(again.select(["p14", "p2"])) == exactly([SOME[14], SOME[2]])
    assert again.sealed


def test_an_older_version_refuses_what_this_one_has_gone_on_with(of_format_5, monkeypatch):
    of_format_5.update_manifest(status="running")
    of_format_5.close()
    monkeypatch.setattr(_identity, "READABLE", (1, 2, 3, 4, 5))
    with pytest.raises(StoreError, match="has format 6, this version of onlinerl reads formats 1, 2, 3, 4, 5"):
        RunDirectory.open(of_format_5.path)


@pytest.mark.parametrize("lacking", ["name", "fingerprint"])
def test_a_manifest_that_lacks_what_a_resume_needs(run, lacking):
    run.close()
    manifest = json.loads((run.path / "manifest.json").read_text())
    manifest.pop("sha256")
    (run.path / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != lacking} | {"format": 1}))
    with pytest.raises(StoreError, match=f"does not say {lacking} of the run"):
        RunDirectory.open(run.path)
