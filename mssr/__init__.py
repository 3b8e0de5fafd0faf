"""mssr: single-rollout reinforcement learning from verifiable rewards for vision-language models."""

__version__ = "0.2.0"
