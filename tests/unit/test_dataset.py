"""Datasets as they are published: how each form is understood, what is left out, and what is refused with which words."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import ClassVar

import datasets
import pytest
from word_tokenizer import WordTokenizer

from onlinerl import config as configuration
from onlinerl.errors import ConfigError, PromptError
from onlinerl.prompts import _formats
from onlinerl.prompts._kept import Kept
from onlinerl.prompts._source import load_prompts
from onlinerl.prompts.dataset import Dataset

HELDOUT = {"prompt": "never asked in training"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def dataset(tmp_path):
    """A dataset of these rows, with a held-out prompt of its own."""

    def make(*rows: dict, heldout: tuple[dict, ...] = (HELDOUT,), **keys: object) -> Dataset:
        files = {}
        for name, of in (("train", rows), ("heldout", heldout)):
            file = tmp_path / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in of))
            files[name] = str(file)
        return Dataset(**{**files, **keys})

    return make


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


DIALOGUE = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
TURNS = [user("hi"), said("hello"), user("why?")]
FORMS = {
    "texts": ({"text": "Once upon", "reference_answer": "a time"}, "Once upon", "a time"),
    "messages": ({"messages": [*TURNS, said("so")]}, TURNS, "so"),
    "messages, only asked": ({"messages": TURNS, "answer": 7}, TURNS, "7"),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, [user("hi")], "ho"),
    "verl": ({"prompt": [user("2+2?")], "reward_model": {"ground_truth": "4"}, "data_source": "sums"}, [user("2+2?")], "4"),
    "preferences": ({"prompt": "hi", "chosen": "good", "rejected": "bad"}, [user("hi")], "good"),
    "preferences, as messages": ({"prompt": TURNS, "chosen": [said("so")], "rejected": [said("no")]}, TURNS, "so"),
    "preferences, prompt twice": ({"prompt": "hi", "chosen": [user("hi"), said("ho")], "rejected": []}, [user("hi")], "ho"),
    "preferences, prompt inside": ({"chosen": [*TURNS, said("so")], "rejected": [*TURNS, said("no")]}, TURNS, "so"),
    "transcripts": ({"chosen": f"{DIALOGUE} so", "rejected": f"{DIALOGUE} no"}, TURNS, "so"),
    "a prompt as transcript": ({"prompt": DIALOGUE, "chosen": "so", "rejected": "no"}, TURNS, "so"),
    "prompts": ({"prompt": "hi"}, [user("hi")], None),
    "prompts, as messages": ({"prompt": TURNS}, TURNS, None),
    "prompts with a completion": ({"prompt": "hi", "completion": "ho"}, [user("hi")], "ho"),
    "prompts, completion as messages": ({"prompt": [user("hi")], "completion": [said("ho")]}, [user("hi")], "ho"),
    "prompts, unwanted completion": ({"prompt": "hi", "completion": "ho", "label": False}, [user("hi")], None),
    "prompts with a solution": ({"prompt": [user("2+2?")], "solution": "4"}, [user("2+2?")], "4"),
    "instructions": ({"instruction": "Add", "input": "2, 2", "output": "4"}, [user("Add\n\n2, 2")], "4"),
    "instructions without input": ({"instruction": "Sing", "input": "", "output": "la"}, [user("Sing")], "la"),
    "instructions in context": (
        {"instruction": "Who?", "context": "A fox.", "response": "fox"},
        [user("Who?\n\nA fox.")],
        "fox",
    ),
    "questions": ({"question": "2+2?", "answer": "#### 4"}, [user("2+2?")], "#### 4"),
    "problems": ({"problem": "2+2?", "solution": "4"}, [user("2+2?")], "4"),
    "OpenRLHF": ({"input": "hi", "output": "ho"}, [user("hi")], "ho"),
    "OpenRLHF, as messages": ({"context_messages": TURNS}, TURNS, None),
}


class TestForms:
    @pytest.mark.parametrize("name", FORMS)
    def test_each_is_understood(self, dataset, name):
        row, asked, answer = FORMS[name]
        (found,) = dataset(row).raw("train")
        got = found.text or [{"role": m.role, "content": m.content} for m in found.messages]
        assert (got, found.reference_answer) == (asked, answer)

    def test_every_form_is_tried(self):
        tried = {_formats.recognised(list(row)).name for row, _, _ in FORMS.values()}
        assert tried == {form.name for form in _formats.FORMATS}

    def test_ids_and_sources_are_taken_where_there_are_any(self, dataset):
        row, *_ = FORMS["verl"]
        first, second = dataset({**row, "id": 7}, {**row, "prompt": [user("3+3?")]}).raw("train")
        assert (first.id, first.source) == ("7", "sums")
        assert len(second.id) == 16, "from the content"
        assert dataset({"prompt": "hi"}).raw("train")[0].source == "train", "the file"

    def test_unknown_columns_ask_which_is_the_prompt(self, dataset):
        with pytest.raises(PromptError, match="no known form has the columns query, reward") as error:
            dataset({"query": "hi", "reward": {"answer": "4"}}).raw("train")
        assert "prompts.columns.prompt=COLUMN" in error.value.fix

    def test_columns_say_which_is_what(self, dataset):
        columns = {
            "prompt": "query",
            "reference_answer": "reward.answer",
            "id": "number",
            "source": "of",
            "difficulty": "reward.level",
        }
        row = {"query": "hi", "reward": {"answer": 4, "level": 2.5}, "number": 3, "of": "me"}
        (found,) = dataset(row, heldout=({**row, "query": "ho"},), columns=columns).raw("train")
        assert (found.messages[0].content, found.reference_answer, found.id, found.source) == ("hi", "4", "3", "me")
        assert found.difficulty == 2.5

    def test_a_column_can_be_named_beside_a_known_form(self, dataset):
        columns = {"reference_answer": "short"}
        row = {"question": "2+2?", "answer": "two and two is 4", "short": "4"}
        (found,) = dataset(row, heldout=({**row, "question": "3+1?"},), columns=columns).raw("train")
        assert (found.messages[0].content, found.reference_answer) == ("2+2?", "4")

    def test_of_two_answers_the_columns_say_which_is_the_reference_answer(self, dataset):
        """Of preferences the chosen one, unless another column is named: what `dr_po` resets to."""
        row = {"prompt": "hi", "chosen": "so", "rejected": "no", "human": "well"}
        for columns, answer in (({}, "so"), ({"reference_answer": "human"}, "well")):
            (found,) = dataset(row, heldout=({**row, "prompt": "ho"},), columns=columns).raw("train")
            assert found.reference_answer == answer

    def test_a_column_that_is_not_there(self, dataset):
        with pytest.raises(PromptError, match="no column 'queri'") as error:
            dataset({"query": "hi"}, columns={"prompt": "queri"}).raw("heldout")
        assert error.value.field == "prompts.columns"
        assert error.value.fix == "choose from those of prompts.heldout: prompt"

    def test_a_role_that_is_none(self):
        with pytest.raises(ConfigError, match=r"prompts\.columns") as error:
            configuration.parse(
                {**MINIMAL, "prompts": {"name": "dataset", "train": "a", "heldout": "b", "columns": {"promt": "x"}}}
            )
        assert error.value.field.startswith("prompts.columns")

    def test_texts_can_be_continued_instead(self, dataset):
        plain = {"apply_chat_template": False}
        assert dataset({"prompt": "Once upon"}, **plain).raw("train")[0].text == "Once upon"
        with pytest.raises(PromptError, match="is a conversation, which needs the model's chat template"):
            dataset({"prompt": TURNS}, **plain).raw("train")

    def test_templates_and_system_prompts(self, dataset):
        keys = {"input_template": "Question: {}\nAnswer:", "system_prompt": "Be brief."}
        asked = dataset({"prompt": "2{}2?"}, **keys).raw("train")[0].messages
        assert [(m.role, m.content) for m in asked] == [("system", "Be brief."), ("user", "Question: 2{}2?\nAnswer:")]
        kept = dataset({"prompt": [{"role": "system", "content": "Sing."}, user("hi")]}, **keys).raw("train")[0].messages
        assert [m.content for m in kept] == ["Sing.", "hi"], "its own system message stays, and messages get no template"
        with pytest.raises(ConfigError, match="input_template"):
            configuration.parse(
                {**MINIMAL, "prompts": {"name": "dataset", "train": "a", "heldout": "b", "input_template": "Q:"}}
            )


MINIMAL = {"name": "x", "model": "m", "iterations": 1, "algorithm": {"name": "dpo"}, "oracle": {"name": "sentiment"}}


class TestLeftOut:
    def test_what_comes_again_or_is_held_out_is_counted(self, dataset):
        rows = [{"prompt": "hi"}, {"prompt": "hi"}, {"prompt": "Never  asked in training"}, {"prompt": "ho"}]
        found = dataset(*rows)
        assert [each.messages[0].content for each in found.raw("train")] == ["hi", "ho"]
        (remark,) = [each for each in found.remarks() if each.startswith("prompts.train")]
        assert "2 prompts of" in remark
        assert "left out: 1 that come again, 1 that are held out" in remark
        assert load_prompts(found, WordTokenizer(), seed=0).remarks[0] == remark

    def test_another_prompt_of_the_same_id_is_no_duplicate(self, dataset):
        """Where a column `id` is a number of something else, leaving out what comes again would lose prompts without a word."""
        with pytest.raises(PromptError, match=r"row 2: has the id of another prompt, '7', that of .*row 1") as error:
            dataset({"prompt": "hi", "id": 7}, {"prompt": "ho", "id": 7}).raw("train")
        assert "prompts.columns.id=COLUMN" in error.value.fix

    def test_or_refused(self, dataset):
        with pytest.raises(PromptError, match=r"row 2: holds the same prompt as .*row 1"):
            dataset({"prompt": "hi"}, {"prompt": "hi"}, filter_duplicates=False).raw("train")
        shared = dataset({"prompt": "never asked in training"}, filter_duplicates=False)
        with pytest.raises(PromptError, match="also training prompts"):
            load_prompts(shared, WordTokenizer(), seed=0)

    @pytest.mark.parametrize("bad", ["", "  ", "<|im_start|>user", None])
    def test_rows_that_are_no_prompt(self, dataset, bad):
        rows = {"prompt": "hi"}, {"prompt": bad}
        with pytest.raises(PromptError, match="row 2") as error:
            dataset(*rows).raw("train")
        assert "prompts.filter_invalid=true" in error.value.fix
        lenient = dataset(*rows, filter_invalid=True)
        assert len(lenient.raw("train")) == 1
        assert "1 that are no prompt" in lenient.remarks()[-1] + lenient.remarks()[0]

    def test_nothing_left_is_an_error(self, dataset):
        with pytest.raises(PromptError, match="holds no prompts but 1 that are no prompt"):
            dataset({"prompt": ""}, filter_invalid=True).raw("train")

    def test_long_prompts(self, dataset):
        rows = {"prompt": "one two three four five six"}, {"prompt": "hi"}
        with pytest.raises(PromptError, match="1 of 2 prompts are longer than 8 tokens") as error:
            load_prompts(dataset(*rows, max_tokens=8), WordTokenizer(), seed=0)
        assert "prompts.filter_overlong_prompts=true" in error.value.fix
        loaded = load_prompts(dataset(*rows, max_tokens=8, filter_overlong_prompts=True), WordTokenizer(), seed=0)
        assert len(loaded.train) == 1
        assert "prompts.train: 1 of 2 left out, longer than 8 tokens" in loaded.remarks

    def test_all_too_long_is_an_error(self, dataset):
        found = dataset({"prompt": "one"}, {"prompt": "two"}, max_tokens=2, filter_overlong_prompts=True)
        with pytest.raises(PromptError, match="2 of 2 prompts are longer"):
            load_prompts(found, WordTokenizer(), seed=0)

    def test_answers_stay_with_their_prompts(self, dataset):
        rows = {"prompt": "one two three four five six", "answer": "one two"}, {"prompt": "hi", "answer": "ho ho ho"}
        found = dataset(*rows, max_tokens=8, filter_overlong_prompts=True)
        (prompt,) = load_prompts(found, WordTokenizer(), seed=0, longest_answer=9).train
        assert (prompt.reference_answer, len(prompt.answer_ids)) == ("ho ho ho", 4)

    def test_what_was_too_long_is_no_addition_at_a_resume(self, dataset):
        rows = {"prompt": "one two three four five six"}, {"prompt": "hi"}
        found = dataset(*rows, max_tokens=8, filter_overlong_prompts=True)
        loaded = load_prompts(found, WordTokenizer(), seed=0)
        kept = Kept(train=list(loaded.train), heldout=loaded.heldout)
        config = configuration.parse(
            MINIMAL | {"prompts": {"name": "dataset", **found.model_dump(mode="json", exclude={"name"})}}
        )
        assert kept.changes(config, WordTokenizer()) == []
        dataset(*rows, {"prompt": "new"}, max_tokens=8)
        (sentence,) = kept.changes(config, WordTokenizer())
        assert "1 added" in sentence


class TestPlaces:
    ROWS: ClassVar = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(10)]

    def read(self, path: Path, **keys: object) -> list[str]:
        return [
            each.reference_answer
            for each in Dataset(train=str(path), heldout=str(path), filter_duplicates=False, **keys).raw("train")
        ]

    @pytest.mark.parametrize("end", ["jsonl", "json", "parquet", "csv", "tsv", "jsonl.gz"])
    def test_files(self, tmp_path, end):
        table, path = datasets.Dataset.from_list(self.ROWS), tmp_path / f"sums.{end}"
        lines = "".join(json.dumps(row) + "\n" for row in self.ROWS)
        if end == "parquet":
            table.to_parquet(path)
        elif end in {"csv", "tsv"}:
            table.to_csv(path, sep="," if end == "csv" else "\t", index=False)
        elif end == "json":
            path.write_text(json.dumps(self.ROWS))
        elif end == "jsonl":
            path.write_text(lines)
        else:
            path.write_bytes(gzip.compress(lines.encode()))
        assert self.read(path) == [str(2 * i) for i in range(10)]

    def test_parts_of_a_file(self, tmp_path):
        path = tmp_path / "all.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.ROWS))
        both = Dataset(train=str(path), heldout=str(path), train_split="train[:80%]", heldout_split="train[80%:]")
        assert (len(both.raw("train")), len(both.raw("heldout"))) == (8, 2)

    def test_saved_to_disk(self, tmp_path):
        datasets.DatasetDict(
            train=datasets.Dataset.from_list(self.ROWS), test=datasets.Dataset.from_list(self.ROWS[:2])
        ).save_to_disk(tmp_path / "both")
        assert len(self.read(tmp_path / "both")) == 10
        assert len(Dataset(train="x", heldout=str(tmp_path / "both")).raw("heldout")) == 2, "`test` by default"
        assert self.read(tmp_path / "both", train_split="train[2:4]") == ["4", "6"]
        datasets.Dataset.from_list(self.ROWS).save_to_disk(tmp_path / "one")
        assert len(self.read(tmp_path / "one")) == 10
        assert len(self.read(tmp_path / "one", train_split="train[:30%]")) == 3
        with pytest.raises(PromptError, match="Unknown split 'valid'") as error:
            self.read(tmp_path / "both", train_split="valid")
        assert error.value.field == "prompts.train_split"

    def test_a_folder_of_files(self, tmp_path):
        for split in ("train", "test"):
            datasets.Dataset.from_list(self.ROWS).to_parquet(tmp_path / "folder" / f"{split}-00000-of-00001.parquet")
        assert len(self.read(tmp_path / "folder")) == 10

    def test_the_hub_is_asked_for_what_is_not_here(self, monkeypatch):
        asked = []

        def load_dataset(*arguments, **keys):
            asked.append((arguments, keys))
            return datasets.Dataset.from_list(self.ROWS)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        config = Dataset(train="openai/gsm8k", heldout="openai/gsm8k", subset="main", filter_duplicates=False)
        config.raw("train")
        config.raw("heldout")
        assert asked == [(("openai/gsm8k", "main"), {"split": "train"}), (("openai/gsm8k", "main"), {"split": "test"})]

    def test_what_is_held_out_is_read_once_for_both(self, tmp_path, monkeypatch):
        path, parts, loaded = tmp_path / "all.jsonl", [], datasets.load_dataset
        path.write_text("".join(json.dumps(row) + "\n" for row in self.ROWS))
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *names, **keys: parts.append(keys["split"]) or loaded(*names, **keys)
        )
        both = Dataset(train=str(path), heldout=str(path), heldout_split="train[8:]")
        assert (len(both.raw("train")), len(both.raw("heldout"))) == (8, 2)
        assert parts == ["train[8:]", "train"]

    def test_out_of_reach(self, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(PromptError, match="no_such/dataset_x cannot be read: ConnectionError") as error:
            Dataset(train="no_such/dataset_x", heldout="b", filter_duplicates=False).raw("train")
        assert error.value.field == "prompts.train"
        assert "hf download" in error.value.fix

    def test_no_such_split(self, tmp_path):
        path = tmp_path / "all.jsonl"
        path.write_text(json.dumps(self.ROWS[0]) + "\n")
        with pytest.raises(PromptError, match="Unknown split") as error:
            self.read(path, train_split="test")
        assert error.value.field == "prompts.train_split"

    @pytest.mark.parametrize(("name", "content"), [("a.txt", "hi"), ("a.jsonl", "{"), ("a.parquet", "no"), ("a.jsonl", "")])
    def test_files_that_cannot_be_read(self, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        with pytest.raises(PromptError) as error:
            self.read(tmp_path / name)
        assert error.value.field == "prompts.train"
        assert name in error.value.cause

    def test_without_the_library(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(PromptError, match="not installed") as error:
            self.read(tmp_path / "a.jsonl")
        assert "pip install datasets" in error.value.fix

    def test_paths_do_not_depend_on_the_working_directory(self, tmp_path, monkeypatch):
        (tmp_path / "a.jsonl").write_text("")
        monkeypatch.chdir(tmp_path)
        located = Dataset(train="a.jsonl", heldout="org/name").located()
        assert (located.train, located.heldout) == (str(tmp_path / "a.jsonl"), "org/name")


def test_the_keys_of_other_trainers_lead_here():
    for key, meant in (("dataset_name", "prompts.train"), ("input_key", "prompts.columns.prompt")):
        with pytest.raises(ConfigError) as error:
            configuration.parse({**MINIMAL, "prompts": {"train": "a", "heldout": "b"}, key: "x"})
        assert meant in error.value.fix
