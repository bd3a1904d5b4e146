"""Every recipe that ships is read by its script."""

from pathlib import Path

import pytest
import yaml

from mimetic.engine.config import parse
from mimetic.finetune.logistic import LogisticRecipe
from mimetic.finetune.recipe import ClassifyRecipe
from mimetic.pretrain.pixel_recipes import MaeRecipe, SimmimRecipe
from mimetic.pretrain.recipe import Beit2Recipe, BeitRecipe
from mimetic.tokenizers.recipe import DvaeRecipe
from mimetic.tokenizers.vqkd_recipe import VqkdRecipe

FOLDER = Path(__file__).parents[1] / "launch/recipes"
HEADERS = ("# Run:", "# Cost:", "# Expect:")


def recipe_class(settings: dict) -> type:
    if "dvae" in settings:
        return DvaeRecipe
    if "simmim" in settings:
        return SimmimRecipe
    if "mae" in settings:
        return MaeRecipe
    if "vqkd" in settings:
        return VqkdRecipe
    if "aggregation" in settings:
        return Beit2Recipe
    if "tokenizer" in settings:
        return BeitRecipe
    return ClassifyRecipe if "train" in settings else LogisticRecipe


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_and_says_what_to_expect(path):
    text = path.read_text()
    recipe = parse(recipe_class(yaml.safe_load(text)), example="", argv=["--config", str(path), "--out", "run"]).recipe
    assert recipe.data.index
    assert all(header in text for header in HEADERS)


def test_the_arms_of_the_demo_differ_in_nothing_but_what_they_are_about():
    arms = [yaml.safe_load((FOLDER / f"demo_{name}.yaml").read_text()) for name in ("from_scratch", "fine_tuned", "distilled")]
    for section in ("data", "labels", "evaluation", "train", "views"):
        assert arms[0][section] == arms[1][section] == arms[2][section]
