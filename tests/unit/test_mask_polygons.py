"""Polygons that must give every mask back: all small masks, noise of all densities, and drawings with known corners."""

import numpy as np
import pytest
import torch
from pycocotools import mask as pycocotools_mask
from scipy import ndimage
from torch import Tensor

from mpformer_hf.mask_encoding import rasterize_polygons
from mpformer_hf.mask_polygons import trace_polygons

# pycocotools still answers numpy's question for a copy in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def draw(*rows: str) -> Tensor:
    """Foreground where there is a #."""
    return torch.tensor([[character == "#" for character in row] for row in rows])


def all_masks(height: int, width: int) -> Tensor:
    numbers = torch.arange(2 ** (height * width))
    return ((numbers[:, None] >> torch.arange(height * width)) & 1).bool().unflatten(1, (height, width))


def noise(height: int, width: int, density: float) -> Tensor:
    return torch.rand(height, width) < density


def steps_of(polygon: list[float]) -> np.ndarray:
    corners = np.array(polygon).reshape(-1, 2)
    return np.roll(corners, -1, axis=0) - corners


def signed_area(polygon: list[float]) -> float:
    """The shoelace formula; positive if the polygon runs clockwise as seen on the screen."""
    corners = np.array(polygon).reshape(-1, 2)
    following = np.roll(corners, -1, axis=0)
    return float((corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]).sum() / 2)


def assert_exact(mask: Tensor) -> None:
    polygons = trace_polygons(mask)
    assert torch.equal(rasterize_polygons(polygons, *mask.shape), mask), (mask.int(), polygons)
    assert sum(map(signed_area, polygons)) == mask.sum(), (mask.int(), polygons)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (7, 1), (3, 3)])
def test_every_small_mask_comes_back(height: int, width: int) -> None:
    for mask in all_masks(height, width):
        assert_exact(mask)


@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 3)])
def test_all_masks_of_twelve_pixels_come_back_from_one_sheet(height: int, width: int) -> None:
    apart = torch.nn.functional.pad(all_masks(height, width), (0, 1, 0, 1))
    assert_exact(apart.unflatten(0, (64, 64)).transpose(1, 2).flatten(2).flatten(0, 1))


def test_masks_of_four_by_four_come_back() -> None:
    for mask in all_masks(4, 4)[torch.randperm(2**16)[:300]]:
        assert_exact(mask)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
def test_noise_comes_back(density: float) -> None:
    for height, width in torch.randint(1, 40, (10, 2)).tolist():
        assert_exact(noise(height, width, density))


def test_islands_in_holes_in_islands_come_back() -> None:
    y, x = torch.meshgrid(torch.arange(61), torch.arange(73), indexing="ij")
    rings = torch.maximum((y - 30).abs(), (x - 35).abs()) // 3 % 2 == 0
    circles = torch.hypot(y - 30.0, x - 35.0) // 4 % 2 == 0
    for mask in (rings, circles, ~rings, ~circles):
        assert_exact(mask)


def test_many_holes_on_one_row_come_back() -> None:
    mask = torch.ones(7, 40, dtype=torch.bool)
    mask[2:4, 2::3] = False
    mask[5, 3::5] = False
    mask[2, 0] = False  # bridges end at corners of the outer ring, at other holes and amid an edge
    assert len(trace_polygons(mask)) == 1
    assert_exact(mask)


def test_neighbouring_corners_are_never_on_one_line() -> None:
    for density in (0.3, 0.5, 0.8, 0.95):
        for polygon in trace_polygons(noise(50, 60, density)):
            is_vertical = steps_of(polygon)[:, 0] == 0
            assert (steps_of(polygon) != 0).sum(axis=1).tolist() == [1] * len(is_vertical)
            assert (is_vertical != np.roll(is_vertical, 1)).all()


def test_each_part_is_one_polygon() -> None:
    for density in (0.3, 0.5, 0.8):
        mask = noise(30, 40, density)
        labels, num_parts = ndimage.label(mask.numpy())  # neighbours share an edge
        polygons = trace_polygons(mask)
        assert len(polygons) == num_parts
        for polygon in polygons:
            part = rasterize_polygons([polygon], 30, 40)
            assert torch.equal(part, torch.from_numpy(labels == labels[part.numpy()][0]))


def test_no_foreground_gives_no_polygon() -> None:
    assert trace_polygons(torch.zeros(5, 6, dtype=torch.bool)) == []


@pytest.mark.parametrize(("height", "width"), [(0, 0), (0, 4), (4, 0)])
def test_a_mask_without_pixels_gives_no_polygon(height: int, width: int) -> None:
    assert trace_polygons(torch.zeros(height, width, dtype=torch.bool)) == []


def test_the_full_image_is_its_frame() -> None:
    assert trace_polygons(torch.ones(4, 9, dtype=torch.bool)) == [[0, 0, 9, 0, 9, 4, 0, 4]]


def test_one_pixel_is_a_square() -> None:
    mask = torch.zeros(8, 9, dtype=torch.bool)
    mask[5, 3] = True
    assert trace_polygons(mask) == [[3, 5, 4, 5, 4, 6, 3, 6]]


def test_numbers_are_floats_as_json_of_coco_has_them() -> None:
    (polygon,) = trace_polygons(torch.ones(1, 1, dtype=torch.bool))
    assert all(type(number) is float for number in polygon)


def test_an_outline_runs_clockwise_from_its_top_left_corner() -> None:
    mask = draw(
        ".....",
        "..##.",
        ".###.",
        ".#...",
    )
    assert trace_polygons(mask) == [[2, 1, 4, 1, 4, 3, 2, 3, 2, 4, 1, 4, 1, 2, 2, 2]]


def test_pixels_that_touch_at_a_corner_are_apart() -> None:
    assert trace_polygons(draw("#.", ".#")) == [[0, 0, 1, 0, 1, 1, 0, 1], [1, 1, 2, 1, 2, 2, 1, 2]]
    assert trace_polygons(draw(".#", "#.")) == [[1, 0, 2, 0, 2, 1, 1, 1], [0, 1, 1, 1, 1, 2, 0, 2]]


def test_a_bridge_leads_from_the_side_to_the_hole_and_back() -> None:
    mask = draw(
        "####",
        "##.#",
        "####",
    )
    # From the top left corner around; then from (0, 1) to the hole's corner (2, 1), around the hole, and back.
    assert trace_polygons(mask) == [[0, 0, 4, 0, 4, 3, 0, 3, 0, 1, 2, 1, 2, 2, 3, 2, 3, 1, 0, 1]]


def test_a_bridge_to_a_corner_goes_on_along_its_edge() -> None:
    mask = draw(
        ".###",
        "##.#",
        "####",
    )
    # The edge that ends in the corner (1, 1) goes on to the hole at (2, 1).
    assert trace_polygons(mask) == [[1, 0, 4, 0, 4, 3, 0, 3, 0, 1, 2, 1, 2, 2, 3, 2, 3, 1, 1, 1]]


def test_polygons_are_sorted_from_top_to_bottom_and_left_to_right() -> None:
    firsts = [(polygon[1], polygon[0]) for polygon in trace_polygons(noise(30, 30, 0.3))]
    assert len(firsts) > 20
    assert firsts == sorted(firsts)


def test_pycocotools_fills_the_polygons_alike() -> None:
    y, x = torch.meshgrid(torch.arange(300), torch.arange(400), indexing="ij")
    star = torch.hypot(y - 150.0, x - 190.0) < 100 + 40 * torch.sin(7 * torch.atan2(y - 150.0, x - 190.0))
    holes = (torch.hypot(y - 150.0, x - 170.0) < 30) | (torch.hypot(y - 140.0, x - 230.0) < 20)
    for mask in (star, star & ~holes, ~star):
        runs = pycocotools_mask.merge(pycocotools_mask.frPyObjects(trace_polygons(mask), 300, 400))
        theirs = torch.from_numpy(pycocotools_mask.decode(runs)).bool()
        assert (theirs & mask).sum() / (theirs | mask).sum() > 0.999


def test_a_view_that_is_not_contiguous_is_traced() -> None:
    mask = noise(40, 30, 0.6)
    assert trace_polygons(mask.T) == trace_polygons(mask.T.contiguous())


def test_the_mask_is_untouched() -> None:
    mask = noise(20, 20, 0.8)
    before = mask.clone()
    trace_polygons(mask)
    assert torch.equal(mask, before)


def test_a_thousand_polygons_with_long_rings_and_holes_come_back() -> None:
    mask = noise(200, 300, 0.6)
    assert len(trace_polygons(mask)) > 1000
    assert_exact(mask)


@pytest.mark.gpu
def test_a_mask_on_a_gpu_is_traced() -> None:
    mask = noise(40, 30, 0.6)
    assert trace_polygons(mask.cuda()) == trace_polygons(mask)


@pytest.mark.parametrize("mask", [torch.ones(3, 3), torch.ones(1, 3, 3, dtype=torch.bool)], ids=["float", "batch"])
def test_what_is_no_single_bool_mask_is_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected one mask as bool \(H, W\), got torch\."):
        trace_polygons(mask)
