"""Scores by image: their order, their way through JSON, and the union of several collections."""

import functools
import json
import math
import operator

import numpy as np
import pytest
import torch

from training.metrics.image_scores import ImageScores, to_numpy


class Numbers(ImageScores[list[float]]):
    """Keeps some numbers of each image, and adds them one after the other in the order of the ids."""

    def __init__(self, unit="m", **scores):
        super().__init__()
        self.unit = unit
        for image_id, score in scores.items():
            self.keep(image_id, score)

    def settings(self):
        return {"unit": self.unit}

    def compute(self):
        return add_up(number for _, numbers in self.in_order() for number in numbers)


def add_up(numbers):
    """Sum up with the rounding errors that Python 3.12's `sum` avoids."""
    return functools.reduce(operator.add, numbers, 0.0)


def collect(scores):
    numbers = Numbers()
    for image_id, score in scores:
        numbers.keep(image_id, score)
    return numbers


def test_integer_ids_come_first_by_value_then_text_by_alphabet():
    ids = ["b", 10, "10", 9, "a", -1, "B", 100]
    numbers = collect((image_id, [0.0]) for image_id in ids)
    assert [image_id for image_id, _ in numbers.in_order()] == [-1, 9, 10, 100, "10", "B", "a", "b"]


def test_a_number_and_its_text_are_two_images():
    numbers = collect([(1, [1.0]), ("1", [2.0])])
    assert len(numbers) == 2
    assert 1 in numbers
    assert "1" in numbers
    assert 2 not in numbers


def test_sum_in_the_order_of_ids_does_not_depend_on_the_order_of_images():
    scores = [(number, [2.0**53 if number == 9 else 1.0]) for number in range(10)]
    expected = collect(scores).compute()
    assert collect(scores[::-1]).compute() == expected
    assert add_up(score[0] for _, score in scores[::-1]) != expected, "these numbers do not tell orders apart"


AWKWARD = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2.0**53 + 2, math.pi]


def test_dumped_and_loaded_scores_are_the_same_digit_by_digit():
    rng = np.random.default_rng(0)
    numbers = collect([(1, AWKWARD), ("é\n\u2028", rng.random(100).tolist()), ("1", [])])
    lines = numbers.dump()
    assert len(lines) == 3
    assert all("\n" not in line for line in lines)
    loaded = Numbers()
    loaded.load(lines)
    assert list(loaded.in_order()) == list(numbers.in_order())
    assert [math.copysign(1, number) for number in dict(loaded.in_order())[1]] == [1, 1, 1, 1, -1, 1, 1]
    assert loaded.dump() == lines


def test_a_line_is_json_with_the_image_and_its_score():
    assert [json.loads(line) for line in collect([(3, [0.5]), ("3", [])]).dump()] == [[3, [0.5]], ["3", []]]


def test_merged_image_that_both_know_counts_once():
    first, second = collect([(1, [1.0]), (2, [2.0])]), collect([(2, [2.0]), ("2", [4.0])])
    first.merge(second)
    assert first.compute() == 7.0
    assert len(first) == 3
    assert second.compute() == 6.0, "what is merged stays as it was"


def test_loaded_image_that_is_known_counts_once():
    numbers = collect([(1, [1.0]), (2, [2.0])])
    numbers.load(collect([(2, [2.0]), (3, [4.0])]).dump() * 2)
    assert numbers.compute() == 7.0


def test_merging_needs_the_same_settings_and_the_same_metric():
    with pytest.raises(ValueError, match=r"same settings.*\{'unit': 'm'\} here, \{'unit': 'ft'\} there"):
        Numbers().merge(Numbers(unit="ft"))

    class OtherNumbers(Numbers):
        """The same settings, other scores."""

    with pytest.raises(ValueError, match=r"same kind.*Numbers here, OtherNumbers there"):
        Numbers().merge(OtherNumbers())


def test_an_image_is_kept_once_until_reset():
    numbers = collect([("a", [1.0])])
    with pytest.raises(ValueError, match="'a' was added before"):
        numbers.keep("a", [2.0])
    assert numbers.compute() == 1.0
    numbers.reset()
    assert len(numbers) == 0
    numbers.keep("a", [2.0])
    assert numbers.compute() == 2.0


def test_arrays_lists_and_tensors_that_need_gradients_become_arrays():
    for values in ([1.0, 2.0], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0], requires_grad=True)):
        array = to_numpy(values)
        assert type(array) is np.ndarray
        assert array.tolist() == [1.0, 2.0]
