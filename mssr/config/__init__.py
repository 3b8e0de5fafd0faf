"""A run's config: `options` says what a field knows of itself; `actor`, `algorithm`, `data`, `run` have the
sections, one dataclass each; `easyr1_keys` reads EasyR1's names; `loading` merges files and overrides;
`checks` refuses what contradicts itself; `secrets` keeps keys and tokens out of what is written; `reference`
writes docs/config.md. `mssr.runs.config` puts it together."""

from mssr.config.actor import LoraConfig
from mssr.config.run import Config, ModelConfig, WatchConfig, flatten, to_dict

__all__ = ["Config", "LoraConfig", "ModelConfig", "WatchConfig", "flatten", "to_dict"]
