"""EasyR1's data section, pasted as it is: every key gets the meaning it has there, under our name."""

from __future__ import annotations

from typing import Any

from mssr.errors import UserError

RENAMED: dict[str, tuple[str, Any]] = {
    "train_files": ("data.train", ""),
    "val_files": ("data.val", ""),
    "prompt_key": ("data.problem_column", "prompt"),
    "answer_key": ("data.answer_column", "answer"),
    "image_key": ("data.images_column", "images"),
    "format_prompt": ("data.prompt_template", None),
    "override_chat_template": ("data.chat_template", None),
    "max_response_length": ("rollout.max_response_length", 512),
    "seed": ("seed", 1),
}
"""Keys of EasyR1's data section -> ours, and their default there. Those with the same name in both are not
listed."""

WITHOUT_EFFECT = {
    "video_key": "there are no videos here",
    "video_fps": "there are no videos here",
    "val_batch_size": "all of a validation is one batch",
    "mini_rollout_batch_size": "all rollouts of a step are generated at once",
    "filter_overlong_prompts_workers": "the filter needs none",
}
PROMPTS_PER_STEP = "rollout_batch_size"
FILTER = "filter_overlong_prompts"
ONLY_EASYR1 = {*RENAMED, *WITHOUT_EFFECT, PROMPTS_PER_STEP, FILTER}


def translate(tree: dict[str, Any], source: str) -> tuple[dict[str, Any], int | None, list[str]]:
    """The config tree of one file or override (the source) with EasyR1's keys under our names.

    Returns:
        The tree, EasyR1's ``rollout_batch_size`` (prompts a step, None without), and a line of what was
        translated (nothing if nothing was).

    Raises:
        UserError: a key is set under both names, or asks for what is not done here; or it is a whole config
            of EasyR1.
    """
    theirs = "verl" if "actor_rollout_ref" in tree else "EasyR1" if "worker" in tree else ""
    if theirs or "adv_estimator" in (tree.get("algorithm") or {}):
        raise UserError(
            f"{source} is a whole config of {theirs or 'EasyR1'}; its section data can be pasted into a "
            "config of ours if it is EasyR1's, and mssr convert FILE makes one of all of it"
        )
    given = tree.get("data")
    if not isinstance(given, dict) or not ONLY_EASYR1.intersection(given):
        return tree, None, []
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    data, notes = tree["data"], []
    for key, (ours, _) in RENAMED.items():
        if key in given:
            section, _, leaf = ours.rpartition(".")
            target = tree.setdefault(section, {}) if section else tree
            if leaf in target:
                raise UserError(f"{source}: data.{key} is EasyR1's name of {ours}; set one of the two")
            target[leaf] = data.pop(key)
            notes.append(f"{key} as {ours}")
    if given.get("format_prompt", ...) is None:
        data.setdefault("instruction", "")  # without format_prompt EasyR1 asks the bare question
    for key, reason in WITHOUT_EFFECT.items():
        if data.pop(key, None) is not None:
            notes.append(f"{key} not at all ({reason})")
    if data.pop(FILTER, True) is False:
        raise UserError(
            f"{source}: data.{FILTER}=false: overlong prompts are always left out here; raise "
            "data.max_prompt_length to keep them"
        )
    prompts = data.pop(PROMPTS_PER_STEP, None)
    if prompts is not None:
        if not isinstance(prompts, int) or isinstance(prompts, bool) or prompts < 1:
            raise UserError(f"{source}: data.{PROMPTS_PER_STEP}={prompts} must be a whole number above 0")
        if "rollouts_per_step" in tree.get("rollout", {}):
            raise UserError(
                f"{source}: data.{PROMPTS_PER_STEP} and rollout.rollouts_per_step say the same; set one"
            )
        notes.append(f"{PROMPTS_PER_STEP} as rollout.rollouts_per_step, times the responses per prompt")
    return tree, prompts, ["EasyR1's data section: " + ", ".join(notes)] if notes else []
