"""The image processor: sizes, padding, labels, files, and the results of post-processing in the forms of transformers."""

import inspect
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from pycocotools import mask as pycocotools_mask
from torch import Tensor
from transformers import Mask2FormerImageProcessor
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentationOutput
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput

from mpformer_hf.image_processing_mpformer import MPFormerImageProcessor
from mpformer_hf.mask_encoding import rasterize_polygons

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])

# As transformers wrote it for the checkpoints of facebook/mask2former-*.
MASK2FORMER_FILE = {
    "_max_size": 1333,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "ignore_index": 255,
    "image_mean": [0.48500001430511475, 0.4560000002384186, 0.4059999883174896],
    "image_processor_type": "Mask2FormerImageProcessor",
    "image_std": [0.2290000021457672, 0.2239999920129776, 0.22499999403953552],
    "num_labels": 80,
    "reduce_labels": True,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 1333, "shortest_edge": 800},
    "size_divisor": 32,
}


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def small(**fields) -> MPFormerImageProcessor:
    """A processor that leaves sizes as they are."""
    return MPFormerImageProcessor(**{"do_resize": False, **fields})


# Sizes and padding


def test_the_aspect_ratio_is_kept() -> None:
    inputs = MPFormerImageProcessor()(image(480, 640), return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, 800, 1088)
    assert inputs.pixel_mask.dtype == torch.int64
    assert inputs.pixel_mask[0].sum(0).nonzero().max() == 1066  # 800 x 1067 are the image
    assert inputs.pixel_mask.sum() == 800 * 1067


@pytest.mark.parametrize(
    ("size", "image_size", "expected"),
    [
        ({"shortest_edge": 80, "longest_edge": 133}, (50, 100), (67, 133)),
        ({"shortest_edge": 80, "longest_edge": 133}, (100, 50), (133, 67)),
        ({"shortest_edge": 80}, (50, 100), (80, 160)),
        ({"longest_edge": 80}, (50, 100), (40, 80)),
        ({"height": 70, "width": 30}, (50, 100), (70, 30)),
        ({"max_height": 60, "max_width": 60}, (50, 100), (30, 60)),
        (64, (50, 100), (64, 128)),
        ({"longest_edge": 8}, (1, 100), (1, 8)),
    ],
    ids=str,
)
def test_every_form_of_size_is_understood(size, image_size: tuple[int, int], expected: tuple[int, int]) -> None:
    pixels = image(*image_size)
    for inputs in (
        MPFormerImageProcessor(size=size)(pixels, return_tensors="pt"),
        MPFormerImageProcessor()(pixels, size=size, return_tensors="pt"),
    ):
        rows, columns = inputs.pixel_mask[0].any(1).sum(), inputs.pixel_mask[0].any(0).sum()
        assert (int(rows), int(columns)) == expected


def test_images_of_a_batch_are_padded_with_zeros_at_the_right_and_the_bottom() -> None:
    first, second = image(40, 70), image(50, 33)
    inputs = small()([first, second], return_tensors="pt")
    assert inputs.pixel_values.shape == (2, 3, 64, 96)
    for index, pixels in enumerate((first, second)):
        height, width = pixels.shape[:2]
        expected = torch.zeros(3, 64, 96)
        expected[:, :height, :width] = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - MEAN[:, None, None]) / STD[
            :, None, None
        ]
        torch.testing.assert_close(inputs.pixel_values[index], expected, atol=1e-5, rtol=0)
        mask = torch.zeros(64, 96, dtype=torch.int64)
        mask[:height, :width] = 1
        assert torch.equal(inputs.pixel_mask[index], mask)


@pytest.mark.parametrize(
    ("fields", "padded"),
    [
        ({}, (64, 96)),
        ({"size_divisor": 16}, (48, 80)),
        ({"size_divisor": 1}, (40, 70)),
        ({"size_divisor": 0}, (40, 70)),
        ({"do_pad": False}, (40, 70)),
        ({"pad_size": {"height": 128, "width": 160}}, (128, 160)),
        ({"pad_size": 128}, (128, 128)),
    ],
    ids=str,
)
def test_padding_follows_its_fields_and_its_arguments(fields: dict, padded: tuple[int, int]) -> None:
    assert small(**fields)(image(40, 70), return_tensors="pt").pixel_values.shape[2:] == padded
    assert small()(image(40, 70), return_tensors="pt", **fields).pixel_values.shape[2:] == padded


def test_an_image_smaller_than_a_stride_is_padded() -> None:
    inputs = small()(image(1, 3), return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, 32, 32)
    assert inputs.pixel_mask.sum() == 3


def test_an_image_that_does_not_fit_the_fixed_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"Image 1 is 40 x 70 after resizing, .* `pad_size` 64 x 64"):
        small(pad_size={"height": 64, "width": 64})([image(10, 10), image(40, 70)], return_tensors="pt")


def test_a_fixed_size_that_the_backbone_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`pad_size` must be a multiple of `size_divisor` \(32\), got 500 x 500"):
        small(pad_size=500)(image(10, 10), return_tensors="pt")


# Size buckets

BUCKETS = ((64, 64), (32, 160), (96, 96))  # ascending area: 4096, 5120, 9216


@pytest.mark.parametrize(
    ("sizes", "bucket"),
    [
        ([(10, 10)], (64, 64)),
        ([(64, 64)], (64, 64)),
        ([(20, 65)], (32, 160)),
        ([(65, 20)], (96, 96)),
        ([(20, 70), (33, 20)], (96, 96)),  # each fits into a smaller one, but into different ones
        ([(1, 97), (32, 1)], (32, 160)),
    ],
    ids=str,
)
def test_a_batch_is_padded_to_the_smallest_bucket_that_holds_all_its_images(
    sizes: list[tuple[int, int]], bucket: tuple[int, int]
) -> None:
    images = [image(*size) for size in sizes]
    for buckets in (BUCKETS, BUCKETS[::-1], [{"height": height, "width": width} for height, width in BUCKETS]):
        from_field = small(size_buckets=buckets)(images, return_tensors="pt")
        from_argument = small()(images, size_buckets=list(buckets), return_tensors="pt")
        for inputs in (from_field, from_argument):
            assert inputs.pixel_values.shape == (len(sizes), 3, *bucket)
            assert inputs.pixel_mask.shape == (len(sizes), *bucket)
            assert inputs.pixel_mask.sum((1, 2)).tolist() == [height * width for height, width in sizes]


def test_few_shapes_reach_the_model_with_buckets() -> None:
    processor = small(size_buckets=BUCKETS)
    sizes = [(height, width) for height in range(1, 33, 6) for width in range(1, 160, 9)]
    shapes = {tuple(processor(image(*size), return_tensors="pt").pixel_values.shape[2:]) for size in sizes}
    assert shapes == {(64, 64), (32, 160)}


def test_pixels_and_labels_in_a_bucket_are_those_without_one() -> None:
    masks, classes = stripes()
    call = {"mask_labels": [masks], "class_labels": [classes], "return_tensors": "pt"}
    plain = small()(image(40, 70), **call)
    bucket = small(size_buckets=[(128, 160)])(image(40, 70), **call)
    assert torch.equal(bucket.pixel_values[..., :64, :96], plain.pixel_values)
    assert bucket.pixel_values[..., 40:, :].abs().max() == 0
    assert bucket.mask_labels[0].shape == (3, 128, 160)
    assert torch.equal(bucket.mask_labels[0][:, :64, :96], plain.mask_labels[0])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            [(10, 10), (97, 20)],
            r"Image 1 is 97 x 20 after resizing, which fits into none of `size_buckets` "
            r"\(64 x 64, 32 x 160, 96 x 96\). Add a bucket that holds 97 x 20, or lower `size`",
        ),
        (
            [(10, 10), (96, 10), (32, 160)],
            r"No bucket of `size_buckets` .* holds both image 1 \(96 x 10 after resizing\) and image 2 \(32 x 160 .*"
            r"Add a bucket that holds 96 x 160, or put tall and wide images into batches of their own",
        ),
    ],
    ids=["one image", "two images together"],
)
def test_images_that_fit_no_bucket_are_named(sizes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(size_buckets=BUCKETS)([image(*size) for size in sizes], return_tensors="pt")


def test_the_size_after_resizing_decides_about_the_bucket() -> None:
    processor = MPFormerImageProcessor(size={"longest_edge": 64}, size_buckets=BUCKETS)
    assert processor(image(500, 400), return_tensors="pt").pixel_values.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="Image 0 is 128 x 102 after resizing"):
        processor(image(500, 400), size={"longest_edge": 128}, return_tensors="pt")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"size_buckets": [(64, 64), (64, 100)]},
            r"`size_buckets` must be a multiple of `size_divisor` \(32\), got 64 x 100. Round it up to 64 x 128",
        ),
        (
            {"size_buckets": [(96, 96)], "size_divisor": 64},
            r"must be a multiple of `size_divisor` \(64\), got 96 x 96. Round it up to 128 x 128",
        ),
        ({"size_buckets": [(64, 64)], "pad_size": 64}, r"Drop `size_buckets` \(set it to `\(\)`\) .*, or `pad_size`"),
        ({"size_buckets": (64, 64)}, r"`size_buckets` must hold pairs \(height, width\) .*, got 64"),
        ({"size_buckets": [(64, 64, 3)]}, r"got \(64, 64, 3\)"),
        ({"size_buckets": [(0, 64)]}, r"integers of at least 1, .*got \(0, 64\)"),
        ({"size_buckets": [(64.0, 64)]}, r"got \(64.0, 64\)"),
        ({"size_buckets": [{"height": 64}]}, "got {'height': 64}"),
        ({"size_buckets": [{"shortest_edge": 64, "longest_edge": 64}]}, "got {'shortest_edge': 64"),
    ],
    ids=str,
)
def test_buckets_that_cannot_be_are_refused_at_construction_and_in_a_call(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MPFormerImageProcessor(**fields)
    with pytest.raises(ValueError, match=message):
        small()(image(8, 8), return_tensors="pt", **fields)


def test_a_divisor_or_a_fixed_size_in_a_call_is_checked_against_the_buckets_of_the_processor() -> None:
    processor = small(size_buckets=[(96, 96)])
    with pytest.raises(ValueError, match=r"must be a multiple of `size_divisor` \(64\), got 96 x 96"):
        processor(image(8, 8), size_divisor=64, return_tensors="pt")
    with pytest.raises(ValueError, match="`pad_size` and `size_buckets` both decide"):
        processor(image(8, 8), pad_size={"height": 64, "width": 64}, return_tensors="pt")
    fixed = processor(image(8, 8), pad_size={"height": 64, "width": 64}, size_buckets=(), return_tensors="pt")
    assert fixed.pixel_values.shape == (1, 3, 64, 64)
    assert processor(image(8, 8), size_buckets=(), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    assert processor(image(8, 8), do_pad=False, return_tensors="pt").pixel_values.shape == (1, 3, 8, 8)


def test_buckets_of_any_size_are_fine_without_a_divisor() -> None:
    inputs = small(size_buckets=[(50, 75)], size_divisor=1)(image(40, 70), return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, 50, 75)


@pytest.mark.parametrize("form", [list, tuple, lambda pairs: [{"height": one[0], "width": one[1]} for one in pairs]])
def test_buckets_come_back_equal_from_their_file(form, tmp_path: Path) -> None:
    processor = MPFormerImageProcessor(size_buckets=form([[96, 96], [64, 64], [64, 64]]))
    assert processor.size_buckets == ((64, 64), (96, 96))
    processor.save_pretrained(tmp_path / "first")
    loaded = MPFormerImageProcessor.from_pretrained(tmp_path / "first")
    assert loaded.size_buckets == processor.size_buckets
    assert loaded.to_dict() == processor.to_dict()
    loaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "preprocessor_config.json").read_text() for name in ("first", "second"))
    assert first == second
    assert json.loads(first)["size_buckets"] == [[64, 64], [96, 96]]
    assert MPFormerImageProcessor(**json.loads(first)).to_dict() == processor.to_dict()
    assert MPFormerImageProcessor.from_pretrained(tmp_path / "first", size_buckets=[]).size_buckets == ()


def test_images_of_different_sizes_need_padding() -> None:
    with pytest.raises(ValueError, match=r"different sizes \(\[\(10, 10\), \(40, 70\)\]\)"):
        small(do_pad=False)([image(10, 10), image(40, 70)], return_tensors="pt")
    assert len(small(do_pad=False)([image(10, 10), image(40, 70)]).pixel_values) == 2


def test_resized_images_are_those_of_transformers() -> None:
    fields = {"size": {"height": 64, "width": 96}}
    ours = MPFormerImageProcessor(**fields)(image(50, 70), return_tensors="pt")
    theirs = Mask2FormerImageProcessor(**fields)(image(50, 70), return_tensors="pt")
    torch.testing.assert_close(ours.pixel_values, theirs.pixel_values)
    assert torch.equal(ours.pixel_mask, theirs.pixel_mask)


# Images


def as_forms(pixels: np.ndarray) -> dict[str, object]:
    return {
        "PIL": PIL.Image.fromarray(pixels),
        "channels last": pixels,
        "channels first": pixels.transpose(2, 0, 1).copy(),
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
        "opaque RGBA": PIL.Image.fromarray(pixels).convert("RGBA"),
        "int64": pixels.astype(np.int64),
        "uint16": pixels.astype(np.uint16) * 257,
        "16 bit tensor": torch.from_numpy(pixels.astype(np.uint16) * 257).permute(2, 0, 1),
        "read-only": np.broadcast_to(pixels, pixels.shape),
    }


@pytest.mark.parametrize("form", as_forms(image(4, 4)))
def test_every_form_of_an_image_gives_the_same_pixels(form: str) -> None:
    pixels = image(20, 30)
    ours = small()(as_forms(pixels)[form], return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, small()(pixels, return_tensors="pt").pixel_values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "I;16", "two-dimensional"])
def test_images_of_other_modes_become_rgb(mode: str) -> None:
    gray = image(20, 30)[..., 0]
    pixels = PIL.Image.fromarray(gray)
    if mode == "I;16":
        pixels = PIL.Image.fromarray(gray.astype(np.uint16) * 257)
        assert pixels.mode == "I;16"
    converted = gray if mode == "two-dimensional" else pixels if mode == "I;16" else pixels.convert(mode)
    expected = pixels if mode in ("I;16", "two-dimensional") else converted.convert("RGB")
    expected = np.asarray(PIL.Image.fromarray(gray).convert("RGB") if mode in ("I;16", "two-dimensional") else expected)
    ours = small()(converted, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, small()(expected.copy(), return_tensors="pt").pixel_values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["PIL", "array"])
def test_what_is_transparent_becomes_white(form: str) -> None:
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    rgba[:4, :, 3] = 255
    pixels = PIL.Image.fromarray(rgba) if form == "PIL" else rgba
    values = small(do_normalize=False)(pixels, return_tensors="pt").pixel_values[0, :, :8, :8]
    assert values[:, :4].max() == 0
    assert values[:, 4:].min() == pytest.approx(1)


# Labels


def test_labels_of_mixed_sizes_are_padded_with_zeros_and_never_with_the_ignored_value() -> None:
    maps = [np.full((40, 70), 2), np.full((50, 33), 255)]
    maps[1][10:20] = 4
    inputs = small(ignore_index=255)([image(40, 70), image(50, 33)], maps, return_tensors="pt")
    assert [tuple(masks.shape) for masks in inputs.mask_labels] == [(1, 64, 96), (1, 64, 96)]
    assert [labels.tolist() for labels in inputs.class_labels] == [[2], [4]]
    assert all(masks.dtype == torch.bool for masks in inputs.mask_labels)
    expected = torch.zeros(64, 96, dtype=torch.bool)
    expected[:40, :70] = True
    assert torch.equal(inputs.mask_labels[0][0], expected)
    assert inputs.mask_labels[1].sum() == 10 * 33


def test_labels_are_resized_with_their_image() -> None:
    segmentation_map = np.zeros((40, 80), dtype=np.uint8)
    segmentation_map[10:30, 20:60] = 1
    inputs = MPFormerImageProcessor(size={"shortest_edge": 80})(
        image(40, 80), segmentation_map, ignore_index=0, return_tensors="pt"
    )
    expected = torch.zeros(96, 160, dtype=torch.bool)
    expected[20:60, 40:120] = True
    assert torch.equal(inputs.mask_labels[0][0], expected)


def stripes() -> tuple[Tensor, list[int]]:
    """Three segments that do not overlap, in the order of their ids."""
    masks = torch.zeros(3, 40, 70, dtype=torch.bool)
    for segment in range(3):
        masks[segment, :, 20 * segment : 20 * segment + 20] = True
    return masks, [2, 0, 2]


def three_forms_of_labels() -> dict[str, dict[str, object]]:
    masks, classes = stripes()
    ids = (masks * torch.arange(1, 4)[:, None, None]).sum(0).numpy()
    png = np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], axis=-1).astype(np.uint8)
    polygons = [[[20 * x, 0, 20 * x + 20, 0, 20 * x + 20, 40, 20 * x, 40]] for x in range(3)]
    instances = [
        {"category_id": label, "segmentation": polygon} for label, polygon in zip(classes, polygons, strict=True)
    ]
    segments_info = [{"id": index + 1, "category_id": label} for index, label in enumerate(classes)]
    return {
        "map of ids": {
            "segmentation_maps": ids,
            "instance_id_to_semantic_id": {1: 2, 2: 0, 3: 2},
            "ignore_index": 0,
        },
        "list of maps": {
            "segmentation_maps": [PIL.Image.fromarray(ids.astype(np.uint8))],
            "instance_id_to_semantic_id": [{1: 2, 2: 0, 3: 2}],
            "ignore_index": 0,
        },
        "masks": {"mask_labels": [masks], "class_labels": [torch.tensor(classes)]},
        "masks of one image": {"mask_labels": masks.numpy(), "class_labels": np.array(classes)},
        "COCO instances": {"annotations": [instances]},
        "COCO instances of one image": {"annotations": instances},
        "COCO instances with an id": {"annotations": {"image_id": 7, "annotations": instances}},
        "COCO panoptic": {"annotations": [{"segments_info": segments_info, "png": png}]},
        "COCO panoptic of one image": {
            "annotations": {"segments_info": segments_info, "png": PIL.Image.fromarray(png)}
        },
    }


@pytest.mark.parametrize("form", three_forms_of_labels())
def test_every_form_of_labels_gives_the_same_segments(form: str) -> None:
    masks, classes = stripes()
    inputs = small()(image(40, 70), return_tensors="pt", **three_forms_of_labels()[form])
    assert torch.equal(inputs.mask_labels[0][:, :40, :70], masks)
    assert inputs.mask_labels[0].shape == (3, 64, 96)
    assert inputs.class_labels[0].tolist() == classes
    assert inputs.class_labels[0].dtype == torch.int64


def test_a_panoptic_png_is_read_from_its_path(tmp_path: Path) -> None:
    annotation = three_forms_of_labels()["COCO panoptic"]["annotations"][0]
    PIL.Image.fromarray(annotation["png"]).save(tmp_path / "0.png")
    annotation = {"segments_info": annotation["segments_info"], "file_name": str(tmp_path / "0.png")}
    inputs = small()(image(40, 70), annotations=annotation, return_tensors="pt")
    assert torch.equal(inputs.mask_labels[0][:, :40, :70], stripes()[0])


def test_three_hundred_of_three_hundred_instances_survive() -> None:
    ids = np.arange(1, 301).reshape(15, 20)
    mapping = dict.fromkeys(range(1, 301), 1)
    inputs = small(ignore_index=255, do_reduce_labels=True)(image(15, 20), ids, mapping, return_tensors="pt")
    assert inputs.mask_labels[0].shape[0] == 300
    assert inputs.class_labels[0].tolist() == [0] * 300


def test_segment_ids_255_and_256_and_classes_beyond_8_bits_survive() -> None:
    ids = np.repeat(np.array([0, 1, 254, 255, 256, 257, 70_000, 300]), 4).reshape(8, 4)
    mapping = {1: 1, 254: 255, 255: 256, 256: 257, 257: 300, 70_000: 70_000, 300: 1}
    inputs = small(ignore_index=255, do_reduce_labels=True)(image(8, 4), ids, mapping, return_tensors="pt")
    # In ascending order of ids, classes lowered by one.
    assert inputs.class_labels[0].tolist() == [0, 254, 255, 256, 299, 0, 69_999]
    assert inputs.mask_labels[0].flatten(1).sum(1).tolist() == [4] * 7
    for segment, segment_id in zip(inputs.mask_labels[0], sorted(mapping), strict=True):
        assert torch.equal(segment[:8, :4], torch.from_numpy(ids == segment_id))


@pytest.mark.parametrize("do_reduce_labels", [False, True])
def test_what_is_dropped_from_a_map_of_ids_depends_on_reducing(do_reduce_labels: bool) -> None:
    ids = np.array([[0, 1, 255, 256]] * 8, dtype=np.uint16)
    mapping = {0: 4, 1: 2, 255: 3, 256: 1}
    processor = small(ignore_index=255, do_reduce_labels=do_reduce_labels)
    classes = processor(image(8, 4), ids, mapping, return_tensors="pt").class_labels[0].tolist()
    # Reducing: id 0 goes and 255 stays. Not reducing: 255 goes and 0 stays, as in transformers.
    assert classes == ([1, 2, 0] if do_reduce_labels else [4, 2, 1])
    if not do_reduce_labels:
        theirs = Mask2FormerImageProcessor(do_resize=False, ignore_index=255)
        assert (
            theirs(image(8, 4), ids.astype(np.int64), mapping, return_tensors="pt").class_labels[0].tolist() == classes
        )


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_lowering_classes_of_a_small_type_does_not_overflow(dtype: type) -> None:
    classes = np.array([[0, 1, 2, 100]] * 8, dtype=dtype)
    inputs = small(ignore_index=255, do_reduce_labels=True)(image(8, 4), classes, return_tensors="pt")
    assert inputs.class_labels[0].tolist() == [0, 1, 99]
    without_value = small(do_reduce_labels=True)(image(8, 4), classes, return_tensors="pt")
    assert without_value.class_labels[0].tolist() == [0, 1, 99]


def test_three_hundred_overlapping_masks_and_soft_masks_reach_the_model_as_they_are() -> None:
    masks = torch.rand(300, 16, 20) > 0.5
    classes = torch.arange(300)
    inputs = small()(image(16, 20), mask_labels=[masks], class_labels=[classes], return_tensors="pt")
    assert torch.equal(inputs.mask_labels[0][:, :16, :20], masks)
    assert torch.equal(inputs.class_labels[0], classes)
    soft = torch.rand(5, 16, 20, dtype=torch.float64)
    soft_inputs = small()(image(16, 20), mask_labels=[soft], class_labels=[[0, 1, 2, 3, 4]], return_tensors="pt")
    assert soft_inputs.mask_labels[0].dtype == torch.float32
    assert torch.equal(soft_inputs.mask_labels[0][:, :16, :20], soft.float())
    doubled = MPFormerImageProcessor(size={"height": 32, "width": 40})(
        image(16, 20), mask_labels=[soft], class_labels=[[0, 1, 2, 3, 4]], return_tensors="pt"
    )
    expected = soft.float().repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(doubled.mask_labels[0][:, :, :40], expected)


def test_images_without_segments_are_normal_input() -> None:
    inputs = small()(
        [image(8, 8)] * 2, mask_labels=[torch.zeros(0, 8, 8)] * 2, class_labels=[[], []], return_tensors="pt"
    )
    assert [tuple(masks.shape) for masks in inputs.mask_labels] == [(0, 32, 32)] * 2
    assert [tuple(labels.shape) for labels in inputs.class_labels] == [(0,)] * 2


def test_labels_are_those_of_transformers() -> None:
    segmentation_map = np.random.default_rng(0).integers(0, 6, (50, 70)).astype(np.uint8)
    for fields in ({}, {"ignore_index": 3}, {"ignore_index": 255, "do_reduce_labels": True}):
        call = {"size": {"height": 64, "width": 96}, "return_tensors": "pt", **fields}
        ours = MPFormerImageProcessor()(image(50, 70), segmentation_map, **call)
        theirs = Mask2FormerImageProcessor()(image(50, 70), segmentation_map, **call)
        assert torch.equal(ours.class_labels[0], theirs.class_labels[0])
        assert torch.equal(ours.mask_labels[0], theirs.mask_labels[0].bool())


def test_numpy_is_returned_where_it_is_asked_for() -> None:
    masks, classes = stripes()
    inputs = small()(image(40, 70), mask_labels=[masks], class_labels=[classes], return_tensors="np")
    assert all(isinstance(inputs[name], np.ndarray) for name in ("pixel_values", "pixel_mask"))
    assert all(isinstance(inputs[name][0], np.ndarray) for name in ("mask_labels", "class_labels"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"segmentation_maps": np.zeros((8, 8)), "annotations": [[]]},
            "one form, got `segmentation_maps` and `annotations`",
        ),
        ({"mask_labels": [torch.zeros(0, 8, 8)]}, "`mask_labels` and `class_labels` belong together"),
        ({"class_labels": [[]]}, "`mask_labels` and `class_labels` belong together"),
        ({"instance_id_to_semantic_id": {1: 1}}, "belongs to `segmentation_maps`"),
        ({"segmentation_maps": [np.zeros((8, 8))] * 3}, "`segmentation_maps` must have one entry .* 2 images, got 3"),
        (
            {"segmentation_maps": [np.zeros((8, 8))] * 2, "instance_id_to_semantic_id": [{0: 0}]},
            "`instance_id_to_semantic_id` must have one entry .* 2 images, got 1",
        ),
        ({"annotations": [[]]}, "`annotations` must have one entry for each of the 2 images, got 1"),
        (
            {"mask_labels": [torch.zeros(0, 8, 8)] * 2, "class_labels": [[]]},
            "`class_labels` must have one entry for each of the 2 images, got 1",
        ),
        (
            {"mask_labels": [torch.zeros(0, 8, 8), torch.ones(2, 8, 8)], "class_labels": [[], [1]]},
            "Image 1: it has 2 masks but 1 class labels",
        ),
        (
            {"mask_labels": [torch.zeros(0, 8, 8), torch.full((1, 8, 8), 255.0)], "class_labels": [[], [1]]},
            "Image 1: its masks must be bool, or numbers in",
        ),
        (
            {"mask_labels": [torch.zeros(0, 8, 8), torch.ones(8, 8)], "class_labels": [[], [1]]},
            r"Image 1: its masks must have the shape \(segments, height, width\)",
        ),
        (
            {"segmentation_maps": [np.zeros((8, 8)), np.zeros((8, 9))]},
            "Image 1: its segmentation map is 8 x 9, but the image is 8 x 8",
        ),
        ({"segmentation_maps": [np.zeros((8, 8)), np.full((8, 8), -1)]}, r"Image 1 has the class labels \[-1\]"),
        (
            {"segmentation_maps": [np.zeros((8, 8)), np.full((8, 8), 5)], "num_labels": 5},
            r"Image 1 has the class labels \[5\], expected 0 to 5 - 1",
        ),
        ({"annotations": [[], {"segments_info": []}]}, "Image 1: its panoptic annotation needs `png`"),
        ({"annotations": [[], {"image_id": 3}]}, "Image 1: .*annotations"),
    ],
)
def test_labels_that_do_not_fit_are_refused_and_the_image_is_named(labels: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()([image(8, 8)] * 2, return_tensors="pt", **labels)


# Fields and files


@pytest.mark.parametrize(
    "method", ["preprocess", *(f"post_process_{task}_segmentation" for task in ("semantic", "instance", "panoptic"))]
)
def test_signatures_begin_with_those_of_transformers(method: str) -> None:
    theirs, ours = (
        [
            parameter.name
            for parameter in inspect.signature(getattr(processor, method)).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        for processor in (Mask2FormerImageProcessor, MPFormerImageProcessor)
    )
    assert ours[: len(theirs)] == theirs


POST_PROCESSING = {
    "score_threshold": 0.3,
    "mask_threshold": 0.4,
    "overlap_mask_area_threshold": 0.6,
    "top_k": 7,
    "label_ids_to_fuse": (4, 5),
    "combine_before_resize": True,
}


def test_fields_of_post_processing_are_stored_with_the_checkpoint(tmp_path: Path) -> None:
    processor = MPFormerImageProcessor(
        **POST_PROCESSING, size={"longest_edge": 640}, pad_size={"height": 640, "width": 640}
    )
    processor.save_pretrained(tmp_path)
    loaded = MPFormerImageProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in POST_PROCESSING} == POST_PROCESSING
    assert loaded.to_dict() == processor.to_dict()
    assert loaded(image(20, 30), return_tensors="pt").pixel_values.shape == (1, 3, 640, 640)


def test_defaults_are_those_of_the_contract() -> None:
    processor = MPFormerImageProcessor()
    assert {name: getattr(processor, name) for name in POST_PROCESSING} == {
        "score_threshold": 0.5,
        "mask_threshold": 0.5,
        "overlap_mask_area_threshold": 0.8,
        "top_k": 100,
        "label_ids_to_fuse": (),
        "combine_before_resize": False,
    }


def test_files_name_no_class_so_that_the_pipeline_asks_nothing(tmp_path: Path) -> None:
    processor = MPFormerImageProcessor()
    processor.auto_map = {"AutoImageProcessor": "image_processing_mpformer.MPFormerImageProcessor"}
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert not {"auto_map", "image_processor_type"} & set(written)
    assert MPFormerImageProcessor.from_pretrained(tmp_path).to_dict() == written | {
        "image_mean": tuple(written["image_mean"]),
        "image_std": tuple(written["image_std"]),
        "label_ids_to_fuse": (),
        "size_buckets": (),
    }


@pytest.mark.parametrize("form", ["as released", "fixed size", "oldest names", "written by this transformers"])
def test_processor_files_of_mask2former_load_with_an_empty_log(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    fields = dict(MASK2FORMER_FILE)
    if form == "fixed size":
        fields["size"] = {"height": 384, "width": 384}
    if form == "oldest names":
        fields |= {"size": 800, "max_size": 1333, "feature_extractor_type": "MaskFormerFeatureExtractor"}
    if form == "written by this transformers":
        Mask2FormerImageProcessor(ignore_index=255, do_reduce_labels=True, num_labels=80).save_pretrained(tmp_path)
    else:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with caplog.at_level(logging.WARNING):
        processor = MPFormerImageProcessor.from_pretrained(tmp_path)
    assert caplog.text == ""
    assert "".join(capfd.readouterr()) == ""
    assert (processor.ignore_index, processor.do_reduce_labels, processor.num_labels) == (255, True, 80)
    valid = processor(image(48, 64), return_tensors="pt").pixel_mask[0]
    assert (int(valid.any(1).sum()), int(valid.any(0).sum())) == ((384, 384) if form == "fixed size" else (800, 1067))
    assert "reduce_labels" not in processor.to_dict()


def test_arguments_of_from_pretrained_replace_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(MASK2FORMER_FILE))
    processor = MPFormerImageProcessor.from_pretrained(tmp_path, do_reduce_labels=False, label_ids_to_fuse={9, 8})
    assert processor.label_ids_to_fuse == (8, 9)
    assert processor.do_reduce_labels is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score_treshold": 0.5}, "no field `score_treshold`. Did you mean `score_threshold`"),
        ({"mask_threshold": 1.5}, r"`mask_threshold` must be in \[0, 1\], got 1.5"),
        ({"top_k": 0}, "`top_k` must be at least 1, got 0"),
        ({"size_divisor": -32}, "`size_divisor` must be at least 0"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MPFormerImageProcessor(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score_threshold": 0.5}, r"\['score_threshold'\] have no effect on preprocessing"),
        ({"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, "Cropping is not supported"),
        ({"data_format": "channels_last"}, "always channels first"),
    ],
)
def test_arguments_without_an_effect_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(image(8, 8), return_tensors="pt", **arguments)


# Arguments of transformers

GRADIENT = np.arange(0, 240, dtype=np.uint8).reshape(8, 10, 3)
SCALED = torch.from_numpy(GRADIENT).permute(2, 0, 1) / 255
NORMALISED = (SCALED - MEAN[:, None, None]) / STD[:, None, None]


def raw_pixels(**arguments) -> Tensor:
    """The pixels of `GRADIENT` after a call with some arguments; neither resized, scaled nor normalised unless they say so."""
    fields = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False, **arguments}
    values = MPFormerImageProcessor()(GRADIENT, return_tensors="pt", **fields).pixel_values[0]
    of_constructor = MPFormerImageProcessor(**fields)(GRADIENT, return_tensors="pt").pixel_values[0]
    assert torch.equal(values, of_constructor)  # a field and an argument are the same
    return values


def resized_by_pillow(resample: int) -> Tensor:
    pixels = np.asarray(PIL.Image.fromarray(GRADIENT).resize((20, 16), resample))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()


def size_of_call(**arguments) -> tuple[int, ...]:
    fields = {"do_pad": False, **arguments}
    return tuple(MPFormerImageProcessor()(GRADIENT, return_tensors="pt", **fields).pixel_values.shape[-2:])


class Uncounted(MPFormerImageProcessor):
    """Counts how often it resizes."""

    def resize(self, *arguments, **keywords) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().resize(*arguments, **keywords)


def resizes(disable_grouping: bool | None) -> int:
    processor = Uncounted(size=16)
    processor([image(8, 10), image(8, 12), image(8, 10)], disable_grouping=disable_grouping, return_tensors="pt")
    return processor.calls


def labels_of_call(**arguments) -> list[int]:
    values = np.arange(80).reshape(8, 10) % 4
    return small()(GRADIENT, values, return_tensors="pt", **arguments).class_labels[0].tolist()


def is_refused(reason: str, **arguments) -> bool:
    for call in (
        lambda: small()(GRADIENT, return_tensors="pt", **arguments),
        lambda: MPFormerImageProcessor(**arguments),
    ):
        with pytest.raises(ValueError, match=reason):
            call()
    return True


# What an argument does, or why it is refused. Names are those of the signatures of transformers.
EFFECTS = {
    "images": lambda: small()([GRADIENT] * 2, return_tensors="pt").pixel_values.shape == (2, 3, 32, 32),
    "segmentation_maps": lambda: labels_of_call() == [0, 1, 2, 3],
    "instance_id_to_semantic_id": lambda: (
        labels_of_call(instance_id_to_semantic_id={0: 7, 1: 7, 2: 5, 3: 1}) == [7, 7, 5, 1]
    ),
    "do_convert_rgb": lambda: (
        small(image_mean=0.5, image_std=0.5)(
            GRADIENT[..., :1], do_convert_rgb=False, return_tensors="pt"
        ).pixel_values.shape
        == (1, 1, 32, 32)
        and small()(GRADIENT[..., :1], return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    ),
    "do_resize": lambda: (size_of_call(do_resize=False), size_of_call(do_resize=True)) == ((8, 10), (800, 1000)),
    "size": lambda: (size_of_call(size=[4, 6]), size_of_call(size={"shortest_edge": 16})) == ((4, 6), (16, 20)),
    "default_to_square": lambda: (
        (
            size_of_call(size=16, default_to_square=True),
            size_of_call(size=16, default_to_square=False),
            size_of_call(size=16),
        )
        == ((16, 16), (16, 20), (16, 20))
    ),
    "resample": lambda: all(
        (raw_pixels(do_resize=True, size=16, resample=resample) - resized_by_pillow(resample)).abs().max() <= 1
        for resample in (0, 2, 3)
    ),
    "do_rescale": lambda: torch.allclose(raw_pixels(do_rescale=True), SCALED),
    "rescale_factor": lambda: torch.allclose(raw_pixels(do_rescale=True, rescale_factor=0.5), SCALED * 127.5),
    "do_normalize": lambda: torch.allclose(raw_pixels(do_rescale=True, do_normalize=True), NORMALISED, atol=1e-5),
    "image_mean": lambda: torch.allclose(
        raw_pixels(do_rescale=True, do_normalize=True, image_mean=[0.0, 0.5, 1.0], image_std=[1.0, 1.0, 1.0]),
        SCALED - torch.tensor([0, 0.5, 1])[:, None, None],
        atol=1e-5,
    ),
    "image_std": lambda: torch.allclose(
        raw_pixels(do_rescale=True, do_normalize=True, image_mean=0.0, image_std=0.25), SCALED * 4, atol=1e-5
    ),
    "do_pad": lambda: size_of_call(do_resize=False, do_pad=True) == (32, 32),
    "pad_size": lambda: size_of_call(do_resize=False, do_pad=True, pad_size={"height": 64, "width": 96}) == (64, 96),
    "size_divisor": lambda: size_of_call(do_resize=False, do_pad=True, size_divisor=4) == (8, 12),
    "ignore_index": lambda: labels_of_call(ignore_index=2) == [0, 1, 3],
    "do_reduce_labels": lambda: labels_of_call(do_reduce_labels=True, ignore_index=255) == [0, 1, 2],
    "num_labels": lambda: is_refused_for_labels(num_labels=3) and labels_of_call(num_labels=4) == [0, 1, 2, 3],
    "input_data_format": lambda: (
        size_of_call(do_resize=False, input_data_format="channels_last") == (8, 10)
        # Eight channels of 10 x 3
        and size_of_call(do_resize=False, input_data_format="channels_first", do_convert_rgb=False, do_normalize=False)
        == (10, 3)
        and is_refused("`input_data_format` must be", input_data_format="hwc")
    ),
    "data_format": lambda: (
        is_refused("always channels first", data_format="channels_last")
        and size_of_call(do_resize=False, data_format="channels_first") == (8, 10)
    ),
    "device": lambda: small()(GRADIENT, device="meta", do_normalize=False, return_tensors="pt").pixel_values.is_meta,
    "return_tensors": lambda: (
        isinstance(small()(GRADIENT, return_tensors="np").pixel_values, np.ndarray)
        and isinstance(small()(GRADIENT).pixel_values, list)
    ),
    "disable_grouping": lambda: (resizes(False), resizes(True), resizes(None)) == (2, 3, 3),
    "do_center_crop": lambda: is_refused("Cropping is not supported", do_center_crop=True, crop_size=4),
    "crop_size": lambda: is_refused("Cropping is not supported", crop_size={"height": 4, "width": 4}),
    "image_seq_length": lambda: is_refused("`image_seq_length` belongs to models of text", image_seq_length=7),
}


def is_refused_for_labels(**arguments) -> bool:
    with pytest.raises(ValueError, match=r"class labels \[3\], expected 0 to 3 - 1"):
        labels_of_call(**arguments)
    return True


@pytest.mark.parametrize("name", EFFECTS)
def test_every_argument_of_transformers_has_its_effect_or_is_refused_with_a_reason(name: str) -> None:
    assert EFFECTS[name]()


def test_no_argument_of_transformers_is_forgotten() -> None:
    of_call = set(inspect.signature(Mask2FormerImageProcessor.preprocess).parameters) - {"self", "kwargs"}
    assert {*of_call, *Mask2FormerImageProcessor.valid_kwargs.__annotations__} <= set(EFFECTS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"shortest_edge": -5}}, r"`size` must hold integers of at least 1, got {'shortest_edge': -5}"),
        ({"size": {"shortest_edge": 0, "longest_edge": 8}}, "`size` must hold integers of at least 1"),
        ({"size": {"min_pixels": 64, "max_pixels": 128}}, "`size` must be a dict of `shortest_edge` and/or"),
        ({"pad_size": {"height": -64, "width": 64}}, "`pad_size` must be a dict of `height` and `width`, at least 1"),
        ({"pad_size": {"longest_edge": 64}}, "`pad_size` must be a dict of `height` and `width`, at least 1"),
        ({"size_divisor": -32}, "`size_divisor` must be at least 0, got -32"),
        ({"resample": 4}, r"`resample` must be one of 0 \(nearest\), 2 \(bilinear\), .*, got 4"),
        ({"rescale_factor": 0.0}, "`rescale_factor` must be above 0, got 0.0"),
        ({"image_std": [0.0, 1.0, 1.0]}, "`image_std` must be above 0"),
        ({"image_mean": [123.675, 116.28, 103.53]}, "lies above 1, to which `rescale_factor` brings white"),
    ],
    ids=str,
)
def test_values_that_cannot_be_are_refused_at_construction_and_in_a_call(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MPFormerImageProcessor(**fields)
    with pytest.raises(ValueError, match=message):
        MPFormerImageProcessor()(image(8, 8), return_tensors="pt", **fields)


def test_a_misspelt_argument_of_a_call_is_refused() -> None:
    with pytest.raises(TypeError, match="do_resiz"):
        small()(image(8, 8), do_resiz=False, return_tensors="pt")


def test_none_takes_the_field_where_the_field_has_a_default() -> None:
    processor = small(ignore_index=3, pad_size=64, size_divisor=16)
    names = ["do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"]
    names += ["do_pad", "size_divisor", "size_buckets", "do_reduce_labels", "do_convert_rgb"]
    plain = processor(GRADIENT, return_tensors="pt").pixel_values
    assert torch.equal(processor(GRADIENT, return_tensors="pt", **dict.fromkeys(names)).pixel_values, plain)
    without = processor(GRADIENT, np.full((8, 10), 3), ignore_index=None, pad_size=None, return_tensors="pt")
    assert without.class_labels[0].tolist() == [3]
    assert without.pixel_values.shape == (1, 3, 16, 16)


def test_pixels_are_float32_whatever_is_switched_off() -> None:
    for dtype in (np.uint8, np.uint16, np.float16, np.float64, np.int64):
        pixels = GRADIENT.astype(dtype) * (257 if dtype == np.uint16 else 1)
        for switches in ({}, {"do_normalize": False}, {"do_normalize": False, "do_rescale": False}):
            values = small(**switches)(pixels, return_tensors="pt").pixel_values
            expected = {0: NORMALISED, 1: SCALED, 2: SCALED * 255}[len(switches)]
            assert values.dtype == torch.float32
            torch.testing.assert_close(values[0, :, :8, :10], expected, atol=1e-5, rtol=1e-5)


def test_images_of_one_size_processed_together_are_those_processed_one_by_one() -> None:
    images = [image(20, 30), image(30, 20), 255 - image(20, 30), image(20, 30).astype(np.float32)]
    processor = MPFormerImageProcessor(size=40)
    together = processor(images, disable_grouping=False, return_tensors="pt").pixel_values
    one_by_one = processor(images, disable_grouping=True, return_tensors="pt").pixel_values
    assert torch.equal(together, one_by_one)


# Post-processing

HALVES = [((0, 40), 0), ((24, 64), 1)]  # columns and class of two objects that overlap by 16 columns
SCORES = (0.9, 0.8)


def two_objects(image_sizes: list[tuple[int, int]] | None = None) -> SimpleNamespace:
    """Outputs for one image of 64 x 64 with the objects of `HALVES`, sharp enough that all borders are exact."""
    masks = torch.empty(1, 2, 16, 16)
    for query, ((left, right), _) in enumerate(HALVES):
        x = (torch.arange(16) + 0.5) * 4
        masks[0, query] = 8 * torch.minimum(x - left, right - x) if left else 8 * (right - x)
    classes = torch.zeros(1, 2, 4)
    for query, (_, label) in enumerate(HALVES):
        classes[0, query, label] = float(torch.logit(torch.tensor(SCORES[query])) + torch.tensor(3.0).log())
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks.clamp(-64, 64))
    if image_sizes is not None:
        outputs.image_sizes = torch.tensor(image_sizes)
    return outputs


def drawn(columns: tuple[int, int]) -> Tensor:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, columns[0] : columns[1]] = True
    return mask


def test_instance_results_have_all_their_parts() -> None:
    (result,) = MPFormerImageProcessor(overlap_mask_area_threshold=0).post_process_instance_segmentation(two_objects())
    truth = torch.stack([drawn((0, 40)), drawn((24, 64))])
    assert torch.equal(result["masks"], truth)
    expected = torch.where(truth[0], 0, 1).to(torch.int32)
    assert torch.equal(result["segmentation"], expected)
    assert [(one["id"], one["label_id"], one["was_fused"]) for one in result["segments_info"]] == [
        (0, 0, False),
        (1, 1, False),
    ]
    assert [one["score"] for one in result["segments_info"]] == result["scores"].tolist()
    assert result["scores"].tolist() == pytest.approx(SCORES, abs=0.02)
    assert result["labels"].tolist() == [0, 1]
    assert result["boxes"].tolist() == [[0, 0, 40, 64], [24, 0, 64, 64]]


def test_coco_annotations_are_read_by_pycocotools() -> None:
    (result,) = MPFormerImageProcessor(overlap_mask_area_threshold=0).post_process_instance_segmentation(
        two_objects(), return_coco_annotation=True, target_sizes=[(128, 32)]
    )
    assert len(result["segmentation"]) == 2
    for rle, mask in zip(result["segmentation"], result["masks"], strict=True):
        assert rle["size"] == [128, 32]
        assert torch.equal(torch.from_numpy(pycocotools_mask.decode(rle)).bool(), mask)


def test_polygons_filled_again_are_the_masks() -> None:
    outputs = two_objects()
    processor = MPFormerImageProcessor(overlap_mask_area_threshold=0)
    (result,) = processor.post_process_instance_segmentation(outputs, target_sizes=[(128, 32)], return_polygons=True)
    assert len(result["polygons"]) == len(result["masks"]) == 2
    for polygons, mask in zip(result["polygons"], result["masks"], strict=True):
        assert mask.any()
        assert torch.equal(rasterize_polygons(polygons, 128, 32), mask)
    assert "polygons" not in processor.post_process_instance_segmentation(outputs)[0]


def test_binary_maps_are_the_masks() -> None:
    (result,) = MPFormerImageProcessor(overlap_mask_area_threshold=0).post_process_instance_segmentation(
        two_objects(), return_binary_maps=True
    )
    assert torch.equal(result["segmentation"], result["masks"])


def test_two_forms_of_segmentation_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="both decide what `segmentation` is"):
        MPFormerImageProcessor().post_process_instance_segmentation(
            two_objects(), return_coco_annotation=True, return_binary_maps=True
        )


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="`preset` must be one of 'display', 'evaluation' or None, got 'test'"):
        MPFormerImageProcessor().post_process_instance_segmentation(two_objects(), preset="test")


@pytest.mark.parametrize(
    ("fields", "arguments", "labels"),
    [
        ({}, {}, [0, 1]),  # one object in front of another is no error
        ({}, {"preset": "display"}, [0]),  # the second keeps 24 of its 40 columns, less than 0.8
        ({"overlap_mask_area_threshold": 0.5}, {"preset": "display"}, [0, 1]),
        ({}, {"overlap_mask_area_threshold": 0.8}, [0]),
        ({}, {"overlap_mask_area_threshold": 0.5}, [0, 1]),
        ({"overlap_mask_area_threshold": 0.5, "score_threshold": 0.85}, {}, [0]),
        ({"overlap_mask_area_threshold": 0.5}, {"threshold": 0.85}, [0]),
        ({"overlap_mask_area_threshold": 0.5, "top_k": 1}, {}, [0]),
        ({"overlap_mask_area_threshold": 0.5}, {"top_k": 1}, [0]),
        ({"overlap_mask_area_threshold": 0.5, "label_ids_to_fuse": [0]}, {}, [1]),
        ({"overlap_mask_area_threshold": 0.5, "label_ids_to_fuse": [0]}, {"label_ids_to_fuse": set()}, [0, 1]),
        ({"score_threshold": 0.85}, {"preset": "evaluation", "top_k": 2}, [0, 1]),
        ({}, {"preset": "evaluation", "top_k": 2, "threshold": 0.85}, [0]),
        ({}, {"preset": "evaluation", "top_k": 2, "overlap_mask_area_threshold": 0.8}, [0]),
        ({"score_threshold": 0}, {"preset": "evaluation", "top_k": 2, "mask_threshold": 1}, [0, 1]),
    ],
)
def test_instance_arguments_take_the_fields_and_explicit_ones_win(
    fields: dict, arguments: dict, labels: list[int]
) -> None:
    (result,) = MPFormerImageProcessor(**fields).post_process_instance_segmentation(two_objects(), **arguments)
    assert result["labels"].tolist() == labels


def test_the_evaluation_preset_returns_the_top_k_without_a_threshold() -> None:
    (result,) = MPFormerImageProcessor(top_k=5).post_process_instance_segmentation(two_objects(), preset="evaluation")
    assert len(result["scores"]) == 5
    assert result["scores"].diff().max() <= 0


@pytest.mark.parametrize(
    ("fields", "arguments", "labels"),
    [
        ({}, {}, [0]),
        ({"overlap_mask_area_threshold": 0.5}, {}, [0, 1]),
        ({}, {"overlap_mask_area_threshold": 0.5}, [0, 1]),
        ({"overlap_mask_area_threshold": 0.5, "score_threshold": 0.85}, {}, [0]),
        ({"overlap_mask_area_threshold": 0.5}, {"threshold": 0.85}, [0]),
        ({"overlap_mask_area_threshold": 0.5}, {"mask_threshold": 1.0}, []),
    ],
)
def test_panoptic_arguments_take_the_fields_and_explicit_ones_win(
    fields: dict, arguments: dict, labels: list[int]
) -> None:
    (result,) = MPFormerImageProcessor(**fields).post_process_panoptic_segmentation(two_objects(), **arguments)
    assert [one["label_id"] for one in result["segments_info"]] == labels


@pytest.mark.parametrize("source", ["field", "argument"])
def test_stuff_is_fused_from_the_field_or_the_argument(source: str) -> None:
    outputs = two_objects()
    outputs.class_queries_logits[0, 1] = outputs.class_queries_logits[0, 0]
    processor = MPFormerImageProcessor(
        overlap_mask_area_threshold=0, label_ids_to_fuse=[0] if source == "field" else []
    )
    arguments = {"label_ids_to_fuse": {0}} if source == "argument" else {}
    (result,) = processor.post_process_panoptic_segmentation(outputs, **arguments)
    assert [(one["id"], one["label_id"], one["was_fused"]) for one in result["segments_info"]] == [(1, 0, True)]
    assert (result["segmentation"] == 1).all()
    (result,) = processor.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=())
    assert [one["was_fused"] for one in result["segments_info"]] == [False, False]


def test_semantic_scores_come_with_the_map_when_asked_for() -> None:
    processor = MPFormerImageProcessor()
    (result,) = processor.post_process_semantic_segmentation(
        two_objects(), target_sizes=[(32, 48)], return_segmentation_scores=True
    )
    assert result.segmentation_scores.shape == (3, 32, 48)
    assert torch.equal(result.segmentation, result.segmentation_scores.argmax(0))
    (plain,) = processor.post_process_semantic_segmentation(two_objects(), target_sizes=[(32, 48)])
    assert torch.equal(plain, result.segmentation)


def test_combining_before_resizing_comes_from_the_field_or_the_argument() -> None:
    maps = [
        MPFormerImageProcessor(**fields)
        .post_process_semantic_segmentation(
            two_objects(), target_sizes=[(50, 50)], return_segmentation_scores=True, **arguments
        )[0]
        .segmentation_scores
        for fields, arguments in (
            ({}, {}),
            ({"combine_before_resize": True}, {}),
            ({}, {"combine_before_resize": True}),
            ({"combine_before_resize": True}, {"combine_before_resize": False}),
        )
    ]
    assert not torch.allclose(maps[0], maps[1])
    assert torch.equal(maps[1], maps[2])
    assert torch.equal(maps[0], maps[3])


def test_the_valid_size_of_the_outputs_crops_the_padding_away() -> None:
    processor = MPFormerImageProcessor(overlap_mask_area_threshold=0)
    (result,) = processor.post_process_instance_segmentation(two_objects([(30, 50)]))
    assert torch.equal(result["masks"], torch.stack([drawn((0, 40)), drawn((24, 64))])[:, :30, :50])
    (result,) = processor.post_process_panoptic_segmentation(two_objects([(30, 50)]))
    assert torch.equal(result["segmentation"] == 1, drawn((0, 40))[:30, :50])
    (result,) = processor.post_process_panoptic_segmentation(
        two_objects([(30, 50)]), None, None, None, None, [(60, 100)]
    )
    assert torch.equal(result["segmentation"][:, :78] == 1, torch.ones(60, 78, dtype=torch.bool))
    assert not (result["segmentation"][:, 82:] == 1).any()


@pytest.mark.parametrize(
    "output",
    [
        Mask2FormerForUniversalSegmentationOutput,
        MaskFormerForInstanceSegmentationOutput,
        EomtForUniversalSegmentationOutput,
    ],
)
def test_outputs_of_transformers_own_models_are_served(output: type) -> None:
    ours = two_objects()
    theirs = output(class_queries_logits=ours.class_queries_logits, masks_queries_logits=ours.masks_queries_logits)
    (result,) = MPFormerImageProcessor().post_process_panoptic_segmentation(theirs, 0.5, 0.5, 0.5, {1}, [(64, 64)])
    assert [(one["label_id"], one["was_fused"]) for one in result["segments_info"]] == [(0, False), (1, True)]


def test_target_sizes_of_another_length_are_refused() -> None:
    for task in ("semantic", "instance", "panoptic"):
        with pytest.raises(ValueError, match=r"`target_sizes` must hold one .* for each of the 1 images, got 2"):
            getattr(MPFormerImageProcessor(), f"post_process_{task}_segmentation")(
                two_objects(), target_sizes=[(64, 64)] * 2
            )
