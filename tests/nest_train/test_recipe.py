import dataclasses

import pytest

from nestpatch.errors import RecipeError
from nestpatch.nest_train.recipe import Recipe, make_recipe


def test_every_knob_says_what_it_is_and_where_it_comes_from():
    for knob in dataclasses.fields(Recipe):
        assert knob.metadata["unit"], knob.name
        assert knob.metadata["source"], knob.name


def test_later_sources_win(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('steps = 7\nclip = 2\nrefusals = "own"\n')
    recipe = make_recipe(file, ["steps=9", "threshold=2.5"])
    assert (recipe.steps, recipe.clip, recipe.refusals, recipe.threshold) == (9, 2.0, "own", 2.5)
    assert type(recipe.clip) is float


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("nonsense=1", "unknown setting: nonsense"),
        ("steps", "key=value"),
        ("steps=many", "steps must be int"),
        ("steps=0", "steps must be between"),
        ("steps=1.5", "steps must be int"),
        ("threshold=nan", "threshold must be between"),
        ("refusals=loud", "refusals must be one of"),
        ("k_min=99", "more than k_max"),
        ("k_max=257", "k_max must be between"),
    ],
)
def test_bad_settings_are_named(assignment, says):
    with pytest.raises(RecipeError, match=says) as caught:
        make_recipe(None, [assignment])
    assert "--help-recipe" in caught.value.advice


@pytest.mark.parametrize(
    ("assignment", "meant"), [("step=3", "Did you mean steps?"), ("learning-rate=1", "learning_rate"), ("seeed=1", "seed")]
)
def test_a_misspelt_setting_gets_a_suggestion(assignment, meant):
    with pytest.raises(RecipeError, match="unknown setting") as caught:
        make_recipe(None, [assignment])
    assert meant in caught.value.advice


def test_every_setting_is_documented():
    documented = Recipe.__doc__ or ""
    for knob in dataclasses.fields(Recipe):
        assert f"{knob.name}: {knob.metadata['unit']}" in documented


@pytest.mark.parametrize("text", [b"steps = ", b"\xff\xfe", b"[steps]\na=1\n"])
def test_broken_recipe_files_are_named(tmp_path, text):
    file = tmp_path / "recipe.toml"
    file.write_bytes(text)
    with pytest.raises(RecipeError):
        make_recipe(file)
    with pytest.raises(RecipeError, match="cannot read"):
        make_recipe(tmp_path / "none.toml")
