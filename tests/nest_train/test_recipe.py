import dataclasses
from importlib.resources import files
from pathlib import Path

import pytest

from nestpatch.errors import RecipeError
from nestpatch.nest_train.recipe import SHIPPED, Recipe, make_recipe


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


def test_every_recipe_that_ships_is_valid_and_another():
    folder = files("nestpatch.nest_train") / "recipes"
    assert {"nest", *(file.name.removesuffix(".toml") for file in folder.iterdir())} == set(SHIPPED)
    assert make_recipe("nest") == make_recipe() == Recipe()
    recipes = [make_recipe(name) for name in SHIPPED]
    assert len(set(recipes)) == len(SHIPPED)


def test_a_shipped_recipe_is_changed_like_any_other():
    recipe = make_recipe("fast", ["steps=7"], defaults={"seed": 3, "steps": 9, "max_prompts": 77})
    assert (recipe.steps, recipe.seed, recipe.max_prompts) == (7, 3, make_recipe("fast").max_prompts)
    assert make_recipe("lab").sign == "both"


def test_the_seed_of_the_lab_is_that_of_the_demo():
    assert make_recipe("lab", defaults={"seed": 5}).seed == 5


def test_numbers_of_a_file_are_those_of_their_setting(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("clip = 2\nwarmup = 0\nlearning_rate = 1e-2\nsteps = 1_000\nfirst_layer = -1\n")
    recipe = make_recipe(file)
    assert [type(value) for value in (recipe.clip, recipe.warmup, recipe.steps)] == [float, float, int]
    assert (recipe.learning_rate, recipe.steps, recipe.first_layer) == (0.01, 1000, -1)
    for text, says in [("steps = 7.0", "steps must be int"), ("clip = true", "clip must be float"), ("seed = '1'", "seed")]:
        file.write_text(text)
        with pytest.raises(RecipeError, match=says):
            make_recipe(file)


@pytest.mark.parametrize("name", ["nesst", "quick", "recipes/lab"])
def test_an_unknown_name_lists_those_that_ship(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=f"cannot read the recipe {name}: No such file") as caught:
        make_recipe(name)
    assert "nest, fast, lab" in caught.value.advice


def test_a_file_with_the_name_of_a_shipped_recipe_is_read_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fast").write_text("steps = 3\n")
    assert make_recipe("fast").steps != 3
    assert (make_recipe("./fast").steps, make_recipe(Path("fast")).steps) == (3, 3)


@pytest.mark.parametrize("text", [b"steps = ", b"\xff\xfe", b"[steps]\na=1\n"])
def test_broken_recipe_files_are_named(tmp_path, text):
    file = tmp_path / "recipe.toml"
    file.write_bytes(text)
    with pytest.raises(RecipeError):
        make_recipe(file)
    with pytest.raises(RecipeError, match="cannot read"):
        make_recipe(tmp_path / "none.toml")
