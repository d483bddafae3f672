"""The parts of the training program: parameter groups, schedule, order of the images, log lines and files."""

import json
import math

import pytest
import torch

from tests.factories import tiny_model
from training.arguments import RecipeError, TrainingArguments
from training.digit_scenes import DigitScenes
from training.folders import complete_or_nothing, write_text
from training.optimization import learning_rate_factor, make_parameter_groups, scaled_learning_rate
from training.progress import format_line, list_levels
from training.sampling import ShuffledEpochs, list_classes, list_repeats, repeat_factors
from training.train import require_usable_folder


def make_arguments(**settings):
    return TrainingArguments(**{"output_dir": "out", "max_steps": 100, "backbone": "x", "warmup_steps": 0, **settings})


def groups_by_name(model, **settings):
    """(learning rate, weight decay) of each trained parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_parameter_groups(model, make_arguments(**settings))
    placed = [
        (names[id(parameter)], (group["lr"], group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    ]
    assert len(placed) == len(dict(placed)), "a parameter is in two groups"
    return dict(placed)


def test_every_trained_parameter_is_in_one_group_and_frozen_ones_in_none():
    model = tiny_model("resnet", freeze_backbone_norm=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) < len(list(model.named_parameters()))
    assert groups_by_name(model).keys() == trained


@pytest.mark.parametrize("backbone", ["resnet", "swin", "convnext", "timm"])
def test_the_backbone_learns_more_slowly_and_norms_are_not_decayed(backbone):
    model = tiny_model(backbone, freeze_backbone_norm=False)
    places = groups_by_name(model, learning_rate=1.0, weight_decay=0.05)
    assert {rate for name, (rate, _) in places.items() if ".pixel_level_module.encoder." in name} == {0.1}
    assert {rate for name, (rate, _) in places.items() if ".pixel_level_module.encoder." not in name} == {1.0}
    # A norm is a module with a weight of one dimension; of all others the weight has two or more.
    weights = {name: parameter.ndim for name, parameter in model.named_parameters() if name in places}
    norms = [name for name, ndim in weights.items() if name.endswith("weight") and ndim == 1]
    assert len(norms) > 10
    assert {places[name][1] for name in norms} == {0.0}


def test_embeddings_and_position_tables_are_not_decayed_but_the_level_embedding_of_the_pixel_decoder_is():
    places = groups_by_name(tiny_model("swin"), weight_decay=0.05)
    decay = {name: decay for name, (_, decay) in places.items()}
    transformer = "model.transformer_module."
    for name in ("queries_embedder", "queries_features", "pilot_label_embedder", "level_embed"):
        assert decay[f"{transformer}{name}.weight"] == 0.0
    assert {decay[name] for name in decay if "relative_position_bias_table" in name} == {0.0}
    assert decay["model.pixel_level_module.decoder.level_embed"] == 0.05
    assert decay["class_predictor.weight"] == decay["class_predictor.bias"] == 0.05


def test_poly_schedule_falls_from_the_full_rate_towards_zero():
    arguments = make_arguments(schedule_power=0.9)
    assert learning_rate_factor(0, arguments) == 1.0
    assert learning_rate_factor(25, arguments) == pytest.approx(math.exp(0.9 * math.log(0.75)))
    assert learning_rate_factor(99, arguments) == pytest.approx(0.01**0.9)


def test_step_schedule_falls_at_its_milestones():
    arguments = make_arguments(schedule="step", schedule_milestones=(60, 90), schedule_factor=0.5)
    factors = [learning_rate_factor(step, arguments) for step in (0, 59, 60, 89, 90, 99)]
    assert factors == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_the_learning_rate_rises_in_equal_steps_until_warmup_ends():
    arguments = make_arguments(schedule="step", schedule_milestones=(50,), warmup_steps=4)
    assert [learning_rate_factor(step, arguments) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_every_image_comes_once_in_each_epoch_and_epochs_differ():
    positions = list(ShuffledEpochs(num_images=10, num_samples=25, seed=3))
    assert [epoch for epoch, _, _ in positions] == [0] * 10 + [1] * 10 + [2] * 5
    assert {repeat for _, _, repeat in positions} == {0}
    order = [index for _, index, _ in positions]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert len(order) == len(set(order[20:])) + 20 == 25


def test_the_order_depends_on_the_seed_but_not_on_the_length_of_the_training():
    assert list(ShuffledEpochs(10, 20, seed=3))[:13] == list(ShuffledEpochs(10, 13, seed=3))
    assert list(ShuffledEpochs(10, 10, seed=3)) != list(ShuffledEpochs(10, 10, seed=4))


def test_an_order_that_is_entered_anywhere_goes_on_as_it_would_have():
    for repeats in (None, [1.0, 2.5, 1.25, 1.0, 3.0]):
        whole = list(ShuffledEpochs(5, 40, seed=1, repeats=repeats))
        for start in (0, 3, 5, 17, 39):
            part = ShuffledEpochs(5, 40, seed=1, start=start, repeats=repeats)
            assert list(part) == whole[start:]
            assert len(part) == 40 - start


def test_rare_classes_repeat_their_images_as_in_lvis():
    # Class 0 is in all of 8 images, class 1 in two, class 2 in one; below a half of the images a class is rare.
    images = [{0}] * 5 + [{0, 1}, {0, 1, 2}, {0}]
    factors = repeat_factors([frozenset(image) for image in images], threshold=0.5)
    assert factors == pytest.approx([1] * 5 + [math.sqrt(0.5 / (2 / 8)), math.sqrt(0.5 / (1 / 8)), 1])
    assert repeat_factors([frozenset(), frozenset({0})], threshold=1.0)[0] == 1.0


def test_a_part_of_a_repetition_is_drawn_in_each_epoch():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(2000):
        for index, repeat in list_repeats(torch.tensor([1.0, 2.3, 1.5]), generator):
            assert repeat <= 2
            counts[index] += 1
    assert (counts / 2000).tolist() == pytest.approx([1, 2.3, 1.5], abs=0.04)


def test_classes_are_counted_in_the_rows_unless_the_data_set_knows_them():
    scenes = DigitScenes("train", image_size=64, num_images=4)
    expected = [frozenset(scenes[index]["class_labels"].tolist()) for index in range(4)]
    assert list_classes(scenes, is_shown=False) == expected
    scenes.classes_of = lambda index: [index, index]
    assert list_classes(scenes, is_shown=False) == [frozenset({index}) for index in range(4)]


def test_losses_are_listed_level_by_level_with_the_last_one_last():
    losses = {"loss_mask": 1.0, "loss_mask_0": 2.0, "loss_mask_10": 4.0, "loss_mask_9": 3.0, "loss_pilot_mask_1": 8.0}
    assert list_levels(losses) == {"mask": [2.0, 3.0, 4.0, 1.0], "pilot_mask": [8.0]}


def test_the_learning_rate_is_in_proportion_to_the_images_of_a_step():
    arguments = make_arguments(learning_rate=1e-4, reference_batch_size=16)
    assert scaled_learning_rate(arguments, 4) == pytest.approx(2.5e-5)
    assert scaled_learning_rate(make_arguments(learning_rate=1e-4), 4) == 1e-4
    groups = make_parameter_groups(tiny_model("resnet"), arguments, num_images=32)
    assert sorted({group["lr"] for group in groups}) == pytest.approx([2e-5, 2e-4])


def test_the_progress_bar_shows_the_losses_that_there_are():
    line = {"step": 3, "loss": 6.0, "cross_entropy": 1.0, "mask": 2.0, "dice": 3.0}
    line |= {"learning_rate": 1e-3, "images_per_second": 7.25}
    assert format_line(line) == "loss 6.00, matched 1.00/2.00/3.00, lr 1.0e-03, 7.2 images/s"
    assert "piloted -/0.50/0.25, lr" in format_line(line | {"pilot_mask": 0.5, "pilot_dice": 0.25})


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with complete_or_nothing(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
        assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "new"


def test_a_complete_folder_takes_the_place_of_the_one_before(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    with complete_or_nothing(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
        assert (tmp_path / "model" / "old").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/weights"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_while_saving_leaves_what_was_there_before(tmp_path, stop):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")

    def fail() -> None:
        with complete_or_nothing(tmp_path / "model") as folder:
            (folder / "weights").write_text("half")
            raise stop

    with pytest.raises(stop):
        fail()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/old"]


def test_what_a_killed_run_left_beside_the_folder_is_removed_by_the_next(tmp_path):
    (tmp_path / ".model.unfinished-1").mkdir()
    (tmp_path / ".model.unfinished-1" / "weights").write_text("half")
    (tmp_path / ".other.unfinished-1").mkdir()
    with complete_or_nothing(tmp_path / "model"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.unfinished-1", "model"]


def test_text_is_written_whole(tmp_path):
    write_text(tmp_path / "results.json", json.dumps({"pq": 1}))
    assert json.loads((tmp_path / "results.json").read_text()) == {"pq": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_with_files_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RecipeError, match="no result of this program"):
        require_usable_folder(tmp_path)
    with pytest.raises(RecipeError, match="is a file"):
        require_usable_folder(tmp_path / "thesis.tex")
    with pytest.raises(RecipeError, match="cannot be made"):
        require_usable_folder(tmp_path / "thesis.tex" / "model")


def test_a_new_an_empty_and_an_old_result_folder_can_be_used(tmp_path):
    require_usable_folder(tmp_path / "deep" / "new")
    require_usable_folder(tmp_path / "deep")
    for name in ("recipe.yaml", "config.json", "predictions.png"):
        (tmp_path / "deep" / name).write_text("")
    require_usable_folder(tmp_path / "deep")
