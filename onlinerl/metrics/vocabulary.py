"""In what metrics are measured, and how they are estimated."""

from __future__ import annotations

from collections.abc import Mapping

from onlinerl.metrics.definition import Estimator

ESTIMATORS: Mapping[Estimator, str] = {
    "exact": "counted, timed, or computed from all that there is; without an error bar",
    "mean": "mean of one value per prompt; bootstrap over prompts",
    "wilson": "share of prompts; Wilson interval",
    "ratio": "one sum over another, e.g. nats over tokens; bootstrap over prompts",
    "k1": "mean over prompts of sum_t d_t, d_t the difference of the log-probs of token t; unbiased; bootstrap over prompts",
    "k3": "mean over prompts of sum_t (exp(-d_t) - 1 + d_t); unbiased, never negative, less noisy near the other model; bootstrap "
    "over prompts",
    "mean over steps": "mean over the optimizer steps of the iteration, each of them a mean over its batch; bootstrap over steps",
}
"""Estimator -> what it does. Every interval is at 95 %."""

UNITS: Mapping[str, str] = {
    "1": "a number without a unit",
    "bool": "1 for yes, 0 for no",
    "bytes": "",
    "calls": "",
    "items": "what is trained as one: a response, a pair or a group",
    "iterations": "",
    "loss": "whatever the algorithm's loss is in; not comparable between algorithms",
    "nats": "",
    "nats/sequence": "summed over the tokens of a response",
    "nats/token": "",
    "pairs": "",
    "prompts": "",
    "pushes": "",
    "ratio": "a share within [0, 1], or a quotient",
    "replicas": "",
    "responses": "",
    "reward": "the oracle's score; win rates where it gives none",
    "s": "seconds",
    "steps": "",
    "tokens": "",
    "USD": "US dollars",
    "versions": "",
}
"""Unit -> what must be said about it."""
