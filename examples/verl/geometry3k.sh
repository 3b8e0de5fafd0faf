#!/usr/bin/env bash
# MSSR in verl 0.9.1: Qwen2.5-VL-3B on Geometry3K, 4 GPUs of 80 GB. Arguments are further overrides of verl's.
# Data: verl's own examples/data_preprocess/geo3k.py, which numbers the rows (extra_info.index), into $DATA.
set -euo pipefail
DATA=${DATA:-$HOME/data/geo3k}

exec python3 -m verl.trainer.main_ppo \
    trainer.v1.trainer_mode=mssr_sync \
    algorithm.adv_estimator=mssr \
    actor_rollout_ref.rollout.n=1 \
    +algorithm.mssr.kl_target=0.01 \
    data.train_files="$DATA/train.parquet" \
    data.val_files="$DATA/test.parquet" \
    data.train_batch_size=512 \
    data.seed=1 \
    data.max_prompt_length=1024 \
    data.max_response_length=2048 \
    data.filter_overlong_prompts=true \
    data.image_key=images \
    actor_rollout_ref.model.path=Qwen/Qwen2.5-VL-3B-Instruct \
    actor_rollout_ref.model.use_remove_padding=true \
    actor_rollout_ref.model.enable_gradient_checkpointing=true \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.ref.strategy=fsdp2 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.clip_ratio_high=0.3 \
    actor_rollout_ref.actor.use_kl_loss=true \
    actor_rollout_ref.actor.kl_loss_coef=0.01 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    actor_rollout_ref.actor.use_dynamic_bsz=true \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    trainer.logger='[console]' \
    trainer.project_name=mssr \
    trainer.experiment_name=geometry3k_3b \
    trainer.n_gpus_per_node=4 \
    trainer.nnodes=1 \
    trainer.save_freq=20 \
    trainer.test_freq=5 \
    trainer.total_epochs=15 \
    "$@"
