"""Run lengths against pycocotools, polygons against a slow definition."""

import numpy as np
import pytest
import torch
from pycocotools import mask as pycocotools_mask
from torch import Tensor

from mpformer_hf.mask_encoding import (
    compress_counts,
    decode_rle,
    encode_cropped_rle,
    encode_rle,
    expand_counts,
    occupied_box,
    rasterize_polygons,
)

# pycocotools still answers numpy's question for a copy in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def random_masks() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(6, 37, 53, generator=generator)
    masks = noise < torch.tensor([0.0, 0.02, 0.3, 0.5, 0.95, 1.1])[:, None, None]
    blob = torch.zeros(1, 37, 53, dtype=torch.bool)
    blob[0, 5:30, 0:40] = True
    return torch.cat([masks, blob])


def columns_first(mask: Tensor) -> np.ndarray:
    return np.asfortranarray(mask.numpy().astype(np.uint8))


def counts_of_pycocotools(mask: Tensor) -> str:
    return pycocotools_mask.encode(columns_first(mask))["counts"].decode()


def paste(crop: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    return mask


def read_digit_by_digit(text: str) -> list[int]:
    """COCO's string as its definition says it: one character after the other."""
    counts, number, shift = [], 0, 0
    for character in text:
        digit = ord(character) - 48
        number += (digit % 32) * 2**shift
        shift += 5
        if digit < 32:
            if digit >= 16:
                number -= 2**shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number, shift = 0, 0
    return counts


def is_inside(polygon: list[float], x: float, y: float) -> bool:
    """Count the edges to the right of a point."""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    crossings = 0
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y0 > y) != (y1 > y):
            crossings += x < x0 + (y - y0) * (x1 - x0) / (y1 - y0)
    return crossings % 2 == 1


def test_run_lengths_are_those_of_pycocotools() -> None:
    for mask, rle in zip(random_masks(), encode_rle(random_masks()), strict=True):
        assert rle["counts"] == pycocotools_mask.encode(columns_first(mask))["counts"].decode()


def test_pycocotools_decodes_every_mask_to_itself() -> None:
    for mask, rle in zip(random_masks(), encode_rle(random_masks()), strict=True):
        assert torch.equal(torch.from_numpy(pycocotools_mask.decode(rle)).bool(), mask)


def test_long_runs_take_several_characters() -> None:
    mask = torch.zeros(1, 1000, 1200, dtype=torch.bool)
    mask[0, 400:900, 601] = True
    (rle,) = encode_rle(mask)
    assert rle["counts"] == pycocotools_mask.encode(columns_first(mask[0]))["counts"].decode()
    assert torch.equal(decode_rle(rle), mask[0])


@pytest.mark.parametrize("density", [0.001, 0.05, 0.5, 0.95, 0.999])
def test_sparse_and_dense_noise_is_encoded_as_pycocotools_does(density: float) -> None:
    for height, width in torch.randint(1, 60, (20, 2)).tolist():
        masks = torch.rand(3, height, width) < density
        assert [rle["counts"] for rle in encode_rle(masks)] == [counts_of_pycocotools(mask) for mask in masks]


def test_a_view_that_is_not_contiguous_is_encoded() -> None:
    masks = (torch.rand(20, 30, 3) < 0.3).permute(2, 1, 0)
    assert [rle["counts"] for rle in encode_rle(masks)] == [counts_of_pycocotools(mask) for mask in masks]


@pytest.mark.parametrize(("height", "width"), [(0, 0), (0, 3), (3, 0)])
def test_masks_without_pixels_have_one_empty_run(height: int, width: int) -> None:
    (rle,) = encode_rle(torch.zeros(1, height, width, dtype=torch.bool))
    assert rle == {"size": [height, width], "counts": "0"}
    assert decode_rle(rle).shape == (height, width)


@pytest.mark.parametrize(("height", "width"), [(3, 2), (2, 3), (4, 2), (3, 4)])
def test_every_crop_at_every_place_is_encoded_as_the_full_mask(height: int, width: int) -> None:
    numbers = torch.arange(2**6)
    crops = ((numbers[:, None] >> torch.arange(6)) & 1).bool()
    for h, w in [(3, 2), (2, 3), (6, 1), (1, 6)]:
        for top in range(height - h + 1):
            for left in range(width - w + 1):
                for crop in crops.unflatten(1, (h, w)):
                    expected = counts_of_pycocotools(paste(crop, top, left, height, width))
                    assert encode_cropped_rle(crop, top, left, height, width)["counts"] == expected


def test_runs_join_where_a_mask_touches_the_bottom_and_the_top() -> None:
    crop = torch.tensor([[True, True], [False, True], [True, False]])
    # Columns of three: background, then 1 0 1, 1 1 0, and background. The runs are 3, 1, 1, 3 and 1 + 3.
    rle = encode_cropped_rle(crop, top=0, left=1, height=3, width=4)
    assert expand_counts(rle["counts"].encode()).tolist() == [3, 1, 1, 3, 4]


def test_a_full_column_is_one_run() -> None:
    rle = encode_cropped_rle(torch.ones(5, 3, dtype=torch.bool), top=0, left=1, height=5, width=4)
    assert expand_counts(rle["counts"].encode()).tolist() == [5, 15]


@pytest.mark.parametrize(("h", "w"), [(0, 0), (0, 2), (2, 0)])
def test_an_empty_crop_is_a_mask_without_foreground(h: int, w: int) -> None:
    rle = encode_cropped_rle(torch.zeros(h, w, dtype=torch.bool), top=1, left=1, height=4, width=5)
    assert rle["counts"] == counts_of_pycocotools(torch.zeros(4, 5, dtype=torch.bool))


def test_a_crop_of_a_mask_that_fits_into_no_memory_is_encoded() -> None:
    side = 10**6
    rle = encode_cropped_rle(torch.ones(2, 2, dtype=torch.bool), top=7, left=5, height=side, width=side)
    before = 5 * side + 7
    after = side**2 - before - 2 - (side - 2) - 2
    assert expand_counts(rle["counts"].encode()).tolist() == [before, 2, side - 2, 2, after]


@pytest.mark.parametrize(("top", "left"), [(-1, 0), (0, -1), (3, 0), (0, 4)])
def test_a_crop_beyond_the_mask_is_refused(top: int, left: int) -> None:
    with pytest.raises(
        ValueError, match=rf"inside a mask of 4 x 5, got the shape \(2, 2\) at row {top}, column {left}"
    ):
        encode_cropped_rle(torch.ones(2, 2, dtype=torch.bool), top, left, height=4, width=5)


@pytest.mark.gpu
def test_masks_on_a_gpu_are_encoded() -> None:
    assert encode_rle(random_masks().cuda()) == encode_rle(random_masks())


def test_the_box_holds_the_foreground_and_no_more() -> None:
    for crop in torch.rand(50, 6, 7) < 0.1:
        mask = paste(crop, 3, 2, 12, 15)
        places = mask.nonzero()
        if len(places) == 0:
            expected = slice(0, 0), slice(0, 0)
        else:
            (top, left), (bottom, right) = places.amin(0).tolist(), places.amax(0).tolist()
            expected = slice(top, bottom + 1), slice(left, right + 1)
        assert occupied_box(mask) == expected


def test_no_masks_give_no_run_lengths() -> None:
    assert encode_rle(torch.zeros(0, 4, 4, dtype=torch.bool)) == []


@pytest.mark.parametrize("form", ["str", "bytes", "list"])
def test_run_lengths_are_read_in_every_form_of_coco(form: str) -> None:
    for mask in random_masks():
        rle = pycocotools_mask.encode(columns_first(mask))
        if form == "str":
            rle["counts"] = rle["counts"].decode()
        if form == "list":
            flat = mask.T.flatten().tolist()
            counts, value = [0], False
            for pixel in flat:
                if pixel != value:
                    counts.append(0)
                    value = pixel
                counts[-1] += 1
            rle["counts"] = counts
        assert torch.equal(decode_rle(rle), mask)


def test_strings_are_read_as_digit_by_digit() -> None:
    for length in (1, 2, 3, 4, 5, 50):
        for most in (10, 1000, 10**6, 10**11):
            counts = torch.randint(0, most, (length,)).numpy()
            text = compress_counts(counts)
            assert expand_counts(text.encode()).tolist() == read_digit_by_digit(text) == counts.tolist()


@pytest.mark.parametrize("count", [0, 15, 16, 31, 32, 511, 512, 16383, 16384, 2**31])
def test_numbers_at_the_ends_of_digits_survive(count: int) -> None:
    # The differences are both `count` and `-count`.
    counts = np.array([0, count, 0, 2 * count, count, count])
    assert read_digit_by_digit(compress_counts(counts)) == counts.tolist()
    assert expand_counts(compress_counts(counts).encode()).tolist() == counts.tolist()


def test_an_empty_string_has_no_runs() -> None:
    assert expand_counts(b"").tolist() == []


@pytest.mark.parametrize("keep", [1, 2])
def test_a_string_cut_within_a_number_is_refused(keep: int) -> None:
    text = compress_counts(np.array([5000]))
    assert len(text) == 3
    with pytest.raises(ValueError, match=rf"end in the middle of a number, after {keep} characters"):
        decode_rle({"size": [50, 100], "counts": text[:keep]})


def test_a_string_cut_between_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="must add up to 4, but they add up to 2"):
        decode_rle({"size": [2, 2], "counts": "2"})


@pytest.mark.parametrize("foreign", ["\n", " ", "/", "p", "=\x7f", "\u00e9"])
def test_characters_that_are_none_of_cocos_are_refused(foreign: str) -> None:
    with pytest.raises(ValueError, match=r"characters '0' to 'o', got .* at position [23]"):
        decode_rle({"size": [2, 2], "counts": "22" + foreign})


def test_a_number_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 10 characters, got one of 21"):
        decode_rle({"size": [2, 2], "counts": "2" + 20 * "o" + "0"})


def test_garbage_is_refused_or_fills_the_mask() -> None:
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        text = generator.integers(40, 120, size=generator.integers(0, 12)).astype(np.uint8).tobytes()
        try:
            assert decode_rle({"size": [3, 4], "counts": text}).shape == (3, 4)
        except ValueError as error:
            assert "run length" in str(error).lower()  # noqa: PT017
            refused += 1
    assert refused > 400


def test_run_lengths_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must add up to 20, but they add up to 12"):
        decode_rle({"size": [4, 5], "counts": [5, 7]})


def test_run_lengths_without_size_are_refused() -> None:
    with pytest.raises(ValueError, match="`size` and `counts`, got the keys"):
        decode_rle({"counts": "04"})


@pytest.mark.parametrize(
    "polygon",
    [
        [2, 1, 9, 1, 9, 6, 2, 6],
        [3.3, 1.2, 14.9, 4.6, 8.7, 11.6],
        [-5, -5, 30, 4.2, 10.1, 30],
        [1, 1, 12, 10.3, 12, 1, 1, 10.3],  # crosses itself
        [-9, -9, -2, -9, -2, -2],
        [3, 40, 20, 40, 20, 50],
        [4.5, 2.5, 9.5, 2.5, 9.5, 7.5, 4.5, 7.5],  # through centres
    ],
    ids=["box", "triangle", "beyond the image", "crossing itself", "left and above", "below", "through centres"],
)
def test_a_pixel_is_inside_when_its_centre_is(polygon: list[float]) -> None:
    expected = [[is_inside(polygon, x + 0.5, y + 0.5) for x in range(16)] for y in range(12)]
    assert rasterize_polygons([polygon], 12, 16).tolist() == expected


def test_polygons_nearly_equal_those_of_pycocotools() -> None:
    angles = np.linspace(0, 2 * np.pi, 17)[:-1]
    radii = 40 + 15 * np.cos(5 * angles)
    polygon = np.stack([70 + radii * np.cos(angles), 60 + radii * np.sin(angles)], axis=1).flatten().tolist()
    theirs = torch.from_numpy(pycocotools_mask.decode(pycocotools_mask.frPyObjects([polygon], 120, 150))[..., 0]).bool()
    ours = rasterize_polygons([polygon], 120, 150)
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.99  # they round corners to a fifth of a pixel


def test_overlapping_polygons_of_one_object_are_joined() -> None:
    both = rasterize_polygons([[1, 1, 6, 1, 6, 6, 1, 6], [4, 4, 9, 4, 9, 9, 4, 9]], 10, 10)
    assert both.sum() == 25 + 25 - 4


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_polygon_with_numbers_that_are_not_finite_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match=f"needs finite numbers, got {number} among its 6"):
        rasterize_polygons([[1, 1, 2, number, 3, 3]], 4, 4)


def test_a_polygon_of_two_corners_is_refused() -> None:
    with pytest.raises(ValueError, match="at least three corners"):
        rasterize_polygons([[1, 1, 2, 2]], 4, 4)
