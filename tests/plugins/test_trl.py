"""`mssr.integrations.trl`, in an environment with TRL: scripts/test_plugins.sh."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")

import torch
import transformers
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_client import VLLMClient
from trl.trainer.utils import RepeatSampler

from mssr import algorithms
from mssr.integrations import trl as plugin
from mssr.integrations.base import load_state, save_state
from mssr.integrations.trl import MSSRConfig, MSSRTrainer, batches
from tests.plugins import trl_lab as lab

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lab.make_model(tmp_path_factory.mktemp("model"))


def make_trainer(model: Path, out: Path, reward: Any = None, rows: Any = None, **more: Any) -> MSSRTrainer:
    args = MSSRConfig(**lab.settings(out, **more))
    rows = lab.make_rows() if rows is None else rows
    return MSSRTrainer(str(model), reward or lab.Rewards(), args, rows)


def run(
    model: Path, out: Path, resume: Path | None = None, missing: str | None = None, **more: Any
) -> tuple[MSSRTrainer, lab.Rewards, lab.Steps]:
    rewards, steps = lab.Rewards(missing), lab.Steps()
    steps.trainer = trainer = make_trainer(model, out, rewards, **more)
    trainer.add_callback(steps)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, rewards, steps


def test_advantages_eta_and_baseline_are_those_of_the_algorithms_and_a_resume_changes_nothing(
    model: Path, tmp_path: Path
) -> None:
    """Five generations in three epochs, of two updates each, with a row that never gets a reward."""
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 6, "missing": "t3"}
    whole, rewards, steps = run(model, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole/checkpoint-6"  # in the middle of the second epoch
    resumed, rest, more = run(model, tmp_path / "resumed", checkpoint, **options)

    calls = rewards.calls[:3] + rest.calls
    assert calls == rewards.calls and len(calls) == 5
    assert len({tuple(call["ids"]) for call in calls}) == 5, "the epochs have orders of their own"
    assert lab.same(lab.weights(whole), lab.weights(resumed))
    for key in ("loss", "grad_norm", "entropy", "policy/kl_update", "shaping/mean"):
        assert lab.history(whole, key) == lab.history(resumed, key), key

    method = algorithms.create("mssr")
    kls = lab.history(resumed, "policy/kl_update")
    told = {key: lab.history(resumed, key) for key in ("baseline/eta", "baseline/mean", "advantage/std")}
    assert len(kls) == 5 and min(kls) > 0
    for i, (call, trained) in enumerate(zip(calls, steps.advantages[:3] + more.advantages, strict=True)):
        advantages, metrics = lab.by_hand(method, call, kls[i])
        assert np.array_equal(np.float32(trained), advantages)
        assert {key: values[i] for key, values in told.items()} == {key: metrics[key] for key in told}
    # What trains is what was told: the rows of the last generation, in the order in which TRL shuffled them.
    pairs = sorted(zip(calls[-1]["tokens"], advantages.tolist(), strict=True))
    buffered = [batches.loss_mask(batch) for batch in resumed._buffered_inputs]
    assert pairs == sorted(
        (batch["completion_ids"][mask == 1].tolist(), float(batch["advantages"][0]))
        for batch, mask in zip(resumed._buffered_inputs, buffered, strict=True)
    )
    assert len(method.baseline) == len({i for call in calls for i in call["ids"]} - {"t3"}) == lab.ROWS - 1
    saved = load_state(tmp_path / "resumed/checkpoint-10/mssr.npz")["method"]
    assert np.array_equal(saved["baseline"]["counts"], method.state_dict()["baseline"]["counts"])
    assert saved["discount"] == method.state_dict()["discount"]


def alone(plain: Any, processor: Any, row: Any, tokens: list[int]) -> np.ndarray:
    """(T,) log-probs of a response to a row's prompt and image, without padding, by transformers alone."""
    content = [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    given = processor(text=[text], images=[row["images"]], return_tensors="pt")
    ids = torch.cat([given.pop("input_ids"), torch.tensor([tokens])], dim=1)
    if "mm_token_type_ids" in given:  # the positions of the image's tokens follow from it
        zeros = torch.zeros(1, len(tokens), dtype=torch.long)
        given["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], zeros], dim=1)
    given["attention_mask"] = torch.ones_like(ids)
    with torch.no_grad():
        logits = plain(input_ids=ids, **given).logits[0, -len(tokens) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].numpy()


def test_spo_follows_each_prompts_previous_response_and_a_resume_changes_nothing(
    model: Path, tmp_path: Path
) -> None:
    """Two epochs of two generations, resumed before the last; a row that never gets a reward is no visit."""
    spo = {"eta_min": 0.0, "eta_max": 1.0, "half_life": 0.5}
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 6, "missing": "t3", "method": "spo"}
    options |= {"method_options": spo, "learning_rate": 3e-4}
    whole, rewards, steps = run(model, tmp_path / "whole", **options)
    resumed, rest, _ = run(model, tmp_path / "resumed", tmp_path / "whole/checkpoint-6", **options)
    assert rest.calls == rewards.calls[3:]
    assert lab.same(lab.weights(whole), lab.weights(resumed))
    for key in ("loss", "baseline/drift", "baseline/eta", "baseline/mean"):
        assert lab.history(whole, key) == lab.history(resumed, key), key
    states = [load_state(tmp_path / out / "checkpoint-8/mssr.npz") for out in ("whole", "resumed")]
    np.testing.assert_equal(*states)
    assert len(states[0]["visits"]["ids"]) == lab.ROWS - 1

    rows = {row["id"]: row for row in lab.make_rows()}
    plain = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    method, seen = algorithms.create("spo", init_rollouts=0, **spo), {}
    for i, (call, trained) in enumerate(zip(rewards.calls, steps.advantages, strict=True)):
        drift = np.full(len(call["ids"]), np.nan)
        for j, (key, tokens) in enumerate(zip(call["ids"], call["tokens"], strict=True)):
            if key in seen:
                before, response = seen[key]
                values = []
                for k in (before, i):
                    plain.load_state_dict(steps.weights[k])
                    values.append(alone(plain, whole.processing_class, rows[key], response))
                drift[j] = np.abs(values[1] - values[0]).mean()
            if key != "t3":
                seen[key] = i, tokens
        scored = [key != "t3" for key in call["ids"]]
        assert np.isnan(drift[scored]).all() if i < 2 else drift[scored].min() > 1e-3
        keys = "baseline/drift", "baseline/eta", "baseline/mean"
        told = {key: lab.history(resumed, key)[i] for key in keys}
        advantages, metrics = lab.by_hand(method, call, drift[scored])
        metrics["baseline/drift"] = 0.0 if i < 2 else drift[scored].mean()
        assert trained == pytest.approx(advantages.tolist(), abs=1e-4)
        assert told == pytest.approx({key: metrics[key] for key in told}, rel=1e-4, abs=1e-6)
    assert 0.01 < told["baseline/eta"] < 0.99, "between its bounds, so that it depends on the drift"


def plain_logits(model: Path | torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """(B, T, V) of the responses of a batch of text, by transformers alone."""
    if isinstance(model, Path):
        model = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[:, -batch["completion_ids"].size(1) - 1 : -1].double()


def test_eta_follows_the_kl_of_the_policy_before_and_after_the_updates(model: Path, tmp_path: Path) -> None:
    rows = lab.make_rows(images=False)
    for accumulation in (2, 4):  # two updates, for which TRL keeps log-probs, and one, for which it does not
        options = {"rows": rows, "max_steps": 4 // accumulation, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(model, tmp_path, kl_probe_fraction=1.0, learning_rate=3e-4, **options)
        trainer.train()
        kls, count = 0.0, 0
        for batch in trainer._buffered_inputs:
            mask, token = batches.loss_mask(batch).bool(), batch["completion_ids"][..., None]
            before, after = (plain_logits(m, batch).log_softmax(-1) for m in (model, trainer.model))
            d = (after - before).gather(-1, token)[..., 0][mask]
            kls, count = kls + float((torch.expm1(d) - d).sum()), count + len(d)
        assert lab.history(trainer, "policy/kl_update") == pytest.approx([kls / count], rel=1e-4)


def test_the_loss_takes_shaped_advantages_of_exact_entropies(model: Path, tmp_path: Path) -> None:
    """TRL reads the advantages after it has asked for the entropies, and takes one for each token."""
    rows = lab.make_rows(images=False)
    trainer = make_trainer(model, tmp_path, rows=rows, max_steps=2, learning_rate=0.0, shaping_coef=0.08)
    trainer.train()
    assert 0 < np.mean(lab.history(trainer, "shaping/entropy_branch_fraction")) < 1
    assert set(lab.history(trainer, "shaping/sign_flip_fraction")) == {0.0}
    for batch in trainer._buffered_inputs:
        log_p = plain_logits(model, batch).log_softmax(-1)
        entropy, plain = -(log_p.exp() * log_p).sum(-1), batch["advantages"].double()[:, None]
        shaped = plain + torch.minimum(0.08 * entropy, plain.abs() / 2)
        tokens = batch["num_items_in_batch"] * 2 / 4  # of an update: two passes of the generation's four
        expected = -(shaped * batches.loss_mask(batch)).sum() / tokens
        assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
        assert batch["advantages"].dim() == 1, "the buffered batch keeps its own, for the next pass"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mvsr", {"eta": 0.9}),
        ("spo", {"kl_source": "update", "eta_rule": "monotone"}),
        ("reinforce_pp", {}),
    ],
)
def test_every_method_trains(model: Path, tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    trainer, rewards, steps = run(
        model, tmp_path, max_steps=2, method=method, method_options=options, steps_per_generation=2
    )
    hand = algorithms.create(method, **options, **({"init_rollouts": 0} if method == "spo" else {}))
    kls = lab.history(trainer, "policy/kl_update") or [0.0, 0.0]
    for call, trained, kl in zip(rewards.calls, steps.advantages, kls, strict=True):
        assert np.array_equal(np.float32(trained), lab.by_hand(hand, call, kl)[0])
    assert not lab.history(trainer, "shaping/mean")
    assert bool(lab.history(trainer, "baseline/eta")) == (method != "reinforce_pp")


def test_plain_trl_loses_weights_and_order_in_a_resume_and_ours_does_not(model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model, tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trained, checkpoint = lab.weights(trainer), str(tmp_path / "a/checkpoint-2")
    assert not lab.same(trained, lab.weights(make_trainer(model, tmp_path / "b")))

    plain = GRPOTrainer(
        str(model),
        lab.Rewards(),
        GRPOConfig(**lab.settings(tmp_path / "c", num_generations=2)),
        lab.make_rows(),
    )
    before = lab.weights(plain)
    plain._load_from_checkpoint(checkpoint)
    assert lab.same(lab.weights(plain), before), "TRL's fault is mended: tell so in docs/plugins.md"
    ours = make_trainer(model, tmp_path / "d")
    ours._load_from_checkpoint(checkpoint)
    assert lab.same(lab.weights(ours), trained)
    ours = make_trainer(model, tmp_path / "e")
    ours.state.best_model_checkpoint = checkpoint
    ours._load_best_model()
    assert lab.same(lab.weights(ours), trained)

    fresh, resumed = (RepeatSampler(range(50), 1, seed=3) for _ in range(2))
    first, second = list(fresh), list(fresh)
    assert list(resumed) == first != second, "a process that begins with the second epoch repeats the first"
    fresh, resumed = (batches.EpochSampler(RepeatSampler(range(50), 1, seed=3)) for _ in range(2))
    assert list(fresh) == first
    fresh.epoch = resumed.epoch = 1
    assert list(fresh) == list(resumed) != first


UNTOUCHED = """
import sys
from pathlib import Path
from trl import GRPOConfig, GRPOTrainer
from tests.plugins import trl_lab as lab

def train():
    args = lab.settings(Path(sys.argv[2]), num_generations=8, per_device_train_batch_size=4, max_steps=2)
    trainer = GRPOTrainer(sys.argv[1], lab.Rewards(), GRPOConfig(**args), lab.make_rows())
    before = lab.weights(trainer)
    trainer.train()
    assert not lab.same(before, lab.weights(trainer))
    return lab.weights(trainer)

without = train()
assert "mssr.integrations.trl" not in sys.modules
import mssr.integrations.trl
assert lab.same(without, train())
"""


def test_trls_own_trainer_is_the_same_with_and_without_the_import(model: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", UNTOUCHED, str(model), str(tmp_path)], check=True, cwd=REPO)


RANK = """
import json, sys
from pathlib import Path
from mssr.integrations.trl import MSSRConfig, MSSRTrainer
from tests.plugins import trl_lab as lab

def train(out, resume=None, **more):
    rewards, steps = lab.Rewards("t3"), lab.Steps()
    args = lab.settings(Path(sys.argv[2]) / out, max_steps=4, save_strategy="steps", save_steps=3,
                        steps_per_generation=2, **more)
    trainer = steps.trainer = MSSRTrainer(sys.argv[1], rewards, MSSRConfig(**args), lab.make_rows())
    trainer.add_callback(steps)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, rewards, steps

whole, rewards, steps = train("whole")
resumed, rest, _ = train("resumed", str(Path(sys.argv[2]) / "whole/checkpoint-3"))
assert rest.calls == rewards.calls[3:]
still, visited, _ = train("still", method="spo", learning_rate=0.0)
rank = whole.accelerator.process_index
told = {"calls": rewards.calls, "advantages": steps.advantages,
        "kl": lab.history(whole, "policy/kl_update"), "baseline": whole.method.metrics(),
        "local": [float(a) for batch in whole._buffered_inputs for a in batch["advantages"]],
        "counts": whole.method.state_dict()["baseline"]["counts"].tolist(),
        "visited": visited.calls, "drift": lab.history(still, "baseline/drift"),
        "visits": {i: v[0].tolist() for i, v in still.visits._visits.items()},
        "exact": lab.same(lab.weights(whole), lab.weights(resumed)),
        "weights": float(sum(w.double().abs().sum() for w in lab.weights(whole).values()))}
Path(sys.argv[2], f"rank-{rank}.json").write_text(json.dumps(told))
"""


def test_two_processes_share_one_baseline_and_resume_exactly(model: Path, tmp_path: Path) -> None:
    """Four generations of two rollouts a process in two epochs; resumed in the middle of the second."""
    (tmp_path / "rank.py").write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, str(tmp_path / "rank.py"), str(model), str(tmp_path)], check=True, cwd=REPO)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for key in ("advantages", "baseline", "counts", "weights", "drift", "visits"):
        assert first[key] == second[key], key
    assert first["exact"] and second["exact"]
    hand = algorithms.create("mssr")
    for i, (a, b) in enumerate(zip(first["calls"], second["calls"], strict=True)):
        call = {key: a[key] + b[key] for key in a}
        advantages, metrics = lab.by_hand(hand, call, first["kl"][i])
        assert np.array_equal(np.float32(first["advantages"][i]), advantages)
    assert {key: metrics[key] for key in first["baseline"]} == first["baseline"]
    assert sorted(first["local"]) == sorted(advantages[:2].tolist())
    assert sorted(second["local"]) == sorted(advantages[2:].tolist())
    # Where nothing learns, a drift is of another response or prompt. The shuffle brings some to another rank.
    asked = [[call["ids"] for call in told["visited"]] for told in (first, second)]
    assert {i for ids in asked[0][:2] for i in ids} & {i for ids in asked[1][2:] for i in ids}
    assert first["drift"][:2] == [0.0, 0.0] and 0 <= max(first["drift"][2:]) < 1e-5
    calls = [call for pair in zip(first["visited"], second["visited"], strict=True) for call in pair]
    pairs = [pair for call in calls for pair in zip(call["ids"], call["tokens"], strict=True)]
    assert first["visits"] == {key: tokens for key, tokens in pairs if key != "t3"}


def test_placeholders_are_banned_beside_what_a_user_bans(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(model, tmp_path, generation_kwargs={"suppress_tokens": [7]})
    config = trainer.model.config
    banned = {config.image_token_id, config.video_token_id, config.vision_start_token_id}
    assert banned < set(trainer.banned)
    for suppressed in (
        trainer.generation_config.suppress_tokens,
        trainer.generation_kwargs["suppress_tokens"],
    ):
        assert set(suppressed) == {7, *trainer.banned}
    bad = [[5, config.image_token_id]]
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *_: (bad, None))
    with pytest.raises(ValueError, match=f"placeholder {config.image_token_id}, which must not be sampled"):
        trainer._generate([lab.make_rows()[0]["prompt"]])


class Server(VLLMClient):
    """Records what TRL's client sends to vLLM."""

    def __init__(self) -> None:
        self.base_url, self.model, self.sent = "", "m", []

    def _post(self, url: str, json: dict[str, Any]) -> dict[str, Any]:
        self.sent.append((url, json))
        logprobs = {
            "tokens": ["token_id:5"],
            "token_logprobs": [-1.0],
            "top_logprobs": [{"token_id:5": -1.0}],
        }
        return {"choices": [{"prompt_token_ids": [1], "token_ids": [5], "logprobs": logprobs}]}


def test_placeholders_are_banned_in_what_is_sent_to_vllm(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(**options: Any) -> Any:
        options["generation_kwargs"] = options["generation_kwargs"] or {}
        return type("Engine", (), options)

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", engine)
    given = {"logit_bias": {"9": 1.5}, "seed": 4}
    trainer = make_trainer(model, tmp_path, use_vllm=True, vllm_mode="colocate", generation_kwargs=given)
    kwargs = trainer.vllm_generation.generation_kwargs
    assert kwargs == {"seed": 4, "logit_bias": {9: 1.5, **dict.fromkeys(trainer.banned, -100.0)}}
    server = Server()
    server.generate([[1]], generation_kwargs=kwargs)
    body = json.loads(json.dumps(server.sent[0][1]))
    assert body["logit_bias"] == {"9": 1.5, **{str(token): -100.0 for token in trainer.banned}}


REFUSED = [
    ({"num_generations": 8}, "num_generations=8: a method here compares a prompt's one response"),
    ({"method": "grpo"}, "method 'grpo' must be one of mssr, mvsr, spo, reinforce_pp"),
    ({"method_options": {"kl_targt": 1.0}}, "kl_targt"),
    ({"method": "spo", "mask_truncated_completions": True}, "no log-probs of a cut response"),
    ({"method_options": {"kl_source": "reference"}}, "kl_source='reference': here eta follows"),
    ({"gradient_accumulation_steps": 3}, "must divide the 4 passes of a generation"),
    (
        {"steps_per_generation": 3, "gradient_accumulation_steps": 1},
        "a generation of 3 rollouts: TRL's checks",
    ),
    ({"scale_rewards": "batch"}, "scale_rewards is of groups and without effect"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "normalize_then_sum is of groups"),
    ({"importance_sampling_level": "sequence"}, "shaping is lost: set shaping=False"),
    ({"remove_unused_columns": True}, "would remove 'id'"),
    ({"shaping_coef": -1.0}, "shaping_coef must be a finite number >= 0"),
    ({"shaping_divisor": 0.0}, "shaping_divisor must be a finite number > 0"),
    ({"kl_probe_fraction": 1.5}, "kl_probe_fraction=1.5 must be in"),
]


@pytest.mark.parametrize(("setting", "reason"), REFUSED, ids=[next(iter(s)) for s, _ in REFUSED])
def test_settings_without_sense_are_refused_in_one_line(
    tmp_path: Path, setting: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as told:
        MSSRConfig(**lab.settings(tmp_path, **setting))
    assert "\n" not in str(told.value)


def test_data_that_does_not_tell_prompts_apart_is_refused(model: Path, tmp_path: Path) -> None:
    rows = lab.make_rows()
    with pytest.raises(ValueError, match="the data has no column 'uid', which tells prompts apart"):
        make_trainer(model, tmp_path, id_column="uid")
    twice = rows.map(lambda row, i: {"id": str(i // 2)}, with_indices=True)
    with pytest.raises(ValueError, match="column 'id' has '0' twice: two prompts would share a baseline"):
        make_trainer(model, tmp_path, rows=twice)
    with pytest.raises(ValueError, match="args must be an MSSRConfig, not GRPOConfig"):
        MSSRTrainer(str(model), lab.Rewards(), GRPOConfig(**lab.settings(tmp_path, num_generations=2)), rows)
    trainer = make_trainer(model, tmp_path)
    mixed = [{**rows[0]}, {**rows[1], "images": []}]
    with pytest.raises(ValueError, match="a generation has rows with and without images"):
        trainer._generate_and_score_completions(mixed)
    trainer.model.train()
    empty = [{**row, "id": None} for row in rows.select(range(2))]
    with pytest.raises(ValueError, match="a row has nothing in column 'id'"):
        trainer._generate_and_score_completions(empty)


def test_what_would_spoil_a_run_is_refused_before_or_within_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_steps=3 must be a multiple of the 2 updates of a generation"):
        make_trainer(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=3).train()
    with pytest.raises(ValueError, match="max_steps=3 must be a multiple of the 2 updates"):
        make_trainer(model, tmp_path, max_steps=3, save_strategy="steps", save_steps=2).train()
    trainer = make_trainer(model, tmp_path, max_steps=2)
    trainer.state.global_step = 1
    with pytest.raises(ValueError, match="the checkpoint's step=1 must be a multiple of the 2 updates"):
        trainer._save_checkpoint(trainer.model, None)
    with pytest.raises(ValueError, match="the checkpoint's step=1 must be a multiple of the 2 updates"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)

    def five(completion_ids: list[Any], **_: Any) -> list[float]:
        return [5.0] * len(completion_ids)

    with pytest.raises(ValueError, match=r"the reward of prompt 't\d' must be in \[0, 1\], not 5.0"):
        make_trainer(model, tmp_path, five, max_steps=2).train()
    (tmp_path / "strange").mkdir()
    with pytest.raises(ValueError, match="strange has no mssr"):
        trainer._load_optimizer_and_scheduler(str(tmp_path / "strange"))
    trainer = make_trainer(model, tmp_path, method="spo")
    save_state(tmp_path / "strange/mssr.npz", {"method": trainer.method.state_dict()})
    with pytest.raises(ValueError, match="kl_source='last_visit' needs, and only it has, last visits"):
        trainer._load_optimizer_and_scheduler(str(tmp_path / "strange"))
    with pytest.raises(ValueError, match="spo scores responses again, in which no other text may be"):
        trainer._drift_since_last_visits(trainer.visits, {"tool_mask": torch.ones(1, 1)})


def test_rewards_are_weighed_and_a_row_without_any_is_left_out(model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model, tmp_path)
    trainer.args.reward_weights = [0.9, 0.1]
    nan = float("nan")
    trainer._rewards = torch.tensor([[1.0, 1.0], [nan, 1.0], [nan, nan], [0.0, 0.0]])
    rewards = trainer._summed_rewards()
    assert np.array_equal(rewards, [1.0, 0.1, nan, 0.0], equal_nan=True)
    nothing = lab.Rewards()
    nothing.__class__ = type("Nothing", (lab.Rewards,), {"__call__": lambda *_, id, **__: [None] * len(id)})
    before, trainer = lab.weights(trainer), make_trainer(model, tmp_path, nothing, max_steps=2)
    trainer.train()
    assert lab.same(lab.weights(trainer), before), "nothing was scored, so nothing is learned"
    assert len(trainer.method.baseline) == 0 and not lab.history(trainer, "baseline/eta")


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0.0"])
def test_another_version_of_trl_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda _: version)
        with pytest.raises(ImportError, match=f"needs trl>=1.16,<1.17, and this is {version}"):
            importlib.reload(plugin)
