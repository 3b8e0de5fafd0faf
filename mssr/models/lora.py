"""LoRA: low-rank adapters on linear layers of the language model (arXiv 2106.09685), by way of peft.

An adapted layer computes W x + b + (alpha / rank) B A x with W and b frozen. peft puts the adapters beside
the layers and leaves the tree of modules as it is: ``q_proj`` becomes ``q_proj.base_layer``,
``q_proj.lora_A.default`` and ``q_proj.lora_B.default``. The functions here make and undo that difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mssr.config import LoraConfig
from mssr.errors import UserError
from mssr.models.families import family_of

ADAPTER = "default"
_BASE = ".base_layer."


def add_adapters(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze a Hugging Face model and put adapters into its language model, in place.

    What the model computes is the same as before, because every B starts at 0.

    Args:
        config: ``rank`` must not be 0.
        seed: of the A's, which are then the same on every rank.

    Raises:
        UserError: a target is no linear layer of the language model.
    """
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft_config(model, config), model, ADAPTER)
    if config.dropout:
        for layer in adapted_layers(model).values():
            layer.lora_dropout[ADAPTER] = _TrainingDropout(config.dropout)


def peft_config(model: nn.Module, config: LoraConfig) -> Any:
    """The `peft.LoraConfig` for a model that has no adapters yet.

    Raises:
        UserError: as in `add_adapters`.
    """
    import peft

    inside = set(family_of(model.config).language_model(model).modules())
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m in inside]
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    for target in config.targets:
        if target not in kinds:
            what = f"no linear layer {target}; it has {', '.join(kinds)}"
            raise UserError(f"actor.lora.targets: the language model has {what}")
    wanted = set(config.targets or kinds)
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        # By their whole names: the vision tower has layers of the same kinds.
        target_modules=[name for name in linear if name.rpartition(".")[2] in wanted],
    )


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer with an adapter; none where there are no adapters."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}


def is_adapter(name: str) -> bool:
    """Whether a parameter, by name, belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


Named = Iterable[tuple[str, Any]]


def full_weights(
    model: nn.Module, gather: Callable[[Named], Iterable[tuple[str, torch.Tensor]]] = lambda named: named
) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights by Hugging Face name, as if there were no adapters: these are merged in, out of place.

    Args:
        gather: gives the whole tensors behind sharded ones, in their order.

    Yields:
        Name and whole weight. A merged one is W + (alpha / rank) B A, computed in float32 and returned so.
    """
    layers = adapted_layers(model)
    state = model.state_dict()
    adapters = dict(gather([(name, value) for name, value in state.items() if is_adapter(name)]))
    for name, weight in gather([(name, value) for name, value in state.items() if not is_adapter(name)]):
        stem = name.removesuffix(f"{_BASE}weight")
        if stem in layers:
            a, b = (adapters[f"{stem}.lora_{x}.{ADAPTER}.weight"] for x in "AB")
            weight = merge(weight, a, b, layers[stem].scaling[ADAPTER])
        yield name.replace(_BASE, "."), weight


@torch.no_grad()
def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """(O, I) float32 weight of a layer and its adapter together, from (O, I), (rank, I) and (O, rank)."""
    return weight.float() + scaling * (b.float() @ a.float())


def remove_adapters(model: nn.Module) -> None:
    """Put the adapters into the weights, and the plain layers back in their places."""
    for name, layer in adapted_layers(model).items():
        base = layer.base_layer
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        base.weight.data = merge(base.weight, a, b, layer.scaling[ADAPTER]).to(base.weight.dtype)
        model.set_submodule(name, base)


def save_adapter(weights: Mapping[str, torch.Tensor], config: Any, base: str, directory: Path) -> None:
    """Write adapters as `peft.PeftModel.from_pretrained` reads them.

    Args:
        weights: by their names in the model.
        config: of `peft_config`.
        base: path or name of the model that they belong to.
    """
    import safetensors.torch

    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(directory)
    named = {f"base_model.model.{n.replace(f'.{ADAPTER}.', '.')}": w for n, w in weights.items()}
    safetensors.torch.save_file(named, directory / "adapter_model.safetensors")


class WithoutAdapters(nn.Module):
    """A policy as it was before training: the reference, which needs no second model in memory."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like the policy's, with every adapter passed by."""
        layers = adapted_layers(self.policy).values()
        # Not enable_adapters(False): it also takes requires_grad from the parameters, which FSDP relies on.
        for layer in layers:
            layer._disable_adapters = True
        try:
            return self.policy(*args, **kwargs)
        finally:
            for layer in layers:
                layer._disable_adapters = False


class _TrainingDropout(nn.Dropout):
    """Dropout wherever there is a gradient: the log-probs of other passes are those of the whole policy.

    The mode of the modules does not say so: models here are in eval mode, or in train mode for activation
    checkpointing.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, self.p, training=torch.is_grad_enabled())
