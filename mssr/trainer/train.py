"""`mssr train`: config and run directory first, then `session` with all that takes seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mssr.config.recipes import find
from mssr.models.loading import check_model_path, importing
from mssr.runs.config import load_config
from mssr.runs.console import captured_output
from mssr.runs.run_directory import prepare_run_directory


def train(config_file: str | Path, overrides: Sequence[str] = ()) -> int:
    """Run a training from a config file; returns the exit code.

    Raises:
        UserError: the input is wrong; before any worker starts wherever that can be known.
    """
    config = load_config(config_file, overrides, note=lambda line: print(f"mssr: {line}", flush=True))
    check_model_path(config.model, config.rollout.tensor_parallel)
    with prepare_run_directory(config, find(config_file)) as notes:
        for line in (f"run directory {config.run_dir}", *notes):
            print(f"mssr: {line}", flush=True)
        with captured_output(config.run_dir / "logs" / "driver.log") as terminal:
            with importing():
                from mssr.trainer.session import run_session

            return run_session(config, terminal)
