"""What is made of pairs and their labels: which knobs exclude one another, and which nothing would read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

from onlinerl.config import RunConfig, pair_builder
from onlinerl.errors import ConfigError
from onlinerl.protocols.algorithm import Algorithm


class _Fault(NamedTuple):
    knob: str
    cause: str
    fix: str


def check_labels(config: RunConfig, algorithm: Algorithm) -> None:
    """Refuse what counts a strength, or a doubt, of one label twice, and what is set and nothing reads.

    A label is trusted by a probability (`soft_labels`, `label_smoothing`, `flip_rate`), or its strength is a margin (`score_margin`) or a weight
    (`pair_weights: strength` and `dcg`): one of these. Weights for other reasons go with any.

    Raises:
        ConfigError: naming the knob, the cause and the fix.
    """
    knobs = algorithm.model_dump()
    fault = next(
        (
            one
            for one in (
                *_twice(algorithm, knobs),
                *_unread(config, algorithm, knobs),
                *_sources(config, algorithm),
                *_impossible(knobs),
            )
        ),
        None,
    )
    if fault is not None:
        raise ConfigError(fault.cause, field=f"algorithm.{fault.knob}", fix=fault.fix)
    for section, faults in (("training", _weights(config, algorithm)), ("pairing", _pairing(config, algorithm))):
        fault = next(faults, None)
        if fault is not None:
            raise ConfigError(fault.cause, field=f"{section}.{fault.knob}", fix=fault.fix)


def _pairing(config: RunConfig, algorithm: Algorithm) -> Iterator[_Fault]:
    """What becomes of the pairs of the pair builder."""
    if not algorithm.needs.pairs:
        return
    builder = pair_builder(config)
    labels = type(algorithm).model_fields.get("soft_labels")
    if builder.soft is not None and not (
        algorithm.needs.preferences if labels is None else algorithm.model_dump()["soft_labels"]
    ):
        own = labels is not None and labels.annotation is bool
        yield _Fault(
            builder.soft,
            f"is {getattr(builder, builder.soft)}, and {config.algorithm['name']} as configured takes every label for certain: it would train a "
            "pair that is even as if one of the two had won",
            "leave it out, or "
            + (
                "set algorithm.soft_labels=true" if own else "choose a loss that reads probabilities, e.g. dpo with soft_labels"
            ),
        )
    if algorithm.needs.uncertainty and builder.uncertainty_filter.mu:
        yield _Fault(
            "uncertainty_filter.mu",
            f"is {builder.uncertainty_filter.mu}, and {config.algorithm['name']} goes by the uncertainty of each label itself",
            "leave it out",
        )


def _weights(config: RunConfig, algorithm: Algorithm) -> Iterator[_Fault]:
    """Of items that are no pairs of the pair builder."""
    kind, clip = config.training.sample_weights, config.training.sample_weight_clip
    name, judged = config.algorithm["name"], config.sampling.samples_per_prompt + len(algorithm.needs.beside_samples)
    decay = config.training.sample_age_decay
    if kind != "age" and decay != type(config.training).model_fields["sample_age_decay"].default:
        yield _Fault(
            "sample_age_decay", f"is {decay}, and training.sample_weights is {kind}", "leave it out, or set that to age"
        )
    if kind == "equal" and clip is not None:
        yield _Fault("sample_weight_clip", f"is {clip}, and training.sample_weights is equal", "leave it out, or set that")
    if kind == "equal":
        return
    if not algorithm.weighable:
        own = "pair_weights" in type(algorithm).model_fields
        yield _Fault(
            "sample_weights",
            f"is {kind}, and {name} " + ("has weights of its pairs" if own else "has no use for weights, or has its own"),
            "leave it out, and set algorithm.pair_weights" if own else "leave it out",
        )
    if kind == "score_gap" and algorithm.unit not in ("pair", "list"):
        yield _Fault(
            "sample_weights",
            f"is score_gap, and {name} trains single responses, which have no gap",
            "set it to certainty: how far a response is from winning half of its comparisons",
        )
    if kind == "certainty" and judged == 1:
        yield _Fault(
            "sample_weights",
            "is certainty, and with one response to each prompt there is nothing that it could win against",
            "leave it out, or set sampling.samples_per_prompt to 2 or more",
        )
    if kind == "per_prompt" and algorithm.most_items(judged, 1) == 1:
        yield _Fault(
            "sample_weights",
            f"is per_prompt, and {name} makes at most one item of each prompt, so all would count alike",
            "leave it out",
        )
    if kind == "age" and not _comes_again(config, algorithm):
        yield _Fault(
            "sample_weights",
            "is age, and all responses that are trained are of the same one: none of earlier iterations come back",
            "choose another, or set selection.name=regenerate",
        )
    if _is_no_clip(clip):
        yield _Fault("sample_weight_clip", f"is {clip}: {_CLIP}", _CLIP_FIX)


def _comes_again(config: RunConfig, algorithm: Algorithm) -> bool:
    """Whether responses of earlier iterations are trained once more."""
    return bool(algorithm.needs.replay) or config.selection.reuses


_CLIP = "it takes the lowest and the highest weight, and the mean weight, 1, is between the two"
_CLIP_FIX = "set it to e.g. [0.1, 5.0]"


def _is_no_clip(clip: list[float] | None) -> bool:
    return clip is not None and not (len(clip) == 2 and 0.0 <= clip[0] <= 1.0 <= clip[1] and clip[0] < clip[1])


def _twice(algorithm: Algorithm, knobs: dict[str, Any]) -> Iterator[_Fault]:
    doubts = [knob for knob in ("soft_labels", "label_smoothing", "flip_rate") if knobs.get(knob)]
    doubts += ["the uncertainty of each label, which this algorithm reads"] if algorithm.needs.uncertainty else []
    if knobs.get("soft_labels") and knobs.get("flip_rate"):
        yield _Fault(
            "flip_rate",
            f"is {knobs['flip_rate']}, and soft_labels is set: the probabilities of an oracle that is wrong at times say so already, and the "
            "correction would count that twice",
            "leave one of the two out",
        )
    if knobs.get("score_margin") and doubts:
        yield _Fault(
            "score_margin",
            f"is {knobs['score_margin']}, beside {doubts[0]}: how sure a label is would count as a margin and as a probability",
            "leave it out, or that",
        )
    strengths = [knob for knob in ("soft_labels", "score_margin") if knobs.get(knob)]
    if knobs.get("pair_weights") in ("strength", "dcg") and strengths:
        yield _Fault(
            "pair_weights",
            f"is {knobs['pair_weights']}, and {strengths[0]} is set too: how much better a response is would count twice",
            "leave one of the two out",
        )


def _unread(config: RunConfig, algorithm: Algorithm, knobs: dict[str, Any]) -> Iterator[_Fault]:
    weights, defaults = knobs.get("pair_weights"), {n: f.default for n, f in type(algorithm).model_fields.items()}
    filtered, free = knobs.get("pair_filter") or {}, not algorithm.needs.reference
    if free and knobs.get("online_kl"):
        yield _Fault("online_kl", "there is no reference that a KL could be to", "set it to 0")
    if free and filtered.get("max_reference_margin") is not None:
        yield _Fault(
            "pair_filter.max_reference_margin", "there is no reference whose log-probs could be compared", "leave it out"
        )
    if filtered.get("ches_normalized") is False and not filtered.get("ches_share"):
        yield _Fault(
            "pair_filter.ches_normalized",
            "nothing would read it: algorithm.pair_filter.ches_share is 0",
            "leave it out, or set that",
        )
    readers = {
        "importance_sampling_mode": (knobs.get("importance_sampling_cap") is not None, "importance_sampling_cap is null"),
        "importance_sampling_floor": (knobs.get("importance_sampling_cap") is not None, "importance_sampling_cap is null"),
        "kl_clip": (
            algorithm.needs.kl_in_reward or knobs.get("objective") == "kl",
            "kl_coef is 0, or the KL is no part of a reward",
        ),
        "online_kl_samples": (knobs.get("online_kl"), "online_kl is 0"),
        "strength_thresholds": (weights == "strength", "pair_weights is not strength"),
        "pair_age_decay": (weights == "age", "pair_weights is not age"),
        "source_weights": (weights == "source", "pair_weights is not source"),
        "pair_weight_clip": (weights not in ("equal", "wpo"), f"pair_weights is {weights}"),
        "nll_target": (knobs.get("nll_coef"), "nll_coef is 0"),
        "nll_norm": (knobs.get("nll_coef"), "nll_coef is 0"),
        "nll_on": (knobs.get("nll_coef"), "nll_coef is 0"),
        "common_token_weight": (knobs.get("token_weights") == "differing", "token_weights is not differing"),
        "score_margin_max": (knobs.get("score_margin"), "score_margin is 0"),
    }
    for knob, (read, why) in readers.items():
        if not read and knob in knobs and knobs[knob] != defaults[knob]:
            yield _Fault(knob, f"is {knobs[knob]}, and nothing would read it: algorithm.{why}", "leave it out, or set that")
    if weights == "age" and not _comes_again(config, algorithm):
        yield _Fault(
            "pair_weights",
            "is age, and all pairs that are trained are of the same one: no pairs of earlier iterations come back",
            "choose another, selection.name=regenerate, or an algorithm that trains earlier pairs once more, such as one with "
            "algorithm.replay above 0",
        )
    shares = [knobs.get("teacher_max_share"), knobs.get("teacher_decay")]
    if algorithm.needs.teacher and config.sampling.samples_per_prompt == 1 and None not in shares and shares != [1.0, 1.0]:
        yield _Fault(
            "teacher_max_share",
            f"is {shares[0]}, and with one sample per prompt every pair has the teacher's answer: at most a share of them would be trained",
            "set sampling.samples_per_prompt to 2 or more, or it and algorithm.teacher_decay to 1.0",
        )
    judged = config.sampling.samples_per_prompt + len(algorithm.needs.beside_samples)
    if weights == "per_prompt" and pair_builder(config).most(judged) == 1:
        yield _Fault(
            "pair_weights",
            "is per_prompt, and the pair builder makes at most one pair of each prompt, so all would count alike",
            "leave it out, or set pairing.name=all_pairs",
        )


def _sources(config: RunConfig, algorithm: Algorithm) -> Iterator[_Fault]:
    """Of `pair_weights: source`."""
    knobs = algorithm.model_dump()
    if knobs.get("pair_weights") != "source":
        return
    counts, replayed = knobs["source_weights"], ["replay"] * _comes_again(config, algorithm)
    known = [*dict.fromkeys(("policy", *algorithm.needs.beside_samples)), *replayed]
    if len(known) == 1:
        yield _Fault(
            "pair_weights",
            "is source, and all responses that are trained are samples of the policy of the same iteration, so all pairs would count alike",
            "choose another, or what has others among them: an algorithm with a teacher, or selection.name=regenerate",
        )
    if not counts:
        yield _Fault("source_weights", "is empty, so all pairs count alike", f"set it, e.g. {{{known[-1]}: 0.5}}")
    strange = next((name for name in counts if name not in known), None)
    if strange is not None:
        yield _Fault(
            "source_weights",
            f"names {strange!r}, and what is trained here is from {', '.join(known)}",
            "name some of these, or leave it out",
        )
    wrong = next((count for count in counts.values() if not 0.0 <= count < inf), None)
    if wrong is not None:
        yield _Fault("source_weights", f"has {wrong}, and a weight is a number from 0 on", "set it to e.g. 0.5")


def _impossible(knobs: dict[str, Any]) -> Iterator[_Fault]:
    thresholds = knobs.get("strength_thresholds") or []
    if knobs.get("pair_weights") == "strength" and not thresholds:
        yield _Fault(
            "strength_thresholds",
            "is empty, so all pairs are of one class and count alike",
            "set it to score gaps in ascending order, e.g. [1.0, 2.0], in units of the oracle's score",
        )
    if any(high <= low for low, high in pairwise(thresholds)):
        yield _Fault("strength_thresholds", f"is {thresholds}, which is not ascending", "sort it, each gap once")
    clip = knobs.get("pair_weight_clip")
    if _is_no_clip(clip):
        yield _Fault("pair_weight_clip", f"is {clip}: {_CLIP}", _CLIP_FIX)
    floor, cap = knobs.get("importance_sampling_floor"), knobs.get("importance_sampling_cap")
    if floor is not None and cap is not None and floor >= cap:
        yield _Fault(
            "importance_sampling_floor",
            f"is {floor}, and importance_sampling_cap is {cap}: no ratio is between the two",
            "lower it, or raise that",
        )
    band = knobs.get("importance_sampling_filter")
    if band is not None and not 0.0 < band[0] < 1.0 < band[1]:
        yield _Fault(
            "importance_sampling_filter",
            f"is {list(band)}: it takes the lowest and the highest mean of ratios, and 1, where who sampled is who learns, is between the two",
            "set it to e.g. [0.5, 2.0]",
        )
    if knobs.get("token_weights") == "differing" and knobs.get("common_token_weight") == 1.0:
        yield _Fault(
            "common_token_weight",
            "is 1, so tokens that both responses have in common count like all others",
            "lower it, or leave algorithm.token_weights out",
        )
