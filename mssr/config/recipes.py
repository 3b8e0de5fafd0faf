"""The configs that come with the package, by name: ``digits/mssr``, ``paper/qwen2_5_vl_7b/grpo``."""

from __future__ import annotations

import shutil
from pathlib import Path

from mssr.errors import UserError, did_you_mean, first_line

RECIPES = Path(__file__).parents[1] / "recipes"
SETS = {
    "digits": "mssr prepare digits --out data/digits, and mssr train {}/mssr.yaml",
    "chains": "mssr prepare chains --out data/chains, and mssr train {}/stress.yaml",
    "geometry3k": "mssr plan {}/qwen2_5_vl_3b.yaml --gpus 8xH100-80GB, and mssr train in place of plan",
    "paper": "mssr train {}/qwen2_5_vl_3b/mssr.yaml",
}
"""What to do with the recipes of a set, written to a directory."""
_MEANT = {"digits": "digits/mssr", "geometry3k": "geometry3k/qwen2_5_vl_3b"}
"""Which recipe the name of a set stands for."""


def find(name: str | Path) -> Path:
    """The config file that is meant: the path of one, or the recipe of that name.

    Raises:
        UserError: it is the name of no recipe, or of several, or of one and of something here.
    """
    path, text = Path(name), str(name).rstrip("/")
    if path.is_file() or path.is_absolute() or path.suffix in (".yaml", ".yml"):
        return path
    recipes = {
        str(file.relative_to(RECIPES).with_suffix("")): file for file in sorted(RECIPES.rglob("*.yaml"))
    }
    if file := recipes.get(_MEANT.get(text, text)):
        for here in (Path(f"{text}.yaml"), *sorted(path.glob("*.yaml"))):
            if here.is_file():
                raise UserError(f"{name} may be {here} or the recipe {file}; give the path of one of them")
        return file
    if several := [one for one in recipes if one.startswith(f"{text}/")]:
        raise UserError(f"{name} is several recipes; name one of {', '.join(several)}")
    known = f"{did_you_mean(text, recipes)}; recipes: {', '.join(recipes)}"
    raise UserError(f"config {name} is neither a file nor a recipe{known}")


def init(name: str, directory: Path | None = None) -> None:
    """`mssr init`: write a set of recipes to a directory, ``configs/<name>`` by default.

    Raises:
        UserError: a file of it is there, or the directory cannot be written.
    """
    source, target = RECIPES / name, directory or Path("configs") / name
    files = [target / file.relative_to(source) for file in source.rglob("*.yaml")]
    for file in sorted(files):
        if file.exists():
            raise UserError(f"{file} exists, and nothing was written; name another directory")
    try:
        shutil.copytree(source, target, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"recipes cannot be written to {target}: {first_line(error)}") from error
    print(f"{len(files)} configs are in {target}; next: {SETS[name].format(target)}")
