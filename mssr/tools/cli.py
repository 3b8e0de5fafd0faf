"""The commands. Each imports what it needs inside, so that ``mssr --help`` answers at once."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mssr import __version__
from mssr.errors import EXIT_FAILURE, EXIT_OK, EXIT_SIGINT, EXIT_USER_ERROR, TrainingError, UserError

OF_THE_TRAINER = frozenset(
    "PIL datasets filelock jinja2 math_verify matplotlib pebble psutil pyarrow qwen_vl_utils ray rich "
    "safetensors sklearn tokenizers torch torchvision transformers".split()
)
"""What ``pip install mssr`` alone does not bring."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (0 done, 2 wrong input, 1 else, 130/143 stopped)."""
    # Threads that wait for each other sleep (libraries read this when they are loaded). Where something else
    # uses the cores, too, waiting in a loop takes them from the thread that is waited for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        # argparse takes no key=value after an option.
        if not hasattr(args, "overrides") or any(x.startswith("-") for x in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides = [*args.overrides, *rest]
    arguments = vars(args)
    module, _, name = arguments.pop("command").partition(":")
    try:
        result = getattr(importlib.import_module(module), name)(**arguments)
        return result if isinstance(result, int) else EXIT_OK
    except (UserError, TrainingError) as error:
        from mssr.config.secrets import redact

        print(f"mssr: error: {redact(' '.join(str(error).split()))}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in OF_THE_TRAINER:
            how = 'pip install "mssr[train,cpu]", or "mssr[train,gpu]" where there are GPUs'
            print(f"mssr: error: this command needs the trainer ({error}): {how}", file=sys.stderr)
            return EXIT_USER_ERROR
        traceback.print_exc()
        return EXIT_FAILURE


def prepare(task: str, **options: Any) -> None:
    """`mssr prepare`; see `mssr.data.digits.prepare` and `mssr.data.chains.prepare`."""
    from mssr.data import chains, digits

    {"digits": digits, "chains": chains}[task].prepare(**options)


def evaluate(benchmarks: str, **options: Any) -> int:
    """`mssr eval`; see `mssr.evaluation.runner.EvaluationRequest`."""
    from mssr.evaluation.runner import EvaluationRequest, evaluate

    names = tuple(name.strip() for name in benchmarks.split(",") if name.strip())
    if not names:
        raise UserError("--benchmarks names none")
    return evaluate(EvaluationRequest(benchmarks=names, **options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mssr", description="Single-rollout RL from verifiable rewards for vision-language models."
    )
    parser.add_argument("--version", action="version", version=f"mssr {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function: str, text: str) -> Callable[..., argparse.Action]:
        """A command that calls ``module:function``; its arguments have the names of the parameters."""
        command = commands.add_parser(name, help=text)
        command.set_defaults(command=function)
        return command.add_argument

    option = add("init", "mssr.config.recipes:init", "write recipes to a directory, to change them")
    option("name", choices=["digits", "chains", "geometry3k", "paper"])
    option("directory", type=Path, nargs="?", metavar="DIR", help="to write; configs/<name> by default")

    _add_training(add)
    option = add("prepare", "mssr.tools.cli:prepare", "make an embedded task: data and base models")
    option("task", choices=["digits", "chains"])
    option("--out", type=Path, required=True, help="directory to write")
    option("--seed", type=int, default=0)
    option(
        "--model",
        dest="model_type",
        default="qwen2_5_vl",
        metavar="NAME",
        help="family of the base model (qwen2_5_vl), e.g. qwen3_vl",
    )
    option("--quiet", action="store_true", help="no progress")

    _add_eval(add("eval", "mssr.tools.cli:evaluate", "accuracy of a model or checkpoint on benchmarks"))

    option = add("convert", "mssr.tools.convert:convert", "config of EasyR1 or verl -> one of ours")
    option("config_file", metavar="FILE", help="YAML file, or the script that starts their training")
    option("overrides", nargs="*", metavar="key=value", help="their keys, as on their command line")
    option("--out", type=Path, help="file to write, e.g. ours.yaml; else it is printed")

    option = add("export", "mssr.runs.export:export", "checkpoint -> Hugging Face directory")
    option("checkpoint", help="a run directory (its latest), or a checkpoint")
    option("--out", required=True, help="directory to write")

    option = add("explain", "mssr.tools.errors:explain", "cause and cure of an error message")
    option("message", nargs="*", help="the line, or its end; else what stdin has, e.g. a log")

    option = add("plot", "mssr.runs.plot:plot", "draw a run's curves and write report.html")
    option("run_dir")

    option = add(
        "compare", "mssr.tools.compare:compare", "several runs or evaluations in one table and figure"
    )
    option("paths", nargs="+", metavar="RUN_OR_RESULT", help="run or evaluation directory")
    option(
        "--at",
        type=float,
        action="append",
        default=[],
        metavar="ACCURACY",
        help="when does each run reach it, e.g. 0.65; may be repeated; default: the best of the first run",
    )
    option("--metric", default="val/accuracy", help="key of the validation accuracy of runs")
    option("--out", default="compare", help="directory to write")
    return parser


def _add_training(add: Callable[..., Callable[..., argparse.Action]]) -> None:
    """A training, and what there is to be asked before one."""
    option = add("train", "mssr.trainer.train:train", "train a model as a config file says")
    option(
        "config_file",
        metavar="config",
        help="YAML file, or a recipe: digits, paper/qwen2_5_vl_7b/grpo",
    )
    option("overrides", nargs="*", metavar="key=value", help="e.g. algorithm.name=grpo")

    option = add(
        "plan", "mssr.tools.plan:plan", "memory and time of a training, on GPUs that need not be here"
    )
    option("config_file", metavar="config")
    option("overrides", nargs="*", metavar="key=value")
    option("--gpus", metavar="8xH100-80GB", help="of each node; default: this machine's, or H100s")
    option("--nodes", type=int, default=1)
    option("--image-tokens", type=int, metavar="N", help="of a prompt's images, on average")
    option("--response-tokens", type=int, metavar="N", help="of a response, on average")

    option = add(
        "data",
        "mssr.tools.data_report:data_report",
        "show what a training will see, as a page with the images",
    )
    option("config_file", metavar="config")
    option("overrides", nargs="*", metavar="key=value")
    option("--out", type=Path, help="HTML file to write; data.html in the run directory by default")

    option = add("doctor", "mssr.tools.doctor:doctor", "check machine, GPUs and cluster before a run")
    option("config_file", metavar="config", nargs="?", help="also check that nodes see its model and data")
    option("overrides", nargs="*", metavar="key=value")
    option("--address", help="of a running Ray cluster, or auto; all its nodes are checked")
    option("--json", dest="as_json", action="store_true", help="a list of rows, for programs")


def _add_eval(option: Callable[..., argparse.Action]) -> None:
    option("--model", required=True, help="Hugging Face directory or hub name, checkpoint, or run directory")
    option(
        "--benchmarks",
        required=True,
        metavar="NAME,...",
        help="e.g. mathverse,mathvista; data of your own (my.parquet, hub/name@split); file.py:Class",
    )
    option("--data-dir", type=Path, metavar="DIR", help="local copies of the benchmarks; else the hub")
    option("--limit", type=int, help="the first so many items of each benchmark")
    option("--n", type=int, default=1, help="responses to every item (1)")
    option(
        "--temperature", type=float, help="default: greedy for --n 1, else the config's rollout.temperature"
    )
    option(
        "--judge",
        help="who decides what the rules leave open: MODEL of OpenAI, MODEL@http://host:8000/v1, or "
        "local:PATH of a model for engines of its own",
    )
    option("--reward", action="store_true", help="score own data with the config's reward, as training does")
    option("--out", type=Path, metavar="DIR", help="directory to write; evaluations/<model> by default")
    option("--config", help="YAML file, for a model that is no checkpoint of ours")
    option("--part-size", type=int, help="responses that are generated, and kept, together; for tests")
    option("overrides", nargs="*", metavar="key=value", help="e.g. rollout.workers=4")


if __name__ == "__main__":
    sys.exit(main())
