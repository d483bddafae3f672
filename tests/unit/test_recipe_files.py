"""Files of recipes: how a recipe is laid over its bases, and what is refused with which sentence."""

import re

import pytest

from training.recipe_files import RecipeError, load_yaml, merge_settings, read_recipe_file


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_file


def test_a_recipe_wins_over_its_base_key_by_key(write):
    write("base.yaml", "seed: 1\nmodel: {num_queries: 100, pilot_groups: 2}\n")
    recipe = write("recipe.yaml", "base: base.yaml\nmodel: {num_queries: 200}\noutput_dir: out\n")
    assert read_recipe_file(recipe) == {
        "seed": 1,
        "model": {"num_queries": 200, "pilot_groups": 2},
        "output_dir": "out",
    }


def test_lists_are_replaced_and_null_is_a_value(write):
    write("base.yaml", "schedule_milestones: [1, 2, 3]\nbackbone: a\nmodel: {pilot_layers: 4}\n")
    recipe = write(
        "recipe.yaml", "base: base.yaml\nschedule_milestones: [9]\nbackbone: null\nmodel: {pilot_layers: null}\n"
    )
    assert read_recipe_file(recipe) == {"schedule_milestones": [9], "backbone": None, "model": {"pilot_layers": None}}


def test_bases_have_bases_relative_to_their_own_folder(write):
    write("parts/deep/first.yaml", "a: 1\nb: 1\nc: 1\n")
    write("parts/second.yaml", "base: deep/first.yaml\nb: 2\nc: 2\n")
    recipe = write("recipes/third.yaml", "base: ../parts/second.yaml\nc: 3\n")
    assert read_recipe_file(recipe) == {"a": 1, "b": 2, "c": 3}


def test_of_several_bases_the_later_one_wins_and_all_may_share_one(write):
    write("common.yaml", "a: 0\nb: 0\nc: 0\n")
    write("data.yaml", "base: common.yaml\na: 1\nb: 1\n")
    write("model.yaml", "b: 2\n")
    recipe = write("recipe.yaml", "base: [data.yaml, model.yaml]\n")
    assert read_recipe_file(recipe) == {"a": 1, "b": 2, "c": 0}


def test_merging_leaves_both_sides_as_they_are():
    lower, upper = {"a": {"b": 1}}, {"a": {"c": 2}}
    merge_settings(lower, upper)["a"]["d"] = 3
    assert (lower, upper) == ({"a": {"b": 1}}, {"a": {"c": 2}})


def test_numbers_with_an_exponent_are_numbers_and_no_is_a_word():
    assert load_yaml("[1e-4, 5E2, no, on, true, 10]") == [0.0001, 500.0, "no", "on", True, 10]


def test_a_recipe_that_is_based_on_itself_is_refused_with_the_way_around(write):
    first = write("first.yaml", "base: parts/second.yaml\n")
    second = write("parts/second.yaml", "base: ../first.yaml\n")
    with pytest.raises(RecipeError, match="based on itself") as caught:
        read_recipe_file(first)
    assert re.search(rf"{re.escape(second)}, which is of {re.escape(first)}\)", str(caught.value))


def test_a_missing_base_is_refused_with_the_file_that_names_it(write):
    write("parts/middle.yaml", "base: nowhere.yaml\n")
    recipe = write("recipe.yaml", "base: parts/middle.yaml\n")
    with pytest.raises(
        RecipeError,
        match=r"nowhere\.yaml \(`base` of .*middle\.yaml, which is of .*recipe\.yaml\) cannot be read: No such",
    ):
        read_recipe_file(recipe)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("base: /there/base.yaml", r"recipe\.yaml: `base: /there/base\.yaml` is an absolute path.*relative to"),
        ("base: 3", r"recipe\.yaml: `base` must be the path of a recipe, or a list of paths, got 3"),
        ("base: [a.yaml, {b: c}]", r"`base` must be the path .*, or a list of paths, got \['a\.yaml', \{'b': 'c'\}\]"),
        ("base: {a: b}", r"`base` must be the path of a recipe, or a list of paths, got \{'a': 'b'\}"),
        ("- 1", r"must hold lines of the form `key: value`, got list"),
        ("a: 1\na: 2", r"no valid YAML: the key `a` comes twice"),
        ("a: [", r"no valid YAML"),
    ],
    ids=["absolute", "number", "list with a mapping", "mapping", "list", "key twice", "broken"],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused(write, text, sentence):
    with pytest.raises(RecipeError, match=sentence):
        read_recipe_file(write("recipe.yaml", text))


def test_a_broken_base_is_named_with_its_user(write):
    write("base.yaml", "a: 1\na: 2\n")
    recipe = write("recipe.yaml", "base: base.yaml\n")
    with pytest.raises(
        RecipeError, match=r"base\.yaml \(`base` of .*recipe\.yaml\) is no valid YAML: the key `a` comes twice"
    ):
        read_recipe_file(recipe)
