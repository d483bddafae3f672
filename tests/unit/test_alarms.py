"""Alarms: each cause is told when it is there, once, and not when all is well."""

import json
import math

import pytest
import torch

from tests.factories import random_images, random_targets, tiny_model
from training.alarms import Alarms, announce, blind_label_loss, collect_facts, object_share

WELL = {
    "loss": 20.0,
    "cross_entropy": 1.0,
    "mask": 4.0,
    "dice": 4.0,
    "pilot_cross_entropy": 1.0,
    "pilot_mask": 5.0,
    "pilot_dice": 5.0,
    "levels": {"cross_entropy": [0.5, 0.5]},
    "learning_rate": 1e-4,
    "gradient_norm": 100.0,
    "images_per_second": 12.0,
    "waiting": 0.1,
}
WELL_FACTS = {
    "nonfinite_steps": 0,
    "surplus_segments": 0,
    "broken_images": 0,
    "label_weight": 2.0,
    "no_object_weight": 0.1,
    "segments_per_image": 4.0,
    "num_queries": 20,
    "num_labels": 10,
    "object_share": 0.2,
    "blocked_share": 0.4,
    "match_stability": [0.8, 0.9],
}
# What is wrong, and words of the sentence, among them what to do.
CAUSES = {
    "loss": ({"loss": math.nan}, ["The loss is nan", "max_nonfinite_steps", "learning_rate"]),
    "costs": ({"nonfinite_steps": 3}, ["not finite in the last 3 steps", "bf16"]),
    "null": ({"object_share": 0.001}, ["0.10 % an object", "training.check_data"]),
    "blind": ({"levels": {"cross_entropy": [6.0, 6.0]}}, ["3.00 for each level", "guessing"]),
    "blocked": ({"blocked_share": 0.97}, ["97 % of the attention masks are empty"]),
    "stability": ({"match_stability": [0.1, 0.3]}, ["Only 20 % of the segments keep their query"]),
    "gradients": ({"gradient_norm": 2e5}, ["2.0e+05", "clipped to 0.01"]),
    "rate": ({"learning_rate": 0.0}, ["learning rate is 0 with 400 steps left", "schedule"]),
    "waiting": ({"waiting": 0.75}, ["75 % of the time", "12.0 images/s", "`num_workers`, now 2"]),
    "surplus": ({"surplus_segments": 7}, ["7 more segments had no query", "model.num_queries"]),
    "broken": (
        {"broken_images": 2, "broken_names": ["/data/a.png", "b.png"]},
        ["2 more images could not be read", "a.png, b.png", "more than 10 stop the run"],
    ),
}


def make_alarms(max_steps=1000):
    return Alarms(max_steps, max_gradient_norm=0.01, num_workers=2, max_broken_images=10)


def watch(alarms, steps, **wrong):
    """Step and sentence of every alarm."""
    known = {**WELL_FACTS, **wrong}
    line = {name: known.pop(name, value) for name, value in WELL.items()}
    return [(step, sentence) for step in steps for sentence in alarms.observe(step, {"step": step, **line}, known)]


def test_a_training_that_goes_well_raises_no_alarm():
    assert watch(make_alarms(), range(10, 1001, 10)) == []


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_is_told_once_with_what_to_do(cause):
    wrong, words = CAUSES[cause]
    told = watch(make_alarms(), range(600, 700, 10), **wrong)
    assert len(told) == 1, told
    sentence = told[0][1]
    assert [word for word in words if word not in sentence] == [], sentence
    assert sentence.endswith(".")
    assert "/data" not in sentence


def test_it_takes_several_lines_to_blame_what_a_single_one_may_show():
    assert [step for step, _ in watch(make_alarms(), range(600, 700, 10), waiting=0.9)] == [620]
    assert [step for step, _ in watch(make_alarms(), range(600, 700, 10), loss=math.inf)] == [600]
    alarms = make_alarms()
    for step in range(600, 700, 20):
        assert watch(alarms, [step], waiting=0.9) == watch(alarms, [step + 10]) == []


def test_a_cause_that_comes_back_is_told_again_only_after_it_was_quiet_for_long():
    alarms = make_alarms(max_steps=10_000)  # quiet means 500 steps, 5 %
    assert len(watch(alarms, [1000], loss=math.nan)) == 1
    assert watch(alarms, [1490], loss=math.nan) == []  # which counts as being there
    assert watch(alarms, [1980], loss=math.nan) == []
    assert watch(alarms, range(1990, 2490, 10)) == []
    assert len(watch(alarms, [2490], loss=math.nan)) == 1


def test_early_in_a_training_nothing_is_expected_of_predictions_and_matches():
    early = {"object_share": 0.0, "blocked_share": 1.0, "levels": {"cross_entropy": [9.0, 9.0]}}
    assert watch(make_alarms(), range(10, 250, 10), **early) == []
    assert len(watch(make_alarms(), range(250, 300, 10), **early)) == 3
    assert watch(make_alarms(), range(10, 500, 10), match_stability=[0.0, 0.0]) == []
    assert len(watch(make_alarms(), range(500, 600, 10), match_stability=[0.0, 0.0])) == 1


def test_few_objects_are_no_alarm_where_there_are_few():
    # One segment for 100 images of 20 queries: 0.0005 of the queries; a twentieth of that is the limit.
    assert watch(make_alarms(), [600], object_share=0.0001, segments_per_image=0.01) == []
    assert len(watch(make_alarms(), [600], object_share=0.00002, segments_per_image=0.01)) == 1


def test_evaluations_are_watched_by_what_is_known_of_them():
    alarms = make_alarms()
    assert alarms.observe(600, {"step": 600, "scores": {"PQ": 0.0}}, {"object_share": 0.1}) == []
    (sentence,) = alarms.observe(700, {"step": 700, "scores": {"PQ": 0.0}}, {"object_share": 0.0})
    assert "predict nothing" in sentence
    assert alarms.observe(800, {"step": 800, "scores": {"PQ": 0.0}}) == []


def test_pilots_that_copy_are_told_but_not_data_that_are_easy_from_the_start():
    alarms = make_alarms()
    falling = [10.0, 5.0, 2.0, 1.5, 1.0, 0.5, 0.4]  # of 8.0 matched; below a fifth, 1.6, from the fourth on
    told = [watch(alarms, [step], pilot_mask=loss / 2, pilot_dice=loss / 2) for step, loss in enumerate(falling)]
    assert [len(sentences) for sentences in told] == [0, 0, 0, 0, 0, 1, 0]
    assert "6 % of those of matched queries, and were 125 %" in told[5][0][1]
    assert watch(make_alarms(), range(600, 700, 10), pilot_mask=0.1, pilot_dice=0.1) == []


def test_a_training_without_piloting_is_not_watched_for_copying():
    line = {name: value for name, value in WELL.items() if not name.startswith("pilot_")}
    alarms = make_alarms()
    assert [alarms.observe(step, {"step": step, **line}) for step in range(600, 700, 10)] == [[]] * 10


def test_the_last_step_may_have_no_learning_rate():
    assert watch(make_alarms(), [1000], learning_rate=0.0) == []


def test_counters_are_told_by_how_much_they_have_grown():
    alarms = make_alarms()
    assert "7 more segments" in watch(alarms, [100], surplus_segments=7)[0][1]
    assert watch(alarms, range(110, 400, 10), surplus_segments=7) == []
    assert "2 more segments" in watch(alarms, [400], surplus_segments=9)[0][1]


def test_a_run_that_goes_on_remembers_what_was_told_but_not_the_counters_of_another_process():
    steps = [600, 610, 620, 630]
    whole = make_alarms()
    expected = [watch(whole, [step], waiting=0.9, surplus_segments=3) for step in steps]
    first, second = make_alarms(), make_alarms()
    got = [watch(first, [step], waiting=0.9, surplus_segments=3) for step in steps[:2]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [watch(second, [step], waiting=0.9, surplus_segments=0) for step in steps[2:]]
    assert got == expected
    assert [len(sentences) for sentences in got] == [1, 0, 1, 0]


def test_the_blind_label_loss_is_the_least_of_all_constant_predictions():
    # 3 of 8 queries have one of 4 classes equally often, the others weigh 0.1 each.
    segments, num_queries, num_labels, weight = 3, 8, 4, 0.1
    nothing = weight * (num_queries - segments)
    logits = torch.zeros(num_labels + 1, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([segments / num_labels] * num_labels + [nothing], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        loss = -(weights * logits.log_softmax(0)).sum() / weights.sum()
        loss.backward()
        return loss

    least = optimizer.step(closure)
    least = closure()
    assert blind_label_loss(segments, num_queries, num_labels, weight) == pytest.approx(least.item(), abs=1e-6)


def test_no_segments_and_too_many_leave_nothing_to_guess():
    assert blind_label_loss(0, 10, 5, 0.1) == 0.0
    assert blind_label_loss(99, 10, 1, 0.1) == 0.0


def test_the_object_share_counts_queries_whose_best_class_is_not_the_last():
    logits = torch.tensor([[[3.0, 0.0, 1.0], [0.0, 0.0, 1.0]], [[0.0, 2.0, 1.0], [0.0, 0.5, 1.0]]])
    assert object_share(logits).item() == 0.5


def test_facts_are_read_from_a_model_in_training():
    model = tiny_model().train()
    targets = random_targets(num_segments=[2, 0, 4])
    outputs = model(random_images(batch_size=3), **targets)
    facts = collect_facts(model, outputs, targets["class_labels"])
    assert facts["nonfinite_steps"] == facts["surplus_segments"] == 0
    assert facts["segments_per_image"] == 2.0
    assert facts["num_queries"] == model.config.num_queries
    assert facts["num_labels"] == model.config.num_labels
    assert facts["label_weight"] == model.config.class_weight
    assert facts["no_object_weight"] == model.config.no_object_weight
    best = outputs.class_queries_logits.argmax(-1)
    expected = sum(int(best[i, q]) != model.config.num_labels for i in range(3) for q in range(best.shape[1]))
    assert facts["object_share"] == pytest.approx(expected / best.numel())
    assert 0 <= facts["blocked_share"] <= 1
    assert len(facts["match_stability"]) == model.config.decoder_layers - 1
    assert json.loads(json.dumps(facts)) == facts
    assert Alarms(100).observe(1, {"step": 1, "loss": outputs.loss.item()}, facts) == []


def test_readings_that_a_model_has_are_taken_from_any_of_its_parts():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    assert collect_facts(model) == {}
    model[0].last_blocked_share = torch.tensor([0.0, 0.25])
    model[1].last_blocked_share = 1.0
    model.criterion = torch.nn.Identity()
    model.criterion.last_match_stability = [torch.tensor(0.5), 1.0]
    assert collect_facts(model) == {"blocked_share": 1.25 / 3, "match_stability": [0.5, 1.0]}


def test_an_alarm_is_written_above_the_progress_bar(capsys):
    announce(20, ["One.", "Two."])
    assert capsys.readouterr().err == "Alarm after step 20: One.\nAlarm after step 20: Two.\n"
