"""Checkpoint -> Hugging Face directory, without Ray and without the actor's process group."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from mssr.config_loading import from_dict
from mssr.errors import UserError
from mssr.trainer.checkpoint import CheckpointStore


def export(checkpoint: str | Path, out: str | Path) -> Path:
    """Write the policy of a checkpoint with tokenizer, processor and generation config.

    Args:
        checkpoint: a checkpoint directory, or a run directory for its latest one.
        out: directory to write; must not exist or be empty.

    Raises:
        UserError: there is no checkpoint, or ``out`` is in use.
    """
    path, out = Path(checkpoint), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} exists and is not an empty directory")
    if (path / "checkpoints").is_dir():
        found = CheckpointStore(path, keep=1).find("auto")
        if found is None:
            raise UserError(f"{path} has no checkpoint yet")
        path = found
    if not (path / "trainer.json").is_file():
        raise UserError(f"{path} is neither a run directory nor a complete checkpoint")
    config_file = path.parent.parent / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{config_file} is missing; the checkpoint must lie in its run directory")
    config = from_dict(OmegaConf.to_container(OmegaConf.load(config_file)))  # type: ignore[arg-type]

    import torch
    import torch.distributed.checkpoint as dcp
    import transformers

    from mssr.models.loading import check_model_path, load_model, load_processor

    check_model_path(config.model)
    model = load_model(config.model, torch.float32)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=str(path / "actor"), no_dist=True)
    model.load_state_dict(state["model"])
    # Master weights are float32; the export has the dtype in which the base model was stored.
    model.to(transformers.AutoConfig.from_pretrained(config.model.path).dtype or torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    load_processor(config.model).save_pretrained(out)
    print(f"mssr: {path} exported to {out}")
    return out
