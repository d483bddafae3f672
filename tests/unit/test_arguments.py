"""Recipes and the command line: what is read, what wins, and what is refused with which sentence."""

from pathlib import Path

import pytest

from training.arguments import FIELDS, RecipeError, parse_arguments

ROOT = Path(__file__).parents[2]
SCRATCH = "output_dir: out\nmax_steps: 20\nmodel:\n  num_queries: 7\n  backbone_config: {model_type: resnet}\n"


@pytest.fixture
def write_recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    "recipe", sorted(ROOT.glob("training/recipes/digit_scenes/**/*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_of_digit_scenes_is_valid(recipe):
    assert parse_arguments([str(recipe)]).max_steps > 0


def test_a_recipe_sets_fields_and_leaves_the_others_at_their_defaults(write_recipe):
    arguments = parse_arguments([write_recipe(SCRATCH + "learning_rate: 0.002\nschedule_power: 2\n")])
    assert (arguments.output_dir, arguments.max_steps, arguments.learning_rate) == ("out", 20, 0.002)
    assert arguments.model == {"num_queries": 7, "backbone_config": {"model_type": "resnet"}}
    assert type(arguments.schedule_power) is float
    assert (arguments.weight_decay, arguments.max_gradient_norm, arguments.task) == (0.05, 0.01, "panoptic")


def test_options_win_over_the_recipe(write_recipe):
    recipe = write_recipe(SCRATCH + "seed: 3\nmax_gradient_norm: 1.0\n")
    arguments = parse_arguments([recipe, "--seed", "4", "--max_gradient_norm=null", "--output_dir", "2024"])
    assert (arguments.seed, arguments.max_gradient_norm, arguments.output_dir) == (4, None, "2024")


def test_an_option_reaches_into_a_mapping_and_leaves_its_neighbours(write_recipe):
    words = [write_recipe(SCRATCH), "--model.num_queries", "9", "--model.backbone_config.depths=[1, 2]"]
    arguments = parse_arguments([*words, "--train_options.num_images", "5"])
    assert arguments.model == {"num_queries": 9, "backbone_config": {"model_type": "resnet", "depths": [1, 2]}}
    assert arguments.options_of("train") == {"task": "panoptic", "num_images": 5}
    assert arguments.options_of("validation") == {"task": "panoptic"}


def test_numbers_with_an_exponent_are_numbers_and_no_is_a_word(write_recipe):
    arguments = parse_arguments([write_recipe(SCRATCH + "learning_rate: 1e-3\nmixed_precision: no\n")])
    assert (arguments.learning_rate, arguments.mixed_precision) == (0.001, "no")
    assert parse_arguments([write_recipe(SCRATCH), "--weight_decay", "5E-2"]).weight_decay == 0.05


def test_a_saved_recipe_gives_the_same_settings(write_recipe, tmp_path):
    recipe = write_recipe(SCRATCH + "schedule: step\nschedule_milestones: [5, 9]\nmodel_name_or_path: null\n")
    arguments = parse_arguments([recipe])
    arguments.save(tmp_path / "saved.yaml")
    assert parse_arguments([str(tmp_path / "saved.yaml")]) == arguments


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("max_step: 3", r"recipe.yaml: unknown key `max_step`. Did you mean `max_steps`\?"),
        ("learning_rat: 3", r"recipe.yaml: unknown key `learning_rat`. Did you mean `learning_rate`\?"),
        ("5: 3", "recipe.yaml: unknown key `5`"),
        ("batch_size: 2.5", r"recipe.yaml: `batch_size` must be an integer, got 2.5 \(float\)"),
        ("batch_size: true", r"`batch_size` must be an integer, got True \(bool\)"),
        ("batch_size:", r"`batch_size` must be an integer, got None"),
        ("learning_rate: fast", r"`learning_rate` must be a number, got 'fast' \(str\)"),
        ("max_gradient_norm: big", r"`max_gradient_norm` must be a number or null, got 'big'"),
        ("evaluate: 1", r"`evaluate` must be true or false, got 1 \(int\)"),
        ("dataset: [a]", r"`dataset` must be text, got \['a'\] \(list\)"),
        ("dataset_options: easy", r"`dataset_options` must be a mapping of names to values, got 'easy'"),
        ("schedule_milestones: [1, b]", r"`schedule_milestones` must be a list of integers, got \[1, 'b'\]"),
        ("schedule: cosine", r"`schedule` must be one of poly, step, got 'cosine'"),
        ("mixed_precision: fp8", r"`mixed_precision` must be one of no, fp16, bf16, got 'fp8'"),
        ("seed: 1\nseed: 2", "no valid YAML: the key `seed` comes twice"),
        ("seed: {", "no valid YAML"),
    ],
)
def test_a_wrong_key_or_type_is_named_with_the_file(write_recipe, lines, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse_arguments([write_recipe(SCRATCH + lines + "\n")])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max_step", "3"], r"unknown option `--max_step`. Did you mean `--max_steps`\?"),
        (["--max_steps=x"], r"`max_steps` must be an integer, got 'x'"),
        (["--evaluate", "yes"], r"`evaluate` must be true or false, got 'yes' \(str\)"),
        (["extra"], r"unknown option `extra`. Options are written --NAME VALUE"),
        (["--seed.x", "1"], r"`--seed.x` does not exist, because `seed` is an integer"),
        (["--modl.x", "1"], r"unknown option `--modl.x`. Did you mean `--model`\?"),
        (["--model.", "1"], "unknown option `--model.`"),
        (["--model.num_querys", "1"], r"unknown key `model.num_querys`. Did you mean `model.num_queries`\?"),
        (["--processor.pad_sizes", "1"], r"unknown key `processor.pad_sizes`. Did you mean `processor.pad_size`\?"),
        (["--train_options.presets", "easy"], r"unknown key `train_options.presets`. .* `train_options.preset`\?"),
        (["--train_options.split", "validation"], "unknown key `train_options.split`"),
    ],
)
def test_a_wrong_option_is_named(write_recipe, words, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse_arguments([write_recipe(SCRATCH), *words])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max_steps", "0"], "recipe.yaml: `max_steps` must be above 0, got 0"),
        (["--learning_rate", "-1"], "`learning_rate` must be above 0"),
        (["--evaluation_steps", "0"], "`evaluation_steps` must be above 0"),
        (["--num_workers", "-1"], "`num_workers` must not be below 0"),
        (["--dataset", "coco"], "`dataset` must be one of digit_scenes.*, got 'coco'"),
        (["--warmup_steps", "21"], r"`warmup_steps` \(21\) must not be above `max_steps` \(20\)"),
        (["--schedule", "step"], "`schedule: step` needs `schedule_milestones`"),
        (["--schedule_milestones", "[3]"], "`schedule_milestones` belongs to `schedule: step`"),
        (
            ["--trackers", "tensorboard,abacus"],
            "`trackers` has no choice 'abacus'. Choices: tensorboard, trackio, wandb",
        ),
        (["--keep_best", "true"], "`keep_best` compares scores: set `evaluate: true` and `evaluation_steps` too"),
        (["--early_stopping", "2"], "`early_stopping` compares scores"),
        (["--push_to_hub", "evaluation"], "`push_to_hub: evaluation` needs"),
        (["--class_weights.cat", "-1"], "`class_weights.cat` must be a number of at least 0, got -1"),
        (["--exclude_ignored", "true"], "`exclude_ignored` needs `augmentation`"),
        (["--backbone", "x"], "exactly one of .*, got `backbone` and `model.backbone_config`"),
        (["--model", "{}"], "exactly one of .*, got none of them"),
        (["--model.num_labels", "3"], "`model.num_labels` comes from the data set"),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_is_loaded(write_recipe, words, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse_arguments([write_recipe(SCRATCH), *words])


def test_lists_of_words_are_separated_by_commas(write_recipe):
    arguments = parse_arguments([write_recipe(SCRATCH), "--trackers", "tensorboard,wandb", "--frozen", "backbone"])
    assert (arguments.trackers, arguments.frozen) == (("tensorboard", "wandb"), ("backbone",))


def test_a_missing_setting_is_asked_for(write_recipe):
    with pytest.raises(RecipeError, match=r"`max_steps` \(an integer\) is missing.*pass --max_steps"):
        parse_arguments([write_recipe(SCRATCH.replace("max_steps: 20\n", ""))])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, r"nowhere.yaml cannot be read: No such file"),
        ("- a\n- b\n", "must hold lines of the form"),
        ("", "NoneType"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(write_recipe, tmp_path, text, sentence):
    path = str(tmp_path / "nowhere.yaml") if text is None else write_recipe(text)
    with pytest.raises(RecipeError, match=sentence):
        parse_arguments([path])


def test_the_backbone_learns_slowly_only_if_it_is_pretrained(write_recipe):
    pretrained = "output_dir: out\nmax_steps: 20\nbackbone: timm:resnet50\nlearning_rate: 1\n"
    assert parse_arguments([write_recipe(pretrained)]).backbone_factor == 0.1
    assert parse_arguments([write_recipe(SCRATCH), "--learning_rate", "1"]).backbone_factor == 1.0
    words = ["--learning_rate", "1", "--backbone_learning_rate_factor", "0.5"]
    assert parse_arguments([write_recipe(SCRATCH), *words]).backbone_factor == 0.5


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert [name for name in FIELDS if f"--{name} VALUE" not in text] == []
    assert "optimiser steps (an integer; required)" in text
    assert "forward passes in an optimiser step (an integer; default: 1)" in text
    assert "(a number or null; default: 0.01)" in text
