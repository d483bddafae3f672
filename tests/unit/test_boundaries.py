"""The boundary of a mask against an erosion step by step."""

import numpy as np
import pytest

from training.metrics.boundaries import boundary_distance, boundary_region


def erode(mask):
    """Keep what has no background among its eight neighbours; outside is background."""
    height, width = mask.shape
    padded = np.pad(mask, 1)
    windows = [padded[row : row + height, column : column + width] for row in range(3) for column in range(3)]
    return np.logical_and.reduce(windows)


def plain_boundary(mask, distance):
    inner = mask
    for _ in range(distance):
        inner = erode(inner)
    return mask & ~inner


def random_masks():
    """Rectangles over one another, some with holes of a pixel, some thinner than the boundary, some at all borders."""
    rng = np.random.default_rng(0)
    for number in range(150):
        height, width = (int(side) for side in rng.integers(1, 50, 2))
        mask = np.zeros((height, width), dtype=bool)
        for _ in range(3):
            top, left = rng.integers(0, height), rng.integers(0, width)
            mask[top : top + rng.integers(1, height + 1), left : left + rng.integers(1, width + 1)] = True
        if number % 3 == 0:
            mask &= rng.random(mask.shape) < 0.99
        yield np.asfortranarray(mask) if number % 2 else mask


def test_boundary_is_what_an_erosion_step_by_step_takes_away():
    with_inner = 0
    for mask in random_masks():
        for distance in (1, 2, 3, 7):
            region = boundary_region(mask, distance)
            np.testing.assert_array_equal(region, plain_boundary(mask, distance))
            with_inner += bool((mask & ~region).any())
    assert with_inner > 100, "most masks are all boundary, which tests nothing"


def test_boundary_of_a_square_is_its_frame():
    mask = np.zeros((9, 8), dtype=bool)
    mask[2:8, 1:7] = True
    frame = mask.copy()
    frame[4:6, 3:5] = False
    np.testing.assert_array_equal(boundary_region(mask, 2), frame)


def test_mask_that_fills_the_image_has_its_boundary_at_the_border():
    assert boundary_region(np.ones((5, 6), dtype=bool), 1).sum() == 5 * 6 - 3 * 4


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0), (3, 5)])
def test_empty_mask_has_no_boundary(shape):
    assert not boundary_region(np.zeros(shape, dtype=bool), 2).any()


def test_the_mask_stays_as_it_was():
    mask = np.ones((9, 9), dtype=bool)
    boundary_region(mask, 2)
    assert mask.all()


@pytest.mark.parametrize(
    ("size", "ratio", "distance"),
    [
        ((480, 640), 0.02, 16),  # the diagonal is 800
        ((3, 4), 0.02, 1),  # 0.1, but at least 1
        ((75, 100), 0.02, 2),  # 2.5, halves to even
        ((105, 140), 0.02, 4),  # 3.5, halves to even
        ((30, 40), 0.1, 5),
    ],
)
def test_distance_is_a_share_of_the_diagonal(size, ratio, distance):
    assert boundary_distance(size, ratio) == distance


def test_distance_is_that_of_the_paper_unless_another_is_asked_for():
    assert boundary_distance((480, 640)) == 16  # 2 % of the diagonal of 800


@pytest.mark.parametrize("ratio", [0.0, -0.1, float("nan"), float("inf")])
def test_ratio_that_is_no_share_is_an_error(ratio):
    with pytest.raises(ValueError, match="dilation_ratio must be above 0"):
        boundary_distance((4, 4), ratio)


@pytest.mark.parametrize(
    ("mask", "distance"), [(np.ones((2, 2)), 1), (np.ones((1, 2, 2), dtype=bool), 1), (np.ones((2, 2), dtype=bool), 0)]
)
def test_what_is_no_mask_or_distance_is_an_error(mask, distance):
    with pytest.raises(ValueError, match="Expected a bool mask"):
        boundary_region(mask, distance)
