"""The sections of a configuration: every key with its type, bounds, default and meaning.

A key marked `Resumable` may differ between a run and its resume; all others are part of what is computed. Sections that select an
implementation by `name` (algorithm, oracle, pairing) keep their remaining keys in the component's own class, which validates them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, field_validator

from onlinerl.config.paths import at_home
from onlinerl.config.roles import build, chosen, default
from onlinerl.protocols.engine import EngineConfig
from onlinerl.protocols.keys import Resumable, Seconds
from onlinerl.protocols.learner import LearnerConfig
from onlinerl.protocols.prompts import PromptsConfig
from onlinerl.protocols.selection import Selector
from onlinerl.protocols.tracker import TrackerConfig
from onlinerl.protocols.transport import TransportConfig
from onlinerl.types import Sampling

Device = Literal["auto", "cpu", "cuda"]
AnchorColumn = Literal["prompt", "chosen", "rejected", "prob", "tie", "source", "reference_answer"]


class Section(BaseModel):
    """Base of all configuration sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SamplingConfig(Section):
    """How responses are drawn."""

    samples_per_prompt: int = Field(4, ge=1)
    """K: responses drawn for each training prompt; those that an algorithm needs beside them come on top. The held-out prompts get one
    each."""
    temperature: float = Field(1.0, ge=0.01)
    """Not below 0.01: vLLM samples at 0.01 instead, and the learner would compute log-probs at another temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the most probable tokens that make up this share; 1 draws from all."""
    top_k: int = Field(-1, ge=-1)
    """Draw from so many of the most probable tokens; -1 draws from all."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest response in tokens; a longer one is cut there, and `training.on_truncated` says what becomes of it."""
    dynamic: bool | None = None
    """Dynamic sampling: a prompt whose responses the oracle judges all alike is replaced by another one, until there are
    `prompts.per_iteration` others. By default as the algorithm's paper has it. Needs `schedule.stream`."""
    max_rounds: int = Field(10, ge=1)
    """With dynamic sampling: how often `prompts.per_iteration` prompts are sampled in an iteration at most. It goes on with what there is
    then."""

    def spec(self) -> Sampling:
        """The part that engine and learner share."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_new_tokens=self.max_new_tokens)


class ReferenceConfig(Section):
    """Which weights the reference log-probs come from."""

    schedule: Literal["default", "fixed", "previous", "every_n", "ema", "none"] = "default"
    """`default` is what the algorithm's paper uses; `fixed` the base model; `previous` the weights at the start of the iteration; `every_n` the
    same, but of every n-th iteration only; `ema` an average of the base model and the iterates, the soft update of TR-DPO, "Learn Your
    Reference Model for Real Good Alignment". Whatever it is, KL to the base model and to the iterate before are reported."""
    every: int = Field(1, ge=1)
    """For `every_n` and `ema`: iterations between snapshots, or between updates of the average."""
    mixup_alpha: float = Field(0.6, gt=0, le=1)
    """For `ema`: weight of the policy in an update, reference <- (1 - mixup_alpha) * reference + mixup_alpha * policy. 1 is a copy. The average is
    kept in float32, on disk: 4 more bytes per parameter for each that is kept."""
    allow_nonstandard: bool = False
    """Permit a schedule other than the one the algorithm's theory asks for."""


class OnlineMergingConfig(Section):
    """What an iteration has trained is merged with what supervised fine-tuning had, after its last optimizer step or more often: "Online Merging
    Optimizers for Boosting Rewards and Mitigating Tax in Alignment", whose optimizers merge at every step."""

    base_model: str
    """Directory or hub id of the pretrained model that `model` was fine-tuned from. It must be on the learner's disk, in safetensors files."""
    method: Literal["ondare", "onties"] = "ondare"
    """`ondare` drops entries of both changes at random and rescales the others; `onties` keeps the largest ones whose signs agree."""
    density: float = Field(0.01, gt=0, le=1)
    """Share of the entries of each tensor that is kept."""
    alpha: float = Field(1e-7, ge=0, le=1)
    """Weight of the change of supervised fine-tuning, which is added anew at every merge."""
    every: int | None = Field(None, ge=1)
    """Optimizer steps after each of which their changes are merged together, the rest of an iteration at its end; 1 is the paper. None: once, at
    its end. The optimizer's moments stay as they are. Each merge copies all weights to host memory."""

    @field_validator("base_model")
    @classmethod
    def _absolute(cls, path: str) -> str:
        folder = at_home(path, "training.online_merging.base_model")
        return str(folder.absolute()) if folder.is_dir() else path  # a resume may start in another working directory


class TrainingConfig(Section):
    """How the learner steps."""

    batch_size: int = Field(8, ge=1)
    """Pairs (or samples) per optimizer step, over all ranks."""
    epochs: int = Field(1, ge=1)
    """Passes over the iteration's items."""
    target_kl: float | None = Field(None, gt=0)
    """Early stopping: once the KL of the weights that the iteration began with to the policy exceeds this, in nats per token, no further
    optimizer step of the iteration is taken. It is estimated (k3) on the response tokens of each step, before that step. None never stops.
    Where there are two passes with auxiliary weights, each is stopped by itself.
    `algorithm.target_kl` of ppo is another one: it changes the price of the KL in the reward."""
    learning_rate: float = Field(5e-7, ge=0, le=1)
    """At its peak. The default suits a model of 7B; one of 135M needs 5e-5 to move at all."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate within one iteration."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of an iteration's steps with a rising learning rate."""
    iteration_decay: float = Field(1.0, gt=0, le=1)
    """The learning rate of iteration t is multiplied by this to the power t - 1."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """`rmsprop` keeps one moment less, and is what SPPO's authors train with."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """What happens to the moments between iterations."""
    online_merging: OnlineMergingConfig | None = None
    """Off by default; needs a learner that lets its weights be replaced (`learner.name: torch`)."""
    aux_loss_coef: float = Field(0.0, ge=0)
    """Of mixtures of experts: weight of the auxiliary loss that keeps their routers in balance, over all tokens of a step, prompts included; 0: none.
    `config.json` says what the model was trained with (`router_aux_loss_coef`). A step then takes one more forward pass."""
    weight_decay: float = Field(0.0, ge=0)
    """Of matrices; biases and the weights of norms do not decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped_steps: Resumable[int] = Field(3, ge=0)
    """Steps with a non-finite gradient that are dropped before the run stops."""
    max_idle_iterations: Resumable[int] = Field(3, ge=1)
    """Iterations in a row that give nothing to learn (every response to a prompt judged the same, or no pair left) before the run
    stops. Each is committed without an optimizer step; a resume goes on with the next one."""
    sample_weights: Literal["equal", "certainty", "score_gap", "per_prompt", "age"] = "equal"
    """What an item counts, a response or a list, of losses that are not on pairs (those have `algorithm.pair_weights`), with mean 1 over the
    iteration: as much as any other; abs(2 w - 1) of a response with the win rate w in its group, of several the gap between their win rates; the gap
    between the scores of a list; as much as the other responses to its prompt together do for theirs; the less the older it is."""
    sample_age_decay: float = Field(0.5, gt=0, le=1)
    """An item that is older by an iteration counts so many times as much."""
    sample_weight_clip: list[float] | None = None
    """The lowest and the highest of these weights, in units of their mean."""
    on_truncated: Literal["keep", "drop"] = "keep"
    """Responses that hit max_new_tokens: train on them as they are, or leave them out (counted either way)."""


class ScheduleConfig(Section):
    """Which phases may run side by side. What is computed depends on `max_lag` alone."""

    stream: Resumable[bool] = True
    """Responses are judged, and the learner gives their log-probs, while the engine still samples."""
    evaluate_beside: Resumable[bool] = True
    """The next iteration samples while this one is evaluated. Where engine and learner compute on the same GPUs or cores, only one of
    them works at a time, and this changes nothing; on CPU they do unless engine.threads and learner.threads say how many each has."""
    max_lag: Literal[0, 1] = 0
    """With 1, the next iteration is sampled while this one trains: from weights that are one training older. An iteration then takes as
    long as the longer of the two. Engine and learner must have GPUs or cores of their own."""


class EvaluationConfig(Section):
    """What is measured on the held-out prompts after each iteration."""

    prompts: int | None = Field(None, ge=2)
    """How many held-out prompts to use; all by default."""
    canary: int = Field(16, ge=1)
    """Sequences teacher-forced on learner and replicas after each sync."""
    mismatch_sample: int = Field(32, ge=1)
    """Fresh rollouts on which engine and learner log-probs are compared."""
    max_mismatch_k3: Resumable[float] = Field(0.01, gt=0)
    """Largest accepted KL estimate (k3, nats per token) between engine and learner on them. bfloat16 kernels of two libraries differ by
    about 0.002; more than this is a bug, not noise."""


class Comparisons(Section):
    """Of rows that compare two responses: how they are read."""

    subset: str | None = None
    """Of a hub dataset that has several."""
    apply_chat_template: bool = True
    """Whether a prompt that is a text, not messages, is what a user says. Otherwise the responses continue it."""
    filter_invalid: bool = False
    """Leave out, and count, rows that are no comparison. Otherwise they are an error."""


class AnchorsConfig(Comparisons):
    """Pairs of which it is known which response is better: what the oracle says of them is measured, nothing is trained on them."""

    data: str
    """A file of JSON lines, JSON, Parquet or CSV, a folder of `save_to_disk`, or a dataset of the hub, with `chosen` and `rejected`."""
    split: str | None = None
    """Name of a split, or a part of one, e.g. `test[:10%]`. By default `test`, and `train` for a file, which has no other."""
    columns: dict[AnchorColumn, str] = Field(default_factory=dict)
    """Which column is what, where it has another name, e.g. `{chosen: answer_a}`."""
    limit: int = Field(2000, ge=1)
    """How many at most. Which they are depends on what they say alone, not on their order. Of two thousand, accuracy is known within 2 %."""
    min_accuracy: Resumable[float] = Field(0.65, ge=0, le=1)
    """The run stops where the oracle is right about fewer, so surely that the 95 % interval lies below."""
    min_accuracy_by_source: Resumable[float | None] = Field(None, ge=0, le=1)
    """The same of the pairs of each `source` that has 30 of them: a good average hides one that fails. 0.5 by default, or `min_accuracy` where
    that is lower."""
    every: Resumable[int] = Field(0, ge=0)
    """After so many iterations the oracle is asked about all of them again, and pays again: what changes while its version stays, as a model
    behind an endpoint may, shows only then. 0: once, before anything is pushed or sampled."""


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
    trackers: list[Annotated[SerializeAsAny[TrackerConfig], BeforeValidator(chosen("tracker"))]] = Field(default_factory=list)
    """Further ones, each a section with `name` and the fields of its class in onlinerl/trackers, or of a class of your own."""

    def all(self) -> list[TrackerConfig]:
        """Every tracker that is told what happens, beside the console and metrics.jsonl."""
        found = list(self.trackers)
        if self.tensorboard:
            found.append(build({"name": "tensorboard"}, "tracker"))
        if self.prometheus:  # last: from here on Prometheus is told that the run is there
            where = {"host": self.prometheus_host, "port": self.prometheus_port}
            found.append(build({"name": "prometheus", **where}, "tracker"))
        return found


class LedgerConfig(Section):
    """What is paid for labels, and whose labels are paid for already. See docs/usage.md."""

    reuse_from: str | None = None
    """A run, or a folder of runs, such as `runs`: what an oracle of the same version has said there about the same responses to the same
    prompt is not asked again. A run's own labels never are."""
    max_calls: int | None = Field(None, ge=1)
    """Questions that may be put to a model or a service, those of all starts and those that failed included."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens that the oracle may read and write."""
    max_usd: float | None = Field(None, gt=0)
    """What it may cost, by the oracle's own prices."""


class CheckpointConfig(Section):
    """What is kept on disk."""

    keep: int = Field(2, ge=1)
    """Resumable checkpoints kept; older ones are removed after a newer one is committed."""
    exports: Literal["all", "last", "best"] = "all"
    """Hugging Face exports kept: every iterate, the last one, or the last and the best one: that which has surely gained most over the base model,
    by the lower bound of the 95 % interval, in reward on the same held-out prompts, or in win rate where the oracle gives no scores (the
    reference is always kept)."""
    when_finished: Literal["keep", "remove"] = "keep"
    """`remove`: a run that is finished keeps no checkpoints, and of its exports those of the last and the best iterate at most (`exports`). It
    cannot be continued with more iterations then. For sweeps, whose runs would fill a disk."""
    min_free_gib: float = Field(1.0, ge=0, le=1e9)
    """Refuse to write a checkpoint that would leave less than this free."""


def number_as_text(value: Any) -> Any:
    """A run may be called 123, which YAML takes for a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class RunConfig(Section):
    """A whole run."""

    name: Annotated[str, BeforeValidator(number_as_text)] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="at most 100 letters, digits, dots, - and _, a letter or digit first",
        examples=["my-run"],
    )
    """The run directory is `<runs>/<name>`."""
    model: str
    """Directory of a Hugging Face model, or a hub id."""
    iterations: Resumable[int] = Field(ge=1)
    """How often the whole loop runs: sample, label, train, push, evaluate. A resume may raise it."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the order of the prompts, the sampling and the order of training. Decimals still depend on how requests are batched."""
    runs: Resumable[str] = "runs"
    """Folder of run directories."""
    algorithm: dict[str, Any]
    """`name` and the knobs of that algorithm: the fields of its class in onlinerl/algorithms, or of a class of your own."""
    oracle: dict[str, Any]
    """`name` and the knobs of that oracle: the fields of its class in onlinerl/oracles, and of onlinerl/protocols/oracle.py."""
    pairing: dict[str, Any] | None = None
    """Best against worst by default; refused where the algorithm trains no pairs."""
    prompts: Annotated[SerializeAsAny[PromptsConfig], BeforeValidator(chosen("prompts"))]
    """`name` and the keys of that source: jsonl by default."""
    selection: Annotated[SerializeAsAny[Selector], BeforeValidator(chosen("selection"))] = Field(
        default_factory=default("selection")
    )
    """Which prompts an iteration samples: `name` and the keys of that selector; shuffled by default."""
    sampling: SamplingConfig = SamplingConfig()
    reference: ReferenceConfig = ReferenceConfig()
    training: TrainingConfig = TrainingConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    anchors: AnchorsConfig | None = None
    """Off by default: whether the oracle can be trusted is then not known."""
    engine: Annotated[SerializeAsAny[EngineConfig], BeforeValidator(chosen("engine"))] = Field(
        default_factory=default("engine")
    )
    """`name` and the keys of that engine: vllm by default; `toy` is for tests."""
    learner: Annotated[SerializeAsAny[LearnerConfig], BeforeValidator(chosen("learner"))] = Field(
        default_factory=default("learner")
    )
    """`name` and the keys of that learner: deepspeed by default; `toy` is for tests."""
    sync: Resumable[Annotated[SerializeAsAny[TransportConfig], BeforeValidator(chosen("sync"))]] = Field(
        default_factory=default("sync")
    )
    """How weights get from the learner into the replicas: `backend` (auto by default) and the keys of that transport."""
    cluster: Resumable[ClusterConfig] = ClusterConfig()
    metrics: Resumable[MetricsConfig] = MetricsConfig()
    checkpoints: Resumable[CheckpointConfig] = CheckpointConfig()
    ledger: Resumable[LedgerConfig] = LedgerConfig()
    max_failed_labels: Resumable[float] = Field(0.1, ge=0, le=1)
    """Largest share of groups that the oracle may fail on before the run stops; also of the replies of a judge, and of the responses of a
    verifier, that may be missing in the verdicts on the others."""

    @property
    def directory(self) -> Path:
        """Where everything about this run is kept."""
        return at_home(self.runs, "runs") / self.name
