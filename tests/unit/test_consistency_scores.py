"""Layer consistency over many images: means by hand, in any order, over any number of collections."""

import itertools
import json
import random
from fractions import Fraction

import numpy as np
import pytest
from transformers import EomtConfig, Mask2FormerConfig, MaskFormerConfig, OneFormerConfig

from mpformer_hf.layer_consistency import LayerConsistency
from mpformer_hf.mask_matching import CostWeights
from tests.factories import tiny_config
from training.metrics.consistency import LayerConsistencyScores, format_consistency, matching_weights


def two_level_image(iou, first, last):
    """Three queries: IoUs, and the segments of the two levels."""
    return LayerConsistency(np.array([iou]), np.array([first, last]))


IMAGES = {
    3: two_level_image([0.5, 1.0, 0.0], [0, 1, -1], [0, -1, 1]),  # matched: queries 0 and 2
    10: two_level_image([0.25, 0.25, 1.0], [-1, -1, -1], [-1, -1, -1]),
    2: two_level_image([0.0, 0.0, 0.75], [2, 0, 1], [2, 0, 1]),
}


def scores_of(images):
    scores = LayerConsistencyScores()
    for image_id, image in images.items():
        scores.add(image_id, image)
    return scores


def test_means_run_over_images_and_leave_out_those_without_matched_queries():
    assert scores_of(IMAGES).compute() == {
        "levels": 2,
        "mIoU_L": [pytest.approx((0.5 + 0.5 + 0.25) / 3)],
        "mIoU_L_matched": [pytest.approx((0.25 + 0.25) / 2)],
        "Util": [pytest.approx((0.5 + 1.0) / 2)],
        "num_images": 3,
        "num_images_matched": 2,
    }


def test_without_a_matched_query_in_any_image_there_are_no_means_of_matched_ones():
    result = scores_of({10: IMAGES[10]}).compute()
    assert (result["mIoU_L"], result["mIoU_L_matched"], result["Util"]) == ([0.5], None, None)
    assert (result["num_images"], result["num_images_matched"]) == (1, 0)
    json.dumps(result, allow_nan=False)


def test_without_images_there_are_no_means_at_all():
    result = LayerConsistencyScores().compute()
    assert result == dict.fromkeys(("levels", "mIoU_L", "mIoU_L_matched", "Util")) | {
        "num_images": 0,
        "num_images_matched": 0,
    }


def test_order_and_number_of_collections_change_no_digit():
    rng = np.random.default_rng(0)
    images = {
        image_id: LayerConsistency(rng.random((3, 7)), rng.integers(-1, 3, (4, 7)))
        for image_id in [*range(20), "a", "b"]
    }
    expected = scores_of(images).compute()
    keys = list(images)
    for number in (1, 2, 3):
        random.Random(number).shuffle(keys)
        parts = [scores_of({key: images[key] for key in keys[part::number]}) for part in range(number)]
        merged, loaded = LayerConsistencyScores(), LayerConsistencyScores()
        for part in parts:
            merged.merge(part)
            loaded.load(part.dump())
        assert merged.compute() == loaded.compute() == expected
    # The sums are exact, rounded once.
    sums = [sum(Fraction(image.mean_iou[level]) for image in images.values()) for level in range(3)]
    assert expected["mIoU_L"] == [float(total) / 22 for total in sums]


def test_an_image_is_added_once_and_all_have_the_same_levels():
    scores = scores_of(IMAGES)
    with pytest.raises(ValueError, match="Image 10 was added before"):
        scores.add(10, IMAGES[10])
    other = LayerConsistency(np.zeros((3, 2)), np.zeros((4, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="Image 'x' has 4 levels, image 3 has 2"):
        scores.add("x", other)
    scores.merge(scores_of({"x": other}))
    with pytest.raises(ValueError, match="The images have 2, 4 levels"):
        scores.compute()


def test_the_table_has_a_row_for_each_level_but_the_last():
    rows = [line.split() for line in format_consistency(scores_of(IMAGES).compute()).splitlines()]
    assert rows == [["level", "mIoU-L", "mIoU-L", "matched", "Util"], ["0", "41.7", "25.0", "75.0"]]
    assert format_consistency(scores_of({10: IMAGES[10]}).compute()).splitlines()[1].split() == ["0", "50.0", "-", "-"]
    assert len(format_consistency(LayerConsistencyScores().compute()).splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (tiny_config(class_weight=1.5, mask_weight=7.0, dice_weight=3.0), (1.5, 7.0, 3.0)),
        (Mask2FormerConfig(), (2.0, 5.0, 5.0)),
        (OneFormerConfig(), (2.0, 5.0, 5.0)),
        (EomtConfig(), (2.0, 5.0, 5.0)),
        (MaskFormerConfig(), (1.0, 20.0, 1.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_of_the_matching_are_those_of_the_config(config, weights):
    assert matching_weights(config) == CostWeights(*weights)


def test_every_subset_of_the_images_counts_its_images():
    for number, keys in itertools.product(range(4), [list(IMAGES)]):
        for subset in itertools.combinations(keys, number):
            result = scores_of({key: IMAGES[key] for key in subset}).compute()
            assert result["num_images"] == number
            assert result["num_images_matched"] == number - (10 in subset)
