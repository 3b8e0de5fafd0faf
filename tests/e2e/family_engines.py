"""What vLLM makes of every family, in one process that imports it once: ``OUT NAME CONFIG ...``.

A name is a family's, with ``-untied`` after it for one whose head is not its embedding. Writes
``OUT/NAME.json`` for each as soon as it is known, for `test_family_engines` to read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
import time
import traceback
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from mssr.config import Config
from mssr.config.run import to_dict
from mssr.errors import TransferInterruptedError, UserError
from mssr.models.families import FAMILIES, Family
from mssr.models.files import sha256
from mssr.models.loading import import_transformers, load_model
from mssr.models.packing import PackItem, pack
from mssr.models.policy import PolicyModel
from mssr.models.tiny import save_quietly
from mssr.rollout.checksums import checksums, differences
from mssr.rollout.queue import RequestQueue
from mssr.rollout.vllm_engine import VllmEngine, _engine_input
from mssr.rollout.weights import InMemory
from mssr.runs.config import load_config
from mssr.runs.export import export
from mssr.runs.manifest import Manifest, write_manifest
from mssr.types import Rollout, RolloutRequest, SamplingParams
from tests.conftest import QUESTION, write_rows

GREEDY = SamplingParams(temperature=1.0, max_tokens=8, greedy=True)
SAMPLED = SamplingParams(temperature=0.8, max_tokens=8)
SIZES = [[(112, 56)], [(56, 56), (84, 140)], [], [(71, 90), (300, 20), (128, 128)]]
"""(width, height) of each prompt's images. Most are resized, by the factor of the one family or the other."""


def write_prompts(path: Path, sees_images: bool) -> list[str]:
    """Prompts with an image, several of different sizes, none, and one of them twice; returns their ids."""
    rng = np.random.default_rng(3)

    def image(size: tuple[int, int]) -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))

    prompts = [[image(size) for size in sizes if sees_images] for sizes in SIZES]
    prompts.append([*prompts[3][:2], *prompts[3][:1]])
    rows = [
        {"id": f"p{k}", "images": images, "problem": QUESTION[: 10 + 4 * k], "answer": "1"}
        for k, images in enumerate(prompts)
    ]
    write_rows(path, rows)
    return [row["id"] for row in rows]


def untie(family: Family, model_dir: Path, out: Path) -> Path:
    """The same model, but with a head of its own."""
    shutil.copytree(model_dir, out)
    model = getattr(import_transformers(), family.auto_class).from_pretrained(model_dir)
    for config in (model.config, family.text_config(model.config)):
        config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    save_quietly(model, out)
    return out


def engine_dtype(family: Family) -> torch.dtype:
    """In which its engine computes here: float32, if vLLM can do that."""
    try:
        family.engine_options("cpu", torch.float32)
    except UserError:
        return torch.bfloat16
    return torch.float32


class Interrupted(InMemory):
    """Of a transfer, only half arrives."""

    def tensors(
        self, device: torch.device, process: int, kept: dict[str, Any]
    ) -> Generator[tuple[str, torch.Tensor]]:
        yield from list(self.weights.items())[: len(self.weights) // 2]
        raise TransferInterruptedError("the sender died")


def lose(worker: Any) -> None:
    """What a GPU loses of a model while its engine sleeps: all but the buffers of its modules."""
    model = worker.get_model()
    lists = [value for module in model.modules() for value in vars(module).values() if type(value) is list]
    tensors = [x for x in itertools.chain(*lists) if isinstance(x, torch.Tensor)]
    with torch.inference_mode():
        for tensor in (*model.parameters(), *tensors):
            tensor.fill_(float("nan"))


class FamilyEngine:
    """The engine and the policy of a family, both with the weights of an export.

    The policy computes in float32; its weights are such as the engine's dtype has.
    """

    def __init__(self, name: str, workspace: Path, out: Path) -> None:
        model_type, *untied = name.split("-")
        self.family = FAMILIES[model_type]
        self.dtype = engine_dtype(self.family)
        self.ids = write_prompts(out / "rows.parquet", self.family.tower_name is not None)
        small = ["rollout.max_num_seqs=16", "rollout.max_num_batched_tokens=1024"]
        # Else no prompt would fill a block, of which what was computed is kept until new weights come.
        small.append("rollout.engine_options={block_size: 32}")
        options = [f"data.train={out / 'rows.parquet'}", "data.val=null", *small]
        options.append(f"model.dtype={str(self.dtype).removeprefix('torch.')}")
        base = load_config(workspace, options)
        if untied:
            options.append(f"model.path={untie(self.family, Path(base.model.path), out / 'untied')}")
            base = load_config(workspace, options)
        self.base = Path(base.model.path)
        self.policy = PolicyModel(load_model(base.model, torch.float32), SAMPLED.temperature)
        self._noise = torch.Generator().manual_seed(1)
        self.update()
        self._export(base, out)
        self.config = load_config(workspace, [*options, f"model.path={out / 'export'}"])
        self.rounding = PolicyModel(load_model(self.config.model, self.dtype), SAMPLED.temperature)
        self.engine = VllmEngine(self.config, "cpu")
        self.prompts = self.engine.prompts.get(self.ids)
        self.rows = [self.engine.prompts.row(i) for i in self.ids]

    def _export(self, config: Config, out: Path) -> None:
        """The policy through a checkpoint into a model directory."""
        checkpoint = out / "checkpoint"
        state = {"model": self.policy.model.state_dict()}
        dcp.save(state, checkpoint_id=str(checkpoint / "actor"), no_dist=True)
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        sums = {str(path.relative_to(checkpoint)): sha256(path) for path in files}
        write_manifest(checkpoint, Manifest(1, to_dict(config), None), sums)
        export(checkpoint, out / "export")

    def update(self) -> None:
        """As an optimizer would: every weight, the tower's included, by a part of its own size."""
        with torch.no_grad():
            for parameter in self.policy.model.parameters():
                step = torch.randn(parameter.shape, generator=self._noise)
                parameter.add_(step * (0.1 * parameter.std(correction=0) + 0.02))
                parameter.copy_(parameter.to(self.dtype))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.to(self.dtype) for name, weight in self.policy.model.state_dict().items()}

    def load(self, weights: dict[str, torch.Tensor], version: int) -> list[str]:
        """After a sleep. Returns the names of tensors that the engine does not have as they were sent."""
        self.engine._engine.collective_rpc(lose)
        loaded = self.engine.load_weights(InMemory(weights), version, check=True)
        assert all(process.held for process in loaded)
        return differences(checksums(weights), loaded)

    def break_off(self, weights: dict[str, torch.Tensor]) -> None:
        """Begin to load, and have no more to load in the midst of the layers."""

        class Ending(InMemory):
            def tensors(self, *where: Any) -> Generator[tuple[str, torch.Tensor]]:
                yield from itertools.islice(self.weights.items(), 3 * len(self.weights) // 4)
                raise TransferInterruptedError("the rank is gone")

        with contextlib.suppress(TransferInterruptedError):
            self.engine.load_weights(Ending(weights), version=-1, check=True)
            raise AssertionError("nobody was told")

    def answers(self, params: SamplingParams, each: int = 1, ids: Sequence[str] = ()) -> list[Rollout]:
        asked = [RolloutRequest(i, k, seed=97 * k + 5) for k in range(each) for i in ids or self.ids]
        found: dict[int, Rollout] = {}
        for part in self.engine.generate(RequestQueue(enumerate(asked)), params):
            found.update(part)
        return [found[k] for k in range(len(asked))]

    def mismatch(self) -> dict[str, float]:
        """Differences of log-probs of what the engine samples, against the policy."""
        # First one without images by itself: where no image is, what it computes with is that of before.
        rollouts = self.answers(SAMPLED, ids=self.ids[2:3]) + self.answers(SAMPLED, each=2)
        items = [self.item(r.prompt_id, torch.from_numpy(r.response_token_ids).long()) for r in rollouts]
        batch = pack(items, self.policy.merge_size)
        with torch.no_grad():
            log_probs, _ = self.policy(batch)
            found = gap(log_probs, torch.cat([torch.from_numpy(r.log_probs) for r in rollouts]))
            if self.dtype != torch.float32:
                # What the same computation loses to the dtype.
                self.rounding.model.load_state_dict(self.weights())
                found["noise"] = gap(log_probs, self.rounding(batch)[0])["mean"]
        return found

    def item(self, prompt_id: str, response: torch.Tensor) -> PackItem:
        prompt = self.prompts[self.ids.index(prompt_id)]
        return PackItem(prompt, self.policy.rope_positions(prompt), response)

    def images(self) -> list[list[Image.Image]]:
        """Of each prompt, in the size in which the model is to see them."""
        return [self.engine.prompts.encoder.images(row) for row in self.rows]

    def vllm_inputs(self, images: Sequence[list[Image.Image]], dtype: torch.dtype) -> list[Any]:
        """What vLLM makes of the texts and images, for a model in this dtype."""
        renderer, encoder = self.engine._engine.renderer, self.engine.prompts.encoder
        prompts = [
            {"prompt": encoder.chat_text(row)} | ({"multi_modal_data": {"image": own}} if own else {})
            for row, own in zip(self.rows, images, strict=True)
        ]
        with mock.patch.object(renderer.model_config, "dtype", dtype):
            return [renderer.render_cmpl([prompt])[0] for prompt in prompts]


def gap(some: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    difference = (some - others).abs()
    return {"largest": float(difference.max()), "mean": float(difference.mean())}


def describe(inputs: Any) -> dict[str, Any]:
    """An input of vLLM as values that can be compared, without the names by which caches know images."""
    described = {"type": inputs["type"], "ids": list(inputs["prompt_token_ids"])}
    if inputs["type"] == "multimodal":
        places, items = inputs["mm_placeholders"], inputs["mm_kwargs"]
        described["placeholders"] = {
            kind: [(p.offset, p.length, p.is_embed) for p in of_kind] for kind, of_kind in places.items()
        }
        for kind, of_kind in items.items():
            elements = [list(item.items()) for item in of_kind]
            described[f"fields of {kind}"] = [[(n, e.field.keep_on_cpu) for n, e in x] for x in elements]
            described[f"kinds of {kind}"] = [[(type(e.field), e.data.dtype) for _, e in x] for x in elements]
            described[f"data of {kind}"] = [[e.data.tolist() for _, e in x] for x in elements]
    return described


def differing(ours: Sequence[Any], theirs: Sequence[Any], but: str = "") -> list[str]:
    """Which parts of which prompts are not the same, except one."""
    pairs = [(describe(a), describe(b)) for a, b in zip(ours, theirs, strict=True)]
    parts = {(k, part) for k, pair in enumerate(pairs) for described in pair for part in described}
    differ = [(k, part) for k, part in sorted(parts) if pairs[k][0].get(part) != pairs[k][1].get(part)]
    return [f"p{k}: {part}" for k, part in differ if part != but]


def compare_inputs(at: FamilyEngine) -> dict[str, Any]:
    """What we give the engine against what vLLM would prepare, and what it answers to both."""
    found: dict[str, Any] = {"inputs": {}}
    images = at.images()
    for dtype in sorted((torch.bfloat16, torch.float32), key=lambda dtype: dtype == at.dtype):
        ours = [_engine_input(prompt, at.engine._merge_size, dtype) for prompt in at.prompts]
        theirs = at.vllm_inputs(images, dtype)
        found["inputs"][str(dtype)] = differing(ours, theirs)
    # Resized by the processor and not by us; pixels may then differ by a rounding.
    originals = at.vllm_inputs([[image.decode() for image in row.images] for row in at.rows], dtype)
    found["inputs"]["originals"] = differing(ours, originals, but="data of image")
    found["tower_on_each_device"] = (
        at.engine._engine.model_config._model_info.supports_multimodal_encoder_tp_data
    )
    names = [i["mm_hashes"]["image"] if "mm_hashes" in i else [] for i in ours]
    found["images"] = [[own.index(name) for name in own] for own in names]
    answers = at.answers(GREEDY)
    with mock.patch.object(at.engine, "_inputs", lambda ids: [theirs[at.ids.index(i)] for i in ids]):
        their_answers = at.answers(GREEDY)
    found["to_both"] = largest_difference(answers, their_answers)
    return found


def largest_difference(some: Sequence[Rollout], others: Sequence[Rollout]) -> float:
    """Of log-probs; infinite where the tokens are not the same."""
    pairs = list(zip(some, others, strict=True))
    if any(a.response_token_ids.tolist() != b.response_token_ids.tolist() for a, b in pairs):
        return float("inf")
    return max(float(np.abs(a.log_probs - b.log_probs).max()) for a, b in pairs)


def changed_by_export(at: FamilyEngine, model: Any, processor: Any) -> list[str]:
    """Weights of an export that are not the policy's, and files that are not those of the model before."""
    path, weights = Path(at.config.model.path), model.state_dict()
    changed = [n for n, w in at.weights().items() if n not in weights or not torch.equal(w, weights[n])]
    files = {file.name for directory in (path, at.base) for file in directory.iterdir()}
    # Loaded, a tokenizer may be of the family's own class, and it knows where it was loaded from.
    same = {name for name in files if not name.startswith(("model", "tokenizer"))}
    changed += [n for n in same if (path / n).read_bytes() != (at.base / n).read_bytes()]
    before = import_transformers().AutoProcessor.from_pretrained(at.base)
    tokenizers = [getattr(p, "tokenizer", p).backend_tokenizer.to_str() for p in (before, processor)]
    return changed + ["tokenizer"] * (tokenizers[0] != tokenizers[1])


def compare_export(at: FamilyEngine) -> dict[str, Any]:
    """The export against what it was made of; and what it says in transformers, with its own processor and
    one prompt at a time, against vLLM."""
    transformers, path = import_transformers(), at.config.model.path
    model = getattr(transformers, at.family.auto_class).from_pretrained(path, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(path)
    changed = changed_by_export(at, model, processor)
    theirs, ours, others = [], [], []
    for row, images, answer in zip(at.rows, at.images(), at.answers(GREEDY), strict=True):
        options = {"images": images, "size": at.config.data.pixel_bounds} if images else {}
        text = at.engine.prompts.encoder.chat_text(row)
        inputs = processor(text=[text], return_tensors="pt", **options)
        tokens = torch.from_numpy(answer.response_token_ids).long()[None]
        # What the processor says of each token; a response is text.
        added = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], added.get(key, torch.zeros_like(tokens))], dim=1)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -tokens.shape[1] - 1 : -1].float()
        logits[:, at.policy.banned_ids] = float("-inf")
        theirs.append(logits.log_softmax(-1).gather(1, tokens.T)[:, 0])
        ours.append(torch.from_numpy(answer.log_probs))
        others += logits.argmax(-1)[tokens[0] != logits.argmax(-1)].tolist()
    return {"changed": changed, "other_tokens": others} | gap(torch.cat(theirs), torch.cat(ours))


def shouting(at: FamilyEngine) -> dict[str, Any]:
    """How often a policy wants to say a placeholder above all, and which of them the engine lets it say."""
    tokenizer = at.engine.prompts.encoder.processor.tokenizer
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    ids = tokenizer.convert_tokens_to_ids(names) if at.family.tower_name else []
    hidden: list[torch.Tensor] = []
    model = at.policy.model
    language_model = at.policy.family.language_model(model)
    hook = language_model.register_forward_hook(lambda *call: hidden.append(call[2].last_hidden_state[0]))
    items = [at.item(i, torch.zeros(1, dtype=torch.int64)) for i in at.ids]
    with torch.no_grad():
        at.policy(pack(items, at.policy.merge_size))
        hook.remove()
        states = torch.cat(hidden)
        model.lm_head.weight[ids] = 100 * states.mean(0)
        share = torch.isin((states @ model.lm_head.weight.T).argmax(-1), torch.tensor(ids)).float().mean()
    found = {"wanted": float(share), "not_loaded": at.load(at.weights(), 9)}
    said = [t for params in (GREEDY, SAMPLED) for r in at.answers(params, 2) for t in r.response_token_ids]
    return found | {"said": sorted(set(map(int, said)) & set(ids)), "tokens": len(said)}


def examine(name: str, workspace: Path, out: Path) -> dict[str, Any]:
    started = time.perf_counter()
    at = FamilyEngine(name, workspace, out)
    found: dict[str, Any] = {"seconds": {"start": time.perf_counter() - started}}
    found |= compare_inputs(at)
    found["export"] = compare_export(at)
    found["mismatch"], found["not_loaded"] = [at.mismatch()], []
    for version in (1, 2):
        at.update()
        with pytest.raises(TransferInterruptedError):
            at.engine.load_weights(Interrupted(at.weights()), version, check=True)
        at.break_off({name: 2 * weight for name, weight in at.weights().items()})
        found["not_loaded"] += at.load(at.weights(), version)
        found["mismatch"].append(at.mismatch())
    found["placeholders"] = shouting(at)
    at.engine.close()
    found["seconds"]["all"] = time.perf_counter() - started
    return found


def main(out: Path, *families: str) -> None:
    import_transformers()  # before vLLM does
    from vllm.model_executor.models import registry

    # Else vLLM would start a process to look at each model, which takes longer than all that is tested here.
    registry._run_in_subprocess = lambda look: look()
    for name, workspace in zip(families[::2], families[1::2], strict=True):
        directory = out / name
        directory.mkdir()
        try:
            found = examine(name, Path(workspace), directory)
        except Exception:
            found = {"error": traceback.format_exc()}
        (out / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
