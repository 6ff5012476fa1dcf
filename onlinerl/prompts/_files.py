"""Rows of published data, read by the `datasets` library: files, folders of `save_to_disk`, and the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onlinerl.config.paths import at_home
from onlinerl.errors import PromptError

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""The library's reader, by the end of a file's name."""
PACKED = (".gz", ".bz2", ".xz", ".zst")


def rows(where: str, field: str, split: str, subset: str | None = None) -> Any:
    """The dataset at a path or of the hub, as the library gives it.

    Args:
        where: a file, a folder or a name on the hub.
        field: the key that names it, e.g. `prompts.train`, for messages.
        split: name of a split, or a part of one, e.g. `train[:90%]`.
        subset: of a hub dataset that has several.

    Raises:
        PromptError: if it cannot be read.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        section = field.partition(".")[0]
        raise PromptError(
            "needs the package `datasets`, which is not installed",
            field=f"{section}.name" if section == "prompts" else field,
            fix="pip install datasets"
            + (", or give JSON lines with text or messages and prompts.name=jsonl" if section == "prompts" else ""),
        ) from None
    path = at_home(where, field)
    with _quiet(datasets), _explained(str(path), split, field):
        if path.is_file():
            reader, options = _reader(path, field)
            return datasets.load_dataset(reader, data_files=str(path), split=split, **options)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _part(datasets, datasets.load_from_disk(str(path)), split)
        return datasets.load_dataset(str(path) if path.is_dir() else where, subset, split=split)


def _reader(path: Path, field: str) -> tuple[str, dict[str, str]]:
    """The library's reader of a file, and its options."""
    ends = [end for end in path.suffixes if end not in PACKED]
    if not ends or ends[-1] not in BUILDERS:
        raise PromptError(
            f"{path} is no file that can be read",
            field=field,
            fix=f"give one that ends with {', '.join(BUILDERS)} (packed with .gz, too)",
        )
    return BUILDERS[ends[-1]], {"sep": "\t"} if ends[-1] == ".tsv" else {}


def _part(datasets: Any, saved: Any, split: str) -> Any:
    """A split, or a part of one, of what `save_to_disk` wrote. One that was saved alone is called by any name."""
    name = split.partition("[")[0]
    parts = saved if isinstance(saved, datasets.DatasetDict) else {name: saved}
    if name not in parts:
        raise ValueError(f"Unknown split {name!r}. Should be one of {list(parts)}.")
    (where,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(parts[name])})
    return parts[name].select(range(where.from_ or 0, len(parts[name]) if where.to is None else where.to))


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the library's progress bars."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _explained(path: str, split: str, field: str) -> Iterator[None]:
    """What the library raises, which may be anything, in our words."""
    try:
        yield
    except PromptError:
        raise
    except Exception as error:
        said = str(error).partition("\n")[0]
        if "split" in said.lower():
            raise PromptError(
                f"{path}: {said}", field=f"{field}_split", fix="choose one of its splits, or a part of one, e.g. 'train[:90%]'"
            ) from None
        if "config" in said.lower() and "missing" in said.lower():
            raise PromptError(
                f"{path}: {str(error).replace(chr(10), ' ')}",
                field=f"{field.partition('.')[0]}.subset",
                fix="choose one of them",
            ) from None
        cause = error.__cause__ or error
        raise PromptError(
            f"{path} cannot be read: {type(cause).__name__}: {str(cause).partition(chr(10))[0]}",
            field=field,
            fix="give a file (relative paths start where onlinerl was started), a folder of `save_to_disk`, or a dataset of the hub that "
            "can be reached or was downloaded (`hf download --repo-type dataset ...`)",
        ) from error
