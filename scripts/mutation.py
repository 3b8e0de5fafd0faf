"""Mutation testing of what turns scores into gradients: does a test notice when a line of it is wrong?

    pip install cosmic-ray
    nice python scripts/mutation.py                                   # about an hour on one core
    nice python scripts/mutation.py --only mssr/models/head.py

The mutants are those of cosmic-ray. It knows eleven wrong operators for a plus and seven for an equals
sign; of the mutants of one kind at one place a single one is taken, at random by the seed.
Left out is what cannot be wrong: annotations, and the text of errors.

Its own runner starts an interpreter for each mutant, which is mostly the import of torch. Here a process that
has imported the libraries forks for each, replaces the one module and runs the tests of `TESTS` until one
fails. Survivors are printed, and with all others in ``--out``; docs/testing.md says why they live.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")
STEP = "step_oracle update_by_value"
NUMBERS = "defaults_and_states ranges"
TESTS = {
    "mssr/algorithms/base.py": f"algorithms token_advantages single_rollout plugins {NUMBERS}",
    "mssr/algorithms/baseline.py": "baseline single_rollout driver_by_hand defaults_and_states ranges",
    "mssr/algorithms/checks.py": "ranges discount kl_control losses",
    "mssr/algorithms/correction.py": "correction defaults_and_states ranges",
    "mssr/algorithms/discount.py": "discount single_rollout driver_by_hand defaults_and_states ranges",
    "mssr/algorithms/baselines.py": f"combinations algorithms single_rollout driver_by_hand {NUMBERS}",
    "mssr/algorithms/methods.py": f"combinations algorithms token_advantages oracles {NUMBERS}",
    "mssr/algorithms/normalisations.py": f"advantages combinations token_advantages oracles {NUMBERS}",
    "mssr/algorithms/id_table.py": "id_table baseline",
    "mssr/algorithms/kl_control.py": "kl_control defaults_and_states ranges",
    "mssr/algorithms/losses.py": "losses oracles policy_losses ranges",
    "mssr/algorithms/objective.py": "gradient step_oracle update_by_value defaults_and_states",
    "mssr/algorithms/policy_losses.py": "policy_losses losses plugins defaults_and_states ranges",
    "mssr/algorithms/sequences.py": "losses correction policy_losses gradient",
    "mssr/algorithms/shaping.py": "losses algorithms gradient defaults_and_states ranges",
    "mssr/algorithms/step.py": "advantages token_advantages algorithms ranges",
    "mssr/models/head.py": "head policy_model gradient",
    "mssr/actor/update.py": f"update_passes {STEP} nonfinite fused_update signals",
    "mssr/actor/step.py": f"signals update_passes {STEP} nonfinite",
}
"""Module -> the names of the files in tests/unit that are to notice, the fastest first."""
TIME_LIMIT_S = 60.0
"""Beyond what the tests take without a mutation; who needs longer loops for ever, and is noticed."""
IMPORTED = "torch transformers numpy pytest hypothesis datasets pyarrow.parquet PIL.Image yaml omegaconf peft"


@dataclass(frozen=True)
class Mutant:
    """``Mutant("mssr/algorithms/discount.py", "core/NumberReplacer", occurrence=3, place=(25, 14))``"""

    path: str
    operator: str
    occurrence: int
    place: tuple[int, int]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.path, self.operator, self.occurrence

    @functools.cached_property
    def source(self) -> str:
        """The whole module, changed."""
        from cosmic_ray import plugins
        from cosmic_ray.ast import get_ast
        from cosmic_ray.mutating import MutationVisitor

        visitor = MutationVisitor(self.occurrence, plugins.get_operator(self.operator)())
        return str(visitor.walk(get_ast((ROOT / self.path).read_text())).get_code())

    @property
    def is_program(self) -> bool:
        """cosmic-ray takes the star before keyword arguments for a product."""
        try:
            compile(self.source, self.path, "exec")
        except SyntaxError:
            return False
        return True

    @property
    def changed(self) -> str:
        """The first line that differs, as it is now."""
        old, new = (ROOT / self.path).read_text().splitlines(), self.source.splitlines()
        pairs = ((a, b) for a, b in zip(old, new, strict=False) if a != b)
        return next((f"{a.strip()}  ->  {b.strip()}" for a, b in pairs), "lines removed")


def mutants(path: str) -> list[Mutant]:
    """All of a module that could be wrong."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    nodes = list(ast_nodes(get_ast((ROOT / path).read_text())))
    said = {id(node) for node in nodes if _is_said_only(node)}
    found = []
    for name in plugins.operator_names():
        if (operator_class := plugins.get_operator(name)).arguments():
            continue
        operator = operator_class()
        places = [(node, start) for node in nodes for start, _ in operator.mutation_positions(node)]
        found += [Mutant(path, name, k, at) for k, (node, at) in enumerate(places) if id(node) not in said]
    return found


def one_of_a_kind(everything: list[Mutant], seed: int) -> list[Mutant]:
    """For each place a single one of the binary operators, of the comparisons, of the numbers, ..."""
    by_place: dict[tuple[str, str, tuple[int, int]], list[Mutant]] = {}
    for mutant in everything:
        kind = mutant.operator.split("/")[1].split("_")[0]
        by_place.setdefault((mutant.path, kind, mutant.place), []).append(mutant)
    return [random.Random(f"{seed} {key}").choice(same) for key, same in by_place.items()]


def _is_said_only(node: Any) -> bool:
    """Whether a node is part of an annotation or of the text of an error."""
    while (parent := node.parent) is not None:
        if (
            parent.type in ("raise_stmt", "fstring")
            or (parent.type == "annassign" and node is parent.children[1])  # ": annotation = value"
            or (parent.type == "tfpdef" and node is parent.children[2])  # "name : annotation" of a parameter
            or (parent.type in ("param", "funcdef") and node is parent.annotation)
        ):
            return True
        node = parent
    return False


def _replace(mutant: Mutant) -> None:
    """Whoever imports the module from now on gets the changed one."""
    get_code, path = SourceFileLoader.get_code, str(ROOT / mutant.path)

    def changed(self: SourceFileLoader, name: str) -> Any:
        return compile(mutant.source, path, "exec") if self.path == path else get_code(self, name)

    SourceFileLoader.get_code = changed  # type: ignore[method-assign]


def run(names: list[str], mutant: Mutant | None, limit_s: float, workspace: Any) -> tuple[str, float]:
    """survived, killed or timeout; and the seconds. In a process of its own."""
    start = time.monotonic()
    child = FORK.Process(target=_run_tests, args=(names, mutant, workspace))
    child.start()
    child.join(limit_s)
    outcome = {None: "timeout", 0: "survived"}.get(child.exitcode, "killed")
    if child.exitcode is None:
        os.killpg(child.pid or 0, signal.SIGKILL)
        child.join()
    return outcome, time.monotonic() - start


def _run_tests(names: list[str], mutant: Mutant | None, workspace: Any) -> None:
    os.setpgid(0, 0)
    sink = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(sink, output)
    if mutant is not None:
        _replace(mutant)
    import pytest

    import tests.conftest

    tests.conftest.make_workspace = lambda path: workspace
    basetemp = tempfile.mkdtemp(prefix="mssr-mutant-")
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={basetemp}"]
    for name in names:  # one by one, so that what comes later need not be imported
        if status := int(pytest.main([*options, name])):
            os._exit(status)
    os._exit(0)


def _workspace() -> Any:
    """The one of all tests, made once, and in a process that may import mssr."""
    from tests import conftest

    path = Path(tempfile.mkdtemp(prefix="mssr-mutants-"))
    with FORK.Pool(1) as pool:
        pool.apply(conftest.make_workspace, (path,))
    return conftest.Workspace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(TESTS), help="modules")
    parser.add_argument("--sample", type=int, help="so many mutants, at random")
    parser.add_argument("--again", action="store_true", help="run survivors of --out again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("mutation.jsonl"), help="is added to")
    args = parser.parse_args()
    everything = [mutant for path in args.only for mutant in mutants(path)]
    print(f"{len(everything)} mutants", end="")
    everything = one_of_a_kind(everything, args.seed)
    random.Random(args.seed).shuffle(everything)  # one that is interrupted is a sample
    everything = everything[: args.sample]
    print(f", {len(everything)} taken: {dict(Counter(m.path for m in everything))}")
    args.out.touch()
    records = map(json.loads, args.out.open())
    known = {(r["path"], r["operator"], r["occurrence"]): r for r in records}
    sys.path.insert(0, str(ROOT))
    for library in IMPORTED.split():
        importlib.import_module(library)
    assert not any(name.split(".")[0] == "mssr" for name in sys.modules)
    workspace = _workspace()
    usual: dict[str, float] = {}
    with args.out.open("a") as out:
        for number, mutant in enumerate(everything, 1):
            before = known.get(mutant.key)
            if before and not (args.again and before["outcome"] == "survived"):
                continue
            tests = [f"tests/unit/test_{name}.py" for name in TESTS[mutant.path].split()]
            for test in tests:
                if test not in usual:
                    outcome, usual[test] = run([test], None, 1200, workspace)
                    assert outcome == "survived", f"{test} fails without a mutation"
                    print(f"{test}: {usual[test]:.0f} s without a mutation", flush=True)
            limit_s = 2 * sum(usual[test] for test in tests) + TIME_LIMIT_S
            outcome, seconds = "no program", 0.0
            if mutant.is_program:
                outcome, seconds = run(tests, mutant, limit_s, workspace)
            record = dict(zip(("path", "operator", "occurrence"), mutant.key, strict=True))
            record |= {"line": mutant.place[0], "changed": mutant.changed, "outcome": outcome}
            known[mutant.key] = record | {"seconds": round(seconds, 1)}
            print(json.dumps(known[mutant.key]), file=out, flush=True)
            if outcome == "survived":
                print(f"{number}: {mutant.path}:{mutant.place[0]} {mutant.changed}", flush=True)
    outcomes = Counter(known[mutant.key]["outcome"] for mutant in everything)
    programs = outcomes.total() - outcomes["no program"]
    print(dict(outcomes), f"{1 - outcomes['survived'] / programs:.1%} noticed")


if __name__ == "__main__":
    main()
