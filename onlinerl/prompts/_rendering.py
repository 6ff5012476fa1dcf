"""Raw prompts -> what the model sees, as text and as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onlinerl.errors import PromptError
from onlinerl.types import Prompt, RawPrompt


def render(
    raw: Sequence[RawPrompt], tokenizer: Any, max_tokens: int, field: str = "prompts.train", *, leave_out_long: bool = False
) -> list[Prompt]:
    """Apply the chat template where there are messages and tokenise, once and for all.

    Args:
        raw: what the source returned.
        tokenizer: the policy's tokenizer, with the interface of Hugging Face tokenizers.
        max_tokens: longest prompt accepted, in tokens.
        field: the configuration key that named the file, for messages.
        leave_out_long: leave longer ones out, unless all are.

    Raises:
        PromptError: if there is no chat template for messages, special tokens are doubled or misplaced, or prompts are too
            long (none is cut, and none left out unless asked for).
    """
    prompts = [tokenized(prompt, tokenizer, field) for prompt in raw]
    long = [prompt for prompt in prompts if len(prompt.token_ids) > max_tokens]
    if leave_out_long and 0 < len(long) < len(prompts):
        return [prompt for prompt in prompts if len(prompt.token_ids) <= max_tokens]
    if long:
        longest = max(long, key=lambda prompt: len(prompt.token_ids))
        raise PromptError(
            f"{len(long)} of {len(prompts)} prompts are longer than {max_tokens} tokens; the longest, {longest.id!r}, has "
            f"{len(longest.token_ids)}",
            field=field,
            fix=f"set prompts.max_tokens to {len(longest.token_ids)} or more, or leave these prompts out: prompts.filter_overlong_prompts=true",
        )
    return prompts


def tokenized(prompt: RawPrompt, tokenizer: Any, field: str) -> Prompt:
    """One prompt, of any length, as the model gets it.

    Raises:
        PromptError: see `render`.
    """
    if prompt.messages:
        text = _apply_template(prompt, tokenizer, field)
        # The template has written all special tokens that belong there.
        token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        text = prompt.text
        token_ids = tuple(tokenizer(text, add_special_tokens=True)["input_ids"])
    if not token_ids:
        raise PromptError(
            f"the tokenizer makes nothing of prompt {prompt.id!r}: {text!r} has no tokens",
            field=field,
            fix="remove it, or give text that the model can read",
        )
    _check_special_tokens(prompt, token_ids, tokenizer, field)
    return Prompt(
        id=prompt.id,
        text=text,
        token_ids=token_ids,
        messages=prompt.messages,
        reference_answer=prompt.reference_answer,
        source=prompt.source,
        difficulty=prompt.difficulty,
    )


def _apply_template(prompt: RawPrompt, tokenizer: Any, field: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"prompt {prompt.id!r} is a conversation, but the model's tokenizer has no chat template",
            field=field,
            fix="use an instruction-tuned model, or give prompts as text for plain continuation",
        )
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    try:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs that raise what they like, e.g. on a role they do not know
        raise PromptError(
            f"the model's chat template rejects prompt {prompt.id!r}: {error}",
            field=field,
            fix="use roles and turns that the model knows (some know no system message), or another model",
        ) from error
    return rendered


def _check_special_tokens(prompt: RawPrompt, token_ids: tuple[int, ...], tokenizer: Any, field: str) -> None:
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    if bos is not None and token_ids[:2] == (bos, bos):
        raise PromptError(
            f"prompt {prompt.id!r} starts with two beginning-of-sequence tokens",
            field=field,
            fix="remove one from the tokenizer's chat template or post-processor",
        )
    if not prompt.messages and eos is not None and len(token_ids) > 1 and token_ids[-1] == eos:
        raise PromptError(
            f"the tokenizer ends prompt {prompt.id!r} with its end-of-sequence token, so there is nothing to continue",
            field=field,
            fix="switch that off in the tokenizer (add_eos_token: false)",
        )
