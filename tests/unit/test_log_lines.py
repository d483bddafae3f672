"""Lines of the log: names of levels, scores, and files that are none."""

import json

import pytest
import torch

from mpformer_hf.mask_losses import name_terms
from training.log_lines import LogError, levels_of, name_levels, read_log, scores_of, split_levels


def test_levels_are_numbered_in_the_order_of_the_criterion():
    # Level v of three has the value v, plus 10 for the second kind, plus 100 for pilots.
    level = torch.tensor([0.0, 1.0, 2.0])
    terms = {"loss_cross_entropy": level, "loss_mask": 10 + level, "loss_pilot_mask": 100 + level}
    split = split_levels(name_terms(terms))
    assert {name: value.item() for name, value in split.items()} == {
        "level/0/cross_entropy": 0,
        "level/0/mask": 10,
        "level/0/pilot_mask": 100,
        "level/1/cross_entropy": 1,
        "level/1/mask": 11,
        "level/1/pilot_mask": 101,
        "level/2/cross_entropy": 2,
        "level/2/mask": 12,
        "level/2/pilot_mask": 102,
    }
    assert list(split)[:2] == ["level/0/cross_entropy", "level/0/mask"]


def test_a_single_level_is_level_0():
    assert split_levels({"loss_mask": 1.5}) == {"level/0/mask": 1.5}


def test_more_than_ten_levels_stay_in_order():
    loss_dict = {"loss_mask": 11.0, **{f"loss_mask_{level}": float(level) for level in range(11)}}
    assert list(split_levels(loss_dict).values()) == list(range(12))


def test_lists_of_levels_and_names_of_levels_say_the_same():
    line = {"step": 1, "loss": 3.0, "levels": {"mask": [1.0, 2.0], "dice": [3.0]}}
    names = {"level/0/mask": 1.0, "level/0/dice": 3.0, "level/1/mask": 2.0}
    assert name_levels(levels_of(line)) == names
    assert levels_of({"step": 1, "loss": 3.0, **names}) == line["levels"]


def test_scores_of_averages_say_so_and_undefined_ones_are_left_out():
    line = {"step": 5, "scores": {"PQ": 0.5, "AP small": -1.0}, "scores_of_average": {"PQ": 0.25}, "alarms": ["one"]}
    assert scores_of(line) == {"PQ": 0.5, "PQ of average": 0.25}
    assert scores_of({"step": 5, "panoptic_quality": {"All": 0.5}}) == {"panoptic quality All": 0.5}
    assert scores_of({"step": 5, "loss": 0.5, "mask": 0.25}) == {}


def test_a_log_is_read_line_by_line(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("inf")}]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_log(path) == lines


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"step": 1}\n{"step": ', "log.jsonl, line 2, is no JSON"),
        ('{"loss": 1}\n', "log.jsonl, line 1, is no line of a training"),
        ("[1]\n", "is no line of a training"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_log_is_named(tmp_path, text, sentence):
    path = tmp_path / "log.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LogError, match=sentence):
        read_log(path)
