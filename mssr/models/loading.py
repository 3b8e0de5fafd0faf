"""Opening a Hugging Face model directory, with one-line errors for what is no model."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mssr.config import Config, ModelConfig
from mssr.config.options import describe, in_yaml, values
from mssr.errors import UserError, first_line
from mssr.models.families import family_named, family_of
from mssr.models.processor import Processor


def check_model_path(config: ModelConfig, tensor_parallel: int = 1) -> None:
    """Refuse a directory that holds no model of a known family, or one that engines cannot share out over so
    many devices, without importing torch.

    A path that is no directory is left to transformers, as a hub name.

    Raises:
        UserError: names the directory and what is missing.
    """
    path = Path(config.path)
    if not is_there(config.path):
        return
    try:
        model_config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: {config.path} is no Hugging Face model (config.json: {error})"
        ) from error
    family = family_named(model_config.get("model_type"), config.path)
    if not any(path.glob("*.safetensors")):
        raise UserError(f"model.path: {config.path} holds no *.safetensors weights")
    family.check_files(model_config, path)
    text = model_config | model_config.get("text_config", {})
    for name in family.shared_out:
        # A head of keys and values may also be on several devices.
        count = text.get(name, tensor_parallel)
        several = name == "num_key_value_heads" and tensor_parallel % count == 0
        if count % tensor_parallel and not several:
            raise UserError(
                f"rollout.tensor_parallel={tensor_parallel} does not divide {name}={count} of "
                f"{config.path}; powers of 2 mostly do"
            )


def is_there(name: str) -> bool:
    """Whether a model path exists; if not it may be a hub name.

    Raises:
        UserError: it may not.
    """
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.count("/") != 1 or name.startswith(".")):
        # The embedded tasks, as the recipes name their directories: data/digits, data/digits-<family>.
        task, _, family = path.parent.name.partition("-")
        how = ""
        if (task, path.name) == ("digits", "model"):
            how = f"; mssr prepare digits --out {path.parent}{family and f' --model {family}'} makes it"
        elif path.parts[-3:-1] == ("chains", "bases"):
            how = f"; mssr prepare chains --out {path.parents[1]} makes it"
        raise UserError(f"model.path: directory {name} does not exist{how}")
    return path.exists()


def check_sight(config: Config, sees_images: bool) -> None:
    """Refuse options that nothing reads where a model takes text only.

    Raises:
        UserError: names the option.
    """
    known = describe(Config)
    for key, value in () if sees_images else values(config):
        if key in _FOR_SIGHT and value != known[key].default:
            raise UserError(
                f"{key}={in_yaml(value)} is for models that see images, and {config.model.path} takes text "
                "only; remove it"
            )


_FOR_SIGHT = (
    "model.freeze_vision",
    "actor.vision_cache_gib",
    "algorithm.loss.text_anchor_coef",
    "algorithm.shaping.visual",
)


def load_processor(config: ModelConfig) -> Processor:
    """What stands before the model.

    Raises:
        UserError: there is none, it has no chat template, or its tokenizer is not the model's.
    """
    auto = import_transformers().AutoProcessor
    try:
        loaded = auto.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers raises many types for an incomplete directory
        raise UserError(f"model.path: {config.path} has no processor ({first_line(error)})") from error
    model_config = read_config(config)
    family = family_of(model_config)
    if family.tower_name and not hasattr(loaded, "image_processor"):
        raise UserError(f"model.path: {config.path} has no processor for images")
    processor = Processor(loaded, family)
    if not processor.chat_template:
        raise UserError(f"model.path: the processor of {config.path} has no chat template")
    # transformers makes an empty tokenizer where its files are missing, without a word.
    if processor.image_token_id != (own := getattr(model_config, "image_token_id", None)):
        raise UserError(
            f"model.path: {config.path} has no processor with the model's tokenizer (the image token is "
            f"{processor.image_token_id} there and {own} in config.json)"
        )
    ends = getattr(model_config, "eos_token_id", None)
    last = max(ends, default=0) if isinstance(ends, list) else ends or 0
    if last >= (known := len(processor.tokenizer)):
        raise UserError(
            f"model.path: {config.path} has no tokenizer of the model's ({known} tokens are there, and "
            f"config.json ends responses with number {last})"
        )
    return processor


def load_model(config: ModelConfig, dtype: Any, packed: bool = True, empty: bool = False) -> Any:
    """The model with its weights in ``dtype``, on CPU, in eval mode (no dropout anywhere).

    Args:
        packed: for passes over packed sequences; false where it is to generate, with padding and a cache.
        empty: on the meta device: every tensor with its shape and without memory.

    Raises:
        UserError: config or weights cannot be read or do not fit.
    """
    import torch

    from mssr.models.attention import use_varlen_attention

    varlen = config.attn_implementation in ("auto", "varlen")
    options = {
        "dtype": dtype,
        "attn_implementation": "sdpa" if varlen else config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
    }
    try:
        model_config = read_config(config)
        family = family_of(model_config)
        kind = getattr(import_transformers(), family.auto_class)
        if empty:
            with torch.device("meta"):
                model = kind.from_config(model_config, **options)
        else:
            model = kind.from_pretrained(config.path, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise UserError(f"model.path: {config.path} cannot be loaded ({first_line(error)})") from error
    if varlen and packed:
        if "sliding_attention" not in (getattr(family.text_config(model.config), "layer_types", None) or ()):
            use_varlen_attention(model)
        elif config.attn_implementation == "varlen":
            raise UserError(
                f"model.attn_implementation=varlen: {config.path} has layers with a sliding window, which it "
                "does not know; use sdpa"
            )
    family.adapt(model, packed)
    return model.eval()


def read_config(config: ModelConfig) -> Any:
    """The transformers config of the model, wherever that is."""
    auto = import_transformers().AutoConfig
    return auto.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)


def resolve_device(name: str) -> str:
    """``cluster.device`` -> "cpu" or "cuda"."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def compute_dtype(name: str, device: str) -> Any:
    """``model.dtype`` -> the torch dtype of forward passes on "cpu" or "cuda", in engines and actor."""
    import torch

    if name == "auto":
        name = "bfloat16" if device == "cuda" else "float32"
    return getattr(torch, name)


def import_transformers() -> Any:
    """The library, kept from importing what takes seconds in every process and is for other models: torchao
    (quantised ones), scikit-learn (assisted generation) and SciPy (losses of object detection)."""
    import transformers
    from transformers.utils import import_utils

    for module in (import_utils, transformers.utils):
        for name in ("torchao", "sklearn", "scipy"):
            setattr(module, f"is_{name}_available", lambda *_, **__: False)
    return transformers


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of large libraries. What they make stays; to look through all of it for garbage, again
    and again, takes an eighth (torch) to a fifth (vLLM) of their time."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()
