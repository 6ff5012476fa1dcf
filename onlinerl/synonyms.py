"""What keys and names of other trainers (TRL, OpenRLHF, verl) are called here: for the suggestion when an unknown one is written."""

from __future__ import annotations

KEYS: dict[str, str] = {
    "model_name_or_path": "model",
    "pretrain": "model",
    "output_dir": "runs",
    "save_path": "runs",
    "run_name": "name",
    "num_iterations": "iterations",
    "dataset": "prompts.train",
    "train_files": "prompts.train",
    "prompt_data": "prompts.train",
    "val_files": "prompts.heldout",
    "eval_dataset": "prompts.heldout",
    "reward_model": "oracle.path, with oracle.name=reward_model",
    "rollout": "engine",
    "actor": "learner",
    "trainer": "training",
    "rollout_batch_size": "prompts.per_iteration",
    "prompts.max_length": "prompts.max_tokens",
    "engine.max_length": "engine.max_model_len",
    "max_prompt_length": "prompts.max_tokens",
    "prompt_max_len": "prompts.max_tokens",
    "n": "sampling.samples_per_prompt",
    "num_generations": "sampling.samples_per_prompt",
    "num_samples": "sampling.samples_per_prompt",
    "n_samples_per_prompt": "sampling.samples_per_prompt",
    "max_tokens": "sampling.max_new_tokens",
    "max_length": "sampling.max_new_tokens",
    "max_completion_length": "sampling.max_new_tokens",
    "max_response_length": "sampling.max_new_tokens",
    "generate_max_len": "sampling.max_new_tokens",
    "lr": "training.learning_rate",
    "actor_learning_rate": "training.learning_rate",
    "batch_size": "training.items_per_step",
    "train_batch_size": "training.items_per_step",
    "mini_batch_size": "training.items_per_step",
    "ppo_mini_batch_size": "training.items_per_step",
    "per_device_train_batch_size": "learner.tokens_per_microbatch",
    "micro_batch_size": "learner.tokens_per_microbatch",
    "micro_train_batch_size": "learner.tokens_per_microbatch",
    "gradient_accumulation_steps": "learner.tokens_per_microbatch",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "ppo_epochs": "training.epochs",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler": "training.schedule",
    "warmup_ratio": "training.warmup",
    "lr_warmup_ratio": "training.warmup",
    "grad_clip": "training.max_grad_norm",
    "max_norm": "training.max_grad_norm",
    "tp": "engine.tensor_parallel_size",
    "tp_size": "engine.tensor_parallel_size",
    "vllm_tensor_parallel_size": "engine.tensor_parallel_size",
    "num_engines": "engine.replicas",
    "vllm_num_engines": "engine.replicas",
    "max_num_seqs": "engine.max_concurrent",
    "zero": "learner.zero_stage",
    "world_size": "learner.ranks",
    "num_gpus": "learner.ranks",
    "n_gpus_per_node": "learner.ranks",
    "attn_implementation": "learner.attention",
    "bf16": "learner.dtype",
    "kl_coef": "algorithm.kl or algorithm.beta",
    "init_kl_coef": "algorithm.kl or algorithm.beta",
    "beta": "algorithm.beta or algorithm.kl",
    "cliprange": "algorithm.clip or algorithm.clip_low",
    "clip_range": "algorithm.clip or algorithm.clip_low",
    "clip_ratio": "algorithm.clip or algorithm.clip_low",
    "epsilon": "algorithm.clip or algorithm.clip_low",
    "sampler_cap": "algorithm.importance_sampling_cap",
    "vllm_importance_sampling_cap": "algorithm.importance_sampling_cap",
    "vllm_importance_sampling_clip_max": "algorithm.importance_sampling_cap",
    "vllm_is_truncated_threshold": "algorithm.importance_sampling_cap",
    "rollout_is_threshold": "algorithm.importance_sampling_cap",
    "vllm_importance_sampling_mode": "algorithm.importance_sampling_mode",
    "rollout_is": "algorithm.importance_sampling_mode",
    "async_level": "schedule.max_lag",
    "max_async_level": "schedule.max_lag",
    "staleness_threshold": "schedule.max_lag",
}
"""A key, or its last part -> what to write. Of several the first that the chosen implementation has."""

NAMES: dict[str, str] = {
    "math": "math_verifier",
    "gsm8k": "math_verifier",
    "rm": "reward_model",
    "function": "python",
}
"""Name of an implementation -> its name here."""


def key(written: str) -> str | None:
    """What a key of another trainer is called here."""
    plain = _plain(written)
    return KEYS.get(plain) or KEYS.get(plain.rsplit(".", 1)[-1])


def name(written: str) -> str:
    """What an implementation is probably called here: other letters, or another name."""
    plain = _plain(written)
    return NAMES.get(plain, plain)


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
