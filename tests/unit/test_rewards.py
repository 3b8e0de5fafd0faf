"""The exact-match reward, user functions from files, and scoring that survives their errors."""

from __future__ import annotations

import logging
import random
import time
from pathlib import Path

import numpy as np
import pytest

from mssr.errors import TrainingError, UserError
from mssr.rewards import RewardResult, Scorer, names, register, resolve, scoring
from mssr.rewards.exact_match import exact_match, last_boxed, normalise

pytestmark = pytest.mark.unit


def think(solution: str) -> str:
    return f"<think>some thoughts</think>{solution}"


# --- exact match --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (think(r"\boxed{8}"), "8"),
        (think("\n\nThe answer is $\\boxed{8}$.\n"), " 8 "),
        (" \n<think></think>\\boxed{8}", "8"),
        (think(r"\boxed{8}"), "<answer> 8 </answer>"),
        (think(r"\boxed {8}"), "$8$"),
        (think(r"\boxed{\frac{1}{2}}"), r"\frac{1}{2}"),
        (think(r"\boxed{3} no, \boxed{8}"), "8"),
        (think(r"\boxed{8} and \boxed{9"), "8"),
        (think(r"\boxed{\boxed{8}}"), "8"),
        (think(r"\boxed{\{1, 2\}}"), r"\{1, 2\}"),
        (think(r"\boxed{\left\{ x \right.}"), r"\left\{ x \right."),
        (think(r"} \boxed{8}"), "8"),
        (think("\\boxed{two\n words.}"), "Two words"),
        (think(r"\boxed{b}"), "B."),
        (r"<think>I try \boxed{3}</think>\boxed{8}", "8"),
    ],
)
def test_right_answers_score_one(response: str, answer: str) -> None:
    assert exact_match(response, answer) == RewardResult(1.0, {"accuracy": 1.0, "format": 1.0})


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{8}",
        r"</think>\boxed{8}",
        r"<think>\boxed{8}",
        r"<think>\boxed{8}</think>",  # the box is part of the thinking
        r"<think>\boxed{8}</think> so it is 8",
        r"First, <think></think>\boxed{8}",
        think("8"),
        think(r"\boxed{8"),
        think(r"\boxed{}"),
        think(r"\boxed{ }"),
        think(r"boxed{8}"),
        "",
    ],
)
def test_a_right_answer_without_the_format_scores_zero(response: str) -> None:
    assert exact_match(response, "8") == RewardResult(0.0, {"accuracy": 0.0, "format": 0.0})


@pytest.mark.parametrize(
    ("boxed", "answer"), [("9", "8"), ("-8", "8"), ("88", "8"), ("8.5", "8"), ("0.5", "5"), ("8", "")]
)
def test_a_wrong_answer_keeps_the_format_part(boxed: str, answer: str) -> None:
    result = exact_match(think(rf"\boxed{{{boxed}}}"), answer)
    assert result == RewardResult(0.0, {"accuracy": 0.0, "format": 1.0})


def test_an_empty_box_does_not_match_an_empty_answer() -> None:
    assert exact_match(think(r"\boxed{}"), "").score == 0.0


def test_normalise_is_idempotent_and_takes_off_only_what_it_says() -> None:
    assert normalise(" $X  = 3$. ") == "x = 3"
    assert normalise("$ $4.$ $ ..") == "4"
    assert normalise("$5") == "$5"
    assert normalise("3.50") == "3.50"
    assert normalise("$") == "$" and normalise("$$") == "" and normalise(" . ") == ""
    rng = random.Random(0)
    for _ in range(2_000):
        text = "".join(rng.choice("aB $.\n{}\\") for _ in range(rng.randrange(12)))
        once = normalise(text)
        assert normalise(once) == once


def test_last_boxed_gives_back_any_balanced_content() -> None:
    rng = random.Random(1)

    def balanced(depth: int) -> str:
        parts = [rng.choice(["x", r"\frac", r"\{", r"\}", r"\\", " "]) for _ in range(rng.randrange(3))]
        if depth:
            parts.insert(rng.randrange(len(parts) + 1), "{" + balanced(depth - 1) + "}")
        return "".join(parts)

    for _ in range(500):
        content = balanced(rng.randrange(5))
        assert last_boxed(r"text {} \boxed{1} \boxed{" + content + "} more {text}") == content


@pytest.mark.parametrize(
    "solution",
    [
        r"\boxed{" * 40_000,
        "{" * 200_000,
        r"\boxed{" * 20_000 + "}" * 20_000,
        r"\boxed" + " " * 200_000,
        (r"\boxed" + " " * 20) * 10_000,
        "<think>" * 30_000 + "</think>" * 30_000,
        r"\boxed{" + "$" * 200_000 + "}",
        r"\boxed{" + "." * 200_000 + "}",
        r"\boxed{" + " ." * 100_000 + "}",
        r"\boxed{a" + " " * 200_000 + "b}",
    ],
)
def test_hostile_texts_take_linear_time(solution: str) -> None:
    start = time.perf_counter()
    exact_match(think(solution), "8")
    assert time.perf_counter() - start < 1.0  # takes about 0.1 s; quadratic time is over ten


# --- scorer -------------------------------------------------------------------------------------


def test_scoring_a_batch() -> None:
    batch = Scorer("exact_match").score([think(r"\boxed{8}"), think(r"\boxed{7}"), "8"], ["8", "8", "8"])
    assert batch.scores.dtype == np.float32 and batch.scores.tolist() == [1, 0, 0]
    assert {key: part.tolist() for key, part in batch.parts.items()} == {
        "accuracy": [1, 0, 0],
        "format": [1, 1, 0],
    }
    assert batch.parts["format"].dtype == np.float32
    assert batch.errors == 0
    empty = Scorer("exact_match").score([], [])
    assert empty.scores.shape == (0,) and empty.parts == {} and empty.errors == 0


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="as many answers"):
        Scorer("exact_match").score(["a", "b"], ["a"])


def user_file(folder: Path, body: str, name: str = "reward.py") -> Path:
    path = folder / name
    path.write_text(body)
    return path


def test_user_functions_may_return_a_number_or_a_dict(tmp_path: Path) -> None:
    path = user_file(
        tmp_path,
        "import numpy as np\n"
        "def number(response, answer): return len(response) / 4\n"
        "def numpy_number(response, answer): return np.float32(0.5)\n"
        "def boolean(response, answer): return response == answer\n"
        "def parts(response, answer):\n"
        "    return {'score': 0.5, 'length': len(response)} if response else {'score': 1}\n",
    )
    assert Scorer(f"{path}:number").score(["ab", "abcd"], ["", ""]).scores.tolist() == [0.5, 1.0]
    assert Scorer(f"{path}:numpy_number").score(["ab"], [""]).scores.tolist() == [0.5]
    assert Scorer(f"{path}:boolean").score(["a", "b"], ["a", "a"]).scores.tolist() == [1, 0]
    batch = Scorer(f"{path}:parts").score(["abc", ""], ["", ""])
    assert batch.scores.tolist() == [0.5, 1.0]
    assert batch.parts["length"].tolist() == [3.0, 0.0]  # a response without the part has 0
    assert "score" not in batch.parts and batch.errors == 0


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    paths = []
    for value in (0.25, 0.75):
        folder = tmp_path / str(value)
        folder.mkdir()
        paths.append(user_file(folder, f"def f(response, answer): return {value}\n"))
    scorers = [Scorer(f"{path}:f") for path in paths]
    assert [s.score(["a"], ["a"]).scores.item() for s in scorers] == [0.25, 0.75]


def test_a_user_file_may_hold_a_dataclass(tmp_path: Path) -> None:
    path = user_file(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass C:\n    x: float\ndef f(response, answer): return C(1.0).x\n",
    )
    assert Scorer(f"{path}:f").score(["a"], ["a"]).scores.tolist() == [1.0]


def test_a_failing_reward_scores_zero_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = user_file(
        tmp_path,
        "def f(response, answer):\n"
        "    if response == 'raise': raise KeyError('lost')\n"
        "    return {'nan': float('nan'), 'inf': float('inf'), 'big': 1e300, 'none': None, 'text': '1',\n"
        "            'keyless': {'format': 1.0}, 'part': {'score': 1.0, 'format': float('nan')}}"
        ".get(response, 1.0)\n",
    )
    wrong = ["raise", "nan", "inf", "big", "none", "text", "keyless", "part"]
    scorer = Scorer(f"{path}:f")
    with caplog.at_level(logging.WARNING):
        batch = scorer.score([*wrong, "fine"], [""] * 9)
        scorer.score(["raise", "fine"], ["", ""])
    assert batch.scores.tolist() == [0.0] * 8 + [1.0]
    assert batch.errors == 8 and batch.parts == {}
    assert len(caplog.records) == 1  # the first traceback only
    assert "KeyError: 'lost'" in caplog.text and "Traceback" in caplog.text and str(path) in caplog.text


def test_a_reward_that_always_fails_stops_the_run(tmp_path: Path) -> None:
    path = user_file(tmp_path, "def f(response, answer): return 1.0 / len(response)\n")
    scorer = Scorer(f"{path}:f")
    assert scorer.score([""] * 7, [""] * 7).errors == 7  # too few to judge
    assert scorer.score([""] * 7 + ["a"], [""] * 8).errors == 7  # not all
    with pytest.raises(TrainingError, match=r"failed on 8 of 8 responses \(ZeroDivisionError"):
        scorer.score([""] * 8, [""] * 8)
    with pytest.raises(TrainingError, match="2 of 4"):
        Scorer(f"{path}:f", error_limit=0.5, min_batch=4).score(["", "", "a", "a"], [""] * 4)


def test_ctrl_c_is_no_error_of_the_reward(tmp_path: Path) -> None:
    path = user_file(tmp_path, "def f(response, answer): raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        Scorer(f"{path}:f").score(["a"], ["a"])


@pytest.mark.parametrize(
    ("file", "function", "message"),
    [
        ("missing.py", "f", "there is no file '.*missing.py'"),
        ("reward.py", "g", "reward.py has no function 'g'"),
        ("reward.py", "constant", "has no function 'constant'"),
        ("reward.py", "", "has no function ''"),
        ("reward.py", "one", r"one must take \(response, answer\)"),
        ("syntax.py", "f", "syntax.py does not run: SyntaxError"),
        ("exits.py", "f", "exits.py does not run: SystemExit"),
        ("text.txt", "f", "is not a Python file"),
    ],
)
def test_a_bad_user_function_is_named(tmp_path: Path, file: str, function: str, message: str) -> None:
    user_file(tmp_path, "constant = 1\ndef f(response, answer): return 1.0\ndef one(response): return 1.0\n")
    user_file(tmp_path, "def f(:\n", "syntax.py")
    user_file(tmp_path, "import sys\nsys.exit(3)\n", "exits.py")
    user_file(tmp_path, "hello", "text.txt")
    with pytest.raises(UserError, match=message) as error:
        Scorer(f"{tmp_path / file}:{function}")
    assert "\n" not in str(error.value)


def test_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_registry", dict(scoring._registry))
    assert names() == ["exact_match"]
    with pytest.raises(UserError, match=r"'exact_mach', did you mean 'exact_match'\?"):
        resolve("exact_mach")

    @register("always")
    def always(response: str, answer: str, /) -> float:
        return 1.0

    assert Scorer("always").score(["a"], ["b"]).scores.tolist() == [1.0]
    with pytest.raises(ValueError, match="colon"):
        register("a:b")


def test_scorer_refuses_wrong_limits() -> None:
    for wrong in ({"error_limit": 0.0}, {"error_limit": 1.1}, {"min_batch": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Scorer("exact_match", **wrong)


# --- the example --------------------------------------------------------------------------------


def test_the_example_gives_credit_for_format_and_reports_its_parts() -> None:
    example = Path(__file__).parents[2] / "examples/custom_reward.py"
    scored = Scorer(f"{example}:with_format_credit").score(
        [think(r"\boxed{8}"), think(r"\boxed{9}"), "8"], ["8", "8", "8"]
    )
    np.testing.assert_allclose(scored.scores, [1.0, 0.1, 0.0])
    assert scored.errors == 0
    np.testing.assert_array_equal(scored.parts["accuracy"], [1, 0, 0])
    np.testing.assert_array_equal(scored.parts["format"], [1, 1, 0])
