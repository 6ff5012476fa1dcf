"""What optimizer steps report, once; see catalogue.py."""

from __future__ import annotations

from onlinerl.metrics.definition import Definition, Series, per_step

_TRAINING = "Training"
TRAINING = (
    Definition(
        name="trained_tokens",
        help="Prompt and response tokens trained on, all epochs",
        unit="tokens",
        section=_TRAINING,
        series=(Series(name="onlinerl_trained_tokens_total", kind="counter"),),
    ),
    Definition(
        name="skipped_steps",
        help="Optimizer steps of the latest iteration that were skipped because a gradient was not finite",
        unit="steps",
        section=_TRAINING,
        series=(Series(name="onlinerl_skipped_steps"),),
    ),
    Definition(
        name="stopped_steps",
        help="Optimizer steps of the latest iteration that were not taken because the KL exceeded training.target_kl",
        unit="steps",
        section=_TRAINING,
        series=(Series(name="onlinerl_stopped_steps"),),
    ),
    Definition(
        name="idle_iterations",
        help="Iterations in a row that gave nothing to learn",
        unit="iterations",
        section=_TRAINING,
        series=(Series(name="onlinerl_idle_iterations"),),
    ),
    per_step("loss", "Training loss", "loss", section=_TRAINING, series=(Series(name="onlinerl_loss"),)),
    per_step(
        "grad_norm",
        "Norm of the gradient",
        "1",
        section=_TRAINING,
        title="Gradient norm",
        series=(Series(name="onlinerl_grad_norm"),),
    ),
    per_step(
        "aux_loss", "Auxiliary loss of the routers of a mixture of experts, without its weight", "loss", section=_TRAINING
    ),
    per_step("learning_rate", "Learning rate", "1", section=_TRAINING, series=(Series(name="onlinerl_learning_rate"),)),
    per_step("skipped", "Share of the steps that were skipped", "ratio", section=_TRAINING),
)

_PAIRS = "Losses on pairs"
PAIRS = (
    per_step("preference_loss", "The loss on preferences alone", "loss", section=_PAIRS),
    per_step("chosen_log_ratio", "log(policy / reference) of the chosen response", "nats/sequence", section=_PAIRS),
    per_step("rejected_log_ratio", "log(policy / reference) of the rejected response", "nats/sequence", section=_PAIRS),
    per_step("margin", "Log-ratio of the chosen response minus that of the rejected one", "nats/sequence", section=_PAIRS),
    per_step("z", "What the loss is a function of: the margin in the algorithm's own scale", "1", section=_PAIRS),
    per_step("accuracy", "Share of pairs whose margin favours the chosen response", "ratio", section=_PAIRS),
    per_step("ranking_accuracy", "Share of pairs whose chosen response is the more probable one", "ratio", section=_PAIRS),
    per_step("ranking_accuracy_per_token", "The same with log-probs per token", "ratio", section=_PAIRS),
    per_step("chosen_fell", "Share of chosen responses less probable than under the reference", "ratio", section=_PAIRS),
    per_step("chosen_length", "Tokens of the chosen response", "tokens", section=_PAIRS),
    per_step("rejected_length", "Tokens of the rejected response", "tokens", section=_PAIRS),
    per_step(
        "chosen_nll", "Negative log-prob of the tokens of the chosen, best or desirable response", "nats/token", section=_PAIRS
    ),
    per_step("answer_nll", "Negative log-prob of the stored answer's tokens", "nats/token", section=_PAIRS),
    per_step(
        "online_kl",
        "KL(policy / reference) on samples of the policy, as `online_kl` puts a price on it (k1)",
        "nats/sequence",
        section=_PAIRS,
    ),
    per_step("length_ratio", "Length of the chosen response over that of the rejected one", "ratio", section=_PAIRS),
    per_step("pair_weight", "Weight of a pair with `pair_weights: wpo`", "ratio", section=_PAIRS),
)

_GRADIENT = "Policy-gradient losses"
POLICY_GRADIENT = (
    per_step("policy_loss", "The clipped surrogate", "loss", section=_GRADIENT),
    per_step("clip_low", "Share of tokens clipped at the lower bound of the ratio", "ratio", section=_GRADIENT),
    per_step("clip_high", "Share of tokens clipped at the upper bound of the ratio", "ratio", section=_GRADIENT),
    per_step(
        "kl_old",
        "How far the policy moved since training on these responses began (k3); with training.target_kl of any loss",
        "nats/token",
        section=_GRADIENT,
    ),
    per_step("kl_reference", "KL to the reference, as the loss takes it (k3)", "nats/token", section=_GRADIENT),
    per_step("clamped", "Share of tokens whose log-ratio to the old policy was clamped", "ratio", section=_GRADIENT),
    per_step("entropy", "Entropy of the policy", "nats/token", section=_GRADIENT),
    per_step(
        "entropy_sampled",
        "Entropy of the policy that training starts from, estimated from the responses",
        "nats/token",
        section=_GRADIENT,
    ),
    per_step(
        "sampler_gap",
        "|log-prob difference| between the learner before training and the engine that sampled; with lag, of another version too",
        "nats/token",
        section=_GRADIENT,
    ),
    per_step(
        "sampler_capped",
        "Share of tokens whose importance weight was capped, or masked for being above the cap",
        "ratio",
        section=_GRADIENT,
    ),
    per_step(
        "sampler_floored",
        "Share of tokens whose importance weight was raised to the floor, or masked",
        "ratio",
        section=_GRADIENT,
    ),
    per_step("sampler_filtered", "Share of responses that `importance_sampling_filter` leaves out", "ratio", section=_GRADIENT),
    per_step("zero_advantage", "Share of responses without any advantage", "ratio", section=_GRADIENT),
    per_step("response_length", "Tokens of a response that is trained on", "tokens", section=_GRADIENT),
)
