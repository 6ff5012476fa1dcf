"""Runs on real prompts and on layouts beyond one replica and one rank, on real parts; `make realdata`.

    python benchmarks/realdata.py [--data ../shared/data] [NAME ...]

NAME is a file of configs/realdata (all of them by default). Needs `gsm8k/train.jsonl` (question, answer) and
`hh_rlhf/harmless_base.jsonl.gz` (chosen, rejected) under the data directory. Prompt files and runs go to runs/; the figures of finished
runs replace the table in docs/results.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from onlinerl.stores.summary import samples, summarise

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "realdata"
PREPARED = ROOT / "runs" / "realdata"
RESULTS = ROOT / "docs" / "results.md"
LONGEST_TOKENS = 1000
HELDOUT = 64
LONG_DIALOGUES = 256
TURN = re.compile(r"\n\n(Human|Assistant): ")


def gsm8k(path: Path) -> Iterator[dict[str, Any]]:
    """Questions as conversations of one turn, with the worked answer to verify against."""
    for line in path.read_text().splitlines():
        row = json.loads(line)
        yield {"messages": [{"role": "user", "content": row["question"]}], "reference_answer": row["answer"]}


def hh(path: Path) -> Iterator[dict[str, Any]]:
    """The dialogue up to its last answer, which is the one that was judged."""
    with gzip.open(path, "rt") as file:
        for line in file:
            _, *parts = TURN.split(json.loads(line)["chosen"])
            turns = list(zip(parts[0::2], parts[1::2], strict=True))
            roles = [name for name, _ in turns]
            texts = [text.strip() for _, text in turns]
            alternating = roles == ["Human", "Assistant"] * (len(roles) // 2)
            if alternating and all(texts[:-1]):
                names = {"Human": "user", "Assistant": "assistant"}
                yield {"messages": [{"role": names[n], "content": t} for n, t in zip(roles, texts, strict=True)][:-1]}


def prepare(data: Path) -> None:
    """Write the prompt files, longest prompts included, and the random model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "SmolLM2-135M-Instruct")
    PREPARED.mkdir(parents=True, exist_ok=True)
    sources = {"gsm8k": gsm8k(data / "gsm8k" / "train.jsonl"), "hh": hh(data / "hh_rlhf" / "harmless_base.jsonl.gz")}
    for name, rows in sources.items():
        fitting = [row for row in distinct(rows) if length(tokenizer, row) <= LONGEST_TOKENS]
        if name == "hh":  # most dialogues are short, and long prompts are what this is about
            fitting = sorted(fitting, key=lambda row: length(tokenizer, row))[-LONG_DIALOGUES - HELDOUT :]
        write(PREPARED / f"{name}_heldout.jsonl", fitting[:HELDOUT])
        write(PREPARED / f"{name}_train.jsonl", fitting[HELDOUT:])
        print(f"{name}: {len(fitting)} prompts of up to {max(length(tokenizer, row) for row in fitting)} tokens")
    random_llama(PREPARED / "random-llama", tokenizer)


def distinct(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each conversation once: the same one may have been judged several times."""
    return list({" ".join(m["content"] for m in row["messages"]).lower(): row for row in rows}.values())


def length(tokenizer: Any, row: dict[str, Any]) -> int:
    """Tokens of the prompt after the chat template."""
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One prompt per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def random_llama(path: Path, tokenizer: Any) -> None:
    """About 30M random parameters with 8 attention heads, which two workers can share."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


def run(name: str) -> dict[str, Any]:
    """One configuration from start to end."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    started = time.monotonic()
    done = subprocess.run(
        [Path(sys.executable).with_name("onlinerl"), "run", CONFIGS / f"{name}.yaml", "--fresh"], cwd=ROOT, check=False
    )
    return {"name": config["name"], "exit": done.returncode, "minutes": (time.monotonic() - started) / 60}


def line(result: dict[str, Any]) -> str:
    """One row of the table."""
    where = ROOT / "runs" / result["name"]
    minutes = f"{result['minutes']:.1f}"
    if result["exit"] != 0:
        return f"| {result['name']} | failed with exit code {result['exit']} | {minutes} | | | | |"
    rows = summarise(where)["iterations"]
    prompts = samples(where, 1, 10**6)
    responses = max(len(prompt["responses"]) for prompt in prompts)
    base, last = rows[0], rows[-1]
    proved = all(row["sync"]["proved"] for row in rows)
    return (
        f"| {result['name']} | {len(rows) - 1} x {len(prompts)} x {responses} | {minutes} | {base['reward']:.3f} | {last['reward']:.3f} "
        f"| {last['kl_ref']:.2f} | {'all' if proved else 'not all'} proved |"
    )


def record(results: list[dict[str, Any]]) -> None:
    """Replace the table in docs/results.md."""
    head = [
        f"Measured {datetime.now(UTC):%Y-%m-%d} with `make realdata`.",
        "",
        "| run | iterations x prompts x responses | minutes | reward, base | reward, last | KL to base (nats) | pushes |",
        "|---|---|---|---|---|---|---|",
    ]
    text = RESULTS.read_text()
    block = "\n".join([*head, *map(line, results)])
    pattern = r"(<!-- figures: realdata -->\n).*?(<!-- /figures -->)"
    RESULTS.write_text(re.sub(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL))


def main() -> int:
    """Prepare, run, record. Returns 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        sys.exit(f"there is no directory {arguments.data}: give one with gsm8k/ and hh_rlhf/ in it (--data)")
    if unknown := sorted({*arguments.names} - {*known}):
        parser.error(f"there is no {', '.join(unknown)}: choose from {', '.join(known)}")
    prepare(arguments.data)
    names = arguments.names or known
    results = [run(name) for name in names]
    if not arguments.names:
        record(results)
    for result in results:
        print(line(result))
    return int(any(result["exit"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
