"""What keys and names are called here that were called otherwise in earlier versions, or are in other trainers (TRL, OpenRLHF, verl)."""

from __future__ import annotations

RENAMED: dict[str, str] = {
    "algorithm.clip": "algorithm.clip_range",
    "algorithm.clip_high": "algorithm.clip_range_high",
    "algorithm.clip_low": "algorithm.clip_range_low",
    "algorithm.kl": "algorithm.kl_coef",
    "algorithm.sampler_cap": "algorithm.importance_sampling_cap",
    "algorithm.train": "algorithm.pairs",
    "algorithm.value_clip": "algorithm.clip_range_value",
    "engine.max_concurrent": "engine.max_num_seqs",
    "learner.attention": "learner.attn_implementation",
    "training.items_per_step": "training.batch_size",
    "training.schedule": "training.lr_scheduler_type",
    "training.warmup": "training.warmup_ratio",
}
"""Keys of earlier versions -> what to write, in the same section. Refused where somebody writes one, and read as the new key where a run
stored it; a class of the user's own may have a key of that name."""

EARLIER: dict[str, float] = {"pairing.tie_within": 0.0}
"""Keys that came with a later version and change what is computed -> the value that means what earlier versions did: a run of theirs goes on so."""

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
    "dataset_name": "prompts.train, with prompts.name=dataset",
    "dataset_config": "prompts.subset, with prompts.name=dataset",
    "dataset_train_split": "prompts.train_split, with prompts.name=dataset",
    "dataset_test_split": "prompts.heldout_split, with prompts.name=dataset",
    "prompt_split": "prompts.train_split, with prompts.name=dataset",
    "eval_split": "prompts.heldout_split, with prompts.name=dataset",
    "input_key": "prompts.columns.prompt, with prompts.name=dataset",
    "prompt_key": "prompts.columns.prompt, with prompts.name=dataset",
    "label_key": "prompts.columns.reference_answer, with prompts.name=dataset",
    "reward_model": "oracle.path, with oracle.name=reward_model",
    "reward_funcs": "oracle.members, with oracle.name=composite",
    "reward_weights": "oracle.weights, with oracle.name=composite",
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
    "filter_groups": "sampling.dynamic",
    "dynamic_filtering": "sampling.dynamic",
    "max_num_gen_batches": "sampling.max_rounds",
    "lr": "training.learning_rate",
    "actor_learning_rate": "training.learning_rate",
    "train_batch_size": "training.batch_size",
    "mini_batch_size": "training.batch_size",
    "ppo_mini_batch_size": "training.batch_size",
    "per_device_train_batch_size": "learner.tokens_per_microbatch",
    "micro_batch_size": "learner.tokens_per_microbatch",
    "micro_train_batch_size": "learner.tokens_per_microbatch",
    "gradient_accumulation_steps": "learner.tokens_per_microbatch",
    "max_tokens_per_gpu": "learner.tokens_per_microbatch",
    "ppo_max_token_len_per_gpu": "learner.tokens_per_microbatch",
    "use_remove_padding": "learner.padding_free",
    "packing_samples": "learner.padding_free",
    "packing": "learner.padding_free",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "ppo_epochs": "training.epochs",
    "lr_scheduler": "training.lr_scheduler_type",
    "lr_warmup_ratio": "training.warmup_ratio",
    "lr_warmup_steps_ratio": "training.warmup_ratio",
    "grad_clip": "training.max_grad_norm",
    "max_norm": "training.max_grad_norm",
    "tp": "engine.tensor_parallel_size",
    "tp_size": "engine.tensor_parallel_size",
    "vllm_tensor_parallel_size": "engine.tensor_parallel_size",
    "num_engines": "engine.replicas",
    "vllm_num_engines": "engine.replicas",
    "zero": "learner.zero_stage",
    "world_size": "learner.ranks",
    "num_gpus": "learner.ranks",
    "n_gpus_per_node": "learner.ranks",
    "bf16": "learner.dtype",
    "use_peft": "learner.lora",
    "peft_config": "learner.lora",
    "lora_config": "learner.lora",
    "lora": "learner.lora",
    "r": "learner.lora.rank",
    "lora_r": "learner.lora.rank",
    "lora_rank": "learner.lora.rank",
    "lora_alpha": "learner.lora.alpha",
    "lora_dropout": "learner.lora.dropout",
    "lora_target_modules": "learner.lora.target_modules",
    "use_rslora": "learner.lora.use_rslora",
    "kl_coef": "algorithm.beta",
    "init_kl_coef": "algorithm.kl_coef or algorithm.beta",
    "beta": "algorithm.kl_coef",
    "rpo_alpha": "algorithm.nll_coef",
    "nll_loss_coef": "algorithm.nll_coef",
    "use_weighting": "algorithm.pair_weights",
    "clip": "algorithm.clip_range_low",
    "cliprange": "algorithm.clip_range or algorithm.clip_range_low",
    "clip_range": "algorithm.clip_range_low",
    "clip_ratio": "algorithm.clip_range or algorithm.clip_range_low",
    "eps_clip": "algorithm.clip_range or algorithm.clip_range_low",
    "epsilon": "algorithm.clip_range or algorithm.clip_range_low",
    "clip_ratio_low": "algorithm.clip_range_low",
    "clip_ratio_high": "algorithm.clip_range_high",
    "epsilon_high": "algorithm.clip_range_high",
    "cliprange_value": "algorithm.clip_range_value",
    "clip_range_vf": "algorithm.clip_range_value",
    "entropy_coeff": "algorithm.entropy_coef",
    "ent_coef": "algorithm.entropy_coef",
    "entropy_loss_coef": "algorithm.entropy_coef",
    "reward_clip_range": "algorithm.score_clip",
    "vllm_importance_sampling_cap": "algorithm.importance_sampling_cap",
    "vllm_importance_sampling_clip_max": "algorithm.importance_sampling_cap",
    "vllm_importance_sampling_clip_min": "algorithm.importance_sampling_floor",
    "vllm_is_truncated_threshold": "algorithm.importance_sampling_cap",
    "rollout_is_threshold": "algorithm.importance_sampling_cap",
    "vllm_importance_sampling_mode": "algorithm.importance_sampling_mode",
    "rollout_is": "algorithm.importance_sampling_mode",
    "rollout_rs": "algorithm.importance_sampling_filter",
    "rollout_rs_threshold": "algorithm.importance_sampling_filter",
    "sync_ref_model": "reference.schedule",
    "ref_model_mixup_alpha": "reference.mixup_alpha, with reference.schedule=ema",
    "ref_model_sync_steps": "reference.every, in iterations",
    "async_level": "schedule.max_lag",
    "max_async_level": "schedule.max_lag",
    "staleness_threshold": "schedule.max_lag",
    "router_aux_loss_coef": "training.aux_loss_coef",
    "save_total_limit": "checkpoints.keep",
    "max_ckpt_num": "checkpoints.keep",
}
"""A key, or its last part -> what to write. Of several the first that the chosen implementation has."""

MODIFIERS: dict[str, str] = {
    "algorithm.pair_filter": "filters the pairs of losses that are a function of the margin of a pair alone",
    "algorithm.pair_weights": "says what a pair counts in losses on pairs; for others there is training.sample_weights",
    "algorithm.token_weights": "weighs the tokens of the pairs of losses that are a function of the margin of a pair alone",
    "algorithm.nll_coef": "is the price of the likelihood of chosen or better responses, in losses on pairs, on lists and of policy gradients",
    "algorithm.nll_target": "belongs to `nll_coef` of losses on pairs",
    "algorithm.online_kl": "is a term of losses of the margin of a pair and of policy gradients",
    "algorithm.online_kl_samples": "belongs to `online_kl` of losses of the margin of a pair",
}
"""Keys that many algorithms have and others cannot -> what they are."""

NAMES: dict[str, str] = {
    "math": "math_verifier",
    "gsm8k": "math_verifier",
    "rm": "reward_model",
    "code": "code_verifier",
    "prime_code": "code_verifier",
    "regex": "format",
    "think_format_reward": "format",
    "jury": "ensemble",
    "function": "python",
}
"""Name of an implementation -> its name here."""


def key(written: str) -> str | None:
    """What a key of another trainer is called here."""
    plain = _plain(written)
    return KEYS.get(plain) or KEYS.get(plain.rsplit(".", 1)[-1])


def name(written: str) -> str:
    """What an implementation is probably called here: other letters, or another name. Everything here is online."""
    plain = _plain(written).removeprefix("online_")
    return NAMES.get(plain, plain)


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
