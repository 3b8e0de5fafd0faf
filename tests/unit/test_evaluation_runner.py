"""`mssr eval` around its engines: what it asks, what it keeps, what it refuses. The engines are fakes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mssr.config import Config
from mssr.data.prompt_source import PromptSource
from mssr.errors import EXIT_SIGTERM, EXIT_USER_ERROR
from mssr.evaluation import results, runner
from mssr.evaluation.model import EvaluatedModel
from mssr.tools import cli
from mssr.types import Rollout, RolloutRequest, SamplingParams
from tests.conftest import Workspace, make_rows, write_rows
from tests.unit.benchmark_data import CASES, write_parquet
from tests.unit.data_forms import encoded, write_jsonl

pytestmark = pytest.mark.unit

COMPARED = ("items.jsonl", "results.json", "table.md", "items.html")
SETTINGS = ["rollout.engine=hf", "cluster.launcher=local", "data.max_prompt_length=512"]


class FakeCluster:
    """Answers from the prompt as engines find it, and from the request's seed unless greedy."""

    def __init__(self, config: Config, engines: FakeEngines) -> None:
        self.config, self.engines = config, engines
        self.source = PromptSource(config)

    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams) -> list[Rollout]:
        self.engines.calls.append(list(requests))
        self.engines.params = params
        if self.engines.before_part is not None:
            self.engines.before_part(len(self.engines.calls))
        return [self._rollout(r, params) for r in requests]

    def shutdown(self) -> None:
        self.engines.shut_down += 1

    def _rollout(self, request: RolloutRequest, params: SamplingParams) -> Rollout:
        row, encoder = self.source.row(request.prompt_id), self.source.encoder
        sizes = [image.size for image in encoder.images(row)]
        self.engines.prompts[request.prompt_id] = (encoder.chat_text(row), sizes)
        reply = self.engines.answer(request.prompt_id, 0 if params.greedy else request.seed)
        tokens = np.zeros(len(reply), np.int32)
        empty = np.zeros(0, np.float32)
        return Rollout(request.prompt_id, request.sample_index, tokens, tokens, empty, "stop", 0, reply)


@dataclasses.dataclass
class FakeEngines:
    """What was asked of the fakes, and how they behave."""

    answer: Callable[[str, int], str]
    calls: list[list[RolloutRequest]] = dataclasses.field(default_factory=list)
    prompts: dict[str, tuple[str, list[Any]]] = dataclasses.field(default_factory=dict)
    configs: list[Config] = dataclasses.field(default_factory=list)
    params: SamplingParams | None = None
    before_part: Callable[[int], None] | None = None
    shut_down: int = 0

    def launch(self, config: Config, report: Any, stop: Callable[[], bool]) -> FakeCluster:
        self.configs.append(config)
        return FakeCluster(config, self)


def hashed(prompt_id: str, seed: int) -> str:
    """Right for some items: the answers of `make_rows` are digits."""
    digit = hashlib.sha256(f"{prompt_id}/{seed}".encode()).digest()[0] % 4
    return rf"<think>**look**</think>\boxed{{{digit}}}"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> FakeEngines:
    fakes = FakeEngines(hashed)
    monkeypatch.setattr(runner, "launch", fakes.launch)
    return fakes


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.parquet"
    write_rows(path, make_rows(12, "q", seed=3))
    return path


def command(workspace: Workspace, out: Path, benchmarks: Any, *more: Any) -> list[str]:
    start = ["eval", "--model", workspace.path / "model", "--config", workspace.config]
    return [str(x) for x in [*start, "--benchmarks", benchmarks, "--out", out, *more, *SETTINGS]]


def items_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, (out / "items.jsonl").read_text().splitlines())}


def complaint(arguments: list[str], capfd: Any) -> str:
    assert cli.main(arguments) == EXIT_USER_ERROR
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return str(lines[0])


def test_greedy_for_one_response_and_seeds_for_several(
    workspace: Workspace, engines: FakeEngines, own: Path, tmp_path: Path
) -> None:
    assert cli.main(command(workspace, tmp_path / "one", own)) == 0
    assert engines.params is not None and engines.params.greedy
    assert engines.configs[0].actor.num_ranks == 0
    engines.calls.clear()
    assert cli.main(command(workspace, tmp_path / "two", own, "--n", 2, "--temperature", 0.7)) == 0
    assert not engines.params.greedy and engines.params.temperature == 0.7
    requests = [request for call in engines.calls for request in call]
    assert len({request.seed for request in requests}) == len(requests) == 24
    summary = results.read(tmp_path / "two").summary
    assert summary["benchmarks"]["own"]["samples"] == 2
    assert summary["config"]["temperature"] == 0.7
    # Neither logs nor an exported model nor prompts are left where the numbers are.
    assert not (tmp_path / "two" / "scratch").exists()


def test_killed_and_started_again_gives_the_same_bytes(
    workspace: Workspace, engines: FakeEngines, own: Path, tmp_path: Path
) -> None:
    sampling = ["--n", 3, "--temperature", 1, "--part-size", 5]
    assert cli.main(command(workspace, tmp_path / "straight", own, *sampling)) == 0
    straight = [len(call) for call in engines.calls]

    def die(call: int) -> None:
        if call == 3:
            raise MemoryError("the machine is gone")

    engines.calls.clear()
    engines.before_part = die
    broken = command(workspace, tmp_path / "broken", own, *sampling)
    assert cli.main(broken) == 1
    assert engines.shut_down == 2
    assert not (tmp_path / "broken" / "results.json").exists()
    # What a crash leaves: half a part, its last line cut off.
    with (tmp_path / "broken" / "responses.jsonl").open("a") as file:
        line = {
            "benchmark": "own",
            "id": "q3",
            "sample": 1,
            "text": "x",
            "tokens": 1,
            "finish_reason": "stop",
        }
        file.write(json.dumps(line) + "\n" + json.dumps(line)[:20])
    engines.before_part = None
    engines.calls.clear()
    assert cli.main(broken) == 0
    # The parts are those that an undisturbed run would have had.
    assert [len(call) for call in engines.calls] == straight[2:]
    for name in (*COMPARED, "responses.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    # A third call has nothing to generate.
    engines.calls.clear()
    assert cli.main(broken) == 0 and engines.calls == []


def test_a_signal_keeps_the_responses(
    workspace: Workspace, engines: FakeEngines, own: Path, tmp_path: Path
) -> None:
    import os
    import signal

    def stop(call: int) -> None:
        if call == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    engines.before_part = stop
    assert cli.main(command(workspace, tmp_path / "out", own, "--part-size", 4)) == EXIT_SIGTERM
    assert len((tmp_path / "out" / "responses.jsonl").read_text().splitlines()) == 1 + 8
    assert engines.shut_down == 1 and not (tmp_path / "out" / "scratch").exists()


def test_responses_made_otherwise_are_refused(
    workspace: Workspace, engines: FakeEngines, own: Path, tmp_path: Path, capfd: Any
) -> None:
    out = tmp_path / "out"
    assert cli.main(command(workspace, out, own)) == 0
    before = (out / "responses.jsonl").read_bytes()
    engines.calls.clear()
    capfd.readouterr()
    for change, part in [
        (["--temperature", "1"], "sampling"),
        (["seed=5"], "sampling"),
        (["rollout.max_response_length=13"], "sampling"),
        (["--limit", "11"], "prompts"),
        (["data.instruction=Think."], "prompts"),
        (["data.max_pixels=6272"], "engine"),
        (["rollout.engine=vllm"], "engine"),
    ]:
        line = complaint([*command(workspace, out, own), *change], capfd)
        assert f"with other {part} than now; choose another --out" in line, change
    assert (out / "responses.jsonl").read_bytes() == before and engines.calls == []


def test_engines_of_several_devices_answer_otherwise_and_large_ones_more_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = Config()
    model = EvaluatedModel("m", config, None, None, "hash")
    evaluation = runner._Evaluation(runner.EvaluationRequest("m", ("own",)), model, tmp_path)
    before = evaluation._decides("")
    config.rollout.tensor_parallel = 2
    assert {k for k, v in evaluation._decides("").items() if v != before[k]} == {"engine"}
    config.rollout.workers = 3
    for gpus, slots in (([], 256), ([80, 40], 256), ([80, 80], 1024)):
        there = SimpleNamespace(gpus=[SimpleNamespace(total_bytes=size << 30) for size in gpus])
        monkeypatch.setattr(runner.machine, "describe", lambda there=there: there)
        assert evaluation._part_size() == runner.PARTS_PER_ENGINE * slots * 3


def test_another_model_is_refused(
    workspace: Workspace, engines: FakeEngines, own: Path, tmp_path: Path, capfd: Any
) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(workspace.path / "model", model)
    arguments = ["eval", "--model", str(model), "--config", str(workspace.config), "--benchmarks", str(own)]
    arguments += ["--out", str(tmp_path / "out"), *SETTINGS]
    assert cli.main(arguments) == 0
    capfd.readouterr()
    weights = next(model.glob("*.safetensors"))
    weights.touch()
    assert "with other model than now" in complaint(arguments, capfd)


def test_what_does_not_decide_responses_may_change(
    workspace: Workspace, engines: FakeEngines, own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli.main(command(workspace, out, own)) == 0
    engines.calls.clear()
    more = ["rollout.max_num_seqs=3", "cluster.threads_per_rollout=1", "trainer.progress=plain"]
    assert cli.main([*command(workspace, out, own), *more]) == 0
    assert engines.calls == []


def test_a_damaged_image_is_left_out_and_a_long_prompt_counts_as_wrong(
    workspace: Workspace, engines: FakeEngines, tmp_path: Path, capfd: Any
) -> None:
    path = tmp_path / "odd.jsonl"
    whole = CASES["mmk12"][0].row["image"]["bytes"]
    import base64

    def row(k: int, problem: str, *images: bytes) -> dict[str, Any]:
        encoded = [base64.b64encode(i).decode() for i in images]
        return {"id": f"r{k}", "problem": problem, "answer": "1", "images": encoded}

    damaged = whole[:60] + bytes(20)
    rows = [
        row(0, "<image>What is it?", whole),
        row(1, "<image>What is it?", damaged),
        row(2, "First <image> then <image>?", whole, damaged),
        row(3, "Which? " * 600, whole),
        row(4, "A question with <|image_pad|> in it"),
        row(5, "No image at all?"),
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    engines.answer = lambda prompt_id, seed: r"<think></think>\boxed{1}"
    out = tmp_path / "out"
    assert cli.main(command(workspace, out, path)) == 0
    items = items_of(out)
    assert set(items) == {f"r{k}" for k in range(6)}
    assert {i: r["correct"] for i, r in items.items()} == {
        "r0": True,
        "r1": True,
        "r2": True,
        "r3": False,
        "r4": False,
        "r5": True,
    }
    assert "note" not in items["r0"] and "note" not in items["r5"]
    assert items["r1"]["note"].startswith("image 0 is left out")
    assert items["r2"]["note"].startswith("image 1 is left out")
    assert "more than data.max_prompt_length=512" in items["r3"]["note"]
    assert "stands for pixels" in items["r4"]["note"]
    for name in ("r3", "r4"):
        assert (items[name]["status"], items[name]["finish_reason"]) == ("extraction_failed", "not_asked")
    assert len(engines.prompts["odd/r0"][1]) == 1 and len(engines.prompts["odd/r2"][1]) == 1
    assert engines.prompts["odd/r1"][1] == [] and "What is it?" in engines.prompts["odd/r1"][0]
    assert set(engines.prompts) == {"odd/r0", "odd/r1", "odd/r2", "odd/r5"}
    summary = results.read(out).summary
    assert (summary["benchmarks"]["odd"]["total"], summary["benchmarks"]["odd"]["correct"]) == (6, 4)
    assert (summary["not_asked"], summary["damaged_images"]) == ({"odd": 2}, {"odd": 2})
    said = capfd.readouterr().out
    assert "2 of 6 items could not be asked and count as wrong" in said


def test_every_benchmark_through_the_command(
    workspace: Workspace, engines: FakeEngines, tmp_path: Path, capfd: Any
) -> None:
    """Fixtures in the public columns; each answer is the one whose verdict the fixture knows."""
    for name in CASES:
        write_parquet(name, tmp_path / "data" / f"{name}.parquet")
    from mssr.evaluation import registry

    answers = {}
    for name, cases in CASES.items():
        items = registry.get(name).load(tmp_path / "data")
        for item, case in zip(items, cases, strict=True):
            answers[f"{name}/{item.id}"] = case
    engines.answer = lambda prompt_id, seed: answers[prompt_id].response
    out = tmp_path / "out"
    names = ",".join(CASES)
    more = ["--data-dir", tmp_path / "data", "--part-size", 7]
    assert cli.main([*command(workspace, out, names, *more), "data.max_prompt_length=2048"]) == 0
    found = results.read(out)
    for row in found.records:
        case = answers[f"{row['benchmark']}/{row['id']}"]
        if not case.truncated:
            assert row["status"] == case.status, row
    assert set(found.summary["benchmarks"]) == set(CASES)
    assert found.summary["benchmarks"]["hallusionbench"]["metrics"].keys() == {"aAcc", "qAcc", "fAcc"}
    assert set(found.summary["averages"]) == {"all", "paper"}
    assert "MathVerse" in capfd.readouterr().out


def test_pairs_and_figures_are_made_of_answers_of_one_sample(
    workspace: Workspace, engines: FakeEngines, tmp_path: Path
) -> None:
    """Always right in sample 0, always wrong in sample 1: half of the pairs and figures, not none."""
    write_parquet("hallusionbench", tmp_path / "hallusionbench.parquet")
    from mssr.evaluation import registry

    truth = {i.id: i.answer for i in registry.get("hallusionbench").load(tmp_path)}
    seeds: dict[str, int] = {}

    def answer(prompt_id: str, seed: int) -> str:
        first = seeds.setdefault(prompt_id, seed)
        right = truth[prompt_id.partition("/")[2]]
        return rf"\boxed{{{right if seed == first else 'maybe both'}}}"

    engines.answer = answer
    out = tmp_path / "out"
    more = ["--data-dir", tmp_path, "--n", 2, "--temperature", 1]
    assert cli.main(command(workspace, out, "hallusionbench", *more)) == 0
    numbers = results.read(out).summary["benchmarks"]["hallusionbench"]
    assert numbers["metrics"] == {"aAcc": 0.5, "fAcc": 0.5, "qAcc": 0.5}
    assert numbers["breakdowns"]["aAcc"]["all"] == {"accuracy": 0.5, "correct": 13, "total": 26}


def test_a_local_judge_decides_what_the_rules_leave_open(
    workspace: Workspace, engines: FakeEngines, own: Path, tmp_path: Path
) -> None:
    """Asked by engines of its own, after those of the policy have ended; verdicts are kept."""

    def answer(prompt_id: str, seed: int) -> str:
        if prompt_id.startswith("own/"):
            return "I think\nthat it is <image> some number."
        assert engines.shut_down == 1
        return "Verdict: correct"

    engines.answer = answer
    out = tmp_path / "out"
    arguments = command(workspace, out, own, "--judge", f"local:{workspace.path / 'model'}")
    assert cli.main([*arguments, "data.instruction=Think."]) == 0
    assert engines.shut_down == 2
    assert {(r["correct"], r["rule"]) for r in items_of(out).values()} == {(True, "judge")}
    judged = [text for prompt_id, (text, _) in engines.prompts.items() if "/" not in prompt_id]
    assert judged and all("[image] some number" in text and "Think." not in text for text in judged)
    first = (out / "results.json").read_bytes()
    engines.calls.clear()
    assert cli.main([*arguments, "data.instruction=Think."]) == 0
    assert engines.calls == [] and (out / "results.json").read_bytes() == first


def test_marks_that_are_text_and_those_that_are_none(
    workspace: Workspace, engines: FakeEngines, tmp_path: Path
) -> None:
    """The template looks for marks, as EasyR1's do: it finds those of images and those that are text."""
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Is it <image>?"}]
    questions = ["What is <image>?", [{"role": "user", "content": parts}], "What?"]
    images = [[], [], ["a.png"]]
    rows = [{"problem": q, "answer": "1", "images": i} for q, i in zip(questions, images, strict=True)]
    own = write_jsonl(tmp_path / "own.jsonl", rows)
    template = "{% if '<image>' not in content %}<image>{% endif %}{{ content }} Think."
    settings = ["data.image_marks=literal", f"data.image_dir={tmp_path}", "data.id_column=null"]
    (tmp_path / "marks.jinja").write_text(template)
    settings += [f"data.prompt_template={tmp_path / 'marks.jinja'}"]
    assert cli.main(command(workspace, tmp_path / "out", own, *settings)) == 0
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    asked = [text.partition("user\n")[2].partition(" Think.")[0] for text, _ in engines.prompts.values()]
    assert asked == ["What is <image>?", f"{image}Is it <image>?", f"{image}What?"]
    shown = [item["question"] for item in items_of(tmp_path / "out").values()]
    assert sorted(shown) == ["<image>Is it <image>?", "What is <image>?", "What?"]


def test_a_model_that_takes_text_only_is_not_scored_on_images(
    workspace_of: Callable[[str], Workspace], engines: FakeEngines, tmp_path: Path, capfd: Any
) -> None:
    workspace = workspace_of("qwen2")
    write_rows(own := tmp_path / "own.parquet", make_rows(1, "q", seed=3))
    capfd.readouterr()
    error = complaint(command(workspace, tmp_path / "out", own), capfd)
    assert (
        "own: of 1 items none can be asked; the first not asked: 1 image, and the model takes text" in error
    )
    assert engines.configs == []


def test_refusals(workspace: Workspace, engines: FakeEngines, own: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"

    def refused(*more: Any, benchmarks: Any = own) -> str:
        return complaint(command(workspace, out, benchmarks, *more), capfd)

    assert "unknown benchmark 'mathvers', did you mean 'mathverse'" in refused(benchmarks="mathvers")
    assert "two are called own" in refused(benchmarks=f"{own},{own}")
    assert "would give the same response 2 times" in refused("--n", 2, "--temperature", 0)
    assert "--limit 0 must be at least 1" in refused("--limit", 0)
    assert "actor.lr is read by nothing in an evaluation" in refused("actor.lr=1")
    assert "rollout.n is read by nothing in an evaluation; use --n" in refused("rollout.n=2")
    assert "reward.name is read by nothing without --reward" in refused("reward.name=math")
    assert "unknown key rollout.worker" in refused("rollout.worker=2")
    assert "--benchmarks names none" in refused("--reward", "--data-dir", tmp_path, benchmarks="mathvista")
    assert "--judge local:nowhere" in refused("--judge", "local:nowhere")
    assert "no data in" in refused("--data-dir", tmp_path, benchmarks="mathverse")
    arguments = ["eval", "--model", str(tmp_path), "--benchmarks", str(own), "--out", str(out)]
    assert "no Hugging Face model (no config.json), no checkpoint" in complaint(arguments, capfd)
    assert engines.calls == []


def test_the_benchmark_of_the_docs(workspace: Workspace, engines: FakeEngines, tmp_path: Path) -> None:
    """The example of docs/evaluation.md, from a file."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (tmp_path / "my.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    rows = [{"id": k, "problem": f"{k} + 1?", "answer": "1", "image": None, "topic": "ab"[k]} for k in (0, 1)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engines.answer = lambda prompt_id, seed: r"\boxed{1}" if prompt_id == "mine/0" else r"\boxed{2}"
    out = tmp_path / "out"
    name = f"{tmp_path / 'my.py'}:MyBenchmark"
    assert cli.main(command(workspace, out, name, "--data-dir", tmp_path)) == 0
    topics = results.read(out).summary["benchmarks"]["mine"]["breakdowns"]["topic"]
    assert {topic: group["correct"] for topic, group in topics.items()} == {"a": 1, "b": 0}
