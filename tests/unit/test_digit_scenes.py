"""Digit scenes: deterministic, split cleanly, with masks that say what the picture shows."""

import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import data, digit_scenes
from training.data import DigitScenes, load_segmentation_dataset, to_hf_dataset

ROOT = Path(__file__).parents[2]
PRESETS = ("easy", "hard")


def assert_same_row(row, other):
    assert row["image_id"] == other["image_id"]
    assert row["image"].tobytes() == other["image"].tobytes()
    np.testing.assert_array_equal(row["mask_labels"], other["mask_labels"])
    np.testing.assert_array_equal(row["class_labels"], other["class_labels"])


@pytest.mark.parametrize("image_size", [64, (48, 160)])
@pytest.mark.parametrize("task", data.TASKS)
def test_rows_have_the_form_of_the_data_set_interface(task, image_size):
    scenes = DigitScenes("train", task=task, image_size=image_size, num_images=3)
    height, width = (64, 64) if image_size == 64 else (48, 160)
    assert len(scenes) == 3
    for index, row in enumerate(scenes):
        assert row["image_id"] == index
        assert (row["image"].mode, row["image"].size) == ("RGB", (width, height))
        assert row["mask_labels"].dtype == bool
        assert row["mask_labels"].shape == (len(row["class_labels"]), height, width)
        assert row["class_labels"].dtype == np.int64
        assert set(row["class_labels"].tolist()) <= set(scenes.id2label)


def test_labels_are_the_digits_and_the_photographs():
    scenes = DigitScenes("train", task="panoptic")
    assert [scenes.id2label[class_id] for class_id in scenes.thing_ids] == list("0123456789")
    assert [scenes.id2label[class_id] for class_id in scenes.stuff_ids] == ["china", "flower"]
    digits = DigitScenes("train", task="instance")
    assert (len(digits.id2label), digits.stuff_ids) == (10, ())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_scene_does_not_depend_on_what_was_read_before(preset):
    scenes = DigitScenes("train", preset=preset, num_images=6, seed=5)
    forward = [scenes[index] for index in range(6)]
    again = DigitScenes("train", preset=preset, num_images=10**12, seed=5)
    for index in (5, 0, 3, 3, 1):
        assert_same_row(again[index], forward[index])
    assert_same_row(pickle.loads(pickle.dumps(scenes))[-1], forward[5])


def test_seed_split_and_index_each_change_the_scene():
    pictures = {
        DigitScenes(split, seed=seed, num_images=2)[index]["image"].tobytes()
        for split, seed, index in itertools.product(data.SPLITS, (0, 1), (0, 1))
    }
    assert len(pictures) == 8


def test_splits_differ_in_their_layout_too():
    counts = [[len(row["class_labels"]) for row in DigitScenes(split, num_images=30)] for split in data.SPLITS]
    assert counts[0] != counts[1]


@pytest.fixture(scope="module")
def new_process():
    """What a fresh Python says of one scene, and which modules it needed."""
    program = """
import hashlib, json, sys
import training.metrics.panoptic_quality
from training.data import DigitScenes
row = DigitScenes("validation", preset="hard", num_images=9, seed=2)[8]
digest = hashlib.sha256(row["image"].tobytes() + row["mask_labels"].tobytes()).hexdigest()
print(json.dumps({"digest": digest, "modules": list(sys.modules)}))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    child = [sys.executable, "-c", program]
    return json.loads(subprocess.run(child, cwd=ROOT, env=environment, check=True, capture_output=True).stdout)


def test_a_new_process_draws_the_same_scene(new_process):
    row = DigitScenes("validation", preset="hard", num_images=9, seed=2)[8]
    assert new_process["digest"] == hashlib.sha256(row["image"].tobytes() + row["mask_labels"].tobytes()).hexdigest()


@pytest.mark.parametrize("package", ["datasets", "evaluate", "pycocotools", "transformers"])
def test_scenes_and_panoptic_quality_need_no(package, new_process):
    assert package not in new_process["modules"]


def test_splits_share_no_handwriting():
    train, validation = ({glyph.tobytes() for glyph, _ in digit_scenes.load_glyphs(split)} for split in data.SPLITS)
    assert not train & validation
    assert len(digit_scenes.load_glyphs("train")) + len(digit_scenes.load_glyphs("validation")) == 1797
    for split in data.SPLITS:
        assert {digit for _, digit in digit_scenes.load_glyphs(split)} == set(range(10))


def test_splits_share_no_pixel_of_a_photograph():
    size = (640, 427)
    coverage = np.zeros(size[::-1], dtype=int)
    for split in data.SPLITS:
        left, top, right, bottom = digit_scenes.photograph_region(split, size)
        coverage[top:bottom, left:right] += 1
    assert (coverage == 1).all()
    for number in range(2):
        widths = [digit_scenes.load_photographs(split)[number].width for split in data.SPLITS]
        assert sum(widths) == 640


def test_crops_of_a_split_show_pixels_of_its_own_region_alone():
    red = Image.new("RGB", (100, 80), (200, 0, 0))
    rng = np.random.default_rng(0)
    for image_size in ((32, 32), (300, 40), (40, 300)):
        pixels = digit_scenes.random_crop(red, image_size, rng)
        assert pixels.shape == (*image_size, 3)
        assert (pixels[..., 0] > 100).all()
        assert (pixels[..., 1:] == 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_each_pixel_belongs_to_at_most_one_segment_and_almost_all_to_one(preset):
    for row in DigitScenes("train", task="panoptic", preset=preset, num_images=30):
        owners = row["mask_labels"].sum(axis=0)
        assert owners.max() == 1
        assert (owners == 0).sum() < 2 * digit_scenes.MIN_VISIBLE_PIXELS
        assert (row["mask_labels"].sum(axis=(1, 2)) >= digit_scenes.MIN_VISIBLE_PIXELS).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_tasks_report_the_same_picture(preset):
    tasks = [DigitScenes("validation", task=task, preset=preset, num_images=20) for task in data.TASKS]
    for instance, panoptic, semantic in zip(*tasks, strict=True):
        assert instance["image"].tobytes() == panoptic["image"].tobytes() == semantic["image"].tobytes()
        is_digit = panoptic["class_labels"] < 10
        np.testing.assert_array_equal(instance["mask_labels"], panoptic["mask_labels"][is_digit])
        np.testing.assert_array_equal(instance["class_labels"], panoptic["class_labels"][is_digit])
        assert semantic["class_labels"].tolist() == sorted(set(panoptic["class_labels"].tolist()))
        for mask, class_id in zip(semantic["mask_labels"], semantic["class_labels"], strict=True):
            parts = panoptic["mask_labels"][panoptic["class_labels"] == class_id]
            np.testing.assert_array_equal(mask, np.logical_or.reduce(parts))


@pytest.mark.parametrize("task", data.TASKS)
def test_digits_can_be_one_class_of_the_same_pictures(task):
    apart = DigitScenes("validation", task=task, num_images=20)
    alike = DigitScenes("validation", task=task, num_images=20, tell_digits_apart=False)
    assert alike.thing_ids == (0,)
    assert alike.stuff_ids == (() if task == "instance" else (1, 2))
    assert list(alike.id2label.values()) == ["digit", "china", "flower"][: len(alike.id2label)]
    merged = {class_id: max(class_id - 9, 0) for class_id in range(12)}
    for ten, one in zip(apart, alike, strict=True):
        assert ten["image"].tobytes() == one["image"].tobytes()
        expected = [merged[class_id] for class_id in ten["class_labels"].tolist()]
        if task == "semantic":
            expected = sorted(set(expected))
        else:
            np.testing.assert_array_equal(ten["mask_labels"], one["mask_labels"])
        assert one["class_labels"].tolist() == expected
        np.testing.assert_array_equal(ten["mask_labels"].any(axis=0), one["mask_labels"].any(axis=0))


def test_upper_segments_hide_lower_ones_and_slivers_are_dropped():
    owner = np.zeros((4, 6), dtype=np.int32)  # 24 pixels of segment 0,
    owner[:, 3:] = 1  # 12 of them under segment 1,
    owner[0, :4] = 2  # 4 under segment 2, which also hides a pixel of segment 1; segment 3 is hidden entirely
    masks, class_ids = digit_scenes.visible_segments(owner, [10, 7, 3, 5], min_pixels=5)
    assert class_ids.tolist() == [10, 7]
    assert masks.sum(axis=(1, 2)).tolist() == [9, 11]
    assert not masks[:, 0, :4].any()


def test_semantic_task_of_a_scene_without_segments_has_no_mask():
    empty = np.zeros((0, 3, 4), dtype=bool)
    masks, class_ids = digit_scenes.select_segments(empty, np.zeros(0, dtype=np.int64), "semantic", 10)
    assert masks.shape == (0, 3, 4)
    assert class_ids.shape == (0,)


@pytest.mark.parametrize("preset", PRESETS)
def test_some_scenes_have_no_digit_and_some_have_both_photographs(preset):
    rows = list(DigitScenes("train", task="panoptic", preset=preset, image_size=64, num_images=200))
    num_digits = np.array([(row["class_labels"] < 10).sum() for row in rows])
    num_stuff = np.array([(row["class_labels"] >= 10).sum() for row in rows])
    assert 0 < (num_digits == 0).sum() < 30
    assert {1, 2} == set(num_stuff.tolist())
    assert 0.4 < (num_stuff == 2).mean() < 0.8


def test_a_stroke_differs_from_what_is_around_it():
    for row in DigitScenes("train", task="panoptic", preset="easy", num_images=40):
        pixels = np.asarray(row["image"], dtype=float)
        stuff = row["mask_labels"][row["class_labels"] >= 10].any(axis=0)
        for mask in row["mask_labels"][row["class_labels"] < 10]:
            # Rows and columns of the digit's box, minus the digit: the ground that it stands out from.
            box = mask.any(axis=1)[:, None] & mask.any(axis=0)[None, :]
            stroke, ground = np.median(pixels[mask], axis=0), pixels[box & stuff]
            if len(ground) > 30:
                assert np.abs(ground - stroke).sum(axis=1).mean() > 60


def test_digit_masks_are_the_strokes_that_were_painted():
    scene = digit_scenes._Scene(np.zeros((40, 50, 3), np.float32), np.zeros((40, 50), np.int32), [10])
    glyph = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), digit_scenes.GLYPH_MARGIN))
    preset = digit_scenes.ScenePreset(1, scale=(4, 4), max_angle=0, contrast=(255, 255), max_hidden=0, crowding=0)
    scene.add_digit(glyph, 3, preset, np.random.default_rng(0))
    masks, class_ids = digit_scenes.visible_segments(scene.owner, scene.class_ids)
    assert class_ids.tolist() == [10, 3]
    rows, columns = np.flatnonzero(masks[1].any(axis=1)), np.flatnonzero(masks[1].any(axis=0))
    assert abs(len(rows) - 32) <= 2, "8 pixels, enlarged 4 times"
    assert abs(len(columns) - 32) <= 2
    color = scene.pixels[masks[1]].max(axis=0)
    is_painted = (scene.pixels > 0.5 * color - 1e-3).all(axis=-1)
    np.testing.assert_array_equal(is_painted, masks[1])


def test_glyphs_turn_by_the_angle_that_was_asked_for():
    bar = np.zeros((12, 12), np.uint8)
    bar[5:7, 2:10] = 255
    ink = digit_scenes.render_glyph(Image.fromarray(bar), scale=6.0, angle=np.pi / 6)
    rows, columns = np.nonzero(ink >= 0.5)
    direction = np.linalg.eigh(np.cov(columns, rows))[1][:, -1]
    assert abs(np.degrees(np.arctan(abs(direction[1] / direction[0]))) - 30) < 2


def test_hidden_share_of_a_digit_stays_below_the_limit_of_the_preset():
    for preset in PRESETS:
        scenes = DigitScenes("train", preset=preset, num_images=60)
        hidden = []
        for index in range(60):
            scene = scenes._draw(np.random.default_rng((0, 0, index)))
            digits = slice(scene.num_stuff, None)
            visible = np.bincount(scene.owner.ravel(), minlength=len(scene.class_ids))
            np.testing.assert_array_equal(visible, scene.visible_areas)
            hidden.extend(1 - visible[digits] / scene.full_areas[digits])
        assert max(hidden) <= digit_scenes.SCENE_PRESETS[preset].max_hidden + 1e-9
        assert max(hidden) > 0.5 * digit_scenes.SCENE_PRESETS[preset].max_hidden, "digits do overlap"


def test_hard_scenes_have_more_and_smaller_digits_and_more_overlap():
    counts, areas = {}, {}
    for preset in PRESETS:
        masks = [row["mask_labels"] for row in DigitScenes("train", task="instance", preset=preset, num_images=60)]
        counts[preset] = np.mean([len(mask) for mask in masks])
        areas[preset] = np.concatenate([mask.sum(axis=(1, 2)) for mask in masks]).mean()
    assert counts["hard"] > 1.5 * counts["easy"]
    assert areas["hard"] < 0.7 * areas["easy"]


def test_color_distance_of_black_and_white_is_255_and_of_a_tint_is_less():
    black, white, blue = np.zeros(3), np.full(3, 255.0), np.array([0.0, 0.0, 255.0])
    assert digit_scenes.color_distance(black, white) == pytest.approx(255)
    # Lightness 0.114 * 255, tint its deviation from grey: sqrt((2 * 0.114**2 + 0.886**2) / 3).
    expected = 255 * np.sqrt(0.114**2 + (2 * 0.114**2 + 0.886**2) / 3)
    assert digit_scenes.color_distance(black, blue) == pytest.approx(expected)


def test_contrast_is_measured_to_the_nearest_color_around():
    around = np.array([[128.0, 128, 128], [255.0, 0, 0]])
    rng = np.random.default_rng(1)
    for contrast in (40, 100):
        color = digit_scenes.contrasting_color(around, contrast, rng)
        nearest = min(float(digit_scenes.color_distance(color, other)) for other in around)
        assert abs(nearest - contrast) < 15


def test_scenes_become_a_hf_dataset_with_the_same_rows(tmp_path):
    scenes = DigitScenes("validation", preset="hard", image_size=(48, 64), num_images=30)
    assert any(len(row["class_labels"]) == 0 for row in DigitScenes("validation", task="instance", num_images=30))
    for task in ("panoptic", "instance"):
        scenes = DigitScenes("validation", task=task, preset="hard", image_size=(48, 64), num_images=30)
        table = to_hf_dataset(scenes, cache_dir=str(tmp_path)).with_format("numpy")
        pictures = table.with_format(None)
        assert len(table) == 30
        for index, row in enumerate(scenes):
            assert table[index]["image_id"] == row["image_id"]
            assert pictures[index]["image"].tobytes() == row["image"].tobytes()
            masks = np.asarray(table[index]["mask_labels"], dtype=bool).reshape(-1, 48, 64)
            np.testing.assert_array_equal(masks, row["mask_labels"])
            np.testing.assert_array_equal(table[index]["class_labels"], row["class_labels"])


def test_data_sets_are_found_by_name():
    scenes = load_segmentation_dataset("digit_scenes", "validation", task="semantic", num_images=4)
    assert_same_row(scenes[1], DigitScenes("validation", task="semantic", num_images=4)[1])
    with pytest.raises(ValueError, match="Use one of: digit_scenes"):
        load_segmentation_dataset("mnist", "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split must be one of 'train', 'validation', got 'test'"),
        ({"task": "boxes"}, "task must be one of"),
        ({"preset": "medium"}, "preset must be one of 'easy', 'hard'"),
        ({"image_size": 16}, "at least 32 pixels, got 16"),
        ({"image_size": (64, 64, 3)}, "one side or"),
        ({"num_images": -1}, "must not be negative"),
        ({"seed": -1}, "must not be negative"),
    ],
)
def test_wrong_arguments_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        DigitScenes(**{"split": "train", **options})


def test_an_index_beyond_the_end_is_an_index_error():
    scenes = DigitScenes("train", num_images=2)
    for index in (2, -3):
        with pytest.raises(IndexError, match="of 2"):
            scenes[index]
    with pytest.raises(IndexError):
        DigitScenes("train", num_images=0)[0]
