"""Every metric of a run, once. Records, Prometheus, Grafana, alerts, the table of iterations and docs/metrics.md are made from this.

To add a metric: one entry here (in training.py if an optimizer step reports it), and a call of the reporter where it is measured. An
algorithm declares what only it has in its own file, as `metrics`. `python tools/metrics_docs.py` writes the documentation anew.
"""

from __future__ import annotations

from onlinerl.metrics.collection import Catalogue
from onlinerl.metrics.definition import Column, Definition, Series
from onlinerl.metrics.judging import COMPONENTS, HELDOUT, JUDGING, ORACLE
from onlinerl.metrics.training import PAIRS, POLICY_GRADIENT, TRAINING

_KL = "KL divergence of the policy from an earlier one, per sequence"
EVALUATION = (
    Definition(
        name="reward",
        help="Mean score that the training oracle gives the answers to the held-out prompts",
        unit="reward",
        section=HELDOUT,
        title="Reward on held-out prompts",
        estimators=("mean",),
        n_min=400,
        labels={"oracle": ("proxy",)},
        series=(Series(name="onlinerl_reward", labels={"oracle": "proxy", "stat": "mean"}, bounds="onlinerl_reward_bound"),),
        column=Column(header="reward", short="reward", digits=3),
    ),
    Definition(
        name="kl_ref",
        help="KL divergence of the policy from the initial one, on the policy's own fresh samples at temperature 1",
        unit="nats/sequence",
        section=HELDOUT,
        title="KL to the initial policy",
        estimators=("k1", "k3"),
        n_min=256,
        labels={"estimator": ("k1", "k3")},
        series=(Series(name="onlinerl_kl_nats", help=_KL, labels={"reference": "initial", "estimator": "k3", "stat": "mean"}),),
        column=Column(header="KL base", short="KL", digits=2, say_unit=True),
    ),
    Definition(
        name="kl_prev",
        help="KL divergence of the policy from the iterate before, on the policy's own fresh samples at temperature 1",
        unit="nats/sequence",
        section=HELDOUT,
        title="KL to the previous policy",
        estimators=("k1", "k3"),
        n_min=256,
        labels={"estimator": ("k1", "k3")},
        series=(
            Series(name="onlinerl_kl_nats", help=_KL, labels={"reference": "prev_iter", "estimator": "k3", "stat": "mean"}),
        ),
    ),
    Definition(
        name="kl_headline",
        help="The one of the two estimates of a KL divergence to quote: k3, or k1 where k3 has more noise or more than 0.1 % of the "
        "tokens are clamped",
        unit="nats/sequence",
        section=HELDOUT,
        title="KL, the estimate to quote",
        estimators=("k1", "k3"),
        n_min=256,
        labels={"reference": ("initial", "prev_iter")},
    ),
    Definition(
        name="kl_conflict",
        help="1 if the estimates k1 and k3 of a KL divergence differ by more than three standard errors of k1",
        unit="bool",
        section=HELDOUT,
        labels={"reference": ("initial", "prev_iter")},
        series=(Series(name="onlinerl_kl_conflict", labels={"reference": None}),),
    ),
    Definition(
        name="kl_clamped",
        help="Share of tokens whose log-ratio was outside [-20, 20] and was clamped in a KL divergence",
        unit="ratio",
        section=HELDOUT,
        n_of="tokens",
        labels={"reference": ("initial", "prev_iter")},
        series=(Series(name="onlinerl_kl_clamped_ratio", labels={"reference": None}),),
    ),
    Definition(
        name="kl_forward",
        help="KL divergence of the initial policy from the policy, on the initial policy's samples",
        unit="nats/sequence",
        section=HELDOUT,
        title="Forward KL",
        estimators=("mean",),
        n_min=512,
        series=(Series(name="onlinerl_kl_forward_nats"),),
    ),
    Definition(
        name="entropy_token",
        help="Entropy of the policy per token, from its own samples at temperature 1",
        unit="nats/token",
        section=HELDOUT,
        title="Entropy",
        estimators=("ratio",),
        n_min=20_000,
        n_of="tokens",
        series=(Series(name="onlinerl_entropy_nats"),),
    ),
    Definition(
        name="entropy_seq",
        help="Entropy of the policy per response, from its own samples at temperature 1",
        unit="nats/sequence",
        section=HELDOUT,
        title="Entropy per response",
        estimators=("mean",),
        n_min=256,
    ),
    Definition(
        name="win_rate",
        help="Share of held-out prompts on which the oracle prefers the policy's answer to that of an earlier iterate; a tie is half",
        unit="ratio",
        section=HELDOUT,
        estimators=("wilson",),
        n_min=400,
        labels={"opponent": ("base", "prev"), "control": ("raw",)},
        series=(
            Series(
                name="onlinerl_win_rate_ratio",
                labels={"opponent": "base", "control": "raw"},
                bounds="onlinerl_win_rate_bound_ratio",
            ),
        ),
        column=Column(header="win rate vs base", short="win rate", digits=2, interval=True),
    ),
    *COMPONENTS,
    Definition(
        name="length",
        help="Tokens of an answer to a held-out prompt",
        unit="tokens",
        section=HELDOUT,
        title="Response length",
        estimators=("mean",),
        n_min=400,
        series=(Series(name="onlinerl_response_length_tokens", labels={"stat": "mean"}),),
        column=Column(header="len", short="length", digits=1, say_unit=True),
    ),
    Definition(
        name="truncated",
        help="Share of the answers to held-out prompts that hit the length limit",
        unit="ratio",
        section=HELDOUT,
        title="Truncated responses",
        estimators=("wilson",),
        n_min=400,
        series=(Series(name="onlinerl_finish_ratio", labels={"reason": "length"}),),
    ),
    # How large a mismatch is does not need many tokens to be seen: a wrong weight or dtype is off by orders of magnitude.
    Definition(
        name="logp_mismatch",
        help="|log-prob difference| between learner and engine on the same tokens with the same weights",
        unit="nats/token",
        section=HELDOUT,
        n_of="tokens",
        labels={"stat": ("mean", "p99", "max")},
        series=(Series(name="onlinerl_logprob_mismatch_nats", labels={"stat": "mean"}),),
    ),
    Definition(
        name="logp_mismatch_k3",
        help="KL divergence of the learner from the engine with the same weights: mean of exp(e) - 1 - e, e the difference of a "
        "token's log-probs",
        unit="nats/token",
        section=HELDOUT,
        n_of="tokens",
        series=(Series(name="onlinerl_logprob_mismatch_k3_nats"),),
    ),
)

_SAMPLING = "Sampling"
SAMPLING = (
    Definition(
        name="prompts_sampled",
        help="Prompts sampled for training",
        unit="prompts",
        section=_SAMPLING,
        series=(Series(name="onlinerl_prompts_sampled_total", kind="counter"),),
    ),
    Definition(
        name="generated_tokens",
        help="Tokens of the training responses",
        unit="tokens",
        section=_SAMPLING,
        n_of="responses",
        series=(Series(name="onlinerl_generated_tokens_total", kind="counter"),),
    ),
    Definition(
        name="unique_ratio",
        help="Distinct texts among the responses to a prompt, as a share",
        unit="ratio",
        section=_SAMPLING,
        estimators=("mean",),
        n_min=200,
    ),
    Definition(
        name="rollouts_truncated",
        help="Share of training responses that hit the length limit",
        unit="ratio",
        section=_SAMPLING,
        estimators=("mean",),
        n_min=200,
        series=(Series(name="onlinerl_rollouts_truncated_ratio"),),
    ),
    Definition(
        name="rollouts_rejected",
        help="Training responses thrown away: log-probs missing or not finite, or never finished",
        unit="responses",
        section=_SAMPLING,
        labels={"reason": ("logprob", "abort")},
        series=(Series(name="onlinerl_rollouts_rejected_total", kind="counter", labels={"reason": None}),),
    ),
    Definition(
        name="sampled_per_kept",
        help="With dynamic sampling: prompts that were sampled for each one whose responses the oracle tells apart and that is trained on",
        unit="ratio",
        section=_SAMPLING,
        n_of="prompts kept",
        series=(Series(name="onlinerl_sampled_per_kept_ratio"),),
    ),
    Definition(
        name="prompts_reused",
        help="Prompts that were not sampled, because their responses of an earlier iteration are trained on once more (selection.name: "
        "regenerate), by how many iterations ago these were sampled",
        unit="prompts",
        section=_SAMPLING,
        labels={"age": ()},
        series=(Series(name="onlinerl_prompts_reused_total", kind="counter", labels={"age": None}),),
    ),
    Definition(
        name="tokens_saved",
        help="Tokens of the responses to these prompts",
        unit="tokens",
        section=_SAMPLING,
        title="Tokens not sampled",
        series=(Series(name="onlinerl_tokens_saved_total", kind="counter"),),
    ),
)

DATA = (
    Definition(
        name="oracle_calls",
        help="Training groups that the oracle was asked about, by outcome",
        unit="calls",
        section=ORACLE,
        labels={"status": ("ok", "failed")},
        series=(Series(name="onlinerl_oracle_calls_total", kind="counter", labels={"kind": "oracle", "status": "ok"}),),
    ),
    Definition(
        name="oracle_failed",
        help="Share of the latest groups of a phase that the oracle could not judge",
        unit="ratio",
        section=ORACLE,
        title="Groups that the oracle could not judge",
        n_of="groups",
        labels={"phase": ()},
        series=(Series(name="onlinerl_oracle_failed_ratio", labels={"phase": None}),),
    ),
    *JUDGING,
    Definition(
        name="zero_spread",
        help="Share of groups whose responses all score the same",
        unit="ratio",
        section=ORACLE,
        title="Groups without spread",
        estimators=("wilson",),
        n_min=200,
        series=(Series(name="onlinerl_zero_spread_ratio"),),
    ),
    Definition(
        name="reward_std_group",
        help="Standard deviation of the scores within a group",
        unit="reward",
        section=ORACLE,
        estimators=("mean",),
        n_min=200,
    ),
    Definition(
        name="pair_yield",
        help="Share of prompts that gave at least one item to train on",
        unit="ratio",
        section=ORACLE,
        series=(Series(name="onlinerl_pair_yield_ratio"),),
    ),
    Definition(name="pairs_per_prompt", help="Items to train on per sampled prompt", unit="ratio", section=ORACLE),
    Definition(
        name="pairs_dropped",
        help="Groups, candidate pairs and items not trained on, by reason",
        unit="pairs",
        section=ORACLE,
        labels={"reason": ()},
        series=(Series(name="onlinerl_pairs_dropped_total", kind="counter", labels={"reason": None}),),
    ),
    Definition(
        name="pairs_contradicted",
        help="Pairs trained on although the oracle prefers the rejected response of the two: chosen by win rate",
        unit="pairs",
        section=ORACLE,
    ),
    Definition(
        name="items_truncated",
        help="Items with a response that hit the length limit, trained on or dropped",
        unit="items",
        section=ORACLE,
        n_of="items",
    ),
    Definition(
        name="staleness",
        help="Version that training starts from less the one that sampled, over the responses trained on; 0 unless schedule.max_lag is 1 "
        "or responses are reused",
        unit="versions",
        section=ORACLE,
        title="Staleness of the responses",
        n_of="responses",
        labels={"stat": ("mean", "p95", "max")},
        series=(Series(name="onlinerl_staleness_versions", labels={"stat": None}),),
    ),
)

_SYNC = "Weight sync"
SYNC = (
    Definition(
        name="weight_sync_seconds",
        help="Wall time of the latest push and its proof",
        unit="s",
        section=_SYNC,
        title="Push and proof",
        series=(Series(name="onlinerl_weight_sync_seconds"),),
    ),
    Definition(
        name="weight_sync_bytes",
        help="Bytes of weights of the latest push",
        unit="bytes",
        section=_SYNC,
        title="Bytes pushed",
        series=(Series(name="onlinerl_weight_sync_bytes"),),
    ),
    Definition(
        name="weight_sync_ok",
        help="1 if the latest push was proved to have arrived",
        unit="bool",
        section=_SYNC,
        title="Delivery proved",
        series=(Series(name="onlinerl_weight_sync_ok"),),
    ),
    Definition(
        name="weight_sync_failures",
        help="Pushes that failed or could not be proved to have arrived",
        unit="pushes",
        section=_SYNC,
        title="Failed pushes",
        labels={"attempt": ()},
        series=(Series(name="onlinerl_weight_sync_failures_total", kind="counter"),),
    ),
    Definition(
        name="weight_sync_canary",
        help="|log-prob difference| between learner and engine on the canary of the latest push",
        unit="nats/token",
        section=_SYNC,
        series=(Series(name="onlinerl_weight_sync_canary_nats"),),
    ),
)

_FLEET = "Replicas"
_REASONS = ("died", "hung", "garbage", "push", "start")
FLEET = (
    Definition(
        name="replicas",
        help="Replicas of the engine in each state",
        unit="replicas",
        section=_FLEET,
        labels={"state": ("starting", "stale", "updating", "serving", "paused", "asleep", "dead")},
        series=(Series(name="onlinerl_replicas", labels={"state": None}),),
    ),
    Definition(
        name="replicas_least",
        help="Fewest replicas that have to serve (engine.min_replicas)",
        unit="replicas",
        section=_FLEET,
        title="Fewest replicas",
        series=(Series(name="onlinerl_replicas_least"),),
    ),
    Definition(
        name="replica_deaths",
        help="Replicas that were given up: the process ended (died), it did not answer in time (hung), what it answered cannot be true "
        "(garbage), it failed in a push (push), or while it was started again (start)",
        unit="replicas",
        section=_FLEET,
        labels={"replica": (), "reason": _REASONS, "number": (), "attempt": ()},
        series=(Series(name="onlinerl_replica_deaths_total", kind="counter", labels={"reason": None}),),
    ),
    Definition(
        name="replica_restarts",
        help="Replicas that were started again, by what they had been given up for",
        unit="replicas",
        section=_FLEET,
        labels={"replica": (), "reason": _REASONS, "number": (), "attempt": ()},
        series=(Series(name="onlinerl_replica_restarts_total", kind="counter", labels={"reason": None}),),
    ),
)

_RUN = "The run itself"
RUN = (
    Definition(
        name="phase_seconds",
        help="Wall time of a phase",
        unit="s",
        section=_RUN,
        title="Seconds per phase",
        labels={"phase": ()},
        series=(
            Series(name="onlinerl_phase_seconds", help="Wall time of the latest run of a phase", labels={"phase": None}),
            Series(name="onlinerl_phase_duration_seconds", kind="histogram", labels={"phase": None}),
        ),
    ),
    Definition(
        name="tracker_failures",
        help="Calls to a tracker that failed, in this process",
        unit="calls",
        section=_RUN,
        labels={"tracker": ()},
        series=(Series(name="onlinerl_tracker_failures", labels={"tracker": None}),),
    ),
)

STATES = (
    Series(name="onlinerl_build_info", help="Version of onlinerl", labels={"version": None}),
    Series(name="onlinerl_iteration", help="Iteration being worked on"),
    Series(name="onlinerl_attempt", help="How often the run was resumed"),
    Series(name="onlinerl_iteration_end_timestamp_seconds", help="When the latest iteration was committed"),
    Series(name="onlinerl_last_progress_timestamp_seconds", help="When something last moved", labels={"role": None}),
    Series(name="onlinerl_run_state", help="1 for the state that the run is in", labels={"state": None}),
    Series(name="onlinerl_phase", help="1 for the phase that is running", labels={"role": None, "phase": None}),
    Series(
        name="onlinerl_metric_insufficient",
        help="1 if the latest value of a metric was measured on less than its smallest n",
        labels={"name": None},
    ),
    # Named after what was not finite; excluded from every figure, never replaced by 0.
    Series(name="onlinerl_nonfinite_total", help="Values that were NaN or infinite", kind="counter", labels={"reason": None}),
)
"""What the exporter says about the run and about its own figures; not in metrics.jsonl."""

CATALOGUE = Catalogue(
    (*EVALUATION, *SAMPLING, *DATA, *TRAINING, *PAIRS, *POLICY_GRADIENT, *SYNC, *FLEET, *RUN),
    STATES,
)
