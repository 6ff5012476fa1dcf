"""Peak memory of every learner rank through a whole iteration's work, beside what `onlinerl check` promises.

python benchmarks/zero3_memory.py --cases 3x1,3x2,2x2,0x1 --out memory.json

A case is ZERO_STAGE x RANKS. Each rank is a process of its own on the CPU over gloo, and does what a run asks of it: load a random
model, give log-probs with it and with a frozen reference, take one optimizer step, export, save a checkpoint, load it again.

What is measured, of the rank that needs most: the highest `RssAnon + RssShmem` of each phase (memory that the kernel cannot take back
without swap, which is what runs a machine out of memory; sampled every 5 ms), and on top of it the pages of mapped files that the
process still uses when the phase is over: a frozen reference in the dtype of its file is used where it lies, without a copy. Pages that
are mapped only while they are read are copies of what is on disk, and the kernel drops them when memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

Sample = tuple[float, int, int]
"""When, bytes of the process's own, bytes of mapped files."""
GIB = 2**30
PHASES = ("start", "load", "logprobs", "reference", "step", "export", "save", "reload")
# Layer counts and widths of Llamas of about so many million parameters.
SIZES = {
    60: {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 15, "num_attention_heads": 8},
    512: {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 25, "num_attention_heads": 20},
}
VOCABULARY = {60: 16_000, 512: 32_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="3x1,3x2,2x1,2x2,0x1")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--millions", type=int, default=512, choices=sorted(SIZES), help="parameters of the model")
    parser.add_argument("--critic", action="store_true", help="with a separate critic (ppo instead of dpo)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--rank", nargs=4, metavar=("JOB", "RANK", "PORT", "LOG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        job, rank, port, log = options.rank
        run_rank(json.loads(Path(job).read_text()), int(rank), int(port), Path(log))
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="learner-memory-") as folder:
        model = Path(folder) / "model"
        parameters = make_model(model, options.millions)
        for case in options.cases.split(","):
            stage, ranks = map(int, case.split("x"))
            job = {
                "model": str(model),
                "stage": stage,
                "ranks": ranks,
                "dtype": options.dtype,
                "critic": options.critic,
                "vocabulary": VOCABULARY[options.millions],
            }
            results.append({**job, "parameters": parameters, **measure(job, Path(folder))})
            results[-1]["estimate"] = estimate(job, parameters)
            print(line(results[-1]), flush=True)
    print()
    print("\n".join(table(results)))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")


def make_model(path: Path, millions: int) -> int:
    """Write a random model with an output matrix of its own, in bfloat16; returns the number of its parameters."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>").save_pretrained(
        path
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY[millions],
            num_key_value_heads=4,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=1,
            **SIZES[millions],
        )
    )
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)
    return sum(p.numel() for p in model.parameters())


# --- the parent ---


def measure(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run all ranks of a case; peaks in bytes by phase, of the rank that needs most."""
    import torch.distributed as dist

    from onlinerl.learners.deepspeed import DeepSpeed

    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "job").write_text(json.dumps({**job, "work": str(work)}))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=300), wait_for_workers=False)
    config = DeepSpeed(ranks=job["ranks"], zero_stage=job["stage"], dtype=job["dtype"])
    threads = max(1, len(os.sched_getaffinity(0)) // job["ranks"])
    env = {**os.environ, **config.environment("cpu", threads), "DEEPSPEED_LOG_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("ONLINERL_DIE_WITH_PARENT")
    logs = [work / f"phases{r}" for r in range(job["ranks"])]
    outputs = [(work / f"output{r}").open("w+") for r in range(job["ranks"])]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(work / "job"), str(r), str(store.port), str(logs[r])],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for r, output in enumerate(outputs)
    ]
    samples: list[list[Sample]] = [[] for _ in processes]
    done = threading.Event()
    sampler = threading.Thread(target=sample, args=([p.pid for p in processes], samples, done))
    sampler.start()
    began = time.monotonic()
    try:
        for process, output in zip(processes, outputs, strict=True):
            if process.wait(timeout=1200) != 0:
                output.seek(0)
                sys.exit(f"a rank failed:\n{output.read()[-4000:]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
        done.set()
        sampler.join()
    ranks = [by_phase(s, json.loads(log.read_text())) for s, log in zip(samples, logs, strict=True)]
    return {
        "phases": {p: max(rank[p] for rank in ranks) for p in PHASES},
        "peak": max(max(rank.values()) for rank in ranks),
        "export": sorted(f.name for f in (work / "export").iterdir()),
        "seconds": round(time.monotonic() - began, 1),
    }


def sample(pids: list[int], samples: list[list[Sample]], done: threading.Event) -> None:
    while not done.wait(0.005):
        for pid, mine in zip(pids, samples, strict=True):
            mine.append((time.monotonic(), *resident(pid)))


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process that only swap could take back, and bytes of mapped files; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    sizes = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in status.splitlines())
        if name.startswith("Rss")
    }
    return sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0), sizes.get("RssFile", 0)


def by_phase(samples: list[Sample], ends: dict[str, float]) -> dict[str, int]:
    """Highest use of each phase; of mapped files, what is there at its end and was not before the model came."""
    peaks, start, libraries = {}, 0.0, 0
    for phase in PHASES:
        mine = [(own, files) for at, own, files in samples if start < at <= ends[phase]] or [(0, 0)]
        libraries = libraries or mine[-1][1]
        peaks[phase] = max(own for own, _ in mine) + max(0, mine[-1][1] - libraries)
        start = ends[phase]
    return peaks


# --- one rank ---


def run_rank(job: dict[str, Any], rank: int, port: int, log: Path) -> None:
    import numpy as np
    import torch.distributed as dist

    from onlinerl.algorithms.dpo import Dpo
    from onlinerl.algorithms.ppo import Ppo
    from onlinerl.config import TrainingConfig
    from onlinerl.learners.deepspeed import DeepSpeed
    from onlinerl.protocols.learner import RankSettings
    from onlinerl.types import TrainItem, TrainSequence

    ends: dict[str, float] = {}

    def end(phase: str) -> None:
        ends[phase] = time.monotonic()

    rng = np.random.default_rng(rank)

    def sequence() -> TrainSequence:
        ids = tuple(map(int, rng.integers(2, job["vocabulary"], 24)))
        row = np.full(16, -10.0, np.float32)
        return TrainSequence(
            prompt_ids=ids[:8],
            response_ids=ids[8:],
            reference_logprobs=row,
            old_logprobs=row,
            behavior_logprobs=row,
            values=row,
            returns=row,
            advantages=row,
        )

    import deepspeed  # noqa: F401  what any rank needs, whatever its model
    import transformers.models.llama.modeling_llama  # noqa: F401
    from vllm.distributed.weight_transfer.base import WeightSource  # noqa: F401

    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=300))
    end("start")
    settings = RankSettings(
        model=job["model"],
        algorithm=Ppo(critic="separate") if job["critic"] else Dpo(),
        training=TrainingConfig(learning_rate=1e-5),
        world_size=job["ranks"],
        device="cpu",
        temperature=1.0,
        seed=0,
    )
    config = DeepSpeed(ranks=job["ranks"], zero_stage=job["stage"], dtype=job["dtype"])
    learner = config.rank(settings, rank=rank, store=store, address="127.0.0.1")
    end("load")
    micro = [[sequence()], [sequence()]]
    learner.logprobs(micro, "policy", 1.0)
    end("logprobs")
    learner.logprobs(micro, job["model"], 1.0)
    end("reference")
    per_item = 1 if job["critic"] else 2
    items = [[TrainItem(prompt_id=str(i), sequences=tuple(sequence() for _ in range(per_item)))] for i in range(2)]
    learner.step(items, 2 * job["ranks"], 1e-5)
    end("step")
    folder = Path(job["work"])
    for name in ("export", "checkpoint"):
        (folder / name).mkdir(exist_ok=True)
    learner.export(str(folder / "export"), job["model"])
    end("export")
    learner.save(str(folder / "checkpoint"))
    end("save")
    learner.load(str(folder / "checkpoint"))
    end("reload")
    log.write_text(json.dumps(ends))
    learner.shutdown()


# --- what is printed ---


def estimate(job: dict[str, Any], parameters: int) -> float:
    """What `onlinerl check` says of such a run."""
    from onlinerl.learners.deepspeed import DeepSpeed
    from onlinerl.learners.deepspeed.memory import learner_rank

    config = DeepSpeed(ranks=job["ranks"], zero_stage=job["stage"], dtype=job["dtype"])
    return sum(learner_rank(config, parameters, critic=parameters if job["critic"] else 0).values())


def line(result: dict[str, Any]) -> str:
    phases = "  ".join(f"{p} {result['phases'][p] / GIB:.2f}" for p in PHASES)
    return f"ZeRO-{result['stage']} x {result['ranks']} {result['dtype']}: peak {result['peak'] / GIB:.2f} GiB  ({phases}; {result['seconds']} s)"


def table(results: list[dict[str, Any]]) -> list[str]:
    rows = ["| ZeRO | ranks | peak of a rank, GiB | of one rank | `check` says | error |", "|---|---|---|---|---|---|"]
    alone = {r["stage"]: r["peak"] for r in results if r["ranks"] == 1}
    for r in results:
        share = f"{r['peak'] / alone[r['stage']]:.2f}" if r["stage"] in alone else "-"
        error = r["estimate"] / r["peak"] - 1
        rows.append(
            f"| {r['stage']} | {r['ranks']} | {r['peak'] / GIB:.2f} | {share} | {r['estimate'] / GIB:.2f} | {error:+.0%} |"
        )
    return rows


if __name__ == "__main__":
    main()
