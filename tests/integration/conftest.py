"""A tiny Llama that real vLLM and real DeepSpeed take: one attention head size the CPU kernels know, a word-level tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine import Replica, Sender, changed
from transformers import AutoModelForCausalLM, LlamaForCausalLM

WORDS = (
    "the film was a and it of in this that story actor scene ending plot we saw screen first last night "
    "good great wonderful love happy excellent best fine nice superb bad awful terrible hate sad worst poor boring ugly "
    "horrible not very really quite never always music camera script people house harbour train before after because when while "
    "but so then there they she he you my his her one two three old new long short slow fast dark light"
)
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]


def build_tiny_llama(path: Path, *, tied: bool, seed: int = 0, scale: float = 0.08) -> Path:
    """Write a two-layer Llama with random weights and a word-level tokenizer to `path`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [*SPECIALS, *WORDS.split()]
    words += [f"w{i}" for i in range(160 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's attention on CPU has
        max_position_embeddings=256,
        initializer_range=scale,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_reward_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random reward model that reads the words of `tiny_llama`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    path = tmp_path_factory.mktemp("reward")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny model with tied embeddings, fp32."""
    return build_tiny_llama(tmp_path_factory.mktemp("llama-tied"), tied=True)


@pytest.fixture(scope="session")
def tiny_llama_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny model with an output matrix of its own, fp32."""
    return build_tiny_llama(tmp_path_factory.mktemp("llama-untied"), tied=False, seed=1)


# The engine that several files share; it ends with the last of them.


@pytest.fixture(scope="package")
def replica(tiny_llama: Path) -> Iterator[Replica]:
    """A real vLLM engine on CPU."""
    replica = Replica(tiny_llama)
    yield replica
    replica.close()


@pytest.fixture(scope="package")
def sender(replica: Replica) -> Sender:
    """What sends it weights."""
    return Sender(replica)


@pytest.fixture(scope="package")
def base(tiny_llama: Path) -> LlamaForCausalLM:
    """The model that it has started with, in transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="package")
def other(tiny_llama: Path) -> LlamaForCausalLM:
    """Same shapes, other weights."""
    return changed(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval())
