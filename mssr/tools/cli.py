"""The commands. Each imports what it needs inside, so that ``mssr --help`` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from mssr import __version__
from mssr.errors import EXIT_FAILURE, EXIT_OK, EXIT_SIGINT, EXIT_USER_ERROR, TrainingError, UserError


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
    try:
        return int(args.command(args))
    except UserError as error:
        _complain(error)
        return EXIT_USER_ERROR
    except TrainingError as error:
        _complain(error)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except Exception:
        traceback.print_exc()
        return EXIT_FAILURE


def _complain(error: Exception) -> None:
    from mssr.config.secrets import redact

    print(f"mssr: error: {redact(' '.join(str(error).split()))}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mssr", description="Single-rollout RL from verifiable rewards for vision-language models."
    )
    parser.add_argument("--version", action="version", version=f"mssr {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model as a config file says")
    train.add_argument("config", help="YAML file, e.g. configs/digits/mssr.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. algorithm.name=grpo")
    train.set_defaults(command=_train)

    data = commands.add_parser("data", help="show what a training will see, as a page with the images")
    data.add_argument("config")
    data.add_argument("overrides", nargs="*", metavar="key=value")
    data.add_argument("--out", help="HTML file to write; data.html in the run directory by default")
    data.set_defaults(command=_data)

    prepare = commands.add_parser("prepare", help="make the embedded task: data and base model")
    prepare.add_argument("task", choices=["digits"])
    prepare.add_argument("--out", required=True, help="directory to write")
    prepare.add_argument("--seed", type=int, default=0)
    prepare.add_argument("--quiet", action="store_true", help="no progress")
    prepare.set_defaults(command=_prepare)

    _add_eval(commands)

    export = commands.add_parser("export", help="checkpoint -> Hugging Face directory")
    export.add_argument("checkpoint", help="a run directory (its latest), or a checkpoint")
    export.add_argument("--out", required=True, help="directory to write")
    export.set_defaults(command=_export)

    plot = commands.add_parser("plot", help="draw a run's curves and write report.html")
    plot.add_argument("run_dir")
    plot.set_defaults(command=_plot)

    compare = commands.add_parser("compare", help="several runs or evaluations in one table and figure")
    compare.add_argument("paths", nargs="+", metavar="RUN_OR_RESULT", help="run or evaluation directory")
    compare.add_argument(
        "--at",
        type=float,
        action="append",
        default=[],
        metavar="ACCURACY",
        help="when does each run reach it, e.g. 0.65; may be repeated; default: the best of the first run",
    )
    compare.add_argument("--metric", default="val/accuracy", help="key of the validation accuracy of runs")
    compare.add_argument("--out", default="compare", help="directory to write")
    compare.set_defaults(command=_compare)
    return parser


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser("eval", help="accuracy of a model or checkpoint on benchmarks")
    evaluate.add_argument(
        "--model", required=True, help="Hugging Face directory or hub name, checkpoint, or run directory"
    )
    evaluate.add_argument(
        "--benchmarks",
        required=True,
        metavar="NAME,...",
        help="e.g. mathverse,mathvista; data of your own (my.parquet, hub/name@split); file.py:Class",
    )
    evaluate.add_argument("--data-dir", metavar="DIR", help="local copies of the benchmarks; else the hub")
    evaluate.add_argument("--limit", type=int, help="the first so many items of each benchmark")
    evaluate.add_argument("--n", type=int, default=1, help="responses to every item (1)")
    evaluate.add_argument(
        "--temperature", type=float, help="default: greedy for --n 1, else the config's rollout.temperature"
    )
    evaluate.add_argument(
        "--judge",
        help="who decides what the rules leave open: MODEL of OpenAI, MODEL@http://host:8000/v1, or "
        "local:PATH of a model for engines of its own",
    )
    evaluate.add_argument(
        "--reward", action="store_true", help="score own data with the config's reward, as training does"
    )
    evaluate.add_argument("--out", metavar="DIR", help="directory to write; evaluations/<model> by default")
    evaluate.add_argument("--config", help="YAML file, for a model that is no checkpoint of ours")
    evaluate.add_argument(
        "--part-size", type=int, help="responses that are generated, and kept, together; for tests"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. rollout.workers=4")
    evaluate.set_defaults(command=_eval)


def _train(args: argparse.Namespace) -> int:
    from mssr.trainer.train import train

    return train(args.config, args.overrides)


def _data(args: argparse.Namespace) -> int:
    from mssr.tools.data_report import data_report

    data_report(args.config, args.overrides, args.out)
    return EXIT_OK


def _prepare(args: argparse.Namespace) -> int:
    from pathlib import Path

    from mssr.data.digits import prepare

    prepare(Path(args.out), seed=args.seed, quiet=args.quiet)
    return EXIT_OK


def _eval(args: argparse.Namespace) -> int:
    from pathlib import Path

    from mssr.evaluation.runner import EvaluationRequest, evaluate

    names = tuple(name.strip() for name in args.benchmarks.split(",") if name.strip())
    if not names:
        raise UserError("--benchmarks names none")
    request = EvaluationRequest(
        model=args.model,
        benchmarks=names,
        data_dir=Path(args.data_dir) if args.data_dir else None,
        limit=args.limit,
        n=args.n,
        temperature=args.temperature,
        judge=args.judge,
        reward=args.reward,
        out=Path(args.out) if args.out else None,
        config=args.config,
        part_size=args.part_size,
        overrides=tuple(args.overrides),
    )
    return evaluate(request)


def _export(args: argparse.Namespace) -> int:
    from mssr.runs.export import export

    export(args.checkpoint, args.out)
    return EXIT_OK


def _plot(args: argparse.Namespace) -> int:
    from mssr.runs.plot import plot

    plot(args.run_dir)
    return EXIT_OK


def _compare(args: argparse.Namespace) -> int:
    from mssr.tools.compare import compare

    compare(args.paths, args.at, args.metric, args.out)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
