"""Bad images and ground truth: what was expected, what came, which image; in the model and in its parts."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mpformer_hf import MPFormerForUniversalSegmentation
from mpformer_hf.target_checks import check_images, check_targets, measure_images, raise_for_values
from tests.factories import random_batch, random_images, tiny_model
from tests.unit.model_contract import predict


@cache
def model(*, training: bool) -> MPFormerForUniversalSegmentation:
    return tiny_model().train(training)


def message_of(batch: dict[str, Any], *, training: bool = True) -> str:
    """What the model says to a bad batch."""
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the tests look at the message
        predict(model(training=training), **batch)
    return str(refusal.value)


def batch_with(**changes: Any) -> dict[str, Any]:
    """A batch of three images with 2, 0 and 3 segments; `mask_labels` and `class_labels` map an image to its new value."""
    batch = random_batch([2, 0, 3])
    for name, change in changes.items():
        if name in {"mask_labels", "class_labels"}:
            batch[name] = [change.get(index, value) for index, value in enumerate(batch[name])]
        else:
            batch[name] = change
    return batch


def masks(count: int, height: int = 64, width: int = 96) -> Tensor:
    return torch.zeros(count, height, width)


# --------------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("images", "expected", "came"),
    [
        (torch.zeros(3, 64, 64), "(batch, channels, height, width)", "(3, 64, 64)"),
        (torch.zeros(1, 1, 3, 64, 64), "(batch, channels, height, width)", "(1, 1, 3, 64, 64)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating-point", "torch.uint8"),
        (torch.zeros(1, 3, 31, 64), "32x32", "31x64"),
        (torch.zeros(1, 3, 64, 16), "32x32", "64x16"),
    ],
    ids=["no batch", "five axes", "not normalised", "too low", "too narrow"],
)
def test_images_that_cannot_be_right_are_refused(images, expected, came):
    message = message_of({"pixel_values": images}, training=False)
    assert expected in message
    assert came in message


def test_smallest_image_is_accepted():
    wide = tiny_model(feature_size=64)  # one number a group is too few for a group norm
    assert predict(wide, random_images(1, (32, 32))).masks_queries_logits.shape[-2:] == (8, 8)


@pytest.mark.parametrize("shape", [(2, 64, 96), (3, 96, 64), (3, 1, 64, 96), (64, 96)], ids=str)
def test_pixel_mask_of_another_shape_is_refused(shape):
    message = message_of({"pixel_values": random_images(3), "pixel_mask": torch.ones(shape)}, training=False)
    assert "(3, 64, 96)" in message
    assert str(shape) in message


def test_checks_of_images_need_no_value_on_the_host():
    meta = torch.empty(2, 3, 64, 96, device="meta")
    check_images(meta, torch.empty(2, 64, 96, device="meta"))
    assert measure_images(meta, None).shape == (2, 2)


def test_image_without_pixel_mask_is_valid_everywhere():
    assert measure_images(torch.zeros(2, 3, 40, 50), None).tolist() == [[40, 50], [40, 50]]


def test_size_of_an_image_is_that_of_its_pixel_mask():
    pixel_mask = torch.zeros(3, 40, 50, dtype=torch.bool)
    pixel_mask[0, :33, :50] = True
    pixel_mask[1, :40, :1] = True  # the third image is padding alone
    assert measure_images(torch.zeros(3, 3, 40, 50), pixel_mask).tolist() == [[33, 50], [40, 1], [0, 0]]


# ------------------------------------------------------------------------------------------------------------ shapes and counts


@pytest.mark.parametrize("given", ["mask_labels", "class_labels"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_masks_without_classes_or_classes_without_masks_are_refused(given, training):
    batch = random_batch([2, 0, 3])
    missing = ({"mask_labels", "class_labels"} - {given}).pop()
    message = message_of({"pixel_values": batch["pixel_values"], given: batch[given]}, training=training)
    assert "together" in message
    assert f"no `{missing}`" in message


@pytest.mark.parametrize("name", ["mask_labels", "class_labels"])
def test_labels_for_another_number_of_images_are_refused(name):
    batch = random_batch([2, 0, 3])
    batch[name] = batch[name][:2]
    message = message_of(batch)
    assert f"`{name}`" in message
    assert "3 images" in message
    assert "got 2" in message


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (torch.zeros(64, 96), "shape (64, 96)"),
        (torch.zeros(3, 1, 64, 96), "shape (3, 1, 64, 96)"),
        ([[0, 1]], "list"),
        (None, "NoneType"),
    ],
    ids=["one mask alone", "four axes", "a list", "nothing"],
)
def test_masks_of_a_wrong_rank_are_refused_with_the_image(wrong, came):
    message = message_of(batch_with(mask_labels={2: wrong}))
    assert "masks of image 2" in message
    assert "(segments, height, width)" in message
    assert came in message


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (torch.tensor(1), "shape ()"),
        (torch.zeros(3, 1, dtype=torch.int64), "shape (3, 1)"),
        (torch.zeros(3), "torch.float32"),
        (torch.zeros(3, dtype=torch.bool), "torch.bool"),
        ([0, 1, 2], "list"),
    ],
    ids=["a number", "two axes", "float", "bool", "a list"],
)
def test_class_labels_of_a_wrong_kind_are_refused_with_the_image(wrong, came):
    message = message_of(batch_with(class_labels={2: wrong}))
    assert "class labels of image 2" in message
    assert "(segments,)" in message
    assert came in message


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_class_labels_of_any_integer_type_are_accepted(dtype):
    labels = {index: label.to(dtype) for index, label in enumerate(random_batch([2, 0, 3])["class_labels"])}
    assert predict(model(training=True), **batch_with(class_labels=labels)).loss.isfinite()


@pytest.mark.parametrize(("image", "count"), [(0, 1), (1, 2), (2, 4)])
def test_different_counts_of_masks_and_classes_are_refused_with_the_image(image, count):
    labels = torch.zeros(count, dtype=torch.int64)
    message = message_of(batch_with(class_labels={image: labels}))
    num_masks = [2, 0, 3][image]
    assert f"Image {image} has {num_masks} masks but {count} class labels" in message


@pytest.mark.parametrize("size", [(63, 96), (64, 97), (128, 192), (16, 24), (96, 64)], ids=str)
@pytest.mark.parametrize("with_pixel_mask", [False, True])
def test_masks_of_another_size_are_refused_with_the_image(size, with_pixel_mask):
    batch = batch_with(mask_labels={2: masks(3, *size)})
    if with_pixel_mask:
        batch["pixel_mask"] = torch.ones(3, 64, 96)
        batch["pixel_mask"][2, 50:] = 0  # the image's own size is (50, 96)
    message = message_of(batch)
    assert "masks of image 2" in message
    assert "64x96" in message
    assert f"{size[0]}x{size[1]}" in message


def test_masks_of_the_images_own_size_need_the_pixel_mask():
    batch = batch_with(mask_labels={2: masks(3, 50, 96)})
    assert "pixel_mask" in message_of(batch)
    pixel_mask = torch.ones(3, 64, 96)
    pixel_mask[2, 50:] = 0
    assert predict(model(training=True), **batch, pixel_mask=pixel_mask).loss.isfinite()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_own_size_of_one_image_is_not_accepted_for_another(training):
    pixel_mask = torch.ones(3, 64, 96)
    pixel_mask[0, 50:] = 0
    message = message_of(batch_with(mask_labels={2: masks(3, 50, 96)}) | {"pixel_mask": pixel_mask}, training=training)
    assert "masks of image 2" in message


def test_empty_masks_may_have_any_size():
    assert predict(model(training=True), **batch_with(mask_labels={1: masks(0, 1, 1)})).loss.isfinite()


# ---------------------------------------------------------------------------------------------------------------- ignore masks


def ignore_masks(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.zeros(size, dtype=torch.bool) for size in sizes]


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (torch.zeros(64, 96), "torch.float32 of shape (64, 96)"),
        (torch.full((64, 96), 255, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(1, 64, 96, dtype=torch.bool), "shape (1, 64, 96)"),
        ([[True]], "list"),
    ],
    ids=["float", "label map", "three axes", "a list"],
)
def test_ignore_masks_of_a_wrong_kind_are_refused_with_the_image(wrong, came):
    message = message_of(batch_with() | {"ignore_masks": [None, None, wrong]})
    assert "ignore mask of image 2" in message
    assert "(height, width)" in message
    assert came in message


def test_ignore_masks_for_another_number_of_images_are_refused():
    message = message_of(batch_with() | {"ignore_masks": ignore_masks((64, 96), (64, 96))})
    assert "`ignore_masks`" in message
    assert "3 images, got 2" in message


@pytest.mark.parametrize("size", [(63, 96), (64, 97), (0, 96), (50, 90)], ids=str)
@pytest.mark.parametrize("image", [1, 2])
@pytest.mark.parametrize("with_pixel_mask", [False, True])
def test_ignore_masks_of_another_size_are_refused_with_the_image(size, image, with_pixel_mask):
    """Also in an image without segments, and beside masks of the right size."""
    given = ignore_masks((64, 96), (64, 96), (64, 96))
    given[image] = ignore_masks(size)[0]
    batch = batch_with() | {"ignore_masks": given}
    if with_pixel_mask:
        batch["pixel_mask"] = torch.ones(3, 64, 96)
        batch["pixel_mask"][image, 50:] = 0  # the image's own size is (50, 96)
    message = message_of(batch)
    assert f"ignore mask of image {image}" in message
    assert "64x96" in message
    assert f"{size[0]}x{size[1]}" in message


def test_masks_of_another_size_are_named_first():
    pixel_mask = torch.ones(3, 64, 96)
    batch = batch_with(mask_labels={2: masks(3, 50, 96)}) | {"pixel_mask": pixel_mask}
    message = message_of(batch | {"ignore_masks": [None, None, ignore_masks((40, 96))[0]]})
    assert "masks of image 2" in message
    assert "50x96" in message


def test_ignore_masks_may_have_the_images_own_size():
    pixel_mask = torch.ones(3, 64, 96)
    pixel_mask[1:, 50:] = 0
    given = [None, *ignore_masks((50, 96), (50, 96))]
    assert predict(model(training=True), **batch_with(), pixel_mask=pixel_mask, ignore_masks=given).loss.isfinite()


def test_ignore_masks_without_labels_mean_nothing():
    outputs = predict(model(training=False), random_images(1), ignore_masks=[torch.ones(3, dtype=torch.bool)])
    assert outputs.loss is None


# ---------------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("label", "came"), [(3, "3"), (-1, "-1"), (255, "255"), (10**6, "1000000")])
def test_class_label_out_of_range_is_refused_with_the_image(label, came, training):
    message = message_of(batch_with(class_labels={2: torch.tensor([0, label, 1])}), training=training)
    assert "from 0 to 2" in message
    assert came in message
    assert "image 2" in message
    assert "num_labels" in message


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (masks(3) + 255.0, "255"),
        ((masks(3) + 255).to(torch.uint8), "255"),
        ((masks(3) + 2).to(torch.int64), "2"),
        (masks(3) - 0.5, "-0.5"),
        (masks(3) + float("nan"), "nan"),
    ],
    ids=["255", "255 in uint8", "2 in int64", "negative", "nan"],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_mask_values_out_of_range_are_refused_with_the_image(wrong, came, training):
    message = message_of(batch_with(mask_labels={2: wrong}), training=training)
    assert "[0, 1]" in message
    assert came in message
    assert "image 2" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_pixels_that_are_not_finite_are_refused_when_labels_are_given(value, training):
    batch = batch_with()
    batch["pixel_values"][1, 2, 5, 7] = value  # in the image without segments
    message = message_of(batch, training=training)
    assert "Image 1" in message
    assert "finite" in message


def test_first_bad_image_is_named():
    batch = batch_with(class_labels={0: torch.tensor([7, 0]), 2: torch.tensor([9, 0, 0])})
    assert "image 0" in message_of(batch)


def test_bad_values_in_a_batch_of_empty_images_are_found():
    batch = random_batch([0, 0])
    batch["pixel_values"][1] = float("nan")
    assert "Image 1" in message_of(batch)


def test_bad_labels_do_not_break_the_step_before_they_are_reported():
    """The label embedding is read before the check has reached the host: labels are clamped, then the error is raised."""
    targets = check_targets(torch.zeros(1, 3, 64, 96), None, [masks(3)], [torch.tensor([-5, 1, 99])], num_labels=3)
    assert targets.class_labels[0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="got -5 to 99 in image 0"):
        raise_for_values(targets.values.numpy(), targets, num_labels=3)


def test_good_targets_pass_and_keep_their_type():
    given = [masks(2).bool(), masks(0), (masks(1) + 1).to(torch.uint8)]
    labels = [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.int64), torch.tensor([1])]
    targets = check_targets(torch.zeros(3, 3, 64, 96), None, given, labels, num_labels=3)
    raise_for_values(targets.values.numpy(), targets, num_labels=3)
    assert targets.num_segments == [2, 0, 1]
    assert targets.padded_size == (64, 96)
    assert [mask.dtype for mask in targets.mask_labels] == [torch.bool, torch.float32, torch.uint8]
    assert all(ours is theirs for ours, theirs in zip(targets.mask_labels, given, strict=True))
