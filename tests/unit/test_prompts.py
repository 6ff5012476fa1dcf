"""Prompt files: what is accepted, what is refused and with which words."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from word_tokenizer import WordTokenizer

from onlinerl import registry
from onlinerl.errors import PromptError
from onlinerl.prompts._kept import Kept, changes
from onlinerl.prompts._source import ShuffledPrompts, check_answers, check_overlap, load_prompts, render, with_answers
from onlinerl.prompts.jsonl import Jsonl, read_prompts
from onlinerl.protocols.prompts import PromptsConfig
from onlinerl.types import Prompt
from onlinerl.types.directions import Directions
from onlinerl.types.goals import Goals


def write(folder: Path, *rows: object, name: str = "prompts.jsonl") -> str:
    """Rows that are strings are written as they are."""
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


CHAT = {"messages": [{"role": "user", "content": "What is 6 times 7?"}], "reference_answer": "42"}


class TestReading:
    def test_both_forms(self, tmp_path):
        plain, chat = read_prompts(write(tmp_path, {"id": "a", "text": "Once"}, "", CHAT, name="mine.jsonl"))
        assert (plain.id, plain.text, plain.messages, plain.reference_answer, plain.source) == ("a", "Once", (), None, "mine")
        assert (chat.text, chat.messages[0].content, chat.reference_answer) == ("", "What is 6 times 7?", "42")

    def test_numbers_are_answers_and_answer_is_an_alias(self, tmp_path):
        (prompt,) = read_prompts(write(tmp_path, {"id": 3, "text": "x", "answer": 42, "source": "gsm8k"}))
        assert (prompt.id, prompt.reference_answer, prompt.source) == ("3", "42", "gsm8k")

    def test_how_hard_a_prompt_is_stays_with_it_until_it_is_sampled(self, tmp_path):
        path = write(tmp_path, {"text": "one", "difficulty": 2}, name="train.jsonl")
        heldout = write(tmp_path, {"text": "two"}, name="heldout.jsonl")
        train, held, _ = load_prompts(Jsonl(train=path, heldout=heldout), WordTokenizer(), seed=0)
        assert ([p.difficulty for p in train], [p.difficulty for p in held]) == ([2.0], [None])
        assert (
            changes(list(train), read_prompts(write(tmp_path, {"text": "one", "difficulty": 3}, name="train.jsonl")))
            is not None
        )

    def test_ids_come_from_the_content_not_the_line(self, tmp_path):
        first = read_prompts(write(tmp_path, {"text": "one"}, {"text": "two"}))
        second = read_prompts(write(tmp_path, {"text": "two"}, {"text": "three"}, {"text": "one"}))
        assert {p.text: p.id for p in first}.items() <= {p.text: p.id for p in second}.items()

    def test_line_separators_inside_strings_are_text(self, tmp_path):
        (prompt,) = read_prompts(write(tmp_path, '{"text": "one\u2028two"}'))
        assert prompt.text == "one\u2028two"

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ('{"text": "cut off', ["line 2", "not JSON"]),
            ("[1, 2]", ["line 2", "JSON list"]),
            ({"id": "b"}, ["line 2", "neither text nor messages"]),
            ({"text": "x", **CHAT}, ["line 2", "both text and messages"]),
            ({"id": "first", "text": "x"}, ["line 2", "same id as line 1", "'first'"]),
            ({"prompt": "x"}, ["line 2", "unknown key 'prompt'", "did you mean text or messages"]),
            ({"text": "x", "reference_anwser": "1"}, ["unknown key", "did you mean reference_answer"]),
            ({"text": "  "}, ["line 2", "text must be a string that is not empty"]),
            ({"text": 7}, ["text must be a string"]),
            ({"messages": []}, ["messages must be a list"]),
            ({"messages": [{"role": "user"}]}, ["role and content"]),
            ({"messages": [{"role": "user", "content": None}]}, ["must be strings"]),
            ({"messages": [{"role": "assistant", "content": "x"}]}, ["nothing to answer"]),
            ({"text": "x", "answer": "1", "reference_answer": "1"}, ["both reference_answer and answer"]),
            ({"text": "x", "answer": ["1"]}, ["must be a string or a number"]),
            ('{"text": "x", "answer": NaN}', ["must be a string or a number", "nan"]),
            ('{"text": "x", "answer": ' + "9" * 5000 + "}", ["line 2", "cannot be read"]),
            ("[" * 100_000, ["line 2", "cannot be read"]),
            (r'{"text": "x \ud800"}', ["line 2", "half of a surrogate pair"]),
            (r'{"id": "\udc00", "text": "x"}', ["line 2", "half of a surrogate pair"]),
            ({"id": True, "text": "x"}, ["id must be a string or a number, got True"]),
            ({"id": "", "text": "x"}, ["id must be a string or a number, got ''"]),
            ({"text": "x", "difficulty": "hard"}, ["line 2", "difficulty must be a finite number, got 'hard'"]),
            ('{"text": "x", "difficulty": NaN}', ["line 2", "difficulty must be a finite number, got nan"]),
            ('{"text": "x", "difficulty": 1' + "0" * 400 + "}", ["line 2", "difficulty must be a finite number"]),
            ({"text": "x", "difficulty": True}, ["line 2", "difficulty must be a finite number, got True"]),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, row, words):
        path = write(tmp_path, {"id": "first", "text": "fine"}, row)
        with pytest.raises(PromptError) as caught:
            read_prompts(path, "prompts.heldout")
        for word in [*words, path]:
            assert word in str(caught.value)
        assert caught.value.field == "prompts.heldout"
        assert caught.value.fix

    @pytest.mark.parametrize("marker", ["<|im_start|>user", "[INST] hi", "<|start_header_id|>", "<s>hello", "<start_of_turn>"])
    def test_what_is_templated_already_is_refused(self, tmp_path, marker):
        """A prompt has one documented form, and the template is applied once."""
        for row in ({"text": marker}, {"messages": [{"role": "user", "content": marker}]}):
            with pytest.raises(PromptError, match="a template was applied to it already") as caught:
                read_prompts(write(tmp_path, row))
            assert "messages" in caught.value.fix

    def test_the_same_text_twice_without_ids_is_refused(self, tmp_path):
        with pytest.raises(PromptError, match="same id as line 1"):
            read_prompts(write(tmp_path, {"text": "x"}, {"text": "x"}))

    def test_missing_empty_and_foreign_files(self, tmp_path):
        with pytest.raises(PromptError, match="there is no file"):
            read_prompts(str(tmp_path / "no.jsonl"))
        with pytest.raises(PromptError, match="holds no prompts"):
            read_prompts(write(tmp_path, "", ""))
        (tmp_path / "latin.jsonl").write_bytes('{"text": "caf\xe9"}'.encode("latin-1"))
        with pytest.raises(PromptError, match="line 1: is not UTF-8"):
            read_prompts(str(tmp_path / "latin.jsonl"))
        with pytest.raises(PromptError, match="no prompts 'film' ship") as caught:
            read_prompts("package:film")
        assert "film_reviews_train" in caught.value.fix


class TestRendering:
    def raw(self, tmp_path, *rows):
        return read_prompts(write(tmp_path, *rows))

    def test_tokenised_once(self, tmp_path):
        """What is stored is what the tokenizer said, the one time it was asked."""
        tokenizer = WordTokenizer()
        plain, chat = render(self.raw(tmp_path, {"text": "This film"}, CHAT), tokenizer, 64)
        assert tokenizer.calls == 2
        assert (plain.text, plain.token_ids) == ("This film", (1, 14, 14))
        assert chat.text == "<bos> user: What is 6 times 7? assistant:"
        assert chat.token_ids[0] == 1
        assert chat.token_ids[1] != 1
        assert chat.messages[0].role == "user"
        assert chat.reference_answer == "42"

    def test_conversation_needs_a_chat_template(self, tmp_path):
        with pytest.raises(PromptError, match="no chat template"):
            render(self.raw(tmp_path, CHAT), WordTokenizer(template=None), 64)

    def test_a_template_that_refuses_is_quoted(self, tmp_path):
        row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
        with pytest.raises(PromptError, match=r"rejects prompt .* system role not supported"):
            render(self.raw(tmp_path, row), WordTokenizer(), 64)

    def test_double_bos_is_an_error(self, tmp_path):
        """It would shift every log-prob, silently."""
        with pytest.raises(PromptError, match="two beginning-of-sequence tokens"):
            render(self.raw(tmp_path, CHAT), WordTokenizer(template="<bos> <bos> {}"), 64)

    def test_a_prompt_that_is_over_is_an_error(self, tmp_path):
        """After the end of a sequence a model writes anything."""
        with pytest.raises(PromptError, match="nothing to continue"):
            render(self.raw(tmp_path, {"text": "This film"}), WordTokenizer(end=True), 64)

    def test_a_prompt_that_a_tokenizer_makes_nothing_of_is_an_error(self, tmp_path):
        """Some drop characters without a width; an engine would only say so in the middle of a run."""

        class Dropping(WordTokenizer):
            def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
                return {"input_ids": []}

        with pytest.raises(PromptError, match=r"makes nothing of prompt '7': '\\u200b' has no tokens"):
            render(self.raw(tmp_path, {"id": 7, "text": "\u200b"}), Dropping(), 64)

    def test_long_prompts_are_counted(self, tmp_path):
        """None is cut or left out silently."""
        rows = [{"id": str(n), "text": "word " * n} for n in (2, 5, 9)]
        with pytest.raises(PromptError, match=r"2 of 3 prompts are longer than 4 tokens; the longest, '9', has 10") as caught:
            render(self.raw(tmp_path, *rows), WordTokenizer(), 4)
        assert "prompts.max_tokens to 10" in caught.value.fix
        assert len(render(self.raw(tmp_path, *rows), WordTokenizer(), 10)) == 3

    def test_with_a_real_tokenizer(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        words = ["<unk>", "<s>", "</s>", "user", "assistant", ":", "hello", "this", "film"]
        core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        tokenizer.chat_template = (
            "{{ bos_token }} {% for m in messages %}{{ m.role }} : {{ m.content }} {{ eos_token }} {% endfor %}"
            "{% if add_generation_prompt %}assistant :{% endif %}"
        )
        raw = self.raw(tmp_path, {"text": "this film"}, {"messages": [{"role": "user", "content": "hello"}]})
        plain, chat = render(raw, tokenizer, 64)
        assert plain.token_ids == (1, 7, 8)
        assert [words[i] for i in chat.token_ids] == ["<s>", "user", ":", "hello", "</s>", "assistant", ":"]


class TestOverlap:
    def test_the_same_words_in_both_are_refused(self, tmp_path):
        train = read_prompts(write(tmp_path, {"id": "t", "text": "Once upon a time"}, {"text": "y"}, name="t.jsonl"))
        heldout = read_prompts(write(tmp_path, {"id": "h", "text": "once  upon a time"}, {"text": "z"}, name="h.jsonl"))
        with pytest.raises(PromptError, match=r"1 of 2 held-out prompts are also training prompts, e\.g\. 'h', which is 't'"):
            check_overlap(train, heldout)
        check_overlap(train, heldout[1:])

    def test_missing_answers_are_counted(self, tmp_path):
        prompts = read_prompts(write(tmp_path, {"text": "x", "answer": "1"}, {"id": "y", "text": "y"}))
        with pytest.raises(PromptError, match=r"1 of 2 prompts have no reference answer.*oracle needs.*'y' \(.*, line 2\)"):
            check_answers(prompts)
        with pytest.raises(PromptError, match="which the algorithm needs") as error:
            check_answers(prompts, needed_by="algorithm")
        assert "choose another algorithm" in error.value.fix


class TestGoals:
    """Prompts that say which score is wanted."""

    GOALS = Goals(scale=3, text="aim for {goal} of {scale}")

    def rendered(self, folder, tokenizer, goals=GOALS, **files):
        rows = files or {"train": [{"text": "one"}, {**CHAT, "id": "chat"}], "heldout": [{"text": "three"}]}
        paths = {name: write(folder, *own, name=f"{name}.jsonl") for name, own in rows.items()}
        return load_prompts(Jsonl(**paths, max_tokens=12), tokenizer, seed=0, goals=goals)[:2]

    def test_what_is_sampled_and_evaluated_has_the_highest_goal_and_training_prompts_have_all(self, tmp_path):
        source, (held,) = self.rendered(tmp_path, Telling())
        plain, chat = sorted(source, key=lambda p: p.id == "chat")
        for prompt in (plain, chat):
            assert len({*prompt.goal_ids}) == 3
            assert prompt.token_ids == prompt.goal_ids[-1]
        assert (plain.text, held.text, chat.messages[0].content) == ("one", "three", CHAT["messages"][0]["content"]), (
            "for oracles"
        )
        assert plain.token_ids == (1, 13, 13, 3, 12, 3, 13)  # aim for 3 of 3, one
        assert (held.token_ids, held.goal_ids) == ((1, 13, 13, 3, 12, 3, 15), ())
        assert chat.goal_ids[0][:6] == (1, 13, 13, 1, 12, 3)

    def test_before_the_last_user_turn_or_in_the_system_turn_that_there_is(self, tmp_path):
        turns = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
        files = {"train": [{"messages": turns}], "heldout": [{"text": "three"}]}
        told = {}
        for place in ("system", "user"):
            goals = Goals(scale=2, text="goal {goal}", place=place)
            (told[place],) = self.rendered(tmp_path, Telling(), goals, **files)[0]
        assert told["system"].token_ids == (1, 14, 2, 12, 12)
        assert told["user"].token_ids == (1, 12, 14, 2, 12)

    def test_a_template_that_leaves_the_goal_out_is_refused(self, tmp_path):
        class Deaf(Telling):
            def apply_chat_template(self, messages, **how):
                return super().apply_chat_template(messages[-1:], **how)

        with pytest.raises(PromptError, match="the same tokens with different goals") as error:
            self.rendered(tmp_path, Deaf())
        assert error.value.fix.endswith("set algorithm.goal_place=user")
        assert len(self.rendered(tmp_path, Deaf(), Goals(scale=3, text="go {goal}", place="user"))[0]) == 2

    def test_goals_count_as_a_part_of_the_prompt(self, tmp_path):
        long = Goals(scale=3, text="a very long way of saying that {goal} is what is wanted")
        with pytest.raises(PromptError, match="2 of 2 prompts are longer than 12 tokens"):
            self.rendered(tmp_path, Telling(), long)

    def test_those_that_are_too_long_with_a_goal_are_left_out_if_that_is_asked_for(self, tmp_path):
        paths = {
            "train": write(tmp_path, {"text": "one", "id": "plain"}, {**CHAT, "id": "chat"}, name="train.jsonl"),
            "heldout": write(tmp_path, {"text": "three"}, name="heldout.jsonl"),
        }
        config = Jsonl(**paths, max_tokens=8, filter_overlong_prompts=True)
        source, heldout, remarks = load_prompts(config, Telling(), seed=0, goals=self.GOALS)
        assert ([prompt.id for prompt in source], len(heldout)) == (["plain"], 1)
        assert remarks == ["prompts.train: 1 of 2 left out, longer than 8 tokens"]


class Telling(WordTokenizer):
    """Numbers are tokens of their own; the chat template says all turns."""

    def __call__(self, text, add_special_tokens):
        ids = [1 if w == "<bos>" else int(w) if w.isdigit() else 10 + len(w) for w in text.split()]
        return {"input_ids": ([1] if add_special_tokens else []) + ids}

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        return " ".join(["<bos>", *(m["content"] for m in messages)])


class TestDirections:
    """Prompts that say how their responses will be judged."""

    ONE = Directions(bounds={"a": (0.0, 1.0), "b": (-1.0, 1.0)}, text="a {direction}")

    def rendered(self, folder, tokenizer, told=ONE, limit=12, leave_out=False):
        rows = {"train": [{"text": "one", "id": "plain"}, {**CHAT, "id": "chat"}], "heldout": [{"text": "three", "id": "held"}]}
        paths = {name: write(folder, *own, name=f"{name}.jsonl") for name, own in rows.items()}
        config = Jsonl(**paths, max_tokens=limit, filter_overlong_prompts=leave_out)
        source, heldout, _ = load_prompts(config, tokenizer, seed=0, directions=told)
        return {prompt.id: prompt for prompt in (*source, *heldout)}

    def test_tokens_hold_the_direction_and_texts_do_not(self, tmp_path):
        plain, told = self.rendered(tmp_path, Telling(), None), self.rendered(tmp_path, Telling())
        for name, prompt in told.items():
            said = tuple(Telling()(self.ONE.said(name), add_special_tokens=False)["input_ids"])
            bos, *rest = plain[name].token_ids
            assert prompt.token_ids == (bos, *said, *rest)
            assert replace(prompt, token_ids=()) == replace(plain[name], token_ids=())

    def test_a_template_that_leaves_it_out_is_refused(self, tmp_path):
        class Deaf(Telling):
            def apply_chat_template(self, messages, **how):
                return super().apply_chat_template(messages[-1:], **how)

        with pytest.raises(PromptError, match="with its direction and without") as error:
            self.rendered(tmp_path, Deaf())
        assert error.value.fix.endswith("set oracle.direction_place=user")
        assert self.rendered(tmp_path, Deaf(), replace(self.ONE, place="user"))

    def test_it_counts_as_a_part_of_the_prompt(self, tmp_path):
        with pytest.raises(PromptError, match="1 of 2 prompts are longer than 8 tokens"):
            self.rendered(tmp_path, Telling(), limit=8)
        found = self.rendered(tmp_path, Telling(), limit=8, leave_out=True)
        assert set(found) == {"plain", "held"}
        kept = Kept(train=[found["plain"]], heldout=[found["held"]])
        prompts = Jsonl(train=str(tmp_path / "train.jsonl"), heldout=str(tmp_path / "heldout.jsonl"), max_tokens=8)
        config = SimpleNamespace(prompts=prompts, evaluation=SimpleNamespace(prompts=None))
        assert kept.changes(config, Telling(), directions=self.ONE) == [], "what was left out is no addition"
        assert kept.changes(config, Telling(), goals=TestGoals.GOALS) == []
        assert len(kept.changes(config, Telling())) == 1


class TestAnswers:
    """Those that are trained on."""

    @pytest.fixture
    def raw(self, tmp_path):
        return read_prompts(write(tmp_path, {"text": "one", "answer": "of the two"}, {**CHAT, "id": "chat"}))

    def test_they_are_tokens_that_end_with_the_end_of_the_sequence(self, raw):
        plain, chat = with_answers(render(raw, WordTokenizer(), 64), raw, WordTokenizer(), 4)
        assert (plain.answer_ids, chat.answer_ids) == ((12, 13, 13, 2), (12, 2))  # no beginning of sequence
        assert (plain.token_ids, chat.token_ids[0]) == ((1, 13), 1)
        assert [p.answer_ids for p in render(raw, WordTokenizer(), 64)] == [(), ()]

    def test_a_tokenizer_that_ends_them_itself_ends_them_once(self, raw):
        class Ending(WordTokenizer):
            def __call__(self, text, add_special_tokens):
                return {"input_ids": [*super().__call__(text, add_special_tokens)["input_ids"], 2]}

        _, chat = with_answers(render(raw, WordTokenizer(), 64), raw, Ending(), 4)
        assert chat.answer_ids == (12, 2)

    def test_one_that_is_longer_than_a_response_may_be_is_refused_not_cut(self, raw):
        said = r"1 of 2 reference answers are longer than .* 3 tokens; that of '\w+' \(.*, line 1\) has 4, its end included"
        with pytest.raises(PromptError, match=said) as error:
            with_answers(render(raw, WordTokenizer(), 64), raw, WordTokenizer(), 3)
        assert "sampling.max_new_tokens to 4" in error.value.fix

    def test_without_an_end_of_sequence_there_is_none(self, raw):
        class Endless(WordTokenizer):
            eos_token_id = None

        with pytest.raises(PromptError, match="no end-of-sequence token") as error:
            with_answers(render(raw, WordTokenizer(), 64), raw, Endless(), 9)
        assert error.value.field == "model"

    def test_only_training_prompts_have_them(self, tmp_path):
        train = write(tmp_path, {"text": "one", "answer": "1"}, name="train.jsonl")
        heldout = write(tmp_path, {"text": "three"}, name="heldout.jsonl")
        config = Jsonl(train=train, heldout=heldout)
        source, held, _ = load_prompts(config, WordTokenizer(), seed=0, longest_answer=4)
        assert ([p.answer_ids for p in source], [p.answer_ids for p in held]) == ([(11, 2)], [()])
        assert [p.answer_ids for p in load_prompts(config, WordTokenizer(), seed=0)[0]] == [()]
        missing = write(tmp_path, {"text": "one", "answer": "1"}, {"text": "two"}, name="train.jsonl")
        with pytest.raises(PromptError, match="1 of 2 prompts have no reference answer, which the algorithm needs"):
            load_prompts(Jsonl(train=missing, heldout=heldout), WordTokenizer(), seed=0, longest_answer=4)


def prompts(*names: str) -> list[Prompt]:
    return [Prompt(id=name, text=name, token_ids=(1,)) for name in names]


def ids(taken: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in taken]


class TestTaking:
    names = tuple(f"p{i}" for i in range(20))

    def test_the_cursor_decides(self):
        source = ShuffledPrompts(prompts(*self.names), seed=3)
        first, cursor = source.take(8, 0)
        second, end = source.take(8, cursor)
        assert (cursor, end, len(source)) == (8, 16, 20)
        assert not set(ids(first)) & set(ids(second))  # fresh prompts are disjoint
        again = ShuffledPrompts(prompts(*reversed(self.names)), seed=3)  # whatever the order in the file
        assert ids(again.take(8, 8)[0]) == ids(second)
        assert ids(ShuffledPrompts(prompts(*self.names), seed=4).take(8, 0)[0]) != ids(first)

    def test_more_prompts_leave_the_order_of_the_others_alone(self):
        few = ids(ShuffledPrompts(prompts(*self.names), seed=3).take(20, 0)[0])
        more = ids(ShuffledPrompts(prompts(*self.names, "new", "newer"), seed=3).take(22, 0)[0])
        assert [name for name in more if name in few] == few

    def test_running_out_is_an_error_that_counts(self):
        source = ShuffledPrompts(prompts(*self.names), seed=0)
        with pytest.raises(PromptError, match="8 more prompts are wanted, but 4 of 20 are left") as caught:
            source.take(8, 16)
        assert "prompts.reuse" in caught.value.fix
        with pytest.raises(PromptError, match="21 prompts are wanted at once, but there are 20"):
            ShuffledPrompts(prompts(*self.names), seed=0, reuse=True).take(21, 0)

    def test_reuse_starts_over_in_a_new_order(self):
        source = ShuffledPrompts(prompts(*self.names), seed=0, reuse=True)
        first, cursor = source.take(20, 0)
        second, _ = source.take(20, cursor)
        assert set(ids(first)) == set(ids(second))
        assert ids(first) != ids(second)

    def test_no_prompt_twice_in_one_take(self):
        """The same prompt twice in an iteration would draw the same seeds."""
        for seed in range(10):
            source = ShuffledPrompts(prompts(*self.names), seed=seed, reuse=True)
            cursor, seen = 0, set()
            for _ in range(12):
                taken, cursor = source.take(7, cursor)
                assert len(set(ids(taken))) == 7
                seen |= set(ids(taken))
            assert seen == set(self.names)

    def test_found_by_name(self):
        assert registry.load("prompts", "jsonl", PromptsConfig) is Jsonl


class TestFilmReviews:
    """The task of the quickstart."""

    @pytest.fixture(scope="class")
    def generator(self):
        file = Path(__file__).parents[2] / "benchmarks" / "make_film_reviews.py"
        spec = importlib.util.spec_from_file_location("make_film_reviews", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_the_generator_reproduces_the_files(self, generator, tmp_path):
        generator.main(tmp_path)
        for name in (*generator.SIZES, generator.ANSWERED):
            assert (tmp_path / f"{name}.jsonl").read_bytes() == (generator.FOLDER / f"{name}.jsonl").read_bytes()

    def test_the_files_are_fit_for_use(self):
        config = Jsonl(train="package:film_reviews_train", heldout="package:film_reviews_heldout")
        source, heldout, _ = load_prompts(config, WordTokenizer(), seed=0)
        assert len(source) >= 480
        assert len(heldout) >= 120
        everything = source.take(len(source), 0)[0] + heldout
        texts = [prompt.text for prompt in everything]
        assert len(set(texts)) == len(texts)
        assert len({prompt.id for prompt in everything}) == len(texts)
        for text in texts:
            assert 8 <= len(text.split()) <= 14
            assert text == text.strip()
            assert text[-1] not in ".!?,"
        starts = {" ".join(text.split()[:4]) for text in texts}
        assert len(starts) > 150

    def test_the_openings_are_neutral(self):
        from onlinerl.oracles.sentiment import Sentiment
        from onlinerl.types import Query

        raw = read_prompts("package:film_reviews_train") + read_prompts("package:film_reviews_heldout")
        queries = [Query(prompt=Prompt(id=p.id, text=p.text, token_ids=(1,)), responses=("",)) for p in raw]
        assert max(abs(verdict.scores[0]) for verdict in Sentiment().judge(queries)) < 0.05

    def test_there_are_reference_answers_that_like_the_film(self):
        from onlinerl.oracles.sentiment import Sentiment
        from onlinerl.types import Query

        raw = read_prompts("package:film_reviews_answered")
        assert [(p.id, p.text) for p in raw] == [(p.id, p.text) for p in read_prompts("package:film_reviews_train")]
        answers = [(Prompt(id=p.id, text=p.text, token_ids=(1,)), " " + p.reference_answer) for p in raw]
        verdicts = Sentiment().judge([Query(prompt=prompt, responses=(answer,)) for prompt, answer in answers])
        assert min(verdict.scores[0] for verdict in verdicts) > 0.5


def test_load_prompts_checks_everything(tmp_path):
    train = write(tmp_path, {"text": "one"}, {"text": "two"}, name="train.jsonl")
    heldout = write(tmp_path, {"text": "three"}, {"text": "two"}, name="heldout.jsonl")
    with pytest.raises(PromptError, match="also training prompts"):
        load_prompts(Jsonl(train=train, heldout=heldout), WordTokenizer(), seed=0)
    heldout = write(tmp_path, {"text": "three"}, name="heldout.jsonl")
    with pytest.raises(PromptError, match="2 of 2 prompts have no reference answer"):
        load_prompts(Jsonl(train=train, heldout=heldout), WordTokenizer(), seed=0, needs_answers=True)
    source, rendered, _ = load_prompts(Jsonl(train=train, heldout=heldout), WordTokenizer(), seed=0)
    assert (len(source), len(rendered)) == (2, 1)


# --- what a run keeps ---


def kept_and_found(tmp_path, *rows: dict) -> str | None:
    """What is said about a file that holds `rows`, by a run that took its prompts from the first version below."""
    first = [
        {"id": "a", "text": "the film", "reference_answer": "7"},
        {"id": "b", "messages": [{"role": "user", "content": "why"}]},
    ]
    versions = []
    for content in (first, rows):
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        versions.append(read_prompts(str(tmp_path / "mine.jsonl")))
    kept = [
        Prompt(
            id=raw.id,
            text=raw.text or "user : why [end]",
            token_ids=(1,),
            messages=raw.messages,
            reference_answer=raw.reference_answer,
            source=raw.source,
        )
        for raw in versions[0]
    ]
    return changes(kept, versions[1])


def test_what_has_become_of_a_file(tmp_path):
    a, b = (
        {"id": "a", "text": "the film", "reference_answer": "7"},
        {"id": "b", "messages": [{"role": "user", "content": "why"}]},
    )
    assert kept_and_found(tmp_path, a, b) is None
    assert kept_and_found(tmp_path, b, a) is None, "a run orders its prompts by itself"
    assert kept_and_found(tmp_path, a) == "1 removed ('b')"
    assert kept_and_found(tmp_path, {**a, "reference_answer": "8"}, b) == "1 altered ('a')"
    other = {"id": "b", "messages": [{"role": "user", "content": "how"}]}
    assert kept_and_found(tmp_path, a, other, {"id": "c", "text": "more"}) == "1 added ('c'), 1 altered ('b')"
    many = [{"id": str(i), "text": str(i)} for i in range(5)]
    assert kept_and_found(tmp_path, a, b, *many) == "5 added ('0', '1', '2', ...)"
