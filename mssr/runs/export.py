"""Checkpoint -> Hugging Face directory, without Ray and without the actor's process group."""

from __future__ import annotations

from pathlib import Path

from mssr.config.loading import from_dict
from mssr.errors import UserError
from mssr.models.files import give_usual_modes
from mssr.runs.checkpoint import resolve
from mssr.runs.manifest import verify


def export(checkpoint: str | Path, out: str | Path, dtype: str | None = None) -> Path:
    """Write the policy of a checkpoint with tokenizer, processor and generation config.

    Adapters are merged into the weights, and are written by themselves, for peft, to ``out/adapter``.

    Args:
        checkpoint: a checkpoint directory, a pointer to one (``checkpoints/best``), or a run directory for
            its latest one.
        out: directory to write; must not exist or be empty.
        dtype: of the weights; None for the one in which the base model was stored (the checkpoint has
            float32).

    Raises:
        UserError: there is no checkpoint, it is damaged, or ``out`` is in use.
    """
    path, out = Path(checkpoint), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} exists and is not an empty directory")
    path = resolve(path)
    manifest = verify(path)
    config = from_dict(manifest.config)

    import torch

    from mssr.models.families import family_of
    from mssr.models.loading import check_model_path, load_model, load_processor, read_config

    check_model_path(config.model)
    model = load_model(config.model, torch.float32)

    from mssr.actor.checkpoint import load_model_state  # after transformers, see `import_transformers`

    lora = config.actor.lora
    if lora.rank:
        from mssr.models.lora import add_adapters, is_adapter, peft_config, remove_adapters, save_adapter

        described = peft_config(model, lora)
        add_adapters(model, lora, config.seed)
        state = {name: value for name, value in model.state_dict().items() if is_adapter(name)}
        load_model_state(state, str(path / "actor"))
        save_adapter(state, described, config.model.path, out / "adapter")
        remove_adapters(model)
    else:
        state = model.state_dict()
        load_model_state(state, str(path / "actor"))
    family = family_of(model.config)
    if dtype is None:
        published = read_config(config.model)
        # Where Qwen3-VL's says it, of the language model alone.
        stored = published.dtype or family.text_config(published).dtype or torch.float32
    else:
        stored = getattr(torch, dtype)
    model.to(stored)
    out.mkdir(parents=True, exist_ok=True)
    family.save(model, out)
    load_processor(config.model).save(out)
    give_usual_modes(out)
    print(f"mssr: {path} exported to {out}")
    return out
