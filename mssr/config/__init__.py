"""A run's config: `options` says what a field knows of itself; `algorithm`, `data`, `run` have the sections,
one dataclass each; `easyr1_keys` reads EasyR1's names; `loading` merges files and overrides; `checks` refuses
what contradicts itself; `secrets` keeps keys and tokens out of what is written; `reference` writes
docs/config.md. `mssr.runs.config` puts it together."""

from mssr.config.algorithm import AlgorithmConfig, SamplerConfig
from mssr.config.data import DataConfig, RewardConfig
from mssr.config.run import (
    ActorConfig,
    ClusterConfig,
    Config,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    TrainerConfig,
    WatchConfig,
    flatten,
    to_dict,
)

__all__ = [
    "ActorConfig",
    "AlgorithmConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "RewardConfig",
    "RolloutConfig",
    "SamplerConfig",
    "TrainerConfig",
    "WatchConfig",
    "flatten",
    "to_dict",
]
