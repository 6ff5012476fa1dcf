"""A judge on a port of this machine: an OpenAI-compatible chat server that reads what it is shown, judges it in a way that a test can
foresee, and goes wrong as it is told to."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from completions import HALF, HANG_UP, Answer, listening

PATH = "/v1/chat/completions"
PIECES = re.compile(r"\w+|\W")
GARBAGE, HALF_A_REPLY, CLOSED = (200, "<html>busy</html>", {}), (HALF, '{"choices": [', {}), (HANG_UP, "", {})


def quality(response: str) -> float:
    """What the judge likes: the letters g, and not the letters b."""
    return response.count("g") - response.count("b")


class JudgeServer:
    """Judges by `quality`, with a bias for whatever it is shown first.

    Args:
        schema: whether it keeps to a JSON schema; otherwise it refuses one, as other servers do.
        logprobs: whether it gives log-probs.
        bias: log-odds that the first place adds.
    """

    def __init__(self, *, schema: bool = True, logprobs: bool = True, bias: float = 0.0) -> None:
        self.url = ""
        self.schema, self.logprobs, self.bias = schema, logprobs, bias
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.instead: Callable[[int, dict[str, Any]], Answer | None] = lambda n, body: None
        """Told how many questions came before and this one: another answer, or None for the usual one."""
        self.label: Callable[[str, str], str] | None = None
        """The verdict on the first and the second response, instead of by quality."""
        self.words = "one word after the other"
        self._lock = threading.Lock()

    def answer(self, path: str, body: Any, headers: dict[str, str]) -> Answer:
        with self._lock:
            n = len(self.asked)
            self.asked.append(body)
            self.headers.append(headers)
        if path != PATH:
            return 404, {"error": {"message": f"no {path}"}}, {}
        refused = self._refused(body)
        return refused or self.instead(n, body) or (200, self.usual(body), {})

    def _refused(self, body: dict[str, Any]) -> Answer | None:
        for key, able in (("response_format", self.schema), ("logprobs", self.logprobs)):
            if key in body and not able:
                return 400, {"error": {"message": f"{key} is not supported"}}, {}
        return None

    def usual(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion."""
        text = body["messages"][0]["content"]
        said, alternatives = (
            self._list(text) if "<response_1>" in text else self._pair(text) if "<response_a>" in text else self._one(text)
        )
        return completion(self._written(body, text, said), alternatives if body.get("logprobs") else None, text)

    def _pair(self, text: str) -> tuple[str, dict[str, float]]:
        first, second = shown(text, "response_a"), shown(text, "response_b")
        odds = quality(first) - quality(second) + self.bias
        label = self.label(first, second) if self.label else "A" if odds > 0 else "B" if odds < 0 else "tie"
        if label == "tie" and '"tie"' not in text:
            label = "A"
        sure = -math.log1p(math.exp(-odds))
        return label, {"A": sure, "B": sure - odds}

    def _one(self, text: str) -> tuple[str, dict[str, float]]:
        score = min(5, max(1, 3 + round(quality(shown(text, "response")))))
        return str(score), {str(score): math.log(0.75), "1": math.log(0.25)} if score != 1 else {"1": 0.0}

    def _list(self, text: str) -> tuple[str, dict[str, float]]:
        found = re.findall(r"<response_(\d+)>\n(.*?)\n</response_\1>", text, re.DOTALL)
        return " ".join(str(min(5, max(1, 3 + round(quality(each))))) for _, each in found), {}

    def _written(self, body: dict[str, Any], text: str, said: str) -> str:
        wanted = body.get("response_format")
        if wanted is not None:
            schema = wanted["json_schema"]["schema"]["properties"]
            value: Any = [int(n) for n in said.split()] if "scores" in schema else int(said) if "score" in schema else said
            return json.dumps({name: value if name != "rationale" else self.words for name in schema})
        return f"{self.words}\n[RESULT] {said}" if "last line" in text else said


def shown(text: str, tag: str) -> str:
    """What stands between a tag, of which there must be one."""
    found = re.findall(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.DOTALL)
    assert len(found) == 1, f"{len(found)} times <{tag}>: {text}"
    return found[0]


def completion(content: str, alternatives: dict[str, float] | None = None, prompt: str = "") -> dict[str, Any]:
    """As servers answer; the token before the end that is one of the alternatives has the log-probs of all of them."""
    pieces = PIECES.findall(content)
    tokens = [{"token": piece, "logprob": 0.0, "top_logprobs": [{"token": piece, "logprob": 0.0}]} for piece in pieces]
    for token in reversed(tokens if alternatives else []):
        if token["token"] in alternatives:
            token["logprob"] = alternatives[token["token"]]
            token["top_logprobs"] = [{"token": name, "logprob": value} for name, value in alternatives.items()]
            break
    return {
        "choices": [
            {
                "message": {"role": "assistant", "content": content},
                "finish_reason": "stop",
                "logprobs": None if alternatives is None else {"content": tokens},
            }
        ],
        "usage": {"prompt_tokens": len(PIECES.findall(prompt)), "completion_tokens": len(pieces)},
    }


@contextmanager
def judging(**how: Any) -> Iterator[JudgeServer]:
    """A judge, until the end of the block."""
    with listening(JudgeServer(**how)) as server:
        yield server
