"""Run lengths against pycocotools, polygons against a slow definition."""

import numpy as np
import pytest
import torch
from pycocotools import mask as pycocotools_mask
from torch import Tensor

from mpformer_hf.mask_encoding import decode_rle, encode_rle, rasterize_polygons

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
    ],
    ids=["box", "triangle", "beyond the image", "crossing itself"],
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


def test_a_polygon_of_two_corners_is_refused() -> None:
    with pytest.raises(ValueError, match="at least three corners"):
        rasterize_polygons([[1, 1, 2, 2]], 4, 4)
