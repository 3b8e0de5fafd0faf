"""User functions of every form, as they are recognised, called and understood."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mssr.config.data import RewardConfig
from mssr.errors import UserError
from mssr.rewards import RewardInput, ScoredBatch, Scorer, functions
from tests.unit.reward_lab import inputs, score, write

pytestmark = pytest.mark.unit

ITEMS = [RewardInput("a", "1", 3), RewardInput("bb", "0.5", 4), RewardInput("", "0", 0)]

# Each scores an item of ITEMS with its answer, and says in its parts what else it was given.
FORMS = {
    "plain": "def f(response, answer): return float(answer)",
    "other_names": "def f(text, truth): return float(truth)",
    "unknown_names": "def f(a, b): return float(b)",
    "by_name_only": "def f(*, response, answer): return float(answer)",
    "short_names": "def f(gt, pred):\n    assert pred in ('a', 'bb', '')\n    return float(gt)",
    "else_is_option": "def f(text='', *, response, answer, label=1): return float(answer) * label",
    "other_order": "def f(ground_truth, response):\n"
    "    assert response in ('a', 'bb', '')\n    return float(ground_truth)",
    "verl": "def f(data_source, solution_str, ground_truth, extra_info=None):\n"
    "    assert solution_str in ('a', 'bb', '') and data_source == '' and extra_info == {}\n"
    "    return {'score': float(ground_truth), 'acc': True, 'pred': '5', 'all': [1, 2]}",
    "verl_batch": "def f(data_sources, solution_strs, ground_truths, extra_infos=None):\n"
    "    assert solution_strs == ['a', 'bb', '']\n    return map(float, ground_truths)",
    "predict_str": "def f(predict_str, ground_truth, **kwargs):\n    return [float(ground_truth)]",
    "trl_batch": "def f(prompts, completions, **kwargs):\n"
    "    assert completions == ['a', 'bb', ''] and prompts == [''] * 3 and set(kwargs) == {'answer'}\n"
    "    return [float(a) for a in kwargs['answer']]",
    "trl_solution_batch": "def f(completions, solution, **kwargs):\n"
    "    assert completions == ['a', 'bb', '']\n    return [float(s) for s in solution]",
    "trl_log_batch": "def f(completions, solution, log_extra, log_metric=None, trainer_state=None, **kw):\n"
    "    log_extra('solution', solution)\n    log_metric('mean', 0.5)\n    assert trainer_state is None\n"
    "    return [float(s) for s in solution]",
    "verl_reward_model": "def f(data_source, solution_str, ground_truth, extra_info, reward_model=0, **kw):\n"
    "    assert reward_model == 0\n    return {'score': float(ground_truth), 'acc': 1.0, 'pred': 'x'}",
    "format_batch": "def f(completions, **kwargs):\n"
    "    return [{'a': 1.0, 'bb': 0.5}.get(c, 0.0) for c in completions]",
    "torch": "import torch\ndef f(response, answer): return torch.tensor([[float(answer)]])",
    "torch_part": "import torch\ndef f(response, answer):\n"
    "    return {'score': torch.tensor(float(answer)), 'length': torch.tensor([len(response)])}",
    "torch_batch": "import torch\n"
    "def f(responses, answers): return torch.tensor([float(a) for a in answers])",
    "yields": "def f(response, answer): yield float(answer)",
    "list_of_one": "def f(response, answer): return [{'score': [float(answer)]}]",
    "positional_only": "def f(response, answer, /): return float(answer)",
    "any_arguments": "def f(*arguments): return float(arguments[1])",
    "boolean": "def f(response, answer): return {'score': float(answer), 'empty': not response}",
    "numpy": "import numpy as np\ndef f(response, answer): return np.float32(answer)",
    "result": "from mssr.rewards import RewardResult\n"
    "def f(response, answer): return RewardResult(float(answer), {'length': len(response)})",
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass C:\n    x: float\ndef f(response, answer): return C(float(answer)).x",
    "object": "class C:\n    def __call__(self, response, answer): return float(answer)\nf = C()",
    "partial": "import functools\n"
    "def g(x, response, answer): return float(answer)\nf = functools.partial(g, 1)",
    "length": "def f(response, answer, response_length):\n"
    "    return {'score': float(answer), 'tokens': response_length}",
    "async": "import asyncio\nasync def f(response, answer, *, response_length):\n"
    "    await asyncio.sleep(0.001)\n    return {'score': float(answer), 'tokens': response_length}",
    "async_object": "class C:\n    async def __call__(self, response, answer): return float(answer)\nf = C()",
    "awaitable": "async def g(answer): return float(answer)\ndef f(response, answer): return g(answer)",
    "batch": "def f(responses, answers): return [float(a) for r, a in zip(responses, answers, strict=True)]",
    "batch_array": "import numpy as np\n"
    "def f(responses, answers): return np.array([float(a) for a in answers])",
    "batch_generator": "def f(predicts, ground_truths): yield from map(float, ground_truths)",
    "batch_lengths": "def f(responses, answers, *, response_lengths):\n"
    "    return [{'score': float(a), 'tokens': n} for a, n in zip(answers, response_lengths, strict=True)]",
    "batch_async": "async def f(responses, answers): return [float(a) for a in answers]",
    "easyr1": "def f(reward_input, format_weight=0.1):\n"
    "    assert set(reward_input) == {'response', 'response_length', 'ground_truth'}\n"
    "    return {'overall': float(reward_input['ground_truth']), 'format': None,\n"
    "            'tokens': reward_input['response_length']}",
    "easyr1_batch": "def f(reward_inputs, format_weight: float = 0.1):\n"
    "    assert isinstance(reward_inputs, list)\n"
    "    return [{'overall': float(r['ground_truth']), 'tokens': r['response_length']}\n"
    "            for r in reward_inputs]",
    "easyr1_async": "async def f(reward_input): return {'overall': float(reward_input['ground_truth'])}",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_each_response_its_score(tmp_path: Path, form: str) -> None:
    reward = functions.load(RewardConfig(name=write(tmp_path, FORMS[form])))
    assert reward.batch == ("batch" in form)
    assert reward.is_async == ("async" in form)
    calls = [ITEMS] if reward.batch else [[item] for item in ITEMS]
    results = [result for call in calls for result in reward.call(call)]
    assert [r.score for r in results] == [1.0, 0.5, 0.0]
    parts = [dict(r.parts) for r in results]
    if form in ("verl", "verl_reward_model"):
        assert parts == [{"acc": 1}] * 3
    elif form == "torch_part":
        assert parts == [{"length": 1}, {"length": 2}, {"length": 0}]
    elif "length" in form or form in ("async", "easyr1", "easyr1_batch"):
        assert parts == [{"tokens": n} for n in (3, 4, 0)]
    elif form == "boolean":
        assert parts == [{"empty": 0}, {"empty": 0}, {"empty": 1}]
    elif form == "result":
        assert parts == [{"length": 1}, {"length": 2}, {"length": 0}]
    else:
        assert parts == [{}] * 3


def test_a_function_gets_truths_as_the_data_has_them(tmp_path: Path) -> None:
    name = write(tmp_path, "def f(response, ground_truth): return float(ground_truth == [1, {'a': None}])")
    truths = [[1, {"a": None}], "[1, {'a': None}]", 4]
    items = [RewardInput("", truth, 1) for truth in truths]
    assert score(name, items).scores.tolist() == [1, 0, 0]


def test_a_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "helpers_local.py").write_text("def same(a, b): return a.strip() == b.strip()\n")
    name = write(
        tmp_path, "from helpers_local import same\ndef f(response, answer): return same(response, answer)"
    )
    assert score(name, [RewardInput("a ", "a", 1), RewardInput("b", "a", 1)]).scores.tolist() == [1, 0]


@pytest.mark.parametrize("form", ["plain", "async", "batch", "batch_async", "easyr1_batch"])
def test_the_processes_take_every_kind_of_function(tmp_path: Path, form: str) -> None:
    batch = score(write(tmp_path, FORMS[form]), ITEMS * 30)
    assert batch.scores.tolist() == [1.0, 0.5, 0.0] * 30 and batch.errors == 0
    if "tokens" in batch.parts:
        assert batch.parts["tokens"].tolist() == [3, 4, 0] * 30


@pytest.mark.parametrize(
    "function",
    [
        "def f(response, answer, *, scale=1.0, **others): return scale",
        "async def f(response, answer, scale): return scale",
        "def f(responses, answers, scale): return [scale] * len(answers)",
        "def f(reward_inputs, scale: float): return [{'overall': scale} for _ in reward_inputs]",
        "def f(reward_input, **others): return {'overall': others['scale']}",
    ],
)
def test_options_reach_the_function(tmp_path: Path, function: str) -> None:
    assert score(write(tmp_path, function), ITEMS, options={"scale": 0.25}).scores.tolist() == [0.25] * 3


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("def f(answer): return 1.0", {}, r"f must take \(response, answer\), .* not \(answer\)"),
        ("def f(): return 1.0", {}, r"not \(\)"),
        ("def f(a, answer): return 1.0", {}, r"f must take \(response, answer\), .* not \(a, answer\)"),
        ("def f(a, b, c): return 1.0", {}, r"not \(a, b, c\)"),
        ("def f(response, bbox): return 1.0", {}, r"f needs bbox; set reward.options.bbox"),
        ("def f(response, answers): return 1.0", {}, r"one response and many answers; call it answer"),
        ("def f(response, completions): return 1.0", {}, r"both one response and many"),
        ("def f(response, images): return 1.0", {}, r"f asks for images, and there are no rows here"),
        ("def f(response, row): return 1.0", {}, r"f asks for row, and there are no rows here"),
        ("def f(response, answer): return 1.0", {"scale": 1}, r"scale is no option of .* \(it takes none\)"),
        ("def f(response, answer, *, scale=1): ...", {"scal": 1}, r"takes scale\), did you mean 'scale'\?"),
        ("def f(response, answer, *, scale=1): ...", {"answer": 1}, "answer is no option"),
        ("def f(reward_inputs, scale): ...", {}, "f needs scale; set reward.options.scale"),
        ("def f(response, answer, response_length=0): ...", {"response_length": 1}, "is no option"),
        ("f = 1", {}, "has no function 'f'"),
        ("g = 1", {}, "reward.py has no function 'f'"),
        ("def f(:", {}, "does not run: SyntaxError"),
        ("import sys\nsys.exit(3)", {}, "does not run: SystemExit"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_in_one_line(
    tmp_path: Path, function: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        Scorer(RewardConfig(name=write(tmp_path, function), options=options), 10)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file '.*missing.py'"):
        Scorer(RewardConfig(name=f"{tmp_path}/missing.py:f"), 10)
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(UserError, match="is not a Python file"):
        Scorer(RewardConfig(name=f"{tmp_path}/text.txt:f"), 10)


BATCH_TROUBLE = """
import os, time
def f(responses, answers):
    if "raise" in responses: raise KeyError("lost")
    if "exit" in responses: os._exit(1)
    if "hang" in responses: time.sleep(1e6)
    if "few" in responses: return [0.5] * (len(responses) - 1)
    if "nan" in responses: return [float("nan") if r == "nan" else 0.5 for r in responses]
    if "text" in responses: return "0.5"
    return [0.5] * len(responses)
"""


def among_fine_ones(trouble: str) -> list[RewardInput]:
    return inputs(*["fine"] * 6, trouble, *["fine"] * 6)


def check_only_the_culprit_is_lost(batch: ScoredBatch, timeout: bool = False) -> None:
    assert batch.scores.tolist() == [0.5] * 6 + [0] + [0.5] * 6
    assert (batch.errors, batch.timeouts) == (1, int(timeout))


@pytest.mark.parametrize("trouble", ["raise", "exit", "few", "nan", "text"])
def test_a_batch_loses_only_the_culprit(tmp_path: Path, trouble: str) -> None:
    name = write(tmp_path, BATCH_TROUBLE)
    check_only_the_culprit_is_lost(score(name, among_fine_ones(trouble), time_limit_s=0.3))


ASYNC_TROUBLE = """
import asyncio, os, sys, time
loops = []
async def f(response, answer):
    loops.append(asyncio.get_running_loop())
    assert all(loop is loops[0] for loop in loops)
    if response == "await": await asyncio.sleep(1e6)
    if response == "deaf":
        while True:
            try: await asyncio.sleep(1e6)
            except asyncio.CancelledError: pass
    if response == "block": time.sleep(1e6)
    if response == "raise": raise TimeoutError("of its own")
    if response == "exit": os._exit(1)
    if response == "sysexit": sys.exit(1)
    await asyncio.sleep(0.1)
    return 0.5
"""


@pytest.mark.parametrize("trouble", ["raise", "exit", "sysexit"])
def test_async_functions_lose_only_the_culprit(tmp_path: Path, trouble: str) -> None:
    name = write(tmp_path, ASYNC_TROUBLE)
    check_only_the_culprit_is_lost(score(name, among_fine_ones(trouble), time_limit_s=0.3))


def test_what_waits_for_ever_loses_only_the_culprit(tmp_path: Path) -> None:
    """In a batch and in async functions. All at the same time, for nothing but the clock ends them."""
    troubles = {"hang": BATCH_TROUBLE} | dict.fromkeys(("await", "deaf", "block"), ASYNC_TROUBLE)
    with ExitStack() as stack:
        threads, running = stack.enter_context(ThreadPoolExecutor(len(troubles))), []
        for trouble, body in troubles.items():
            (tmp_path / trouble).mkdir()
            config = RewardConfig(name=write(tmp_path / trouble, body), workers=1, time_limit_s=0.3)
            scorer = stack.enter_context(Scorer(config, 10))
            running.append(threads.submit(scorer.score, among_fine_ones(trouble)))
        for one in running:
            check_only_the_culprit_is_lost(one.result(), timeout=True)


def test_async_functions_wait_together(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        "import asyncio\nwaiting = 0\n"
        "async def f(response, answer):\n"
        "    global waiting\n"
        "    waiting += 1\n"
        "    await asyncio.sleep(0.01)\n"
        "    together, waiting = waiting, waiting - 1\n"
        "    return {'score': 0.5, 'together': together}\n",
    )
    batch = score(name, ITEMS * 20)
    assert batch.errors == 0 and batch.parts["together"].max() >= 8
