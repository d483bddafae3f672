"""Layer consistency against a loop over cells and all permutations, by hand, and on models of several families.

Axes: V levels, B images, Q queries, T segments of one image, K classes.
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    DetrConfig,
    EomtConfig,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
)

from mpformer_hf.layer_consistency import (
    LayerConsistency,
    cell_shares,
    enlarge_masks,
    image_layer_consistency,
    level_logits,
)
from mpformer_hf.mask_matching import CostWeights
from tests.factories import random_images, tiny_backbone_config, tiny_model

WEIGHTS = CostWeights(label=2.0, mask=5.0, dice=3.0)


def measure(class_logits, mask_logits, mask_labels, class_labels, valid_size=None, weights=WEIGHTS):
    return image_layer_consistency(class_logits, mask_logits, mask_labels, class_labels, valid_size, weights=weights)


def binary_logits(*masks):
    """Mask logits of 4 or -4 from nested lists of 0 and 1."""
    return torch.tensor(masks) * 8.0 - 4.0


# ----------------------------------------------------------------------------------------------- a plain implementation


def share_by_counting(mask, valid, cell, fineness=12):
    """Share of a cell's valid part inside a mask (H, W), counted on a grid that divides every pixel involved."""
    inside = total = 0
    bounds = [range(4 * cell[axis] * fineness, min(4 * cell[axis] + 4, valid[axis]) * fineness) for axis in (0, 1)]
    for y, x in itertools.product(*bounds):
        row = int((y + 0.5) / fineness * mask.shape[0] / valid[0])
        column = int((x + 0.5) / fineness * mask.shape[1] / valid[1])
        inside += bool(mask[row, column])
        total += 1
    return inside / total


def plain_cost(class_logits, mask_logits, shares, label):
    """Cost of one query, lists of logits, and one segment, list of shares; cell by cell."""
    exponentials = [math.exp(value) for value in class_logits]
    cross_entropy = overlap = area = 0.0
    for logit, share in zip(mask_logits, shares, strict=True):
        probability = 1 / (1 + math.exp(-logit))
        cross_entropy -= share * math.log(probability) + (1 - share) * math.log(1 - probability)
        overlap += probability * share
        area += probability + share
    dice = 1 - (2 * overlap + 1) / (area + 1)
    class_cost = -exponentials[label] / sum(exponentials)
    return WEIGHTS.label * class_cost + WEIGHTS.mask * cross_entropy / len(shares) + WEIGHTS.dice * dice


def plain_matches(costs, num_queries, num_segments):
    """The assignment of least cost among all; costs[query][segment]."""
    best, least = (), math.inf
    for queries in itertools.permutations(range(num_queries), num_segments):
        total = sum(costs[query][segment] for segment, query in enumerate(queries))
        if total < least:
            best, least = queries, total
    return [best.index(query) if query in best else -1 for query in range(num_queries)]


def plain_iou(one, other):
    both = sum(a > 0 and b > 0 for a, b in zip(one, other, strict=True))
    either = sum(a > 0 or b > 0 for a, b in zip(one, other, strict=True))
    return both / either if either else 1.0


def plain_consistency(class_logits, mask_logits, mask_labels, class_labels, valid):
    """IoUs [V - 1][Q] and matches [V][Q]."""
    cells = list(itertools.product(range(math.ceil(valid[0] / 4)), range(math.ceil(valid[1] / 4))))
    shares = [[share_by_counting(mask, valid, cell) for cell in cells] for mask in mask_labels]
    levels = [[[float(query[cell]) for cell in cells] for query in level] for level in mask_logits]
    matches = []
    for classes, masks in zip(class_logits.tolist(), levels, strict=True):
        costs = [
            [plain_cost(*query, share, label) for share, label in zip(shares, class_labels, strict=True)]
            for query in zip(classes, masks, strict=True)
        ]
        matches.append(plain_matches(costs, len(masks), len(shares)))
    ious = [[plain_iou(*pair) for pair in zip(one, other, strict=True)] for one, other in itertools.pairwise(levels)]
    return ious, matches


@pytest.mark.parametrize(
    ("size", "valid"),
    [((9, 12), (9, 12)), ((18, 24), (9, 12)), ((6, 4), (9, 12)), ((7, 9), (14, 6)), ((16, 16), (16, 16))],
    ids=["as processed", "reduced", "enlarged", "squashed", "no padding"],
)
def test_consistency_equals_a_loop_over_cells_and_all_permutations(size, valid):
    class_logits, mask_logits = torch.randn(3, 4, 3), 2 * torch.randn(3, 4, 4, 4) - 0.5
    mask_labels, class_labels = torch.rand(2, *size) < 0.4, [1, 0]
    consistency = measure(class_logits, mask_logits, mask_labels, class_labels, valid)
    ious, matches = plain_consistency(class_logits, mask_logits, mask_labels, class_labels, valid)
    np.testing.assert_allclose(consistency.query_iou, ious, rtol=1e-12)
    np.testing.assert_array_equal(consistency.matches, matches)


def test_shares_of_a_cell_equal_a_count_on_a_finer_grid():
    masks, valid = torch.rand(2, 5, 8) < 0.5, (6, 10)
    expected = [
        [share_by_counting(mask, valid, cell, fineness=20) for cell in itertools.product(range(2), range(3))]
        for mask in masks
    ]
    torch.testing.assert_close(cell_shares(masks, valid), torch.tensor(expected))


# -------------------------------------------------------------------------------------------------------------- by hand


def test_iou_of_neighbouring_levels_by_hand():
    mask_logits = binary_logits(
        [[[1, 1], [0, 0]], [[1, 1], [1, 1]]],
        [[[1, 1], [1, 0]], [[0, 0], [0, 1]]],  # 2 of 3, 1 of 4
        [[[0, 0], [0, 1]], [[0, 0], [0, 1]]],  # 0 of 4, 1 of 1
    )
    consistency = measure(torch.zeros(3, 2, 2), mask_logits, torch.zeros(0, 8, 8), [])
    np.testing.assert_allclose(consistency.query_iou, [[2 / 3, 1 / 4], [0, 1]])
    assert consistency.mean_iou == pytest.approx([11 / 24, 1 / 2])


def test_two_empty_masks_agree_and_an_empty_one_disagrees_with_any_other():
    empty, full = [[0, 0]], [[1, 1]]
    mask_logits = binary_logits([empty, empty, full], [empty, full, empty])
    consistency = measure(torch.zeros(2, 3, 2), mask_logits, np.zeros((0, 4, 8), dtype=bool), [])
    np.testing.assert_array_equal(consistency.query_iou, [[1, 0, 0]])


def test_a_logit_of_zero_is_outside():
    consistency = measure(torch.zeros(2, 1, 2), torch.tensor([[[[0.0, 1.0]]], [[[1.0, 1.0]]]]), np.ones((1, 4, 8)), [0])
    assert consistency.mean_iou == [0.5]


def test_utilisation_counts_the_queries_that_keep_their_segment():
    matches = np.array([[0, 1, 2, -1], [0, -1, 1, 2], [0, 1, -1, 2]])
    consistency = LayerConsistency(np.array([[0.2, 0.3, 0.0, 1.0], [1.0, 0.5, 0.0, 0.0]]), matches)
    # At the last level queries 0, 1 and 3 are matched, to 0, 1 and 2.
    assert consistency.utilisation == pytest.approx([2 / 3, 2 / 3])
    assert consistency.matched_mean_iou == pytest.approx([0.5, 0.5])
    assert consistency.mean_iou == pytest.approx([0.375, 0.375])
    assert consistency.least_consistent_query() == 1, "query 2 changes more, but is not matched"
    assert [consistency.query_of_segment(target) for target in range(4)] == [0, 1, 3, None]


def test_queries_that_swap_their_segments_at_one_level_are_not_used_there():
    left, right = [[1, 0]], [[0, 1]]
    mask_logits = binary_logits([left, right], [right, left], [left, right])
    mask_labels = np.zeros((2, 4, 8), dtype=bool)
    mask_labels[0, :, :4] = mask_labels[1, :, 4:] = True
    consistency = measure(torch.zeros(3, 2, 2), mask_logits, mask_labels, [0, 0])
    np.testing.assert_array_equal(consistency.matches, [[0, 1], [1, 0], [0, 1]])
    assert consistency.utilisation == [1.0, 0.0]


@pytest.mark.parametrize(("weights", "query"), [((1.0, 0.0, 0.0), 0), ((0.0, 1.0, 0.0), 1), ((0.0, 0.0, 1.0), 1)])
def test_each_weight_decides_alone_when_the_others_are_zero(weights, query):
    # Query 0 has the class, query 1 the mask.
    class_logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]]).expand(2, -1, -1)
    mask_logits = binary_logits([[[0, 1]], [[1, 0]]]).expand(2, -1, -1, -1)
    mask_labels = np.zeros((1, 4, 8), dtype=bool)
    mask_labels[0, :, :4] = True
    consistency = measure(class_logits, mask_logits, mask_labels, [0], weights=CostWeights(*weights))
    assert consistency.query_of_segment(0) == query


def test_an_image_without_segments_has_no_matched_queries():
    consistency = measure(torch.zeros(3, 2, 4), torch.randn(3, 2, 4, 4), np.zeros((0, 9, 7), dtype=bool), [])
    assert (consistency.matches == -1).all()
    assert consistency.matched_mean_iou is None
    assert consistency.utilisation is None
    assert consistency.least_consistent_query() in (0, 1)


def test_with_more_segments_than_queries_every_query_is_matched():
    consistency = measure(torch.zeros(2, 2, 4), torch.randn(2, 2, 4, 4), torch.rand(5, 16, 16) < 0.5, [0, 1, 2, 0, 1])
    assert consistency.is_matched.all()
    assert sum(consistency.query_of_segment(target) is None for target in range(5)) == 3


# ---------------------------------------------------------------------------------------------- what has no influence


def test_predictions_in_the_padding_have_no_influence():
    class_logits, mask_logits = torch.randn(3, 5, 4), torch.randn(3, 5, 8, 8)
    targets = (torch.rand(2, 40, 26) < 0.5, [2, 0])
    other = mask_logits.clone()
    other[:, :, 5:] = torch.nan  # 20 rows are valid: five cells
    other[:, :, :, 4:] = 100.0  # 13 columns: three cells and a quarter
    expected, result = (measure(class_logits, logits, *targets, (20, 13)) for logits in (mask_logits, other))
    np.testing.assert_array_equal(result.query_iou, expected.query_iou)
    np.testing.assert_array_equal(result.matches, expected.matches)
    other[0, 0, 0, 3] = -other[0, 0, 0, 3]  # the column that is valid in part
    assert (measure(class_logits, other, *targets, (20, 13)).query_iou != expected.query_iou).any()


@pytest.mark.parametrize("kind", ["uint8", "float", "read-only array", "list of levels", "float64", "tensor of sizes"])
def test_every_form_of_the_same_input_gives_the_same_numbers(kind):
    class_logits, mask_logits = torch.randn(2, 5, 4), torch.randn(2, 5, 8, 8)
    mask_labels, class_labels, valid = torch.rand(2, 32, 20) < 0.5, torch.tensor([2, 0]), (30, 19)
    expected = measure(class_logits, mask_logits, mask_labels, class_labels, valid)
    match kind:
        case "uint8":
            mask_labels = 255 * mask_labels.to(torch.uint8)
        case "float":
            mask_labels = mask_labels.float()
        case "read-only array":
            mask_labels, class_labels = mask_labels.numpy(), class_labels.numpy()
            mask_labels.setflags(write=False)
            class_labels.setflags(write=False)
        case "list of levels":
            class_logits, mask_logits = list(class_logits), list(mask_logits)
        case "float64":
            class_logits, mask_logits = class_logits.double(), mask_logits.double()
        case "tensor of sizes":
            valid = torch.tensor(valid)
    result = measure(class_logits, mask_logits, mask_labels, class_labels, valid)
    np.testing.assert_array_equal(result.query_iou, expected.query_iou)
    np.testing.assert_array_equal(result.matches, expected.matches)


def test_gradients_autocast_and_infinities_do_no_harm():
    class_logits, mask_logits = torch.randn(2, 5, 4), torch.randn(2, 5, 8, 8)
    targets = (torch.rand(2, 32, 32) < 0.5, [2, 0])
    mask_logits[:, 0, 0, 0] = -1e4
    expected = measure(class_logits, mask_logits, *targets)
    mask_logits[:, 0, 0, 0] = -torch.inf
    with torch.autocast("cpu"):
        result = measure(class_logits.requires_grad_(), mask_logits.requires_grad_(), *targets)
    np.testing.assert_array_equal(result.query_iou, expected.query_iou)
    np.testing.assert_array_equal(result.matches, expected.matches)


def test_logits_and_ground_truth_are_left_as_they_are():
    inputs = [torch.randn(2, 5, 4), torch.randn(2, 5, 8, 8), torch.rand(2, 32, 32), torch.tensor([2, 0])]
    before = [tensor.clone() for tensor in inputs]
    measure(*inputs)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


# --------------------------------------------------------------------------------------------------------------- models


def consistencies(model, images, targets, pixel_mask=None, **arguments):
    with torch.no_grad():
        outputs = model(images, pixel_mask=pixel_mask, output_auxiliary_logits=True, **arguments)
    levels = level_logits(outputs)
    sizes = [None] * len(images) if pixel_mask is None else [(40, 64), (64, 96)]
    return [measure(*levels.of_image(index), *targets[index], sizes[index]) for index in range(len(images))]


def two_images():
    """Images of 40 x 64 and 64 x 96, padded, their mask, and ground truth at other sizes."""
    pixel_mask = torch.zeros(2, 64, 96, dtype=torch.int64)
    pixel_mask[0, :40, :64] = 1
    pixel_mask[1] = 1
    targets = [(torch.rand(3, 80, 128) < 0.5, [2, 0, 1]), (torch.rand(1, 30, 45) < 0.5, [1])]
    return random_images(2, (64, 96)), targets, pixel_mask


def test_mpformer_and_transformers_mask2former_of_the_same_weights_agree():
    model = tiny_model()
    twin = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(**{**model.config.to_dict(), "backbone_config": tiny_backbone_config()})
    ).eval()
    weights = model.state_dict()
    weights.pop("model.transformer_module.pilot_label_embedder.weight")
    twin.load_state_dict(weights)
    batch = two_images()
    for one, other in zip(consistencies(model, *batch), consistencies(twin, *batch), strict=True):
        assert len(one.matches) == 4  # levels of tiny_config
        np.testing.assert_array_equal(one.matches, other.matches)
        # A logit so near to zero that rounding moves it across changes one cell of some hundred.
        np.testing.assert_allclose(one.query_iou, other.query_iou, atol=0.02)
        assert 0.05 < one.query_iou.mean() < 0.999


def test_a_batch_gives_what_its_images_give_one_by_one():
    model = tiny_model()
    images, targets, pixel_mask = two_images()
    together = consistencies(model, images, targets, pixel_mask)
    with torch.no_grad():
        for index, size in enumerate([(40, 64), (64, 96)]):
            part = slice(index, index + 1)
            outputs = model(images[part], pixel_mask=pixel_mask[part], output_auxiliary_logits=True)
            assert outputs.image_sizes.tolist() == [list(size)]
            alone = measure(*level_logits(outputs).of_image(0), *targets[index], outputs.image_sizes[0])
            np.testing.assert_array_equal(alone.matches, together[index].matches)
            np.testing.assert_allclose(alone.query_iou, together[index].query_iou, atol=0.02)


def test_levels_are_in_order_and_the_last_is_the_models_prediction():
    with torch.no_grad():
        outputs = tiny_model()(random_images(), output_auxiliary_logits=True)
    levels = level_logits(outputs)
    assert len(levels.mask_logits) == len(levels.class_logits) == 4
    assert levels.mask_logits[-1] is outputs.masks_queries_logits
    assert levels.class_logits[-1] is outputs.class_queries_logits
    for level in range(3):
        assert levels.mask_logits[level] is outputs.auxiliary_logits[level]["masks_queries_logits"]
        assert levels.class_logits[level] is outputs.auxiliary_logits[level]["class_queries_logits"]


def test_maskformer_has_a_level_for_each_hidden_state_of_its_decoder():
    config = MaskFormerConfig(
        backbone_config=tiny_backbone_config("swin"),
        decoder_config=DetrConfig(
            d_model=32, encoder_layers=1, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32, num_queries=5
        ),
        mask_feature_size=32,
        fpn_feature_size=32,
        num_labels=3,
        use_auxiliary_loss=True,
    )
    model = MaskFormerForInstanceSegmentation(config).eval()
    result = consistencies(model, *two_images(), output_hidden_states=True)[0]
    assert result.query_iou.shape == (2, 5)
    assert np.ptp(result.matches[-1][result.is_matched]) == 2


def test_auxiliary_predictions_of_oneformer_are_read_under_their_name():
    level = {"class_queries_logits": torch.zeros(1, 2, 3), "masks_queries_logits": torch.zeros(1, 2, 4, 4)}
    outputs = SimpleNamespace(
        auxiliary_predictions=(level,),
        class_queries_logits=torch.ones(1, 2, 3),
        masks_queries_logits=torch.ones(1, 2, 4, 4),
    )
    assert [float(masks.mean()) for masks in level_logits(outputs).mask_logits] == [0, 1]


def test_models_of_one_level_are_refused():
    config = EomtConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_queries=5,
        num_labels=3,
        num_blocks=1,
    )
    with torch.no_grad():
        outputs = EomtForUniversalSegmentation(config).eval()(random_images(1, (32, 32)))
        with pytest.raises(ValueError, match=r"EomtForUniversalSegmentationOutput holds one level.*EoMT"):
            level_logits(outputs)
        model = tiny_model()
        for outputs in (model(random_images()), model(random_images(), return_dict=False)):
            with pytest.raises(ValueError, match=r"one level.*`output_auxiliary_logits=True`"):
                level_logits(outputs)


def test_levels_of_different_sizes_are_refused():
    level = {"class_queries_logits": torch.zeros(1, 2, 3), "masks_queries_logits": torch.zeros(1, 2, 8, 8)}
    outputs = SimpleNamespace(
        auxiliary_logits=[level], class_queries_logits=torch.ones(1, 2, 3), masks_queries_logits=torch.ones(1, 2, 4, 4)
    )
    with pytest.raises(
        ValueError, match=r"Level 0 has mask logits of \(1, 2, 8, 8\), the last level of \(1, 2, 4, 4\)"
    ):
        level_logits(outputs)


# --------------------------------------------------------------------------------------------- pictures and bad input


def test_enlarged_masks_take_the_cell_in_which_the_centre_of_a_pixel_lies():
    mask_logits, valid, size = torch.randn(3, 4, 4), (14, 9), (10, 21)
    expected = torch.zeros(3, *size, dtype=torch.bool)
    for row, column in itertools.product(range(10), range(21)):
        cell = (int((row + 0.5) * 14 / 10 / 4), int((column + 0.5) * 9 / 21 / 4))
        expected[:, row, column] = mask_logits[:, cell[0], cell[1]] > 0
    assert torch.equal(enlarge_masks(mask_logits, size, valid), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"class_logits": torch.zeros(1, 2, 3), "mask_logits": torch.zeros(1, 2, 4, 4)},
            "two or more levels, got 1 and 1",
        ),
        ({"class_logits": torch.zeros(3, 2, 3)}, "got 3 and 2 levels"),
        ({"mask_logits": torch.zeros(2, 1, 2, 4, 4)}, r"one image.*level 0 has \(2, 3\) and \(1, 2, 4, 4\).*of_image"),
        ({"mask_logits": [torch.zeros(2, 4, 4), torch.zeros(2, 8, 8)]}, r"level 1 has \(2, 3\) and \(2, 8, 8\)"),
        ({"valid_size": (17, 16)}, "padded image of 16 x 16.*got 17 x 16"),
        ({"valid_size": (0, 16)}, "got 0 x 16"),
        ({"class_labels": [0, 1]}, r"masks of \(1, 8, 8\) and labels of \(2,\)"),
        ({"mask_labels": torch.ones(8, 8)}, r"masks of \(8, 8\)"),
        ({"class_labels": [2]}, r"in \[0, 2\).*got 2 to 2"),
        ({"class_labels": [-1]}, "got -1 to -1"),
        ({"mask_logits": torch.full((2, 2, 4, 4), torch.nan)}, "level 0, 1 hold NaN"),
        ({"class_logits": [torch.zeros(2, 3), torch.full((2, 3), torch.nan)]}, "level 1 hold NaN"),
    ],
)
def test_what_cannot_be_compared_is_explained(change, message):
    arguments = {
        "class_logits": torch.zeros(2, 2, 3),
        "mask_logits": torch.zeros(2, 2, 4, 4),
        "mask_labels": torch.ones(1, 8, 8),
        "class_labels": [1],
    }
    with pytest.raises(ValueError, match=message):
        measure(**{**arguments, **change})
