"""A run's config: `run`, `algorithm` and `data` hold the sections (one dataclass each), `loading` merges
files and overrides (`easyr1_keys` reads EasyR1's names), `checks` and `readers` refuse what contradicts
itself, `secrets` keeps keys and tokens out of what is written."""

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
