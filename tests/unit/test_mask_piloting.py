"""Mask-piloted training against definitions, plain loops and statistics."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mpformer_hf import mask_piloting
from mpformer_hf.mask_piloting import (
    NOISE_KINDS,
    PilotMasks,
    PilotNoise,
    SlotLayout,
    count_pilot_groups,
    embed_pilot_labels,
    flip_cells,
    flip_labels,
    isolate_pilot_groups,
    lay_out_slots,
    move_masks,
    pool_masks,
    scale_masks,
    shift_masks,
)

MOVES = ("shift", "scale", "shift_scale")
COUNTS = [2, 0, 3]
PADDED_SIZE = (64, 96)
LEVEL_SIZES = ((2, 3), (4, 6), (8, 12))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_masks(counts: list[int], size: tuple[int, int] = PADDED_SIZE, seed: int = 0) -> list[Tensor]:
    """Blobs of many sizes, ragged at the edges; none is empty and none is visible everywhere at the finest level."""
    generator = seeded(seed)
    height, width = size
    y, x = torch.arange(height)[:, None], torch.arange(width)
    masks = []
    for count in counts:
        draw = torch.rand(count, 4, generator=generator)[:, :, None, None]
        distance = ((y - draw[:, 0] * height) / (4 + draw[:, 2] * height / 4)) ** 2
        distance = distance + ((x - draw[:, 1] * width) / (4 + draw[:, 3] * width / 4)) ** 2
        masks.append(distance + 0.3 * torch.rand(count, height, width, generator=generator) < 1)
    return masks


def rectangles(num_masks: int, size: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """Copies of one filled rectangle; box is top, left, bottom, right, the last two exclusive."""
    masks = torch.zeros(num_masks, *size, dtype=torch.bool)
    masks[:, box[0] : box[2], box[1] : box[3]] = True
    return masks


def box_of(mask: Tensor) -> tuple[int, int, int, int]:
    """Tight box of a mask that has pixels: top, left, bottom, right, the last two exclusive."""
    points = mask.nonzero()
    (top, left), (bottom, right) = points.amin(0).tolist(), (points.amax(0) + 1).tolist()
    return top, left, bottom, right


def prepare(
    masks: list[Tensor],
    noise: PilotNoise,
    num_groups: int = 2,
    padded_size: tuple[int, int] = PADDED_SIZE,
    max_targets: int | None = None,
) -> PilotMasks:
    counts = [len(image) for image in masks]
    layout = lay_out_slots(counts, num_groups, max(counts) if max_targets is None else max_targets, "cpu")
    return PilotMasks.prepare(masks, padded_size, LEVEL_SIZES, layout, noise, num_heads=4)


def average_pool(masks: Tensor, padded_size: tuple[int, int], level_size: tuple[int, int]) -> Tensor:
    """The definition: pad, average every cell in double precision, visible is more than nothing."""
    height, width = masks.shape[1:]
    padded = nn.functional.pad(masks.double(), (0, padded_size[1] - width, 0, padded_size[0] - height))
    return (nn.functional.adaptive_avg_pool2d(padded, level_size) > 1e-8).flatten(1)


def expected_rows(attention_mask: Tensor, layout: SlotLayout) -> list[tuple[int, int, int, int]]:
    """(image, slot, segment of the batch, group) of every filled slot, by counting."""
    rows, segment = [], 0
    counts = [int((layout.image_index == image).sum()) for image in range(attention_mask.shape[0])]
    for image, count in enumerate(counts):
        for place in range(count):
            rows += [(image, group * layout.max_targets + place, segment, group) for group in range(layout.num_groups)]
            segment += 1
    return rows


def standard_error(probability: float, num_draws: int) -> float:
    return math.sqrt(probability * (1 - probability) / num_draws)


# --------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("max_targets", "pilot_groups", "budget", "expected"),
    [(0, 3, None, 0), (7, 3, None, 3), (0, 3, 100, 0), (7, 3, 100, 14), (100, 1, 100, 1), (101, 1, 100, 0)],
)
def test_number_of_groups_follows_setting_or_budget(max_targets, pilot_groups, budget, expected):
    assert count_pilot_groups(max_targets, pilot_groups, budget) == expected


@pytest.mark.parametrize(("pilot_groups", "budget"), [(0, None), (1, 0), (1, -5)])
def test_number_of_groups_refuses_less_than_one(pilot_groups, budget):
    with pytest.raises(ValueError, match="mask_piloting=False"):
        count_pilot_groups(3, pilot_groups, budget)


# --------------------------------------------------------------------------------------------------------------- layout


def test_layout_of_two_none_and_three_segments_in_two_groups():
    layout = lay_out_slots(COUNTS, num_groups=2, max_targets=3, device="cpu")
    assert layout.image_index.tolist() == [0, 0, 2, 2, 2]
    assert layout.target_index.tolist() == [0, 1, 0, 1, 2]
    assert layout.slot_index.tolist() == [[0, 1, 0, 1, 2], [3, 4, 3, 4, 5]]
    assert (layout.num_slots, layout.num_segments, layout.num_images) == (6, 5, 3)
    assert {index.dtype for index in (layout.image_index, layout.target_index, layout.slot_index)} == {torch.int64}


def test_layout_leaves_room_for_the_largest_image_of_another_process():
    layout = lay_out_slots([2, 1], num_groups=2, max_targets=5, device="cpu")
    assert layout.slot_index.tolist() == [[0, 1, 0], [5, 6, 5]]
    assert layout.num_slots == 10


@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [4], [1, 7, 0, 0, 2, 5]])
def test_layout_equals_counting_by_loops(counts):
    layout = lay_out_slots(counts, num_groups=3, max_targets=7, device="cpu")
    places = [(image, place) for image, count in enumerate(counts) for place in range(count)]
    assert list(zip(layout.image_index.tolist(), layout.target_index.tolist(), strict=True)) == places
    assert layout.slot_index.tolist() == [[group * 7 + place for _, place in places] for group in range(3)]


def test_layout_refuses_more_segments_than_slots():
    with pytest.raises(ValueError, match="most segments in one image, 4, got 3"):
        lay_out_slots([1, 4], num_groups=1, max_targets=3, device="cpu")


# ------------------------------------------------------------------------------------------------------- self-attention


@pytest.mark.parametrize(("num_groups", "max_targets", "num_queries"), [(1, 1, 1), (1, 3, 4), (3, 2, 5), (2, 4, 0)])
def test_groups_see_only_themselves_and_the_matched_queries(num_groups, max_targets, num_queries):
    blocked = isolate_pilot_groups(num_groups, max_targets, num_queries, "cpu")
    num_slots = num_groups * max_targets
    assert blocked.dtype == torch.bool
    assert blocked.shape == (num_slots + num_queries, num_slots + num_queries)
    for row in range(len(blocked)):
        for column in range(len(blocked)):
            if column >= num_slots:
                may_see = True
            elif row >= num_slots:
                may_see = False
            else:
                may_see = row // max_targets == column // max_targets
            assert blocked[row, column].item() is not may_see


@pytest.mark.parametrize(("num_groups", "max_targets"), [(0, 3), (2, 0)])
def test_without_slots_nothing_is_blocked(num_groups, max_targets):
    blocked = isolate_pilot_groups(num_groups, max_targets, 4, "cpu")
    assert blocked.tolist() == [[False] * 4] * 4


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(("ratio", "num_labels"), [(0.2, 7), (0.5, 3), (1.0, 5)])
def test_labels_change_as_often_as_a_uniform_replacement_makes_them(ratio, num_labels):
    labels = torch.full((40000,), 2)
    flipped = flip_labels(labels, ratio, num_labels, seeded())
    expected = ratio * (1 - 1 / num_labels)
    rate = (flipped != labels).float().mean().item()
    assert abs(rate - expected) < 3 * standard_error(expected, labels.numel())
    assert flipped.dtype == torch.int64
    assert (labels == 2).all()


def test_replaced_labels_are_uniform_over_all_labels():
    flipped = flip_labels(torch.zeros(50000, dtype=torch.int64), 1.0, 5, seeded(1))
    shares = torch.bincount(flipped, minlength=5) / flipped.numel()
    assert ((shares - 0.2).abs() < 3 * standard_error(0.2, flipped.numel())).all()


def test_zero_label_noise_returns_the_same_labels_without_a_draw():
    generator, labels = seeded(), torch.tensor([[3, 0], [1, 1]])
    before = generator.get_state()
    assert torch.equal(flip_labels(labels, 0.0, 4, generator), labels)
    assert torch.equal(generator.get_state(), before)


def test_label_noise_is_determined_by_the_generator():
    labels = torch.arange(100) % 9
    first, again, other = (flip_labels(labels, 0.5, 9, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("ratio", [-0.1, 1.01, float("nan")])
def test_ratio_outside_zero_and_one_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio in \\[0, 1\\]"):
        flip_labels(torch.zeros(2, dtype=torch.int64), ratio, 3)
    with pytest.raises(ValueError, match="ratio in \\[0, 1\\]"):
        flip_cells(torch.zeros(2, 4, dtype=torch.bool), ratio)
    with pytest.raises(ValueError, match="ratio in \\[0, 1\\]"):
        PilotNoise("shift", ratio)
    with pytest.raises(ValueError, match="ratio in \\[0, 1\\]"):
        move_masks(torch.ones(1, 4, 4, dtype=torch.bool), "shift", ratio)


def test_pilot_queries_are_label_embeddings_at_their_slots_and_zeros_elsewhere():
    embedding, labels = torch.randn(6, 8, generator=seeded()), torch.tensor([5, 0, 2, 2, 1])
    layout = lay_out_slots(COUNTS, num_groups=2, max_targets=4, device="cpu")
    queries = embed_pilot_labels(labels, embedding, layout, ratio=0.0)
    expected = torch.zeros(3, 8, 8)
    for group in range(2):
        for segment, (image, place) in enumerate([(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]):
            expected[image, group * 4 + place] = embedding[labels[segment]]
    assert torch.equal(queries, expected)


def test_labels_of_each_group_are_flipped_independently():
    num_segments, num_labels = 4000, 10
    labels = torch.randint(num_labels, (num_segments,), generator=seeded())
    layout = lay_out_slots([num_segments], num_groups=2, max_targets=num_segments, device="cpu")
    codes = torch.arange(num_labels, dtype=torch.float64)[:, None]
    shown = embed_pilot_labels(labels, codes, layout, 0.5, seeded(1))[0, :, 0].long().unflatten(0, (2, -1))
    flipped = shown != labels
    expected = 0.5 * (1 - 1 / num_labels)
    both = (flipped[0] & flipped[1]).double().mean().item()
    assert (flipped.double().mean(1) - expected).abs().max() < 3 * standard_error(expected, num_segments)
    assert abs(both - expected**2) < 3 * standard_error(expected**2, num_segments)


def test_gradients_reach_the_embedding_of_every_shown_label():
    embedding = torch.randn(4, 3, requires_grad=True)
    layout = lay_out_slots([2, 1], num_groups=3, max_targets=2, device="cpu")
    queries = embed_pilot_labels(torch.tensor([0, 2, 2]), embedding, layout, ratio=0.0)
    queries.sum().backward()
    assert embedding.grad.tolist() == [[3.0] * 3, [0.0] * 3, [6.0] * 3, [0.0] * 3]


@pytest.mark.parametrize(("num_groups", "max_targets"), [(2, 3), (2, 0), (0, 3)])
def test_batch_without_segments_still_has_a_gradient_of_zeros(num_groups, max_targets):
    embedding = torch.randn(4, 3, requires_grad=True)
    layout = lay_out_slots([0, 0], num_groups, max_targets, "cpu")
    queries = embed_pilot_labels(torch.zeros(0, dtype=torch.int64), embedding, layout, ratio=0.2)
    assert queries.tolist() == torch.zeros(2, num_groups * max_targets, 3).tolist()
    queries.sum().backward()
    assert embedding.grad.tolist() == torch.zeros(4, 3).tolist()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pilot_queries_have_the_dtype_of_the_embedding(dtype, autocast):
    embedding = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    layout = lay_out_slots([1, 2], num_groups=1, max_targets=2, device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        queries = embed_pilot_labels(torch.tensor([0, 1, 3]), embedding, layout, 0.2, seeded())
    queries.sum().backward()
    assert queries.dtype == dtype
    assert embedding.grad.dtype == dtype


@pytest.mark.parametrize("label", [-1, 4, 255])
def test_labels_out_of_range_are_refused(label):
    layout = lay_out_slots([2], num_groups=1, max_targets=2, device="cpu")
    with pytest.raises(ValueError, match=f"class labels in \\[0, 4\\), got labels from .*{label}"):
        embed_pilot_labels(torch.tensor([label, label]), torch.randn(4, 3), layout, 0.0)


def test_number_of_labels_must_be_that_of_the_layout():
    layout = lay_out_slots([2], num_groups=1, max_targets=2, device="cpu")
    with pytest.raises(ValueError, match="each of the 2 segments, got shape \\(3,\\)"):
        embed_pilot_labels(torch.zeros(3, dtype=torch.int64), torch.randn(4, 3), layout, 0.0)


# -------------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("given", "padded", "level"),
    [
        ((64, 96), (64, 96), (8, 12)),
        ((50, 71), (64, 96), (8, 12)),
        ((50, 71), (64, 96), (2, 3)),
        ((32, 96), (64, 96), (4, 6)),
        ((5, 3), (64, 96), (4, 6)),
        ((64, 96), (64, 96), (64, 96)),
        ((60, 90), (60, 90), (8, 12)),
        ((37, 53), (60, 90), (7, 11)),
        ((41, 90), (64, 90), (8, 12)),
        ((10, 10), (60, 90), (7, 11)),
        ((9, 7), (9, 7), (12, 10)),
        ((1, 1), (3, 5), (2, 2)),
    ],
)
def test_pooling_equals_the_average_of_each_cell_above_zero(given, padded, level, dtype):
    share = 3 / (padded[0] * padded[1] / (level[0] * level[1]) + 3)
    foreground = torch.rand(6, *given, generator=seeded()) < share * torch.linspace(0, 1, 6)[:, None, None]
    foreground[-1, -1, -1] = True
    masks = foreground.to(dtype) * (0.01 if dtype.is_floating_point else 1)
    pooled = pool_masks(masks.to(dtype), padded, level)
    assert pooled.dtype == torch.bool
    assert torch.equal(pooled, average_pool(masks, padded, level))
    assert pooled.any()


def test_pooling_finds_a_single_pixel_in_every_position():
    masks = torch.eye(7 * 9, dtype=torch.bool).view(-1, 7, 9)
    for padded, level in [((7, 9), (3, 4)), ((8, 12), (2, 3)), ((8, 12), (3, 5))]:
        assert torch.equal(pool_masks(masks, padded, level), average_pool(masks, padded, level))


def test_pooling_works_without_masks_and_on_views():
    assert pool_masks(torch.zeros(0, 50, 60, dtype=torch.bool), (64, 64), (4, 4)).shape == (0, 16)
    masks = random_masks([3])[0].mT
    assert torch.equal(pool_masks(masks, (96, 64), (12, 8)), average_pool(masks, (96, 64), (12, 8)))


@pytest.mark.parametrize("shape", [(2, 65, 96), (2, 64, 97), (64, 96), (1, 2, 64, 96)])
def test_pooling_refuses_masks_that_do_not_fit_the_padded_image(shape):
    with pytest.raises(ValueError, match="inside the padded size"):
        pool_masks(torch.zeros(shape, dtype=torch.bool), PADDED_SIZE, (4, 6))


# ---------------------------------------------------------------------------------------------------------- point noise


@pytest.mark.parametrize("ratio", [0.2, 1.0])
@pytest.mark.parametrize("num_visible", [1, 13, 40])
def test_point_noise_flips_inside_and_outside_with_ratio_times_share(num_visible, ratio):
    num_draws, num_cells = 4000, 40
    visible = (torch.arange(num_cells) < num_visible).expand(num_draws, -1)
    flips = flip_cells(visible, ratio, seeded()) ^ visible
    probability = ratio * num_visible / num_cells
    for part in (flips, flips[:, :num_visible], flips[:, num_visible:]):
        if part.numel():
            tolerance = 3 * standard_error(probability, part.numel())
            assert abs(part.double().mean().item() - probability) <= tolerance


def test_point_noise_depends_on_the_area_of_each_mask_alone():
    visible = torch.zeros(2, 3000, 8, dtype=torch.bool)
    visible[1, :, :4] = True
    flips = (flip_cells(visible, 0.5, seeded()) ^ visible).double().mean((1, 2))
    assert flips[0] == 0
    assert abs(flips[1] - 0.25) < 3 * standard_error(0.25, 24000)


def test_point_noise_leaves_its_input_untouched():
    visible = torch.rand(5, 40, generator=seeded()) < 0.5
    clean = visible.clone()
    assert not torch.equal(flip_cells(visible, 1.0, seeded()), clean)
    assert torch.equal(visible, clean)


# ------------------------------------------------------------------------------------------------------ attention masks


@pytest.mark.parametrize("noise", [PilotNoise("none"), *(PilotNoise(kind, 0.0, per_head=True) for kind in NOISE_KINDS)])
def test_zero_noise_returns_the_clean_masks_without_a_draw(noise):
    masks = random_masks(COUNTS)
    pilot_masks = prepare(masks, noise, max_targets=4)
    own, shared = seeded(), torch.get_rng_state()
    before = own.get_state()
    for level, level_size in enumerate(LEVEL_SIZES):
        drawn = pilot_masks.draw_attention_mask(level, own)
        assert torch.equal(drawn, pilot_masks.draw_attention_mask(level))
        assert drawn.shape == (3, 1, 8, level_size[0] * level_size[1])
        expected = torch.zeros_like(drawn)
        visible = torch.cat([average_pool(image, PADDED_SIZE, level_size) for image in masks])
        for image, slot, segment, _ in expected_rows(drawn, pilot_masks.layout):
            expected[image, 0, slot] = ~visible[segment]
        assert torch.equal(drawn, expected)
    assert expected.any()
    assert torch.equal(own.get_state(), before)
    assert torch.equal(torch.get_rng_state(), shared)


@pytest.mark.parametrize("sizes", [((2, 3), (4, 6), (8, 12)), ((3, 5), (4, 6), (8, 12)), ((8, 12),), ((5, 7), (9, 11))])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_clean_masks_are_pooled_masks_whatever_the_levels(sizes, dtype):
    masks = random_masks(COUNTS, size=(50, 71))
    layout = lay_out_slots(COUNTS, 1, 3, "cpu")
    labels = [image.to(dtype) for image in masks]
    pilot_masks = PilotMasks.prepare(labels, PADDED_SIZE, sizes, layout, PilotNoise("none"), num_heads=1)
    for level, size in enumerate(sizes):
        expected = torch.cat([average_pool(image, PADDED_SIZE, size) for image in masks])
        assert torch.equal(pilot_masks.pooled_masks[level], expected)


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_empty_slots_and_empty_masks_see_everything(kind):
    masks = random_masks(COUNTS)
    masks[2][1] = False
    drawn = prepare(masks, PilotNoise(kind, 0.3)).draw_attention_mask(2, seeded())
    for group in range(2):
        first = group * 3
        assert not drawn[0, :, first + 2].any()
        assert not drawn[1, :, first : first + 3].any()
        assert not drawn[2, :, first + 1].any()
        for image, slot in [(0, first), (0, first + 1), (2, first), (2, first + 2)]:
            assert drawn[image, :, slot].any()


def test_masks_that_the_noise_removes_see_everything():
    masks = [torch.zeros(400, 64, 96, dtype=torch.bool)]
    masks[0][:, 3, 5] = True
    drawn = prepare(masks, PilotNoise("point", 1.0)).draw_attention_mask(0, seeded())[0, 0]
    num_open = int((~drawn).all(-1).sum())
    # One cell of six is visible: all six flip with probability (1/6)^6; only the visible one with (1/6) (5/6)^5.
    expected = (1 / 6) ** 6 + (1 / 6) * (5 / 6) ** 5
    assert abs(num_open / 800 - expected) < 3 * standard_error(expected, 800)
    assert not drawn.all(-1).any()


@pytest.mark.parametrize("kind", ["point", *MOVES])
def test_noise_is_fresh_in_every_layer(kind):
    pilot_masks, generator = prepare(random_masks(COUNTS), PilotNoise(kind, 0.5)), seeded()
    drawn = [pilot_masks.draw_attention_mask(2, generator) for _ in range(3)]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize("kind", ["point", *MOVES])
def test_noise_of_each_group_is_its_own(kind):
    layout = lay_out_slots(COUNTS, num_groups=3, max_targets=3, device="cpu")
    noise = PilotNoise(kind, 1.0)
    pilot_masks = PilotMasks.prepare(random_masks(COUNTS), PADDED_SIZE, [PADDED_SIZE], layout, noise, num_heads=1)
    groups = pilot_masks.draw_attention_mask(0, seeded()).unflatten(2, (3, 3))
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        for image, place in [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]:
            assert not torch.equal(groups[image, :, first, place], groups[image, :, second, place])


@pytest.mark.parametrize("kind", ["point", *MOVES])
def test_noise_is_determined_by_the_generator(kind):
    pilot_masks = prepare(random_masks(COUNTS), PilotNoise(kind, 0.5))
    first, again, other = (pilot_masks.draw_attention_mask(1, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["point", *MOVES])
def test_without_a_generator_noise_follows_the_seed_of_torch(kind):
    pilot_masks = prepare(random_masks(COUNTS), PilotNoise(kind, 0.5))
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(pilot_masks.draw_attention_mask(2))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_point_noise_per_head_is_independent_between_heads():
    num_groups, masks = 300, random_masks([1])
    pilot_masks = prepare(masks, PilotNoise("point", 0.5, per_head=True), num_groups)
    clean = average_pool(masks[0], PADDED_SIZE, LEVEL_SIZES[2])[0]
    drawn = pilot_masks.draw_attention_mask(2, seeded())
    assert drawn.shape == (1, 4, num_groups, 96)
    flips = (~drawn ^ clean)[0]  # (heads, groups, cells)
    probability = 0.5 * clean.double().mean().item()
    assert ((flips.double().mean((1, 2)) - probability).abs() < 3 * standard_error(probability, 96 * num_groups)).all()
    for head in range(1, 4):
        both = (flips[0] & flips[head]).double().mean().item()
        assert abs(both - probability**2) < 3 * standard_error(probability**2, 96 * num_groups)


@pytest.mark.parametrize("kind", ["none", *MOVES])
def test_only_point_noise_is_drawn_per_head(kind):
    drawn = prepare(random_masks(COUNTS), PilotNoise(kind, 0.5, per_head=True)).draw_attention_mask(2, seeded())
    assert drawn.shape[1] == 1


def test_point_noise_switches_padding_cells_on():
    masks = [rectangles(200, (32, 48), (0, 0, 32, 48))]
    drawn = prepare(masks, PilotNoise("point", 1.0)).draw_attention_mask(2, seeded())[0, 0].unflatten(-1, (8, 12))
    on_padding = torch.cat([~drawn[:, 4:].flatten(1), ~drawn[:, :4, 6:].flatten(1)], dim=1).double().mean().item()
    # A quarter of all cells is visible, and padding cells count as cells.
    assert abs(on_padding - 0.25) < 3 * standard_error(0.25, 400 * 72)


@pytest.mark.parametrize("kind", MOVES)
def test_moved_masks_are_full_masks_moved_and_then_pooled(kind):
    masks = random_masks([4])
    drawn = prepare(masks, PilotNoise(kind, 0.6), num_groups=1).draw_attention_mask(2, seeded(5))[0, 0]
    moved = move_masks(masks[0], kind, 0.6, seeded(5))
    assert torch.equal(~drawn, average_pool(moved, PADDED_SIZE, LEVEL_SIZES[2]))


@pytest.mark.parametrize("kind", MOVES)
def test_moved_masks_do_not_depend_on_how_much_is_moved_at_once(kind, monkeypatch):
    pilot_masks = prepare(random_masks(COUNTS), PilotNoise(kind, 0.6), num_groups=5)
    at_once = pilot_masks.draw_attention_mask(2, seeded(5))
    monkeypatch.setattr(mask_piloting, "MOVED_PIXELS_AT_ONCE", 2 * 3 * 64 * 96)
    assert torch.equal(pilot_masks.draw_attention_mask(2, seeded(5)), at_once)
    monkeypatch.setattr(mask_piloting, "MOVED_PIXELS_AT_ONCE", 1)
    assert torch.equal(pilot_masks.draw_attention_mask(2, seeded(5)), at_once)


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("level_sizes", [LEVEL_SIZES, ((3, 5), (5, 7), (9, 11))])
def test_masks_of_image_size_and_padded_size_give_the_same(kind, level_sizes):
    masks = random_masks(COUNTS, size=(50, 71))
    padded = [nn.functional.pad(image, (0, 96 - 71, 0, 64 - 50)) for image in masks]
    layout = lay_out_slots(COUNTS, 2, 3, "cpu")
    noise = PilotNoise(kind, 0.5)
    own = PilotMasks.prepare(masks, PADDED_SIZE, level_sizes, layout, noise, num_heads=1)
    full = PilotMasks.prepare(padded, PADDED_SIZE, level_sizes, layout, noise, num_heads=1)
    for level in range(3):
        left, right = (pilot_masks.draw_attention_mask(level, seeded(level)) for pilot_masks in (own, full))
        assert torch.equal(left, right)


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_dtype_of_the_masks_does_not_matter(kind, dtype):
    masks = random_masks(COUNTS)
    labels = [image.to(dtype) * (0.5 if dtype.is_floating_point else 1) for image in masks]
    left, right = (prepare(some, PilotNoise(kind, 0.5)) for some in (masks, [image.to(dtype) for image in labels]))
    assert torch.equal(left.draw_attention_mask(2, seeded()), right.draw_attention_mask(2, seeded()))


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize(("num_groups", "max_targets"), [(2, 3), (2, 0)])
def test_batch_without_segments_sees_everything(kind, num_groups, max_targets):
    masks = [torch.zeros(0, 64, 96, dtype=torch.bool), torch.zeros(0, 0, 0, dtype=torch.bool)]
    pilot_masks = prepare(masks, PilotNoise(kind, 0.5), num_groups, max_targets=max_targets)
    drawn = pilot_masks.draw_attention_mask(1)
    assert drawn.shape == (2, 1, num_groups * max_targets, 24)
    assert drawn.dtype == torch.bool
    assert not drawn.any()


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_no_groups_make_an_empty_attention_mask(kind):
    drawn = prepare(random_masks(COUNTS), PilotNoise(kind, 0.5), num_groups=0).draw_attention_mask(1)
    assert drawn.shape == (3, 1, 0, 24)


def test_masks_that_do_not_fit_name_their_image():
    masks = random_masks(COUNTS)
    masks[2] = torch.zeros(3, 64, 100, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"image 2 .*\(64, 96\), got \(3, 64, 100\)"):
        prepare(masks, PilotNoise("none"))


@pytest.mark.parametrize("masks", [random_masks([2, 3]), random_masks([2, 0, 2])])
def test_masks_must_be_those_that_were_laid_out(masks):
    layout = lay_out_slots(COUNTS, 1, 3, "cpu")
    with pytest.raises(ValueError, match="5 segments in 3 images, as laid out, got"):
        PilotMasks.prepare(masks, PADDED_SIZE, LEVEL_SIZES, layout, PilotNoise("none"), num_heads=1)


def test_unknown_noise_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="point, shift, scale, shift_scale, none, got 'points'"):
        PilotNoise("points")
    with pytest.raises(ValueError, match="point, shift, scale, shift_scale, none, got 'patch'"):
        replace(PilotNoise(), kind="patch")


@pytest.mark.parametrize("kind", ["point", "none"])
def test_only_geometric_noise_moves_masks(kind):
    with pytest.raises(ValueError, match=f"one of shift, scale, shift_scale, got '{kind}'"):
        move_masks(torch.ones(1, 4, 4, dtype=torch.bool), kind, 0.2)


# ------------------------------------------------------------------------------------------------------ geometric noise


def translate(mask: Tensor, down: int, right: int) -> Tensor:
    """Translation by a loop over pixels; what leaves the image is lost."""
    height, width = mask.shape
    moved = torch.zeros_like(mask)
    for y, x in mask.nonzero().tolist():
        if 0 <= y + down < height and 0 <= x + right < width:
            moved[y + down, x + right] = True
    return moved


def test_shift_moves_by_whole_pixels_up_to_half_the_box_times_the_ratio():
    num_masks, ratio = 3000, 0.5
    moved = shift_masks(rectangles(num_masks, (40, 70), (14, 20, 26, 50)), ratio, seeded())
    boxes = torch.tensor([box_of(mask) for mask in moved])
    assert (moved.sum((1, 2)) == 12 * 30).all()
    assert (boxes[:, 2:] - boxes[:, :2]).unique(dim=0).tolist() == [[12, 30]]
    shift = (boxes[:, :2] - torch.tensor([14, 20])).double()
    # Height 12 and width 30: uniform on [-3, 3] and [-7.5, 7.5], rounded.
    assert set(shift[:, 0].tolist()) == set(range(-3, 4))
    assert set(range(-7, 8)) <= set(shift[:, 1].tolist()) <= set(range(-8, 9))
    assert {(y > 0, x > 0) for y, x in shift.tolist() if y and x} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    deviation = torch.tensor([3.0, 7.5], dtype=torch.float64) / math.sqrt(3)
    assert (shift.mean(0).abs() < 3.3 * deviation / math.sqrt(num_masks)).all()
    assert ((shift**2).mean(0).sqrt() / deviation - 1).abs().max() < 0.05
    assert torch.corrcoef(shift.T)[0, 1].abs() < 3 / math.sqrt(num_masks)


def test_shift_draws_uniformly():
    shift = [box_of(mask)[1] - 30 for mask in shift_masks(rectangles(6000, (3, 80), (0, 30, 3, 50)), 1.0, seeded())]
    counts = torch.bincount(torch.tensor(shift) + 10, minlength=21)
    expected = torch.tensor([1 / 40] + [1 / 20] * 19 + [1 / 40])
    tolerance = 3.5 * (expected * (1 - expected) / 6000).sqrt()
    assert ((counts / 6000 - expected).abs() < tolerance).all()


def test_shifted_pixels_that_leave_the_image_vanish_and_background_enters():
    masks = random_masks([6], size=(20, 24), seed=2)[0]
    masks[0, :4, :7] = True
    masks[1, 12:, 15:] = True
    moved = shift_masks(masks, 1.0, seeded())
    lost = 0
    for clean, noised in zip(masks, moved, strict=True):
        top, left, bottom, right = box_of(clean)
        downs, rights = range(top - bottom, bottom - top + 1), range(left - right, right - left + 1)
        within = [(y, x) for y in downs for x in rights if 2 * abs(y) <= bottom - top and 2 * abs(x) <= right - left]
        assert any(torch.equal(translate(clean, y, x), noised) for y, x in within)
        lost += int(noised.sum() < clean.sum())
    assert lost


@pytest.mark.parametrize("ratio", [0.1, 0.4, 1.0])
def test_shift_keeps_as_much_overlap_as_its_ratio_promises(ratio):
    height, width = 24, 40
    clean = rectangles(500, (64, 96), (20, 28, 20 + height, 28 + width))
    moved = shift_masks(clean, ratio, seeded())
    overlap = (clean & moved).sum((1, 2)) / (clean | moved).sum((1, 2))
    smallest = (height - round(ratio * height / 2)) * (width - round(ratio * width / 2)) / (height * width)
    assert overlap.min() >= smallest / (2 - smallest) - 1e-6
    assert overlap.max() > overlap.min()


def test_scale_shrinks_and_grows_width_and_height_independently_about_the_centre():
    num_masks, ratio = 3000, 0.5
    moved = scale_masks(rectangles(num_masks, (60, 100), (18, 30, 42, 70)), ratio, seeded())
    boxes = torch.tensor([box_of(mask) for mask in moved], dtype=torch.float64)
    size = boxes[:, 2:] - boxes[:, :2]
    assert torch.equal(moved.sum((1, 2)).double(), size.prod(1))
    clean_size = torch.tensor([24.0, 40.0], dtype=torch.float64)
    assert (size >= (1 - ratio) * clean_size - 1).all()
    assert (size <= (1 + ratio) * clean_size + 1).all()
    assert ((boxes[:, :2] + boxes[:, 2:]) / 2 - torch.tensor([30.0, 50.0])).abs().max() <= 0.5
    factor = size / clean_size
    assert {(y > 1, x > 1) for y, x in factor.tolist()} == {(a, b) for a in (True, False) for b in (True, False)}
    deviation = ratio / math.sqrt(3)
    assert (factor.mean(0) - 1).abs().max() < 3 * deviation / math.sqrt(num_masks)
    assert (factor.std(0) / deviation - 1).abs().max() < 0.05
    assert torch.corrcoef(factor.T)[0, 1].abs() < 3 / math.sqrt(num_masks)


def test_scaling_takes_the_pixel_that_the_centre_comes_from():
    rows = torch.zeros(30, dtype=torch.bool)
    columns = torch.zeros(40, dtype=torch.bool)
    rows[[6, 7, 9, 12, 13, 14, 18, 21, 22]] = True  # box from 6 to 23
    columns[[4, 8, 9, 10, 15, 16, 19, 24, 27]] = True  # box from 4 to 28
    mask = rows[:, None] & columns[None, :]
    possible_rows, possible_columns = resized_lines(rows, centre=14.5), resized_lines(columns, centre=16.0)
    seen = set()
    for moved in scale_masks(mask.expand(200, -1, -1), 0.7, seeded()):
        row_line, column_line = moved.any(1), moved.any(0)
        assert torch.equal(moved, row_line[:, None] & column_line[None, :])
        assert tuple(row_line.tolist()) in possible_rows
        assert tuple(column_line.tolist()) in possible_columns
        seen.add((tuple(row_line.tolist()), tuple(column_line.tolist())))
    assert len(seen) > 150


def resized_lines(line: Tensor, centre: float) -> set[tuple[bool, ...]]:
    """All that nearest sampling about a centre can make of a line, by factors from 0.3 to 1.7.

    The result changes where a pixel centre comes from the border of two pixels; one factor between two such changes is
    enough.
    """
    targets = [target + 0.5 - centre for target in range(len(line))]
    borders = [edge - centre for edge in range(len(line) + 1)]
    changes = {target / border for target in targets for border in borders if border}
    changes = [0.3, *sorted(change for change in changes if 0.3 < change < 1.7), 1.7]
    lines = set()
    for low, high in itertools.pairwise(changes):
        sources = [math.floor(centre + 2 * target / (low + high)) for target in targets]
        lines.add(tuple(0 <= source < len(line) and bool(line[source]) for source in sources))
    return lines


@pytest.mark.parametrize("kind", ["scale", "shift_scale"])
def test_filled_masks_survive_the_strongest_scaling(kind):
    masks = rectangles(4000, (40, 40), (16, 14, 23, 26))
    moved = move_masks(masks, kind, 1.0, seeded())
    assert moved.any(2).any(1).all()
    assert moved.sum((1, 2)).min() < 10


def test_shift_and_scale_together_change_place_and_size():
    num_masks, ratio = 2000, 0.4
    moved = move_masks(rectangles(num_masks, (80, 120), (30, 40, 50, 80)), "shift_scale", ratio, seeded())
    boxes = torch.tensor([box_of(mask) for mask in moved], dtype=torch.float64)
    size, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2
    clean_size = torch.tensor([20.0, 40.0], dtype=torch.float64)
    shift, factor = centre - torch.tensor([40.0, 60.0]), size / clean_size
    # Relative to the clean box, also when the mask is resized.
    assert (shift.abs() <= ratio * clean_size / 2 + 1).all()
    assert (shift.std(0) / (ratio * clean_size / 2 / math.sqrt(3)) - 1).abs().max() < 0.08
    assert (factor.std(0) / (ratio / math.sqrt(3)) - 1).abs().max() < 0.08
    every = torch.corrcoef(torch.cat([shift, factor], dim=1).T)
    assert (every - torch.eye(4)).abs().max() < 3.5 / math.sqrt(num_masks)


@pytest.mark.parametrize("kind", MOVES)
def test_moving_keeps_empty_masks_empty_and_other_masks_unaware_of_them(kind):
    masks = random_masks([3])[0]
    masks[1] = False
    moved = move_masks(masks, kind, 0.5, seeded())
    assert moved.dtype == torch.bool
    assert not moved[1].any()
    assert moved[0].any()
    assert moved[2].any()


@pytest.mark.parametrize("kind", MOVES)
def test_moving_leaves_its_input_untouched(kind):
    masks = random_masks([3])[0]
    clean = masks.clone()
    assert not torch.equal(move_masks(masks, kind, 0.5, seeded()), clean)
    assert torch.equal(masks, clean)


@pytest.mark.parametrize("kind", MOVES)
def test_moving_nothing_or_by_nothing_needs_no_draw(kind):
    generator = seeded()
    before = generator.get_state()
    masks = random_masks([3])[0]
    assert torch.equal(move_masks(masks, kind, 0.0, generator), masks)
    assert move_masks(masks[:0], kind, 0.5, generator).shape == (0, 64, 96)
    assert torch.equal(generator.get_state(), before)


def test_masks_of_one_call_move_independently():
    moved = shift_masks(rectangles(8, (64, 96), (20, 30, 44, 66)), 1.0, seeded())
    assert len({box_of(mask) for mask in moved}) == 8
