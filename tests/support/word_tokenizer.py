"""A tokenizer without a model."""

from __future__ import annotations


class WordTokenizer:
    """One token per word; beginning of sequence is 1, end of sequence 2."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, template: str | None = "<bos> user: {} assistant:", end: bool = False) -> None:
        self.chat_template, self.end, self.calls = template, end, 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        self.calls += 1
        ids = [1 if word == "<bos>" else 10 + len(word) for word in text.split()]
        return {"input_ids": ([1] if add_special_tokens else []) + ids + ([2] if add_special_tokens and self.end else [])}

    def apply_chat_template(self, messages: list[dict], *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        if messages[0]["role"] == "system":
            raise RuntimeError("system role not supported")
        return self.chat_template.format(messages[-1]["content"])
