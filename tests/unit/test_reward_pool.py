"""Hanging, dying and hostile reward functions lose their own responses and nothing else: real processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mssr.config.data import RewardConfig
from mssr.errors import TrainingError
from mssr.rewards import RewardInput, Scorer
from tests.unit.reward_lab import inputs

pytestmark = pytest.mark.unit

LIMIT = 0.5
HOSTILE = r'''
import ctypes, os, re, resource, signal, subprocess, sys, threading, time

class Rude(BaseException):
    def __str__(self):
        raise RuntimeError("not even this")

class Number(float):
    def __float__(self):
        while True: pass

def act(response, answer):
    """The response says what to do; its last word is the score."""
    command, _, value = response.partition(" ")
    if command == "loop":
        while True: pass
    if command == "sleep": time.sleep(1e6)
    if command == "stubborn":
        while True:
            try: time.sleep(1e6)
            except BaseException: pass
    if command == "regex": re.match("(a+)+$", "a" * 64 + "b")  # in C, deaf to Python's signals
    if command == "ignores":
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)
        while True: pass
    if command == "float": return Number(1)
    if command == "child":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1e6)", "orphan-of-a-reward"])
    if command == "input": input()
    if command == "raise": raise KeyError("lost")
    if command == "rude": raise Rude
    if command == "interrupt": raise KeyboardInterrupt
    if command == "sysexit": sys.exit(0)
    if command == "exit": os._exit(3)
    if command == "exit0": os._exit(0)
    if command == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if command == "group": os.killpg(0, signal.SIGKILL)
    if command == "segfault": ctypes.string_at(0)
    if command == "recursion": return act(response, answer)
    if command == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
        return len(bytearray(2**40))
    if command == "close": os.closerange(3, 64); return 1.0
    if command == "nan": return float("nan")
    if command == "none": return None
    if command == "thread": threading.Thread(target=time.sleep, args=(1e6,)).start()
    if command == "print":
        print("out of a reward"); print("err of a reward", file=sys.stderr)
    if command == "orphan" and not os.path.exists(answer):  # the first time only
        open(answer, "w").close()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1e6)
    return float(value or 1)
'''
LOOPS = ["loop", "regex", "ignores", "float"]
WAITS = ["sleep", "stubborn", "child"]
DEATHS = ["exit", "exit0", "kill", "group", "segfault"]
ERRORS = ["input", "raise", "rude", "interrupt", "sysexit", "recursion", "memory", "nan", "none"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "hostile.py"
    path.write_text(HOSTILE)
    return path


@pytest.fixture
def scorer(hostile: Path) -> Iterator[Scorer]:
    with make(hostile) as scorer:
        yield scorer


def make(
    hostile: Path,
    function: str = "act",
    on_restart: Callable[[str], None] | None = None,
    **changes: object,
) -> Scorer:
    settings = {"name": f"{hostile}:{function}", "time_limit_s": LIMIT, "workers": 2} | changes
    return Scorer(RewardConfig(**settings), 100, on_restart=on_restart)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", LOOPS)
def test_what_loops_is_ended_and_loses_only_itself(scorer: Scorer, command: str) -> None:
    """By its own CPU time, whatever the function is at and however busy the machine is."""
    batch = scorer.score(inputs("fine 0.25", command, *["fine 0.5"] * 20))
    assert batch.scores.tolist() == [0.25, 0, *[0.5] * 20]
    assert (batch.errors, batch.timeouts) == (1, 1)


def test_what_waits_forever_is_ended_and_loses_only_itself(hostile: Path) -> None:
    with make(hostile, workers=3, time_limit_s=0.5) as scorer:
        batch = scorer.score(inputs("fine 0.25", *WAITS, *["fine 0.5"] * 20))
    assert batch.scores.tolist() == [0.25, *[0] * len(WAITS), *[0.5] * 20]
    assert batch.errors == batch.timeouts == len(WAITS)


@pytest.mark.parametrize("command", [*DEATHS, *ERRORS])
def test_what_dies_or_raises_loses_only_itself(scorer: Scorer, command: str) -> None:
    batch = scorer.score(inputs("fine 0.25", command, *["fine 0.5"] * 20, command))
    assert batch.scores.tolist() == [0.25, 0, *[0.5] * 20, 0]
    assert (batch.errors, batch.timeouts) == (2, 0)
    assert scorer.score(inputs("fine 0.25")).scores.tolist() == [0.25]


def test_many_kinds_of_trouble_at_once(hostile: Path) -> None:
    """Whatever stands beside it, a response is scored or lost by itself, and in its own place."""
    rng = random.Random(0)
    trouble = ["loop", *DEATHS, *ERRORS]
    commands = [rng.choice(trouble) if rng.random() < 0.15 else "fine" for _ in range(150)]
    responses = [f"{command} {i}" for i, command in enumerate(commands, 1)]
    with make(hostile) as scorer:
        batch = scorer.score(inputs(*responses))
    assert batch.scores.tolist() == [i if c == "fine" else 0 for i, c in enumerate(commands, 1)]
    assert batch.errors == sum(c != "fine" for c in commands)
    assert batch.timeouts == commands.count("loop")


def test_what_a_function_leaves_behind_does_not_disturb_others(scorer: Scorer) -> None:
    batch = scorer.score(inputs("thread 0.5", "close", "fine 0.25", "thread 0.5"))
    assert batch.scores[[0, 2, 3]].tolist() == [0.5, 0.25, 0.5]  # the closed one may be lost
    assert scorer.score(inputs("fine 0.25", "fine 0.5")).scores.tolist() == [0.25, 0.5]


def test_output_goes_where_the_drivers_goes(hostile: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with make(hostile) as scorer:
        scorer.score(inputs("print", "exit"))
    out, err = capfd.readouterr()
    assert "out of a reward" in out and "err of a reward" in err


def test_the_processes_are_light(tmp_path: Path) -> None:
    path = tmp_path / "modules.py"
    path.write_text(
        "import sys\ndef f(response, answer):\n"
        "    return {'score': 1, **{name: name in sys.modules for name in answer.split()}}\n"
    )
    heavy = "torch transformers ray vllm datasets omegaconf"
    with make(path, "f") as scorer:
        parts = scorer.score([RewardInput("", heavy, 1)]).parts
    assert {name: part.item() for name, part in parts.items()} == dict.fromkeys(heavy.split(), 0)


def children(pid: int) -> set[int]:
    found: set[int] = set()
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found |= {int(child)} | children(int(child))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


@linux
def test_close_leaves_no_process(hostile: Path) -> None:
    before = children(os.getpid())
    scorer = make(hostile)
    scorer.score(inputs("fine", "thread", "child", *["fine"] * 10))
    mine = children(os.getpid()) - before
    assert len(mine) >= 2  # the one that owns them, and workers
    scorer.close()
    scorer.close()
    # What is killed may take a moment to be gone.
    assert wait_until(lambda: not any(alive(pid) for pid in mine))


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().strip("\0")
    except OSError:
        return ""


DRIVER = """
import sys, threading
from mssr.config.data import RewardConfig
from mssr.rewards import RewardInput, Scorer
scorer = Scorer(RewardConfig(name=sys.argv[1], time_limit_s=60, workers=2), 10)
scorer.score([RewardInput("fine", "", 1)] * 4)
try:
    print("ready", flush=True)
    scorer.score([RewardInput("fine", "", 1)] * 4 + [RewardInput("loop", "", 1), RewardInput("child", "", 1)])
except KeyboardInterrupt:
    print("again", scorer.score([RewardInput("fine 0.5", "", 1)] * 4).scores.sum(), flush=True)
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_a_driver_that_is_killed_or_interrupted(
    hostile: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, f"{hostile}:act"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert wait_until(
        lambda: any(command_of(pid).endswith("orphan-of-a-reward") for pid in children(process.pid))
    )
    mine = children(process.pid)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.kill()
    out, err = process.communicate(timeout=20)
    assert wait_until(lambda: not any(alive(pid) for pid in mine))
    assert err == "" and out == ("again 2.0\n" if number == signal.SIGINT else "")


def owner_of(scorer: Scorer, before: set[int]) -> int:
    scorer.score(inputs("fine"))
    return next(pid for pid in children(os.getpid()) - before if children(pid))


@linux
def test_the_loss_of_the_owning_process_costs_nothing_but_time(hostile: Path) -> None:
    """It is noticed at once, and said."""
    before, said = children(os.getpid()), list[str]()
    with make(hostile, on_restart=said.append) as scorer:
        for count in (1, 2):
            os.kill(owner_of(scorer, before), signal.SIGKILL)
            assert wait_until(lambda: len(said) == count)  # noqa: B023
            assert scorer.score(inputs(*["fine 0.5"] * 30)).scores.tolist() == [0.5] * 30
    assert said == ["the process that owns the reward workers died (SIGKILL)"] * 2


def test_a_batch_that_loses_the_owning_process_has_the_same_outcomes(hostile: Path, tmp_path: Path) -> None:
    """Killed while some responses are scored, some hang and some are still to come."""
    responses = ["fine 0.5", "raise", *["fine 0.25"] * 60, "loop", *["fine 0.75"] * 60, "exit", "fine"]
    responses[30] = "orphan 2"
    batches, said = [], list[str]()
    for kill in (False, True):
        killed = tmp_path / str(kill)
        if not kill:
            killed.touch()
        with make(hostile, on_restart=said.append) as scorer:
            batches.append(scorer.score([RewardInput(r, str(killed), 1) for r in responses]))
        assert len(said) == int(kill)
    calm, disturbed = batches
    assert calm.scores.tolist() == disturbed.scores.tolist()
    assert (calm.errors, calm.timeouts) == (disturbed.errors, disturbed.timeouts) == (3, 1)


@linux
def test_who_is_told_of_a_restart_may_end_the_run(hostile: Path, tmp_path: Path) -> None:
    def refuse(cause: str) -> None:
        raise TrainingError(f"no more: {cause}")

    before = children(os.getpid())
    with make(hostile, on_restart=refuse) as scorer:
        with pytest.raises(TrainingError, match=r"^no more: .* died \(SIGKILL\)$"):
            scorer.score([RewardInput("orphan", str(tmp_path / "killed"), 1)] * 8)
        assert not any(alive(pid) for pid in children(os.getpid()) - before)
        with pytest.raises(TrainingError, match="no more"):
            scorer.score(inputs("fine"))
    with pytest.raises(ValueError, match="closed"):
        scorer.score(inputs("fine"))


@linux
def test_the_loss_of_idle_workers_costs_no_score(hostile: Path) -> None:
    before = children(os.getpid())
    with make(hostile) as scorer:
        for worker in children(owner_of(scorer, before)):
            os.kill(worker, signal.SIGKILL)
        batch = scorer.score(inputs(*["fine 0.5"] * 100))
    assert batch.errors == 0 and batch.scores.tolist() == [0.5] * 100


def test_a_reward_that_kills_its_surroundings_ends_the_run(tmp_path: Path) -> None:
    path, said = tmp_path / "killer.py", list[str]()
    path.write_text("import os, time\ndef f(response, answer): os.kill(os.getppid(), 9); time.sleep(9)\n")
    with (
        make(path, "f", on_restart=said.append) as scorer,
        pytest.raises(TrainingError, match=r"keep dying \(SIGKILL\)"),
    ):
        scorer.score(inputs("a"))
    assert len(said) == 3


def test_starting_does_not_keep_the_caller_waiting(tmp_path: Path) -> None:
    path, go = tmp_path / "heavy.py", tmp_path / "go"
    path.write_text(
        f"import os, sys, time\nwhile 'pytest' not in sys.modules and not os.path.exists({str(go)!r}):\n"
        "    time.sleep(0.01)\ndef f(response, answer): return 1.0\n"
    )
    with make(path, "f") as scorer:
        go.touch()  # it could not load before
        assert scorer.score(inputs("a")).scores.tolist() == [1.0]
