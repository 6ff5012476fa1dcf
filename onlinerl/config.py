"""YAML plus dotted overrides -> one strict, typed, frozen configuration.

`extends: other.yaml` takes another file as the base (paths relative to the file that says so). An unknown key is an error with a
suggestion; a value of the wrong type is an error that names the key. Sections that select an implementation by `name`
(algorithm, oracle, pairing) keep their remaining keys in the component's own class, which validates them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from onlinerl import registry, yaml_files
from onlinerl.errors import ConfigError
from onlinerl.explain import explain
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.component import Component
from onlinerl.protocols.keys import CustomResources, Seconds
from onlinerl.protocols.oracle import Oracle
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.types import Sampling

_SECRET = re.compile(r"(^|_)(api)?(key|token|password|passwd|secret|credential|authorization)s?$")
_PLAIN_KEY = re.compile(r"(^|_)(?<!api_)(?<!access_)(?<!auth_)(?<!private_)(?<!secret_)keys?$")
"""As in `input_key`, which other trainers have and which names a column."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CREDENTIALS = re.compile(
    r"://[^/@\s]*:[^/@\s]+@|[?&][^=&\s]*(key|token|password|secret)=[^&\s]|^\s*bearer\s+\S+\s*$", re.IGNORECASE
)
_WORD_ENDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|-")

Device = Literal["auto", "cpu", "cuda"]


class Section(BaseModel):
    """Base of all configuration sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PromptsConfig(Section):
    """Which prompts are trained on and held out."""

    train: str
    """Path of a JSONL file, or `package:NAME` for one that ships with onlinerl."""
    heldout: str
    """Prompts for evaluation; must not overlap with `train`."""
    per_iteration: int = Field(64, ge=1)
    """Fresh prompts taken in each iteration."""
    max_tokens: int = Field(512, ge=1)
    """Longest prompt accepted; longer ones are an error that counts them."""
    reuse: bool = False
    """Start over when the prompts run out; otherwise asking for more than there are is an error."""


class SamplingConfig(Section):
    """How responses are drawn."""

    samples_per_prompt: int = Field(4, ge=1)
    """K: responses drawn for each training prompt. The held-out prompts get one each."""
    temperature: float = Field(1.0, ge=0.01)
    """Not below 0.01: vLLM samples at 0.01 instead, and the learner would score at another temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the most probable tokens that make up this share; 1 draws from all."""
    top_k: int = Field(-1, ge=-1)
    """Draw from so many of the most probable tokens; -1 draws from all."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest response in tokens; a longer one is cut there, and `training.on_truncated` says what becomes of it."""

    def spec(self) -> Sampling:
        """The part that engine and learner share."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_new_tokens=self.max_new_tokens)


class ReferenceConfig(Section):
    """Which weights the reference log-probs come from."""

    schedule: Literal["default", "fixed", "previous", "every_n", "none"] = "default"
    """`default` is what the algorithm's paper uses; `fixed` the base model; `previous` the weights at the start of the iteration."""
    every: int = Field(1, ge=1)
    """For `every_n`: iterations between snapshots."""
    allow_nonstandard: bool = False
    """Permit a schedule other than the one the algorithm's theory asks for."""


class TrainingConfig(Section):
    """How the learner steps."""

    items_per_step: int = Field(8, ge=1)
    """Pairs (or samples) per optimizer step, over all ranks."""
    epochs: int = Field(1, ge=1)
    """Passes over the iteration's items."""
    learning_rate: float = Field(5e-7, ge=0)
    """At its peak. The default suits a model of 7B; one of 135M needs 5e-5 to move at all."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape within one iteration."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of an iteration's steps with a rising learning rate."""
    iteration_decay: float = Field(1.0, gt=0, le=1)
    """The learning rate of iteration t is multiplied by this to the power t - 1."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """`rmsprop` keeps one moment less, and is what SPPO's authors train with."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """What happens to the moments between iterations (R-O1)."""
    weight_decay: float = Field(0.0, ge=0)
    """Of matrices; biases and the weights of norms do not decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped_steps: int = Field(3, ge=0)
    """Steps with a non-finite gradient that are dropped before the run stops (R-E6)."""
    max_idle_iterations: int = Field(3, ge=1)
    """Iterations in a row that give nothing to learn (every response to a prompt judged the same, or no pair left) before the run
    stops. Each is committed without an optimizer step; a resume goes on with the next one."""
    on_truncated: Literal["keep", "drop"] = "keep"
    """Responses that hit max_new_tokens: train on them as they are, or leave them out (counted either way) (R-F4)."""


class ScheduleConfig(Section):
    """Which phases may run side by side. What is computed does not depend on it."""

    stream: bool = True
    """Responses are judged, and scored by the learner, while the engine still samples."""
    evaluate_beside: bool = True
    """The next iteration samples while this one is evaluated. Where engine and learner compute on the same GPUs or cores, only one of
    them works at a time, and this changes nothing; on CPU they do unless engine.threads and learner.threads say how many each has."""


class EvaluationConfig(Section):
    """What is measured on the held-out prompts after each iteration."""

    prompts: int | None = Field(None, ge=2)
    """How many held-out prompts to use; all by default."""
    canary: int = Field(16, ge=1)
    """Sequences teacher-forced on learner and replicas after each sync."""
    mismatch_sample: int = Field(32, ge=1)
    """Fresh rollouts on which engine and learner log-probs are compared."""
    max_mismatch_k3: float = Field(0.01, gt=0)
    """Largest accepted KL estimate (k3, nats per token) between engine and learner on them. bfloat16 kernels of two libraries differ by
    about 0.002; more than this is a bug, not noise (R-E1)."""


class EngineConfig(Section):
    """The rollout engine."""

    name: str = "vllm"
    """vllm; `toy` is for tests."""
    replicas: int = Field(1, ge=1)
    """Copies of the model that sample in parallel, from one queue of prompts."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Workers that one replica is split over: each needs a GPU, or a core on CPU, of one machine."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of its weights and computation."""
    max_concurrent: int = Field(64, ge=1)
    """Sequences that one replica works on at a time."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Memory for the KV cache of each worker of a replica on CPU, in GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that a replica may take."""
    max_model_len: int | None = Field(None, ge=8)
    """Longest prompt plus response; derived from the budgets by default."""
    enforce_eager: bool | None = None
    """Skip graph capture; by default on for CPU, off for GPU."""
    cpus: int = Field(1, ge=0)
    """CPUs reserved per replica."""
    threads: int | None = Field(None, ge=1)
    """Threads a CPU replica computes with, over all its workers; by default its machine's cores, shared with the other replicas there
    (rollouts and training take turns). Never more than there are cores."""
    resources: CustomResources = Field(default_factory=dict)
    """Extra Ray resources per replica, e.g. {rollout_node: 1} to choose a node."""
    start_timeout_s: Seconds = 900
    generate_timeout_s: Seconds = 1800
    """Longest wait without any response finishing."""
    max_rejected: float = Field(0.1, ge=0, le=1)
    """Largest share of a phase's responses that may be thrown away, because their log-probs were unusable or the engine gave up on
    them, before the run stops."""


class LearnerConfig(Section):
    """The learner."""

    name: str = "deepspeed"
    """deepspeed; `toy` is for tests."""
    ranks: int = Field(1, ge=1)
    """Processes that train data-parallel: one GPU each, or cores on CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the ranks divide among them: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also weights."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights as they compute; the optimizer keeps them and its moments in fp32."""
    tokens_per_microbatch: int = Field(4096, ge=1)
    """Prompt and response tokens of one forward pass of one rank; a single longer item goes alone."""
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    cpus: int = Field(1, ge=0)
    """CPUs reserved per rank."""
    threads: int | None = Field(None, ge=1)
    """Threads per CPU rank; the cores divided by the ranks by default."""
    resources: CustomResources = Field(default_factory=dict)
    """Extra Ray resources per rank, e.g. {learner_node: 1} to choose a node."""
    start_timeout_s: Seconds = 900
    """Longest start: meeting of the ranks, and loading the model."""
    step_timeout_s: Seconds = 3600
    """Longest single call to the learner, and longest wait of one rank for the others."""


class SyncConfig(Section):
    """How weights get from the learner into the replicas."""

    backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """`auto`: gloo on CPU, ipc where learner and replica share a GPU, nccl otherwise."""
    timeout_s: Seconds = 300
    """One deadline over the whole push: rendezvous, send, cache reset and proof (R-A1)."""
    bucket_mib: int = Field(64, ge=1)
    """Size of one message, which is the extra memory that a transfer takes on either side: one message at a time over gloo, two in
    flight over nccl, one buffer per GPU for ipc. A larger tensor travels alone (R-A2)."""
    tensors_checked: int = Field(24, ge=1)
    """Tensors whose checksum is compared after each push, in rotation; all of them at the first."""
    canary_tolerance_nats: float = Field(0.1, gt=0)
    """Largest accepted mean |log-prob difference| between learner and replica on the canary. It is about 0.05 in bfloat16; stale or
    small changes are what versions and checksums are for."""


class ClusterConfig(Section):
    """Where it runs."""

    address: str | None = None
    """Address of an existing Ray cluster (`auto` finds the one this machine belongs to); None starts one on this machine."""
    device: Device = "auto"
    """`auto` takes GPUs if there are any when the run starts; on a cluster whose GPU nodes are still joining say `cuda`."""
    colocate: bool = False
    """Learner ranks and replicas share GPUs, one of each on a GPU, and take turns: while one works, the memory of the other waits on
    the host."""
    start_timeout_s: Seconds = 180
    """Longest wait for Ray to start on this machine, or for an existing cluster to answer."""
    wait_s: float = Field(60, ge=0, le=1e6)
    """How long to wait for a cluster to become big enough."""


class MetricsConfig(Section):
    """Where figures go. metrics.jsonl in the run directory is always written."""

    prometheus: bool = True
    prometheus_host: str = "127.0.0.1"
    """Address to listen on; a scraper on another machine needs one that it can reach, or 0.0.0.0."""
    prometheus_port: int = Field(9470, ge=0, le=65535)
    """If another run has it, the next free one; 0 takes any. `<runs>/.prometheus` tells Prometheus which."""
    tensorboard: bool = False


class CheckpointConfig(Section):
    """What is kept on disk."""

    keep: int = Field(2, ge=1)
    """Resumable checkpoints kept; older ones are removed after a newer one is committed."""
    exports: Literal["all", "last"] = "all"
    """Hugging Face exports kept: every iterate, or the last one (the reference is always kept)."""
    min_free_gib: float = Field(1.0, ge=0)
    """Refuse to write a checkpoint that would leave less than this free."""


def _number_as_text(value: Any) -> Any:
    """A run may be called 123, which YAML takes for a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class RunConfig(Section):
    """A whole run."""

    name: Annotated[str, BeforeValidator(_number_as_text)] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="at most 100 letters, digits, dots, - and _, a letter or digit first",
        examples=["my-run"],
    )
    """The run directory is `<runs>/<name>`."""
    model: str
    """Directory of a Hugging Face model, or a hub id."""
    iterations: int = Field(ge=1)
    """How often the whole loop runs: sample, label, train, push, evaluate. A resume may raise it."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the order of the prompts, the sampling and the order of training. Decimals still depend on how requests are batched."""
    runs: str = "runs"
    """Folder of run directories."""
    algorithm: dict[str, Any]
    """`name` and the knobs of that algorithm: the fields of its class in onlinerl/algorithms, or of a class of your own."""
    oracle: dict[str, Any]
    """`name` and the knobs of that oracle: the fields of its class in onlinerl/oracles, and of onlinerl/protocols/oracle.py."""
    pairing: dict[str, Any] | None = None
    """Best against worst by default; refused where the algorithm trains no pairs."""
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    reference: ReferenceConfig = ReferenceConfig()
    training: TrainingConfig = TrainingConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    learner: LearnerConfig = LearnerConfig()
    sync: SyncConfig = SyncConfig()
    cluster: ClusterConfig = ClusterConfig()
    metrics: MetricsConfig = MetricsConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    max_failed_labels: float = Field(0.1, ge=0, le=1)
    """Largest share of groups that the oracle may fail on before the run stops."""

    @property
    def directory(self) -> Path:
        """Where everything about this run is kept."""
        return at_home(self.runs, "runs") / self.name


def at_home(path: str, field: str) -> Path:
    """A path in which a leading `~` or `~USER` is that home directory.

    Raises:
        ConfigError: if there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path} is in the home of a user that is not there", field=field, fix=f"write ./{path}") from None


def located(config: RunConfig) -> RunConfig:
    """The same configuration with absolute paths, so that it means the same in every working directory."""
    model = at_home(config.model, "model")
    prompts = {
        key: path if path.startswith("package:") else str(at_home(path, f"prompts.{key}").absolute())
        for key, path in (("train", config.prompts.train), ("heldout", config.prompts.heldout))
    }
    return config.model_copy(
        update={
            "model": str(model.absolute()) if model.is_dir() else config.model,  # otherwise perhaps a hub id
            "runs": str(at_home(config.runs, "runs").absolute()),
            "prompts": config.prompts.model_copy(update=prompts),
        }
    )


# Keys that may differ between a run and its resume: where it runs, what is watched and when to stop, not what is computed.
RESUMABLE_CHANGES = (
    "runs",
    "iterations",
    "metrics",
    "cluster",
    "checkpoints",
    "sync",
    "engine.replicas",
    "engine.tensor_parallel_size",
    "engine.max_concurrent",
    "engine.kv_cache_gib",
    "engine.gpu_memory_utilization",
    "engine.enforce_eager",
    "engine.cpus",
    "engine.threads",
    "engine.resources",
    "engine.start_timeout_s",
    "engine.generate_timeout_s",
    "engine.max_rejected",
    "schedule",
    "oracle.groups_per_call",
    "oracle.max_concurrent",
    "oracle.call_timeout_s",
    "oracle.retries",
    "oracle.replicas",
    "oracle.cpus",
    "oracle.threads",
    "oracle.resources",
    "oracle.start_timeout_s",
    "oracle.batch_size",
    "max_failed_labels",
    "prompts.reuse",
    "evaluation.max_mismatch_k3",
    "training.max_skipped_steps",
    "training.max_idle_iterations",
    "learner.cpus",
    "learner.threads",
    "learner.resources",
    "learner.tokens_per_microbatch",
    "learner.gradient_checkpointing",
    "learner.start_timeout_s",
    "learner.step_timeout_s",
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file and apply `key=value` overrides.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    tree = yaml_files.read(Path(path), _CHOICES)
    # The choice of an implementation comes before its knobs, in whatever order they were typed.
    for override in sorted(overrides, key=lambda each: each.partition("=")[0] not in _CHOICES):
        yaml_files.override(tree, override, _CHOICES)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a configuration given as plain data, component sections included.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    _refuse_values(leaf for leaf in _leaves(tree) if not _PLAIN_KEY.search(_plain_name(leaf[0])))
    try:
        # JSON mode: YAML knows no tuples or enums, so strictness is that of JSON (no "1" for 1, lists for tuples allowed).
        config = RunConfig.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise explain(error, RunConfig, "", [section for section, *_ in _COMPONENTS]) from None
    for section, role, base in _COMPONENTS:
        component(_spec(config, section), section, role, base)
    _refuse_values(_leaves(tree))  # every key is known now, and one that is called a key holds one
    return config


def component(spec: Mapping[str, Any], section: str, role: str, base: type[Component]) -> Any:
    """Build the component a section describes: `name` selects the class, the other keys are its fields.

    Raises:
        ConfigError: if the name or a key is unknown, or a value has the wrong type.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name is None and (near := get_close_matches("name", options, n=1)):
        raise ConfigError("is not a known key", field=f"{section}.{near[0]}", fix="did you mean 'name'?")
    if not isinstance(name, str):
        raise ConfigError("is missing", field=f"{section}.name", fix=f"choose one of {', '.join(registry.names(role))}")
    cls: type[Component] = registry.load(role, name, base)
    try:
        return cls.model_validate_json(json.dumps(options, default=str))
    except ValidationError as error:
        raise explain(error, cls, f"{section}.") from None


def algorithm(config: RunConfig) -> Algorithm:
    """The configured algorithm."""
    return component(config.algorithm, "algorithm", "algorithms", Algorithm)


def oracle(config: RunConfig) -> Oracle:
    """The configured oracle."""
    return component(config.oracle, "oracle", "oracles", Oracle)


def pair_builder(config: RunConfig) -> PairBuilder:
    """The configured pair builder."""
    return component(_spec(config, "pairing"), "pairing", "pairing", PairBuilder)


def _spec(config: RunConfig, section: str) -> dict[str, Any]:
    """What a section says, or what it means where it is left out."""
    return getattr(config, section) or {"name": "best_worst"}


_COMPONENTS: tuple[tuple[str, str, type[Component]], ...] = (
    ("algorithm", "algorithms", Algorithm),
    ("oracle", "oracles", Oracle),
    ("pairing", "pairing", PairBuilder),
)
_CHOICES = {f"{section}.name" for section, *_ in _COMPONENTS}


def without_unread(stored: RunConfig) -> RunConfig:
    """The configuration of a run without the pairing that an older version filled in whether or not anything read it."""
    return stored if algorithm(stored).needs.pairs else stored.model_copy(update={"pairing": None})


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that a resume must not change, flattened to dotted keys."""
    flat = flatten(_resolved(config))
    return {k: v for k, v in flat.items() if not any(k == p or k.startswith(p + ".") for p in RESUMABLE_CHANGES)}


def changes(stored: Mapping[str, Any], config: RunConfig) -> dict[str, str]:
    """What differs between the fingerprint that a run was started with and a configuration, in words, by key.

    A key that the stored one lacks came with a later version: it counts as set to its default.
    """
    now, defaults = fingerprint(config), flatten(_defaults(config))
    if not algorithm(config).needs.pairs:  # an older version filled it in whether or not anything read it
        stored = {k: v for k, v in stored.items() if not k.startswith("pairing.")}
    before = {**{k: _as_json(defaults[k]) for k in now.keys() - stored.keys() if k in defaults}, **stored}
    gone = {k: f"was {before[k]!r} when the run started, and this version has no such key" for k in before.keys() - now.keys()}
    differ = {
        k: f"was {before.get(k)!r} when the run started and is now {now[k]!r}"
        for k in now
        if k not in before or before[k] != _as_json(now[k])
    }
    return dict(sorted({**gone, **differ}.items()))


def _defaults(config: RunConfig) -> dict[str, Any]:
    """Every default of the sections and of the components that this configuration chooses."""
    tree = _defaults_of(RunConfig)
    for section, role, base in _COMPONENTS:
        tree[section] = _defaults_of(type(component(_spec(config, section), section, role, base)))
    return tree


def _defaults_of(model: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found[name] = _defaults_of(kind)
        elif not field.is_required():
            found[name] = field.get_default(call_default_factory=True)
    return found


def _as_json(value: Any) -> Any:
    """As it is after it was stored."""
    return json.loads(json.dumps(value, default=str))


def digest(config: RunConfig) -> str:
    """Short hash of `fingerprint`."""
    return hashlib.sha256(json.dumps(fingerprint(config), sort_keys=True).encode()).hexdigest()[:16]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def dump(config: RunConfig) -> str:
    """The whole configuration, defaults of every section and component included, as YAML that `load` reads back."""
    return yaml.safe_dump(_resolved(config), sort_keys=False)


def _resolved(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    for section, role, base in _COMPONENTS:
        spec = _spec(config, section)
        tree[section] = {"name": spec["name"], **component(spec, section, role, base).model_dump(mode="json")}
    if config.pairing is None and not algorithm(config).needs.pairs:
        del tree["pairing"]
    return tree


def _refuse_values(leaves: Iterable[tuple[str, Any]]) -> None:
    """Refuse what no key may hold: numbers without an end, and secrets, because the configuration is stored with the run."""
    for key, value in leaves:
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"is {value}", field=key, fix="give a finite number")
        if not isinstance(value, str):
            continue
        name = _plain_name(key)
        if _SECRET.search(name) and value:
            raise ConfigError(
                "looks like a secret, and the configuration is stored with the run and shown to people",
                field=key,
                fix=f"put it into an environment variable and give that variable's name as `{name}_env`, for the component to read",
            )
        if _SECRET.search(name.removesuffix("_env")) and not _VARIABLE.fullmatch(value):
            raise ConfigError(
                "is not the name of an environment variable", field=key, fix="give the name, e.g. JUDGE_API_KEY; not its value"
            )
        if _CREDENTIALS.search(value):
            raise ConfigError(
                "holds a secret, and the configuration is stored with the run and shown to people",
                field=key,
                fix="give the address without it, and let the component read it from an environment variable",
            )


def _plain_name(key: str) -> str:
    """The last part of a dotted key, as Python would write it."""
    return _WORD_ENDS.sub("_", key.rsplit(".", 1)[-1]).lower()


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping or list, with its dotted key."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, prefix)
    else:
        yield prefix, tree
