"""Oracles on hand-made fixtures: right numbers where there is an answer, Failures where there is none."""

from __future__ import annotations

import math
import signal
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from onlinerl.controller.asking import answers
from onlinerl.errors import ConfigError, OracleError
from onlinerl.oracles import _verdicts
from onlinerl.oracles.math_verifier import MathVerifier
from onlinerl.oracles.python import PythonFunction
from onlinerl.oracles.reward_model import RewardModel
from onlinerl.oracles.sentiment import Sentiment
from onlinerl.types import Failure, Message, Prompt, Query, Replies, Verdict


def query(*responses: str, text: str = "The film was", answer: str | None = None, messages: tuple[Message, ...] = ()) -> Query:
    prompt = Prompt(id="p", text=text, token_ids=(1,), reference_answer=answer, messages=messages)
    return Query(prompt=prompt, responses=responses)


class TestVerdicts:
    def checked(self, values, count=2, build=_verdicts.from_scores):
        return build(values, count, annotator="a", oracle_version="v")

    @pytest.mark.parametrize(
        ("scores", "kind"),
        [
            ([1.0], "wrong_length"),
            ([1.0, math.nan], "non_finite"),
            ([1.0, math.inf], "non_finite"),
            ([1.0, 10**5000], "non_finite"),
            (np.array([1.0, -np.inf]), "non_finite"),
            ([1.0, None], "parse_fail"),
            ([1.0, "2"], "parse_fail"),
            ("12", "parse_fail"),
            (None, "parse_fail"),
            ({0: 1.0, 1: 2.0}, "parse_fail"),
        ],
    )
    def test_bad_scores_become_failures(self, scores, kind):
        result = self.checked(scores)
        assert isinstance(result, Failure)
        assert result.kind == kind

    def test_numpy_and_booleans_are_numbers(self):
        assert self.checked(np.array([1, 2], dtype=np.int32)).scores == (1.0, 2.0)
        assert self.checked([np.float32(0.5), True]).scores == (0.5, 1.0)

    @pytest.mark.parametrize(
        ("matrix", "kind"),
        [
            ([[0.5, 0.7]], "wrong_length"),
            ([[0.5, 0.7], [0.3]], "wrong_length"),
            ([[0.5, 1.7], [0.3, 0.5]], "parse_fail"),
            ([[0.5, math.nan], [0.3, 0.5]], "non_finite"),
            ([[0.5, None], [None, 0.5]], "error"),
            ([0.5, 0.5], "parse_fail"),
        ],
    )
    def test_bad_matrices_become_failures(self, matrix, kind):
        result = self.checked(matrix, build=_verdicts.from_matrix)
        assert isinstance(result, Failure)
        assert result.kind == kind

    def test_both_orders_are_kept_as_returned(self):
        verdict = self.checked([[math.nan, 0.9], [0.3, None]], build=_verdicts.from_matrix)
        assert (verdict.preferences[0][1], verdict.preferences[1][0]) == (0.9, 0.3)
        assert verdict.matrix()[0, 1] == pytest.approx(0.8)  # (0.9 + 1 - 0.3) / 2

    def test_members_are_averaged_and_what_they_disagree_by_is_kept(self):
        members = [[[None, 0.9], [0.3, None]], [[None, 0.5], [0.5, None]]]
        verdict = self.checked(members, build=_verdicts.from_members)
        assert verdict.preferences[0][1] == pytest.approx(0.7)
        # P(0 beats 1) is 0.8 and 0.5: H(0.65) - (H(0.8) + H(0.5)) / 2
        assert (
            verdict.uncertainty[0][1]
            == verdict.uncertainty[1][0]
            == pytest.approx(0.647447 - (0.500402 + 0.693147) / 2, abs=1e-6)
        )
        alike = self.checked([members[0]] * 3, build=_verdicts.from_members)
        assert np.abs(alike.uncertainty).max() < 1e-12

    @pytest.mark.parametrize(
        ("members", "kind"),
        [
            ([[[0.5, 0.7], [0.3, 0.5]]], "wrong_length"),  # one
            ([[[0.5, 0.7], [None, 0.5]], [[0.5, 0.7], [0.3, 0.5]]], "error"),  # in other orders
            ([[[0.5, 0.7], [0.3, 0.5]], [[0.5, 1.7], [0.3, 0.5]]], "parse_fail"),
            ("many", "parse_fail"),
        ],
    )
    def test_bad_members_become_failures(self, members, kind):
        result = self.checked(members, build=_verdicts.from_members)
        assert isinstance(result, Failure)
        assert result.kind == kind

    def test_one_order_alone_is_enough(self):
        verdict = self.checked([[None, 0.9], [None, None]], build=_verdicts.from_matrix)
        assert verdict.matrix()[1, 0] == pytest.approx(0.1)


class TestSentiment:
    def test_orders_texts_as_people_would(self):
        (verdict,) = Sentiment().judge([query(" wonderful and moving", " dull", " terrible, a horrible mess")])
        assert verdict.scores[0] > verdict.scores[1] > verdict.scores[2]
        assert verdict.cost.calls == 3

    def test_reads_across_the_seam_unless_told_otherwise(self):
        together, alone = query(" good", text="The film was not"), query(" good", text="The film was not")
        assert Sentiment().judge([together])[0].scores[0] < 0 < Sentiment(include_prompt=False).judge([alone])[0].scores[0]
        assert Sentiment().version != Sentiment(include_prompt=False).version

    def test_conversations_are_judged_without_template_markers(self):
        messages = (Message(role="user", content="Was it good?"),)
        chat = query("No.", text="<template>love love love</template>", messages=messages)
        plain = query("No.", text="Was it good?\n")
        assert Sentiment().judge([chat])[0].scores == Sentiment().judge([plain])[0].scores


class Stopped(MathVerifier):
    """Its processes stand still as soon as they could answer."""

    started: int = 0

    def open(self):
        before = self._worker
        super().open()
        if self._worker is not before:
            self.__dict__["started"] += 1
            self._worker.send_signal(signal.SIGSTOP)


class TestMathVerifier:
    @pytest.fixture(scope="class")
    def oracle(self):
        oracle = MathVerifier(timeout_s=20)
        oracle.open()
        yield oracle
        oracle.close()

    @pytest.mark.parametrize(
        ("answer", "response", "score"),
        [
            ("72", "She sold 48 + 24 = 72 clips.", 1),
            ("72", "She sold 71 clips.", 0),
            ("72", "I do not know.", 0),
            ("72", "", 0),
            ("48 / 2 = 24 in May.\n#### 72", "Together that is \\boxed{72}", 1),
            ("#### 1,234", "The total is 1234", 1),
            ("72", "First 24, then 48.\n#### 72\nThat took 3 steps.", 1),
            ("72", "### Step 2\nthe result is $72$.", 1),
            ("\\frac{1}{2}", "So the answer is \\boxed{0.5}.", 1),
            ("$\\frac{3}{4}$", "The probability is $\\frac{6}{8}$", 1),
            ("\\boxed{x^2+2x+1}", "We get $\\boxed{(x+1)^2}$", 1),
            ("-5", "Therefore \\boxed{5}", 0),
        ],
    )
    def test_fixtures(self, oracle, answer, response, score):
        (verdict,) = oracle.judge([query(response, answer=answer)])
        assert isinstance(verdict, Verdict), verdict
        assert verdict.scores == (score,)

    def test_needs_reference_answers(self, oracle):
        assert oracle.needs_reference_answer
        with pytest.raises(OracleError, match=r"'p' has no reference answer"):
            oracle.judge([query("72")])

    def test_an_unreadable_reference_is_a_failure(self, oracle):
        (failure,) = oracle.judge([query("72", answer="?!")])
        assert failure.kind == "parse_fail"

    def test_a_call_that_nobody_waits_for_spoils_no_other(self):
        """One that missed its deadline is still at work when the next one comes, and there is one process for both."""
        oracle = MathVerifier(timeout_s=2)
        late: list[Verdict | Failure] = []
        left_alone = threading.Thread(
            target=lambda: late.extend(oracle.judge([query(r"$9^{9^{9^{9}}}$", "The answer is 72.", answer="72")]))
        )
        try:
            oracle.open()
            left_alone.start()
            time.sleep(0.5)  # it has put its first question
            (verdict,) = oracle.judge([query("The answer is 72.", "The answer is 71.", "72", "71", answer="72")])
            assert verdict.scores == (1.0, 0.0, 1.0, 0.0)
            left_alone.join(60)
            assert [(r.kind, r.message) for r in late] == [("timeout", "prompt 'p': nobody waits for this answer any more")]
        finally:
            oracle.close()

    def test_what_cannot_be_compared_is_not_judged(self):
        slow = ("It is $9^{9^{9^{9}}}$", "4", "5")
        oracle = MathVerifier(timeout_s=3)
        try:
            (verdict,) = oracle.judge([query(*slow, answer="4")])
            np.testing.assert_array_equal(verdict.scores, (math.nan, 1.0, 0.0))
            (kind,) = verdict.replies.failed  # out of time, or out of memory before that
            assert kind in ("timeout", "error")
            assert (verdict.unjudged, verdict.replies.asked, verdict.replies.lost) == ((0,), 3, 1)
            assert verdict.raw.startswith(f"response 0: {kind}: ")
            (failure,) = oracle.judge([query(*slow[:2], answer="4")])
            assert isinstance(failure, Failure), "one response that is left is better than nothing"
            assert (failure.kind, failure.replies.lost, failure.cost.calls) == (kind, 1, 2)
        finally:
            oracle.close()

    def test_what_a_dying_process_was_asked_is_not_judged_and_never_0(self):
        """The response is right; the process is killed while it compares, as by a machine without memory."""
        oracle = MathVerifier(timeout_s=60, uncomparable_score=0.0)
        oracle.open()
        first = oracle._worker
        first.send_signal(signal.SIGSTOP)
        threading.Timer(1.0, first.kill).start()
        try:
            (verdict,) = oracle.judge([query("It is 4.", "4", "5", answer="4")])
        finally:
            oracle.close()
        np.testing.assert_array_equal(verdict.scores, (math.nan, 1.0, 0.0))
        assert verdict.replies == Replies(asked=3, failed={"error": 1})
        assert "response 0: error: the process that compares answers died" in verdict.raw

    def test_what_is_late_once_is_judged_in_a_fresh_process(self):
        oracle = MathVerifier(timeout_s=10)
        oracle.open()
        oracle._worker.send_signal(signal.SIGSTOP)  # and it takes no request that is longer than the pipe
        try:
            (verdict,) = oracle.judge([query("so it is not " * 2**17 + "4", "5", answer="4")])
        finally:
            oracle.close()
        assert (verdict.scores, verdict.replies, verdict.raw) == ((1.0, 0.0), Replies(asked=2), None)

    def test_who_is_sure_of_the_machine_may_score_what_is_late(self):
        oracle = Stopped(timeout_s=0.5, uncomparable_score=0.0)
        try:
            (verdict,) = oracle.judge([query("4", answer="4")])
        finally:
            oracle.close()
        assert (verdict.scores, verdict.replies.lost) == ((0.0,), 0)
        oracle = Stopped(timeout_s=0.5)
        try:
            (failure,) = oracle.judge([query("4", answer="4")])
        finally:
            oracle.close()
        assert failure.kind == "timeout"
        assert failure.message == "1 of 1 responses could not be judged; first timeout: not compared within 0.5 s, twice"
        assert oracle.started == 2, "the second try is in a process of its own"

    def test_a_dead_process_is_replaced_and_long_answers_arrive_whole(self):
        oracle = MathVerifier(timeout_s=30)
        oracle.open()
        oracle._worker.kill()
        oracle._worker.wait()
        assert oracle.judge([query("4", answer="4")])[0].scores == (1.0,)
        (failure,) = oracle.judge([query("4", answer="?!" * 2**17)])
        assert failure.kind == "parse_fail", "an answer that is longer than the pipe, too, arrives whole"
        oracle.close()


class TestPythonFunction:
    @pytest.fixture
    def oracle(self, tmp_path, monkeypatch):
        """Builds an oracle from the body of its function."""
        (tmp_path / "judges").mkdir()
        (tmp_path / "judges" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)

        def build(body: str) -> PythonFunction:
            for name in [name for name in sys.modules if name.split(".")[0] == "judges"]:
                del sys.modules[name]
            source = "import math\ndef judge(queries):\n" + textwrap.indent(textwrap.dedent(body), "    ")
            (tmp_path / "judges" / "mine.py").write_text(source)
            sys.path_importer_cache.clear()
            return PythonFunction(function="judges.mine.judge")

        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        yield build
        sys.dont_write_bytecode = before
        for name in [name for name in sys.modules if name.split(".")[0] == "judges"]:
            del sys.modules[name]

    def test_scores(self, oracle):
        (verdict,) = oracle("return [[len(r) for r in q['responses']] for q in queries]").judge([query("a", "bbb")])
        assert verdict.scores == (1.0, 3.0)
        assert verdict.annotator == "judges.mine.judge"

    def test_members(self, oracle):
        (verdict,) = oracle("return [{'scores': [2, 1], 'members': [[[.5, .9], [.1, .5]], [[.5, .5], [.5, .5]]]}]").judge(
            [query("a", "b")]
        )
        assert (verdict.scores, verdict.preferences[0][1]) == ((2.0, 1.0), pytest.approx(0.7))
        assert verdict.uncertainty[0][1] == pytest.approx(0.101749, abs=1e-6)
        (alone,) = oracle("return [[[[.5, .9], [.1, .5]], [[.5, .5], [.5, .5]]]]").judge([query("a", "b")])
        assert (alone.scores, alone.uncertainty) == (None, verdict.uncertainty)

    def test_preferences(self, oracle):
        (verdict,) = oracle("return [[[None, 0.8], [0.4, None]] for q in queries]").judge([query("a", "b")])
        assert verdict.matrix()[0, 1] == pytest.approx(0.7)

    def test_several_scores_by_name(self, oracle):
        body = "return [{'score': [1, 2.5], 'harm': np.array([0.5, 3])} for q in queries]"
        (verdict,) = oracle("import numpy as np\n" + body).judge([query("a", "b")])
        assert (verdict.scores, verdict.components) == ((1.0, 2.5), {"harm": (0.5, 3.0)})
        (plain,) = oracle("return [{'score': [1, 2]} for q in queries]").judge([query("a", "b")])
        assert (plain.scores, plain.components) == ((1.0, 2.0), None)

    def test_sees_what_is_documented(self, oracle):
        build = oracle("""
            (q,) = queries
            assert sorted(q) == ['messages', 'prompt', 'reference_answer', 'responses'], sorted(q)
            assert q['messages'] == [{'role': 'user', 'content': 'hi'}]
            return [[float(q['reference_answer']), q['prompt'] == 'The film was']]
        """)
        (verdict,) = build.judge([query("a", "b", answer="7", messages=(Message(role="user", content="hi"),))])
        assert verdict.scores == (7.0, 1.0)

    @pytest.mark.parametrize(
        ("body", "kind"),
        [
            ("return [None for q in queries]", "refused"),
            ("return [[math.nan, 1.0] for q in queries]", "non_finite"),
            ("return [[1.0] for q in queries]", "wrong_length"),
            ("return [['good', 'bad'] for q in queries]", "parse_fail"),
            ("return ['ab' for q in queries]", "parse_fail"),
            ("return [1.0 for q in queries]", "parse_fail"),
            ("return []", "wrong_length"),
            ("return None", "parse_fail"),
            ("return [[] for q in queries]", "wrong_length"),
            ("return [{'harm': [1.0, 2.0]} for q in queries]", "parse_fail"),
            ("return [{'score': [1.0, 2.0], 'harm': [1.0]} for q in queries]", "wrong_length"),
            ("return [{'score': [1.0, 2.0], 'harm': [1.0, math.inf]} for q in queries]", "non_finite"),
        ],
    )
    def test_what_is_no_judgement_is_a_failure(self, oracle, body, kind):
        results = oracle(body).judge([query("a", "b"), query("c", "d")])
        assert [result.kind for result in results] == [kind, kind]
        assert "judges.mine.judge" in results[0].message

    def test_one_failure_leaves_the_others_alone(self, oracle):
        results = oracle("return [None, [1, 2]]").judge([query("a", "b"), query("c", "d")])
        assert isinstance(results[0], Failure)
        assert results[1].scores == (1.0, 2.0)

    def test_an_exception_becomes_a_failure_that_says_where(self, oracle):
        ((_, failure),) = next(answers(oracle("return [[1 / 0]]"), [query("a")]))
        assert failure.kind == "error"
        assert "PythonFunction raised ZeroDivisionError: division by zero" in failure.message
        assert "mine.py" in failure.message
        assert "line 3" in failure.message

    @pytest.mark.parametrize("path", ["no_such_package.fn", "math.no_such_function", "math.pi"])
    def test_a_wrong_path_is_an_error(self, path):
        with pytest.raises(OracleError) as caught:
            PythonFunction(function=path).open()
        assert caught.value.field == "oracle.function"
        assert caught.value.fix

    def test_a_function_in_a_file(self, tmp_path):
        (tmp_path / "taste.py").write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\nimport beside_it\n@dataclass\nclass Taste:\n"
            "    likes: str\ndef judge(groups):\n    return [[r.count(Taste(beside_it.WORD).likes) for r in g['responses']] for g in groups]\n"
        )
        (tmp_path / "beside_it.py").write_text("WORD = 'a'\n")
        oracle = PythonFunction(function=f"{tmp_path}/taste.py:judge")
        assert oracle.judge([query("a", "aa")])[0].scores == (1.0, 2.0)
        assert oracle.version.startswith("taste.py:judge-")
        assert str(tmp_path) not in oracle.version, "the same file elsewhere is the same oracle"

    def test_files_of_one_name_are_not_mixed_up(self, tmp_path):
        found = []
        for word in ("one", "two"):
            (tmp_path / word).mkdir()
            (tmp_path / word / "json.py").write_text(f"def judge(groups):\n    return [[{len(found)}, 7] for g in groups]\n")
            found += PythonFunction(function=f"{tmp_path}/{word}/json.py:judge").judge([query("a", "b")])
        assert [verdict.scores for verdict in found] == [(0.0, 7.0), (1.0, 7.0)]
        assert sys.modules["json"].__name__ == "json", "and the library's own stays"

    @pytest.mark.parametrize(
        ("body", "cause"),
        [
            (None, "there is no file"),
            ("def judge(groups):\n    return 1 +\n", "SyntaxError"),
            ("import no_such_package_x\n", "ModuleNotFoundError"),
            ("x = 1\nraise ValueError('broken')\n", "line 2: raise ValueError('broken')"),
            ("judge = 3\n", "'judge', which is not a function"),
        ],
    )
    def test_a_file_that_cannot_be_used_says_why(self, tmp_path, body, cause):
        file = tmp_path / f"mine_{abs(hash(body))}.py"
        if body is not None:
            file.write_text(body)
        with pytest.raises(OracleError) as caught:
            PythonFunction(function=f"{file}:judge").open()
        assert caught.value.field == "oracle.function"
        assert cause in caught.value.cause
        assert caught.value.fix
        assert caught.value.cause.count("\n") <= 4

    def test_what_is_built_into_python_has_no_source(self):
        oracle = PythonFunction(function="builtins.sum")
        oracle.open()
        assert oracle.version.startswith("builtins.sum-")

    def test_version_follows_the_source_and_the_revision(self, oracle):
        first = oracle("return 1")
        one = first.version
        second = oracle("return 2")
        assert one != second.version
        assert PythonFunction(function="judges.mine.judge", revision="b").version != second.version


VOCABULARY = ["<unk>", "<s>", "</s>", "user", "assistant", "the", "film", "was", "good", "bad", "dull", "not", "it", "is", ":"]


def save_reward_model(folder, *, padding_side="right", labels=1, template=True, causal=False, double_bos=False):
    """A tiny random reward model whose tokenizer pads with end-of-sequence, saved as a user would."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side=padding_side
    )
    if template:
        start = "{{ bos_token }} {{ bos_token }} " if double_bos else "{{ bos_token }} "
        tokenizer.chat_template = start + "{% for m in messages %}{{ m.role }} : {{ m.content }} {{ eos_token }} {% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_labels=labels,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config) if causal else LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


USER = (Message(role="user", content="the film was good"),)


class TestRewardModel:
    @pytest.mark.parametrize("padding_side", ["left", "right"])
    @pytest.mark.parametrize("messages", [(), USER], ids=["text", "chat"])
    def test_batched_equals_single(self, tmp_path, padding_side, messages):
        path = save_reward_model(tmp_path, padding_side=padding_side)
        responses = (" good", " not good it is dull and bad </s>", "", " it is the film </s> </s>")
        queries = [query(*responses, text="the film was", messages=messages), query(" bad", text="it is", messages=messages)]
        batched = RewardModel(path=path, device="cpu", batch_size=8).judge(queries)
        single = RewardModel(path=path, device="cpu", batch_size=1).judge(queries)
        for one, other in zip(batched, single, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=1e-4)
        assert len(set(batched[0].scores)) == 4

    def test_passes_with_dropout_say_how_uncertain_a_comparison_is(self, tmp_path):
        path = save_reward_model(tmp_path)
        asked = [query(" good", " not good it is dull", "", text="the film was")]
        (plain,) = RewardModel(path=path, device="cpu").judge(asked)
        oracle = RewardModel(path=path, device="cpu", dropout_passes=4, dropout=0.5)
        (verdict,) = oracle.judge(asked)
        assert (verdict.scores, plain.uncertainty, verdict.cost.calls) == (plain.scores, None, 15)
        nats = np.array(verdict.uncertainty)
        assert ((nats > 0) == ~np.eye(3, dtype=bool)).all()
        assert np.allclose(nats, nats.T)
        assert oracle.judge(asked)[0].uncertainty == verdict.uncertainty, "the same at every call"
        assert oracle.judge(asked)[0].scores == plain.scores, "dropout is off again"
        milder = RewardModel(path=path, device="cpu", dropout_passes=4, dropout=1e-6)
        assert np.max(milder.judge(asked)[0].uncertainty) < 1e-9
        assert len({one.version for one in (oracle, milder, RewardModel(path=path))}) == 3

    def test_a_model_without_dropout_cannot_say_it(self, tmp_path):
        with pytest.raises(OracleError, match="attention_dropout is 0") as refused:
            RewardModel(path=save_reward_model(tmp_path), device="cpu", dropout_passes=4).inspect()
        assert refused.value.fix == "set oracle.dropout, e.g. to 0.1"
        for knobs, said in (({"dropout_passes": 1}, "cannot disagree"), ({"dropout": 0.1}, "only dropout_passes reads it")):
            with pytest.raises(ValueError, match=said):
                RewardModel(path="x", **knobs)

    def test_weights_that_are_averaged_answer_as_one_model(self, tmp_path):
        import torch
        from transformers import AutoModelForSequenceClassification

        paths = [save_reward_model(tmp_path / name) for name in ("one", "two", "three")]
        models = [AutoModelForSequenceClassification.from_pretrained(path) for path in paths]
        for i, model in enumerate(models):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05 * i * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            model.save_pretrained(paths[i])
        mean = save_reward_model(tmp_path / "mean")
        with torch.no_grad():
            for together in zip(*(model.parameters() for model in models), strict=True):
                together[0].copy_(torch.stack(together).double().mean(0))
        models[0].save_pretrained(mean)
        asked = [query(" good", " not good it is dull", "", text="the film was")]
        oracle = RewardModel(path=paths[0], average_with=paths[1:], device="cpu")
        (verdict,) = oracle.judge(asked)
        assert verdict.scores == pytest.approx(RewardModel(path=mean, device="cpu").judge(asked)[0].scores, abs=1e-4)
        assert verdict.cost.calls == 3, "the price of one"
        singles = [RewardModel(path=path, device="cpu").judge(asked)[0].scores for path in paths]
        assert all(verdict.scores != pytest.approx(scores, abs=1e-3) for scores in singles)
        same = RewardModel(path=paths[0], average_with=paths[:1], device="cpu").judge(asked)[0]
        assert same.scores == pytest.approx(singles[0], abs=1e-6)
        pair = RewardModel(path=paths[0], average_with=paths[1:2])
        assert len({one.version for one in (oracle, pair, RewardModel(path=paths[0]))}) == 3
        assert (oracle.trainable, RewardModel(path=paths[0], average_with=["some/where"]).absent()) == (None, "some/where")

    def test_weights_that_do_not_go_together_are_not_averaged(self, tmp_path):
        one, other = save_reward_model(tmp_path / "one"), save_reward_model(tmp_path / "other", template=False)
        with pytest.raises(OracleError, match="another tokenizer or chat template") as refused:
            RewardModel(path=one, average_with=[one, other], device="cpu").inspect()
        assert refused.value.field == "oracle.average_with[1]"
        with pytest.raises(OracleError, match="has 2 labels") as refused:
            RewardModel(path=one, average_with=[save_reward_model(tmp_path / "two", labels=2)], device="cpu").inspect()
        assert refused.value.field == "oracle.average_with[0]"
        from transformers import AutoConfig, AutoModelForSequenceClassification

        deeper = save_reward_model(tmp_path / "deeper")
        config = AutoConfig.from_pretrained(deeper, num_hidden_layers=3)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(deeper)
        with pytest.raises(OracleError, match="names or shapes differ"):
            RewardModel(path=one, average_with=[deeper], device="cpu").open()

    def test_score_is_the_head_at_the_true_last_token(self, tmp_path):
        """Against the model's own layers, end-of-sequence included although it is also the pad token."""
        import torch
        from transformers import AutoModelForSequenceClassification

        path = save_reward_model(tmp_path)
        oracle = RewardModel(path=path, device="cpu")
        (verdict, _) = oracle.judge([query(" good </s>", text="the film was"), query(" it is the film was bad", text="the")])
        ids = [VOCABULARY.index(word) for word in ["<s>", "the", "film", "was", "good", "</s>"]]
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        with torch.inference_mode():
            expected = model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
        assert verdict.scores[0] == pytest.approx(expected, abs=1e-4)
        assert verdict.cost.tokens == len(ids)

    def test_reads_conversations_through_its_own_template(self, tmp_path):
        """The policy's rendering of the prompt is not looked at."""
        path = save_reward_model(tmp_path)
        oracle = RewardModel(path=path, device="cpu")
        (one, other) = oracle.judge([query("it", text="X", messages=USER), query("it", text="Y", messages=USER)])
        assert one.scores == other.scores
        words = ["<s>", "user", ":", "the", "film", "was", "good", "</s>", "assistant", ":", "it", "</s>"]
        assert oracle._rows(query("it", messages=USER)) == [[VOCABULARY.index(word) for word in words]]

    def test_too_long_is_dropped_or_stops(self, tmp_path):
        path = save_reward_model(tmp_path)
        long, short = query(" good" * 70, " bad", text="the film"), query(" bad", text="the film")
        for limit in (8, 4096):  # the model itself knows 64 positions
            results = RewardModel(path=path, device="cpu", max_length=limit).judge([long, short])
            assert isinstance(results[0], Failure)
            assert "73 tokens" in results[0].message
            assert isinstance(results[1], Verdict)
        with pytest.raises(OracleError, match="73 tokens"):
            RewardModel(path=path, device="cpu", max_length=8, on_truncate="error").judge([long])

    def test_conversation_without_template_is_an_error(self, tmp_path):
        oracle = RewardModel(path=save_reward_model(tmp_path, template=False), device="cpu")
        with pytest.raises(OracleError, match="no chat template"):
            oracle.judge([query("it", messages=USER)])

    def test_double_bos_is_an_error(self, tmp_path):
        oracle = RewardModel(path=save_reward_model(tmp_path, double_bos=True), device="cpu")
        with pytest.raises(OracleError, match="two <s> tokens"):  # it shifts scores silently
            oracle.judge([query("it", messages=USER)])

    def test_what_is_no_reward_model_is_refused(self, tmp_path):
        with pytest.raises(OracleError, match="3 labels"):
            RewardModel(path=save_reward_model(tmp_path / "three", labels=3), device="cpu").open()
        with pytest.raises(OracleError, match=r"lacks trained weights for score\.weight"):
            RewardModel(path=save_reward_model(tmp_path / "lm", causal=True), device="cpu").open()
        (tmp_path / "empty").mkdir()
        with pytest.raises(OracleError, match="cannot load"):
            RewardModel(path=str(tmp_path / "empty"), device="cpu").open()

    def test_a_missing_path_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(OracleError, match="neither a directory nor a model") as caught:
            RewardModel(path=str(tmp_path / "nowhere"), device="cpu").open()
        assert caught.value.field == "oracle.path"

    def test_version_follows_the_weights_not_the_place(self, tmp_path):
        import shutil

        path = save_reward_model(tmp_path / "model")
        first = RewardModel(path=path).version
        shutil.copytree(path, tmp_path / "copy" / "model")
        assert RewardModel(path=str(tmp_path / "copy" / "model")).version == first
        weights = tmp_path / "copy" / "model" / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        assert RewardModel(path=str(tmp_path / "copy" / "model")).version != first
        assert RewardModel(path=path, dtype="bfloat16").version != first

    def test_close_lets_go_of_the_model(self, tmp_path):
        oracle = RewardModel(path=save_reward_model(tmp_path), device="cpu")
        before = oracle.judge([query(" good")])[0].scores
        oracle.close()
        assert oracle._model is None
        assert oracle.judge([query(" good")])[0].scores == before


def test_unknown_knobs_are_named():
    from onlinerl.config import component
    from onlinerl.protocols.oracle import Oracle

    with pytest.raises(ConfigError, match="include_promt"):
        component({"name": "sentiment", "include_promt": False}, "oracle", "oracles", Oracle)
