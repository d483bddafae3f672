"""Reading maps and masks at points, and choosing the points, against pixel-by-pixel definitions.

Axes: R rows (masks), T segments, P points, h w size of a map.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mpformer_hf.point_sampling import IgnoredPixels, MaskReader, choose_points, sample_maps, sample_masks

# Corners, borders and the centre of the unit square, beside which rounding and the zeros outside show first.
SPECIAL_POINTS = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5], [1.0, 0.3], [0.3, 0.0]]


def read_one(image: Tensor, x: float, y: float) -> float:
    """Read (h, w) at one point of the unit square: the four pixels around it, zero outside."""
    height, width = image.shape
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(row)
    total = 0.0
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < height and 0 <= j < width:
                total += image[i, j].item() * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


def read_all(maps: Tensor, points: Tensor) -> Tensor:
    """`sample_maps` by loops: (R, C, h, w) and (R, P, 2) to float64 (R, C, P)."""
    return torch.tensor(
        [
            [[read_one(channel, x, y) for x, y in row_points] for channel in row]
            for row, row_points in zip(maps, points.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


def random_points(num_rows: int, num_points: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random points, the first of them special: (num_rows, num_points, 2)."""
    points = torch.rand(num_rows, num_points, 2, dtype=dtype)
    points[:, : len(SPECIAL_POINTS)] = torch.tensor(SPECIAL_POINTS, dtype=dtype)
    return points


def random_masks(dtype: torch.dtype, num_masks: int, height: int, width: int) -> Tensor:
    values = torch.rand(num_masks, height, width)
    return values if dtype.is_floating_point else (values < 0.4).to(dtype)


@pytest.fixture
def drawn_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of all calls of `torch.rand` in the test, in order."""
    shapes: list[tuple[int, ...]] = []
    draw: Callable[..., Tensor] = torch.rand

    def recorded(*size: int, **keywords) -> Tensor:
        shapes.append(tuple(size))
        return draw(*size, **keywords)

    monkeypatch.setattr(torch, "rand", recorded)
    return shapes


# ---------------------------------------------------------------------------------------------------------- sample_maps


@pytest.mark.parametrize("num_channels", [3, 64])
def test_maps_are_read_bilinearly_with_zeros_outside(num_channels: int):
    maps, points = torch.randn(2, num_channels, 4, 5, dtype=torch.float64), random_points(2, 20, torch.float64)
    torch.testing.assert_close(sample_maps(maps, points), read_all(maps, points))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_channels_are_read_like_few(dtype: torch.dtype):
    """They take another way on CPU; the type of the maps stays, and gradients arrive."""
    maps, points = torch.randn(2, 64, 9, 11, dtype=dtype).requires_grad_(), random_points(2, 50, dtype)
    found = sample_maps(maps, points)
    expected = torch.cat([sample_maps(few.float(), points.float()) for few in maps.split(8, dim=1)], dim=1)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.float(),
        expected,
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-2 if dtype == torch.bfloat16 else 1e-6,
    )
    direction = torch.randn(found.shape)
    (grad,) = torch.autograd.grad((found * direction).sum(), maps)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), maps)
    torch.testing.assert_close(grad, wanted, rtol=1e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("num_channels", [3, 64])
def test_no_maps_have_no_samples(num_channels: int):
    assert sample_maps(torch.zeros(0, num_channels, 4, 5), torch.zeros(0, 7, 2)).shape == (0, num_channels, 7)


def test_points_are_x_then_y():
    maps = torch.zeros(1, 1, 2, 4)
    maps[0, 0, 0, 3] = 1.0
    centre_of_that_pixel = torch.tensor([[[3.5 / 4, 0.5 / 2]]])
    assert sample_maps(maps, centre_of_that_pixel).item() == 1.0


def test_reading_a_product_equals_the_product_of_readings():
    """Reading is linear: the reason why the matching reads the per-pixel embedding instead of masks."""
    pixel_embedding = torch.randn(1, 6, 5, 7, dtype=torch.float64)
    mask_embeddings = torch.randn(4, 6, dtype=torch.float64)
    points = random_points(1, 30, torch.float64)
    masks = torch.einsum("qd,dhw->qhw", mask_embeddings, pixel_embedding[0])
    torch.testing.assert_close(
        mask_embeddings @ sample_maps(pixel_embedding, points)[0],
        sample_maps(masks[None], points)[0],
        rtol=1e-10,
        atol=0,
    )


# --------------------------------------------------------------------------------------------------------- sample_masks


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(12, 16), (9, 16), (12, 11), (5, 3), (1, 1)], ids=str)
def test_masks_are_read_as_float_masks_padded_with_zeros(dtype: torch.dtype, size: tuple[int, int]):
    padded_size = (12, 16)
    masks = random_masks(dtype, 3, *size)
    mask_index = torch.tensor([2, 0, 2, 1])
    points = random_points(4, 50)
    padded = nn.functional.pad(masks.float(), (0, padded_size[1] - size[1], 0, padded_size[0] - size[0]))
    expected = nn.functional.grid_sample(padded[mask_index][:, None], 2 * points[:, None] - 1, align_corners=False)

    values = sample_masks(masks, mask_index, points, padded_size)

    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected[:, 0, 0], rtol=0, atol=2e-6)


def test_masks_are_read_by_the_definition_in_double_precision():
    masks, points = random_masks(torch.bool, 2, 3, 4), random_points(2, 12, torch.float64)
    padded = nn.functional.pad(masks.double(), (0, 2, 0, 1))
    values = sample_masks(masks, torch.tensor([0, 1]), points, (4, 6))
    torch.testing.assert_close(values, read_all(padded[:, None], points)[:, 0], rtol=1e-10, atol=1e-12)


def test_one_set_of_points_serves_all_rows():
    masks, points = random_masks(torch.uint8, 3, 6, 6), random_points(1, 15)
    index = torch.arange(3)
    torch.testing.assert_close(
        sample_masks(masks, index, points, (6, 6)), sample_masks(masks, index, points.expand(3, -1, -1), (6, 6))
    )


def test_masks_that_are_not_contiguous_are_read_right():
    masks, points = random_masks(torch.bool, 3, 8, 6), random_points(3, 15)
    index = torch.arange(3)
    transposed = masks.transpose(1, 2).contiguous().transpose(1, 2)
    assert not transposed.is_contiguous()
    torch.testing.assert_close(
        sample_masks(transposed, index, points, (8, 6)), sample_masks(masks, index, points, (8, 6)), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_reader_answers_many_times_and_leaves_the_masks_alone(dtype: torch.dtype):
    masks = random_masks(dtype, 3, 6, 7)
    before, index = masks.clone(), torch.tensor([2, 0])
    reader = MaskReader(masks, (8, 8))
    for _ in range(2):
        points = random_points(2, 15)
        expected = sample_masks(before, index, points, (8, 8))
        torch.testing.assert_close(reader.read(index, points), expected, rtol=0, atol=0)
    assert torch.equal(masks, before)


def test_no_rows_give_no_values():
    no_rows = torch.zeros(0, dtype=torch.int64)
    assert sample_masks(torch.zeros(2, 4, 4, dtype=torch.bool), no_rows, torch.rand(0, 5, 2), (4, 4)).shape == (0, 5)
    assert sample_masks(torch.zeros(0, 4, 4, dtype=torch.bool), no_rows, torch.rand(1, 5, 2), (4, 4)).shape == (0, 5)


# -------------------------------------------------------------------------------------------------------- choose_points


def test_the_most_uncertain_candidates_are_kept(monkeypatch: pytest.MonkeyPatch):
    logits = torch.randn(2, 1, 4, 5, dtype=torch.float64)
    draws = [torch.rand(2, 24, 2, dtype=torch.float64), torch.rand(2, 2, 2, dtype=torch.float64)]
    pending = list(draws)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: pending.pop(0))

    points = choose_points(logits, 8, 3.0, 0.75)

    candidates, rest = draws
    certainty = read_all(logits, candidates)[:, 0].abs()
    for row in range(2):
        order = sorted(range(24), key=lambda place: certainty[row, place].item())
        kept = {tuple(candidates[row, place].tolist()) for place in order[:6]}
        assert {tuple(point) for point in points[row, :6].tolist()} == kept
    torch.testing.assert_close(points[:, 6:], rest, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("num_points", "oversample_ratio", "importance_sample_ratio", "num_candidates", "num_rest"),
    [
        (12, 3.0, 0.75, 36, 3),
        (10, 3.0, 0.75, 30, 3),  # floor(7.5) = 7 candidates stay
        (5, 1.5, 0.5, 7, 3),
        (8, 3.0, 0.0, 24, 8),
        (8, 3.0, 1.0, 24, 0),
        (1, 1.0, 0.75, 1, 1),
    ],
)
def test_candidates_are_drawn_first_and_the_rest_afterwards(
    drawn_shapes: list[tuple[int, ...]],
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
    num_candidates: int,
    num_rest: int,
):
    """These shapes are a promise: recorded points are injected through them."""
    points = choose_points(torch.zeros(3, 1, 4, 4), num_points, oversample_ratio, importance_sample_ratio)
    assert points.shape == (3, num_points, 2)
    assert drawn_shapes == [(3, num_candidates, 2), (3, num_rest, 2)]


def test_points_lie_in_the_image_and_differ_between_rows():
    points = choose_points(torch.randn(4, 1, 8, 8), 64, 3.0, 0.75)
    assert points.min() >= 0
    assert points.max() <= 1
    assert len({tuple(row.flatten().tolist()) for row in points}) == 4


def test_chosen_points_lie_where_the_logit_changes_its_sign():
    """Left half certain background, right half certain foreground: of 3 P candidates only those on the seam are kept."""
    logits = torch.full((1, 1, 16, 16), -10.0)
    logits[..., 8:] = 10.0
    points = choose_points(logits, 200, 10.0, 0.05)
    assert (points[0, :10, 0] - 0.5).abs().max() < 1 / 16


def test_choosing_points_makes_no_graph():
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    assert not choose_points(logits, 4, 3.0, 0.75).requires_grad


def test_points_have_the_type_of_the_logits():
    assert choose_points(torch.zeros(1, 1, 4, 4, dtype=torch.float64), 4, 3.0, 0.75).dtype == torch.float64


def test_no_rows_need_no_points():
    assert choose_points(torch.zeros(0, 1, 4, 4), 8, 3.0, 0.75).shape == (0, 8, 2)


# -------------------------------------------------------------------------------------------------------- ignored pixels


def test_a_point_is_ignored_when_any_pixel_that_it_reads_is():
    """Of 4x4 pixels in a padded image of 8x8 pixels, (1, 2) is unknown: it is read within one pixel of its centre."""
    ignore_mask = torch.zeros(4, 4, dtype=torch.bool)
    ignore_mask[1, 2] = True
    ignored = IgnoredPixels(ignore_mask, (8, 8))
    pixels = torch.tensor([[2.0, 1.0], [2.9, 1.9], [1.1, 0.1], [3.0, 1.0], [1.0, 1.0], [2.0, 2.0], [6.0, 5.0]])
    points = ((pixels + 0.5) / 8).expand(3, -1, -1)
    assert ignored.at(points).tolist() == [[True, True, True, False, False, False, False]] * 3


def test_all_points_of_an_image_that_is_unknown_are_ignored():
    ignored = IgnoredPixels(torch.ones(4, 6, dtype=torch.bool), (4, 6))
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    inside = torch.rand(20, 2) * 0.98 + 0.01
    assert ignored.at(inside[None]).all()
    assert ignored.at(corners[None]).all()


def test_candidates_that_are_ignored_are_kept_only_for_want_of_others():
    """The left half is ignored, and the network is most uncertain there."""
    logits = torch.full((2, 1, 8, 8), 10.0)
    logits[..., :4] = 0.1
    points = choose_points(logits, 40, 3.0, 0.5, lambda points: points[..., 0] < 0.5)
    assert (points[:, :20, 0] >= 0.5).all()
    assert (points[:, 20:, 0] < 0.5).any()  # drawn afresh
    nothing_else = choose_points(logits, 40, 3.0, 0.5, lambda points: torch.ones(points.shape[:2], dtype=torch.bool))
    assert nothing_else.shape == (2, 40, 2)
