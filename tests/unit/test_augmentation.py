"""Augmentation: masks stay on their objects, the same everywhere, drawn as the settings say."""

import colorsys
import dataclasses
import random

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import loader
from mpformer_hf import MPFormerImageProcessor
from mpformer_hf.mask_encoding import encode_rle
from tests.factories import tiny_model
from training.augmentation import (
    DEFAULTS,
    PRESETS,
    Augmentation,
    AugmentedDataset,
    generator_of,
    pad_row,
)
from training.colors import change_hue_and_saturation, jitter_colors
from training.compact_batches import pack_batch, pack_masks, shift_out, unpack_batch, unpack_ignore_masks, unpack_masks
from training.digit_scenes import DigitScenes
from training.windows import CocoMasks, MapMasks, Window, cut_image, cut_masks

WHERE = {"seed": 0, "epoch": 0, "index": 0}
JITTER = Augmentation(kind="large_scale_jitter", size=(48, 64))
SHORT_SIDE = Augmentation(kind="short_side", size=(32, 40), short_sides=(30, 60, 90), longest_side=120)
AS_IT_IS = Augmentation(kind="none", flip=0)


def make_row(pixels, masks, labels=None, **more):
    labels = np.arange(len(masks)) if labels is None else np.asarray(labels)
    image = Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    return {"image_id": 7, "image": image, "mask_labels": masks, "class_labels": labels.astype(np.int64), **more}


def checkerboard(height, width, cells):
    """A row whose pixels say to which cell of a grid they belong: the level of red is the row of cells, green the column."""
    rows, columns = np.arange(height) * cells // height, np.arange(width) * cells // width
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = rows[:, None] * 40 + 20, columns * 40 + 20, 7
    number = rows[:, None] * cells + columns
    masks = number[None] == np.arange(cells**2)[:, None, None]
    return make_row(pixels, masks, ignore_mask=number == 3, crowd_masks=masks[2:3], crowd_labels=np.array([9]))


def assert_same_row(row, other):
    assert row["image"].tobytes() == other["image"].tobytes()
    assert row.keys() == other.keys()
    for name in row.keys() - {"image"}:
        np.testing.assert_array_equal(row[name], other[name])


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", [JITTER, dataclasses.replace(JITTER, crop="anywhere"), SHORT_SIDE])
def test_every_mask_pixel_belongs_to_the_object_that_the_image_shows_there(augmentation):
    row, cells, compared = checkerboard(60, 90, 5), 5, 0
    for index in range(40):
        result = augmentation(row, seed=1, epoch=2, index=index)
        pixels = np.asarray(result["image"]).astype(int)
        # Between two cells the colours are mixed; elsewhere a level is that of one cell.
        is_pure = ((pixels[..., :2] - 20) % 40 == 0).all(axis=-1)
        shown = (pixels[..., 0] - 20) // 40 * cells + (pixels[..., 1] - 20) // 40
        for mask, label in zip(result["mask_labels"], result["class_labels"], strict=True):
            assert mask.any()
            np.testing.assert_array_equal(mask[is_pure], shown[is_pure] == label)
        assert set(np.unique(shown[is_pure])) <= set(result["class_labels"])
        np.testing.assert_array_equal(result["ignore_mask"][is_pure], shown[is_pure] == 3)
        for mask in result["crowd_masks"]:
            np.testing.assert_array_equal(mask[is_pure], shown[is_pure] == 2)
        compared += is_pure.sum()
    assert compared > 10_000


def test_a_mask_follows_the_smooth_coordinates_that_its_image_encodes():
    """Red is the row and green the column of the source, so each pixel of the result says where it comes from."""
    columns, rows = np.meshgrid(np.arange(100), np.arange(80))
    pixels = np.stack([rows * 2, columns * 2, 0 * rows], axis=-1)
    disc = (rows - 40) ** 2 + (columns - 50) ** 2 < 25**2
    augmentation = Augmentation(kind="large_scale_jitter", size=200, scale=(1.0, 2.0))
    for index in range(10):
        result = augmentation(make_row(pixels, disc[None]), seed=0, epoch=0, index=index)
        y, x = np.moveaxis(np.asarray(result["image"])[..., :2].astype(float) / 2, -1, 0)
        distance = np.hypot(y - 40, x - 50)
        mask = result["mask_labels"][0]
        assert distance[mask].max() < 25 + 1.5
        assert distance[~mask].min() > 25 - 1.5


def test_a_window_is_a_part_of_the_whole_image_resized():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (37, 53, 3), dtype=np.uint8))
    for height, width in ((90, 131), (37, 53), (20, 29), (5, 70)):
        whole = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
        top, left = height // 3, width // 4
        size = (height - top - 1, width - left - 2)
        expected = whole[top : top + size[0], left : left + size[1]]
        for is_flipped in (False, True):
            window = Window((37, 53), (height, width), top, left, size, is_flipped)
            found = np.asarray(cut_image(image, window)).astype(int)
            assert np.abs(found - (expected[:, ::-1] if is_flipped else expected)).max() <= 1


def test_masks_pick_the_pixel_whose_centre_is_nearest():
    masks = np.random.default_rng(1).random((3, 7, 11)) < 0.5
    window = Window((7, 11), (20, 5), 4, 1, (9, 3))
    found, kept = cut_masks(masks, window)
    assert kept.tolist() == [0, 1, 2]
    for row in range(9):
        for column in range(3):
            y, x = (row + 4 + 0.5) * 7 / 20, (column + 1 + 0.5) * 11 / 5
            np.testing.assert_array_equal(found[:, row, column], masks[:, int(y), int(x)])


@pytest.mark.parametrize("is_flipped", [False, True])
def test_all_forms_of_masks_are_cut_alike(is_flipped):
    generator = np.random.default_rng(2)
    numbers = np.kron(generator.integers(0, 9, (4, 5)), np.ones((5, 6), dtype=int))  # (20, 30)
    ids = [300, 1, 2, 3, 4, 5, 6, 7]
    masks = numbers[None] == np.array(ids)[:, None, None]
    forms = [
        masks,
        MapMasks(numbers.astype(np.uint8), ids),
        MapMasks(numbers.astype(np.int32), ids),
        CocoMasks(encode_rle(torch.from_numpy(masks)), (20, 30)),
    ]
    for resized, top, left, size in (((50, 80), 20, 3, (28, 33)), ((4, 9), 1, 0, (2, 7)), ((20, 30), 0, 0, (20, 30))):
        window = Window((20, 30), resized, top, left, size, is_flipped)
        expected = masks[:, window.rows[:, None], window.columns]
        is_seen = expected.any(axis=(1, 2))
        for form in forms:
            found, kept = cut_masks(form, window)
            np.testing.assert_array_equal(kept, np.flatnonzero(is_seen))
            np.testing.assert_array_equal(found, expected[is_seen])
    for form in forms[1:]:
        np.testing.assert_array_equal(np.asarray(form), masks)


@pytest.mark.parametrize("ends_with", ["foreground", "background"])
def test_run_lengths_are_decoded_to_the_last_pixel(ends_with):
    mask = np.zeros((1, 3, 4), dtype=bool)
    mask[0, :, 1:3] = True
    mask[0, 2, 3] = ends_with == "foreground"
    np.testing.assert_array_equal(np.asarray(CocoMasks(encode_rle(torch.from_numpy(mask)), (3, 4))), mask)


def test_polygons_are_filled_at_the_size_of_the_result():
    # A diamond, of which nearest pixels would have steps ten pixels high.
    masks = CocoMasks([[[5, 0.13, 9.87, 5, 5, 9.87, 0.13, 5]]], (10, 10))
    for is_flipped in (False, True):
        window = Window((10, 10), (100, 100), 10, 20, (60, 50), is_flipped)
        (mask,), _ = cut_masks(masks, window)
        y, x = np.mgrid[10:70, 20:70] + 0.5
        expected = np.abs(x - 50) + np.abs(y - 50) < 48.7
        np.testing.assert_array_equal(mask, expected[:, ::-1] if is_flipped else expected)
    assert masks.shape == np.asarray(masks).shape == (1, 10, 10)


def test_masks_of_another_size_and_broken_run_lengths_are_refused_with_numbers():
    with pytest.raises(ValueError, match="masks are 5 x 6, but the image is 6 x 5"):
        JITTER(make_row(np.zeros((6, 5, 3)), np.zeros((2, 5, 6), dtype=bool)), **WHERE)
    with pytest.raises(ValueError, match="add up to 30, but they add up to 7"):
        CocoMasks([{"size": [5, 6], "counts": [3, 4]}], (5, 6)).cut(Window.whole((5, 6)))
    with pytest.raises(ValueError, match="belong to an image of 5 x 6, but this one has 6 x 5"):
        CocoMasks([{"size": [5, 6], "counts": [30]}], (6, 5))
    with pytest.raises(ValueError, match="Join the channels"):
        MapMasks(np.zeros((5, 6, 3), dtype=np.uint8), [1])


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn
# ---------------------------------------------------------------------------------------------------------------------


def windows_of(augmentation, source_size, number):
    row = {"mask_labels": np.zeros((0, *source_size), dtype=bool), "class_labels": np.zeros(0, dtype=np.int64)}
    return [augmentation._choose_window(row, source_size, generator_of(0, 0, index))[0] for index in range(number)]


def test_scales_are_uniform_and_the_aspect_ratio_is_kept():
    augmentation = Augmentation(kind="large_scale_jitter", size=(500, 1000), scale=(0.1, 2.0))
    windows = windows_of(augmentation, (400, 300), 2000)
    # 400 x 300 fits into 500 x 1000 with the factor 1.25.
    scales = np.sort([window.resized_size[0] / 400 / 1.25 for window in windows])
    uniform = 0.1 + 1.9 * (np.arange(2000) + 0.5) / 2000
    assert np.abs(scales - uniform).max() < 0.1  # of a Kolmogorov test, seven sigma
    assert all(abs(window.resized_size[1] - window.resized_size[0] * 3 / 4) < 1 for window in windows)


def test_windows_lie_inside_the_image_and_reach_all_of_its_borders():
    for augmentation in (Augmentation(size=50, scale=(1.9, 2.0)), SHORT_SIDE):
        windows = windows_of(augmentation, (40, 40), 600)
        for axis in (0, 1):
            places = np.array([(window.top, window.left)[axis] for window in windows])
            room = np.array([window.resized_size[axis] - window.size[axis] for window in windows])
            assert (places >= 0).all()
            assert (places <= room).all()
            shares = places[room > 0] / room[room > 0]
            assert (shares.min() < 0.01, shares.max() > 0.99) == (True, True)
            assert abs(shares.mean() - 0.5) < 0.06


def test_the_original_crop_moves_along_the_diagonal_and_the_other_one_anywhere():
    offsets = {
        crop: np.array(
            [(w.top, w.left) for w in windows_of(Augmentation(size=50, scale=(2, 2), crop=crop), (40, 40), 300)]
        )
        for crop in ("original", "anywhere")
    }
    np.testing.assert_array_equal(*offsets["original"].T)
    assert abs(np.corrcoef(*offsets["anywhere"].T)[0, 1]) < 0.2


def test_all_short_sides_are_drawn_and_the_longest_side_is_a_limit():
    windows = windows_of(dataclasses.replace(SHORT_SIDE, size=None), (20, 30), 300)
    sizes = [window.resized_size for window in windows]
    # 90 would make the longer side 135, so the image is resized to 80 x 120.
    assert set(sizes) == {(30, 45), (60, 90), (80, 120)}
    assert all(70 < sizes.count(size) < 130 for size in set(sizes))
    assert all(window.size == window.resized_size for window in windows)


@pytest.mark.parametrize(("flip", "least", "most"), [(0.0, 0, 0), (1.0, 400, 400), (0.25, 70, 130)])
def test_images_are_mirrored_as_often_as_asked(flip, least, most):
    windows = windows_of(dataclasses.replace(JITTER, flip=flip), (40, 40), 400)
    assert least <= sum(window.is_flipped for window in windows) <= most


def test_a_flip_exchanges_left_and_right_and_nothing_else():
    row = checkerboard(20, 30, 4)
    result = Augmentation(kind="none", flip=1)(row, **WHERE)
    np.testing.assert_array_equal(np.asarray(result["image"]), np.asarray(row["image"])[:, ::-1])
    np.testing.assert_array_equal(result["mask_labels"], row["mask_labels"][..., ::-1])
    np.testing.assert_array_equal(result["ignore_mask"], row["ignore_mask"][:, ::-1])
    np.testing.assert_array_equal(result["class_labels"], row["class_labels"])


def test_nothing_to_do_gives_the_row_as_it_is():
    row = checkerboard(20, 30, 4)
    result = AS_IT_IS(row, **WHERE)
    assert result.pop("canvas_size") == (20, 30)
    assert result.pop("pad_value") == 128
    assert_same_row(result, row)


def test_windows_with_one_class_are_drawn_again_only_if_the_recipe_says_so():
    # A third of the image is class 1; most windows of 8 columns show one class alone.
    masks = np.zeros((2, 8, 60), dtype=bool)
    masks[0, :, :40], masks[1, :, 40:] = True, True
    row = make_row(np.zeros((8, 60, 3)), masks, [4, 6])
    shares = {}
    for most in (1.0, 0.75):
        augmentation = Augmentation(kind="short_side", size=8, short_sides=(8,), max_category_area=most)
        results = [augmentation(row, seed=0, epoch=0, index=index) for index in range(200)]
        areas = [result["mask_labels"].sum(axis=(1, 2)) for result in results]
        shares[most] = np.mean([len(area) == 2 and area.max() < 0.75 * 64 for area in areas])
    # 3 of 53 places are good: 36 to 38; ten draws find one with probability 1 - (50 / 53) ** 10 = 0.44.
    assert shares[1.0] < 0.12
    assert 0.3 < shares[0.75] < 0.58


def test_instances_of_one_class_count_together_in_the_category_area():
    masks = np.zeros((2, 8, 8), dtype=bool)
    masks[0, :4], masks[1, 4:] = True, True
    augmentation = Augmentation(kind="short_side", size=8, short_sides=(8,), max_category_area=0.75)
    assert augmentation._is_mixed(masks, np.array([3, 5]))
    assert not augmentation._is_mixed(masks, np.array([3, 3]))
    assert not augmentation._is_mixed(masks[:0], np.array([], dtype=np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# What is left
# ---------------------------------------------------------------------------------------------------------------------


def test_masks_without_a_pixel_are_dropped_with_their_labels():
    masks = np.zeros((3, 40, 40), dtype=bool)
    masks[0, :5, :5], masks[1], masks[2, -5:, -5:] = True, True, True
    row = make_row(np.zeros((40, 40, 3)), masks, [8, 4, 5], crowd_masks=masks[[2, 0]], crowd_labels=np.array([3, 2]))
    augmentation = Augmentation(size=20, scale=(2, 2), flip=0)
    kept = {
        (tuple(result["class_labels"]), tuple(result["crowd_labels"]))
        for result in (augmentation(row, seed=0, epoch=0, index=index) for index in range(100))
    }
    # A window of half the image, on its diagonal, shows one corner, or none.
    assert kept == {((8, 4), (2,)), ((4, 5), (3,)), ((4,), ())}


@pytest.mark.parametrize("augmentation", [JITTER, SHORT_SIDE, AS_IT_IS, dataclasses.replace(JITTER, color=True)])
def test_an_image_without_segments_stays_one(augmentation):
    result = augmentation(make_row(np.zeros((20, 30, 3)), np.zeros((0, 20, 30), dtype=bool)), **WHERE)
    assert result["mask_labels"].shape == (0, result["image"].height, result["image"].width)
    assert (result["class_labels"].shape, result["class_labels"].dtype) == ((0,), np.int64)
    assert pad_row(result)["mask_labels"].shape[1:] == pad_row(result)["image"].size[::-1]


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (700, 1), (3000, 2000)])
@pytest.mark.parametrize("augmentation", [Augmentation(size=64), SHORT_SIDE])
def test_tiny_and_huge_images_fit(augmentation, size):
    row = make_row(np.full((*size, 3), 90), np.ones((1, *size), dtype=bool))
    for index in range(5):
        result = augmentation(row, seed=0, epoch=0, index=index)
        height, width = result["image"].height, result["image"].width
        assert 1 <= height <= augmentation.size[0]
        assert 1 <= width <= augmentation.size[1]
        assert result["mask_labels"].shape == (1, height, width)
        assert result["mask_labels"].all()
        assert np.unique(np.asarray(result["image"])).tolist() == [90]


def test_padding_is_at_the_right_and_the_bottom_and_of_the_level_asked_for():
    row = checkerboard(30, 20, 3)
    augmentation = Augmentation(size=(40, 50), scale=(0.5, 0.5), pad_value=99)
    result = augmentation(row, **WHERE)
    assert result["image"].size == (13, 20)  # half of the 40 x 27 that fill the height
    padded = pad_row(result)
    pixels = np.asarray(padded["image"])
    assert pixels.shape == (40, 50, 3)
    np.testing.assert_array_equal(pixels[:20, :13], np.asarray(result["image"]))
    assert (pixels[20:] == 99).all()
    assert (pixels[:, 13:] == 99).all()
    for name in ("mask_labels", "crowd_masks", "ignore_mask"):
        assert padded[name].shape[-2:] == (40, 50)
        np.testing.assert_array_equal(padded[name][..., :20, :13], result[name])
        assert padded[name].sum() == result[name].sum()
    assert not {"canvas_size", "pad_value"} & set(padded)


def test_the_row_that_comes_in_is_not_changed():
    row = checkerboard(30, 20, 3)
    before = {name: value.copy() for name, value in row.items() if name != "image_id"}
    spun = dataclasses.replace(JITTER, color=True, transforms=({"name": "RandomRotation", "degrees": 30},))
    spun(row, **WHERE)
    assert_same_row({name: value for name, value in row.items() if name != "image_id"}, before)


def test_images_of_other_modes_become_rgb():
    row = make_row(np.zeros((20, 30, 3)), np.ones((1, 20, 30), dtype=bool))
    row["image"] = Image.new("L", (30, 20), 80)
    assert np.unique(np.asarray(AS_IT_IS(row, **WHERE)["image"]).reshape(-1, 3), axis=0).tolist() == [[80, 80, 80]]


# ---------------------------------------------------------------------------------------------------------------------
# The same everywhere
# ---------------------------------------------------------------------------------------------------------------------


ALL_OF_IT = Augmentation(
    size=64, color=True, transforms=({"name": "RandomRotation", "degrees": 20}, {"name": "RandomPosterize", "bits": 4})
)


def test_a_result_depends_on_seed_epoch_and_index_and_on_nothing_else():
    row = DigitScenes("train", image_size=64)[0]
    first = ALL_OF_IT(row, seed=1, epoch=2, index=3)
    torch.manual_seed(99), np.random.seed(99), random.seed(99)  # noqa: NPY002
    assert_same_row(ALL_OF_IT(row, seed=1, epoch=2, index=3), first)
    for change in ({"seed": 2}, {"epoch": 3}, {"index": 2}, {"repeat": 1}):
        other = ALL_OF_IT(row, **{"seed": 1, "epoch": 2, "index": 3, **change})
        assert other["image"].tobytes() != first["image"].tobytes()


def test_global_random_state_is_left_alone():
    row = DigitScenes("train", image_size=64)[0]
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    ALL_OF_IT(row, **WHERE)
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert random.getstate() == state[2]


def test_large_numbers_do_not_run_into_one_another():
    draws = {
        generator_of(*key).random()
        for key in (
            (2**32, 0, 0),
            (0, 1, 0),
            (0, 0, 1),
            (0, 0, 0, 1),
            (0, 2**32, 0),
            (0, 0, 2**32),
            (2**64, 0, 0),
            (1, 0, 0),
        )
    }
    assert len(draws) == 8
    with pytest.raises(ValueError, match="not negative"):
        generator_of(0, -1, 0)


def test_the_generator_is_the_same_on_every_machine():
    words = np.random.SeedSequence(1, spawn_key=(2, 3, 0)).generate_state(4, np.uint64).tolist()
    assert generator_of(1, 2, 3).random(3).tolist() == first_doubles_of_pcg64(words, 3)


def first_doubles_of_pcg64(words, number):
    """PCG64 (XSL-RR) in plain integers, as its authors describe it: O'Neill 2014."""
    modulus, multiplier = 2**128, 0x2360ED051FC65DA44385DF649FCCF645
    increment = ((words[2] << 64 | words[3]) << 1 | 1) % modulus
    state = (increment + (words[0] << 64 | words[1])) % modulus
    state = (state * multiplier + increment) % modulus
    doubles = []
    for _ in range(number):
        state = (state * multiplier + increment) % modulus
        mixed, turn = (state >> 64) ^ (state % 2**64), state >> 122
        value = (mixed >> turn | mixed << (64 - turn)) % 2**64
        doubles.append((value >> 11) / 2**53)
    return doubles


def test_workers_change_nothing():
    scenes = DigitScenes("train", image_size=64, num_images=6)
    augmented = AugmentedDataset(scenes, ALL_OF_IT, seed=5)
    keys = [(epoch, index) for epoch in (0, 1) for index in (4, 0, 5, 1)]
    alone, shared = (
        list(DataLoader(augmented, sampler=keys, batch_size=None, num_workers=workers, collate_fn=lambda row: row))
        for workers in (0, 2)
    )
    assert len(alone) == len(keys)
    for row, other, (epoch, index) in zip(alone, shared, keys, strict=True):
        assert_same_row(row, other)
        assert_same_row(row, ALL_OF_IT(scenes[index], seed=5, epoch=epoch, index=index))
    assert_same_row(augmented[3], augmented[0, 3])
    assert augmented[0, 3, 1]["image"].tobytes() != augmented[0, 3]["image"].tobytes()


def test_a_setting_changes_only_what_it_is_for():
    row = checkerboard(40, 60, 5)
    plain = [JITTER(row, seed=0, epoch=0, index=index) for index in range(10)]
    for change in ({"color": True}, {"pad_value": 3}):
        for index, one in enumerate(plain):
            other = dataclasses.replace(JITTER, **change)(row, seed=0, epoch=0, index=index)
            np.testing.assert_array_equal(other["mask_labels"], one["mask_labels"])
            assert other["image"].size == one["image"].size


# ---------------------------------------------------------------------------------------------------------------------
# Colours
# ---------------------------------------------------------------------------------------------------------------------


def test_colours_change_and_masks_do_not():
    row = DigitScenes("train", image_size=64)[1]
    colored = [dataclasses.replace(AS_IT_IS, color=True)(row, seed=0, epoch=0, index=index) for index in range(40)]
    for result in colored:
        np.testing.assert_array_equal(result["mask_labels"], row["mask_labels"])
    is_same = [result["image"].tobytes() == row["image"].tobytes() for result in colored]
    assert 0 < sum(is_same) < 10  # none of the four is drawn for one image in 16


def test_hue_and_saturation_are_those_of_hsv():
    generator = np.random.default_rng(3)
    pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    pixels[0, :3] = [[0, 0, 0], [255, 255, 255], [77, 77, 77]]
    for saturation, hue in ((0.5, 0.0), (1.5, 0.0), (1.0, 36.0), (1.0, -36.0), (1.3, -20.0), (0.0, 10.0)):
        changed = np.asarray(change_hue_and_saturation(Image.fromarray(pixels), saturation, hue)).astype(float)
        for place in np.ndindex(40, 50):
            h, s, v = colorsys.rgb_to_hsv(*(pixels[place] / 255))
            expected = np.array(colorsys.hsv_to_rgb((h + hue / 360) % 1, min(1, s * saturation), v)) * 255
            assert np.abs(changed[place] - expected).max() <= 0.51


class Draws:
    """Gives the numbers that a test wants to be drawn."""

    def __init__(self, **values):
        steps = ["brightens", "contrasts", "saturates", "turns"]
        amounts = ["brightness", "contrast", "saturation", "hue", "contrast_is_late"]
        draws = {**dict.fromkeys(steps, 0.99), **dict.fromkeys(amounts, 0.0), **values}
        self.values = np.array([draws[name] for name in steps + amounts])

    def random(self, number):
        assert number == len(self.values)
        return self.values


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ({}, (200, 100, 20)),
        ({"brightens": 0.2, "brightness": 0.0}, (168, 68, 0)),
        ({"brightens": 0.2, "brightness": 1.0}, (232, 132, 52)),
        ({"contrasts": 0.2, "contrast": 0.0}, (100, 50, 10)),
        ({"contrasts": 0.2, "contrast": 1.0}, (255, 150, 30)),
        ({"saturates": 0.2, "saturation": 0.0}, (200, 150, 110)),
        # Channels between 0 and 200; 100 of the 180 between the largest and the smallest.
        ({"saturates": 0.2, "saturation": 1.0}, (200, 89, 0)),
        # Hue 26.67 degrees: 36 more is 62.67, beyond yellow.
        ({"turns": 0.2, "hue": 1.0}, (192, 200, 20)),
        # Brightness before contrast: (200 + 32) / 2.
        ({"brightens": 0.2, "brightness": 1.0, "contrasts": 0.2, "contrast": 0.0}, (116, 66, 26)),
        # Early contrast cuts the channels off before they lose saturation; late contrast after it.
        ({"contrasts": 0.2, "contrast": 1.0, "saturates": 0.2, "contrast_is_late": 0.2}, (255, 203, 143)),
        ({"contrasts": 0.2, "contrast": 1.0, "saturates": 0.2, "contrast_is_late": 0.8}, (255, 225, 165)),
    ],
)
def test_each_step_of_the_colour_jitter_has_the_range_and_the_place_of_ssd(draws, expected):
    image = Image.new("RGB", (3, 2), (200, 100, 20))
    changed = np.asarray(jitter_colors(image, Draws(**draws)))
    assert np.abs(changed.astype(int) - expected).max() <= 1
    assert image.getpixel((0, 0)) == (200, 100, 20)


# ---------------------------------------------------------------------------------------------------------------------
# torchvision's transforms
# ---------------------------------------------------------------------------------------------------------------------


def test_transforms_of_torchvision_move_image_and_masks_together():
    row = checkerboard(60, 60, 3)
    spun = dataclasses.replace(AS_IT_IS, transforms=({"name": "RandomRotation", "degrees": [90, 90]},))
    result = spun(row, **WHERE)
    np.testing.assert_array_equal(np.asarray(result["image"]), np.rot90(np.asarray(row["image"])))
    np.testing.assert_array_equal(result["mask_labels"], np.rot90(row["mask_labels"], axes=(1, 2)))
    np.testing.assert_array_equal(result["crowd_masks"], np.rot90(row["crowd_masks"], axes=(1, 2)))
    np.testing.assert_array_equal(result["ignore_mask"], np.rot90(row["ignore_mask"]))
    np.testing.assert_array_equal(result["class_labels"], row["class_labels"])


def test_what_transforms_fill_in_is_of_the_level_asked_for_and_in_no_mask():
    row = make_row(np.full((40, 40, 3), 9), np.ones((1, 40, 40), dtype=bool), ignore_mask=np.ones((40, 40), dtype=bool))
    turned = {"name": "RandomRotation", "degrees": [45, 45], "fill": 128}
    result = dataclasses.replace(AS_IT_IS, transforms=(turned,))(row, **WHERE)
    level = np.asarray(result["image"])[..., 1]
    assert set(np.unique(level)) == {9, 128}
    np.testing.assert_array_equal(result["mask_labels"][0], level == 9)
    np.testing.assert_array_equal(result["ignore_mask"], level == 9)
    assert 0.7 < (level == 9).mean() < 0.9


def test_transforms_drop_masks_that_they_push_out():
    row = checkerboard(60, 60, 3)
    away = {"name": "RandomAffine", "degrees": 0, "translate": [1.0, 1.0], "scale": [2.0, 2.0]}
    moved = dataclasses.replace(AS_IT_IS, transforms=(away,))
    counts = []
    for index in range(10):
        result = moved(row, seed=0, epoch=0, index=index)
        assert len(result["mask_labels"]) == len(result["class_labels"])
        assert len(result["crowd_masks"]) == len(result["crowd_labels"])
        assert result["mask_labels"].any(axis=(1, 2)).all()
        counts.append(len(result["mask_labels"]))
    assert min(counts) < 9


def test_transforms_that_change_the_size_are_refused():
    bad = dataclasses.replace(AS_IT_IS, transforms=({"name": "Resize", "size": [10, 10]},))
    with pytest.raises(ValueError, match=r"must leave images of 8 bits and of their size"):
        bad(checkerboard(60, 60, 3), **WHERE)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def test_a_batch_is_what_the_processor_makes_of_the_padded_rows():
    augmentation = Augmentation(size=(50, 70), color=True)  # no multiple of 32, so the batch is larger than the canvas
    rows = [augmentation(checkerboard(40, 60, 4), seed=0, epoch=0, index=index) for index in range(4)]
    processor = MPFormerImageProcessor(do_resize=False)
    inputs = unpack_batch(pack_batch(rows), processor)
    padded = [pad_row(row) for row in rows]
    expected = processor(
        [row["image"] for row in padded],
        mask_labels=[row["mask_labels"] for row in padded],
        class_labels=[row["class_labels"] for row in padded],
        return_tensors="pt",
    )
    assert inputs["pixel_values"].shape == (4, 3, 64, 96)
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)
    for image, row in enumerate(rows):
        height, width = row["image"].height, row["image"].width
        seen = inputs["pixel_mask"][image]
        assert seen[:height, :width].all()
        assert seen.sum() == height * width
        assert torch.equal(inputs["mask_labels"][image], expected["mask_labels"][image][:, :height, :width])
        assert torch.equal(inputs["class_labels"][image], expected["class_labels"][image])


@pytest.mark.parametrize("fields", [{"do_normalize": False}, {"do_rescale": False, "do_normalize": False}])
def test_a_batch_is_normalised_as_the_processor_says(fields):
    rows = [JITTER(checkerboard(40, 60, 4), **WHERE)]
    processor = MPFormerImageProcessor(do_resize=False, **fields)
    expected = processor([pad_row(rows[0])["image"]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(unpack_batch(pack_batch(rows), processor)["pixel_values"], expected, rtol=0, atol=1e-6)


def test_the_model_takes_a_batch_and_its_loss_is_that_of_padded_masks():
    model = tiny_model().eval()
    rows = [
        Augmentation(size=64, scale=(0.5, 0.9))(checkerboard(40, 60, 1), seed=0, epoch=0, index=i) for i in range(2)
    ]
    inputs = unpack_batch(pack_batch(rows), MPFormerImageProcessor(do_resize=False))
    padded = {
        **inputs,
        "mask_labels": [torch.from_numpy(pad_row(row)["mask_labels"]) for row in rows],
        "pixel_mask": None,
    }
    losses = []
    for batch in (inputs, padded):
        torch.manual_seed(0)
        losses.append(model(**batch).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert rows[0]["image"].width < 64


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64])
def test_packed_masks_are_the_same_masks_afterwards(width, device):
    masks = np.random.default_rng(0).random((3, 5, width)) < 0.5
    bits = pack_masks(masks)
    assert bits.shape == (3, 5, -(-width // 8))
    np.testing.assert_array_equal(unpack_masks(bits.to(device), width).cpu().numpy(), masks)
    np.testing.assert_array_equal(shift_out(bits, width).numpy(), masks)


def test_ignored_pixels_travel_with_the_batch():
    first, second = checkerboard(40, 60, 4), checkerboard(30, 30, 2)
    del second["ignore_mask"]
    rows = [AS_IT_IS(row, **WHERE) for row in (first, second)]
    masks = unpack_ignore_masks(pack_batch(rows))
    np.testing.assert_array_equal(masks[0].numpy(), first["ignore_mask"])
    assert (masks[1].shape, masks[1].any()) == ((30, 30), False)
    assert unpack_ignore_masks(pack_batch(rows[1:])) is None


def test_the_loaders_that_the_benchmark_compares_give_the_same_pictures(tmp_path):
    setting = loader.Setting(images=4, size=192, segments=6, workers=0, batch_size=1, repeats=1)
    loader.write_images(tmp_path, setting)
    loaders = loader.make_loaders(tmp_path, setting)
    for one, *others in zip(
        *(map(loader.model_inputs(form), loaders[form]) for form in loader.OURS + loader.THEIRS), strict=True
    ):
        (height, width), image = one["mask_labels"][0].shape[1:], one["pixel_values"]
        labels = one["class_labels"][0]
        for other in others:
            # Bilinear in both; torchvision rounds its weights to fewer bits.
            assert (other["pixel_values"] - image).abs().max() < 3 / 255 / 0.22
            masks = other["mask_labels"][0][:, :height, :width] > 0
            order = [other["class_labels"][0].tolist(), labels.tolist()]
            assert sorted(order[0]) == sorted(order[1])
            # Its nearest pixel is up to half a pixel off, so outlines differ.
            best = [max(iou(mask, mine) for mine in one["mask_labels"][0]) for mask in masks]
            assert min(best) > 0.8


def iou(mask, other):
    return ((mask & other).sum() / (mask | other).sum()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(name):
    preset = Augmentation.from_recipe(name)
    assert Augmentation.from_recipe(yaml.safe_load(yaml.safe_dump(preset.to_dict()))) == preset == PRESETS[name]


def test_transforms_survive_yaml():
    augmentation = Augmentation(size=64, transforms=({"name": "GaussianBlur", "kernel_size": 3},))
    assert Augmentation.from_recipe(yaml.safe_load(yaml.safe_dump(augmentation.to_dict()))) == augmentation


def test_presets_have_the_short_sides_of_the_original():
    for name, side in (("ade20k_512", 512), ("ade20k_640", 640), ("cityscapes", 1024), ("mapillary", 2048)):
        assert list(PRESETS[name].short_sides) == [int(x * 0.1 * side) for x in range(5, 21)]


def test_keys_beside_a_preset_win():
    augmentation = Augmentation.from_recipe({"preset": "coco", "size": [512, 768], "crop": "anywhere"})
    assert augmentation == dataclasses.replace(PRESETS["coco"], size=(512, 768), crop="anywhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"siz": 512}, "no key `siz`. Did you mean `size`?"),
        ({"preset": "cocoo"}, "no preset `cocoo`. Did you mean `coco`?"),
        ("cityscape", "no preset `cityscape`. Did you mean `cityscapes`?"),
        (["coco"], "must be the name of a preset"),
        ({"kind": "short_sides", "size": 8}, "`kind` has no choice 'short_sides'. Did you mean `short_side`?"),
        ({"kind": "large_scale_jitter"}, "needs `size`"),
        ({"kind": "short_side"}, "needs `short_sides`"),
        ({"size": 8, "short_sides": [8]}, "`short_sides` belongs to kind short_side, but it is large_scale_jitter"),
        ({"kind": "none", "scale": [1, 2]}, "`scale` belongs to kind large_scale_jitter, but it is none"),
        ({"kind": "none", "size": 8}, "`size` belongs to kind large_scale_jitter or short_side"),
        ({"size": 0}, "`size` must be an integer of at least 1, got 0"),
        ({"size": [8, 8, 3]}, "height and width"),
        ({"size": "8"}, "`size` must be an integer"),
        ({"size": 8, "scale": [2, 1]}, "must begin with the lower factor"),
        ({"size": 8, "scale": 2}, "lowest and the highest factor"),
        ({"size": 8, "scale": [0, 1]}, "`scale` must be a number from 0.001"),
        ({"size": 8, "flip": 1.5}, "`flip` must be a number from 0 to 1, got 1.5"),
        ({"size": 8, "flip": True}, "`flip` must be a number"),
        ({"size": 8, "flip": float("nan")}, "`flip` must be a number"),
        ({"size": 8, "color": "yes"}, "`color` must be true or false, got 'yes'"),
        ({"size": 8, "pad_value": 256}, "`pad_value` must be an integer from 0 to 255"),
        ({"size": 8, "crop": "middle"}, "`crop` has no choice 'middle'"),
        ({"kind": "short_side", "short_sides": 8}, "`short_sides` must be a list"),
        ({"kind": "short_side", "short_sides": [8, 0.5]}, "`short_sides` must be an integer"),
        ({"kind": "short_side", "short_sides": [8], "longest_side": 0}, "`longest_side` must be an integer"),
        ({"kind": "short_side", "short_sides": [8], "max_category_area": 0.5}, "so it needs `size`"),
        ({"size": 8, "transforms": {"name": "GaussianBlur"}}, "`transforms` must be a list of mappings"),
        ({"size": 8, "transforms": [{"name": "GausianBlur"}]}, "Did you mean `GaussianBlur`?"),
        ({"size": 8, "transforms": [{"name": "GaussianBlur", "kernel": 3}]}, "Did you mean `kernel_size`?"),
        ({"size": 8, "transforms": [{"name": "GaussianBlur", "kernel_size": -3}]}, "GaussianBlur cannot be made"),
        ({"size": 8, "transforms": [{"kernel_size": 3}]}, "has no transform 'None'"),
    ],
)
def test_mistakes_in_a_recipe_end_with_a_sentence(settings, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Augmentation.from_recipe(settings)
    assert message in str(caught.value)


def test_every_field_is_documented():
    lines = Augmentation.__doc__.splitlines()
    for name in DEFAULTS:
        assert any(line.strip().startswith(f"{name}: ") for line in lines), name
