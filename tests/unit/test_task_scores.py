"""What is measured of an image, and what is written of it: both must say the same, in the ids of the data set."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training import score_files
from training.data import TASKS, DigitScenes
from training.error_analysis import ErrorAnalysis
from training.official_files import decode_segment_ids
from training.predictor import NO_CLASS
from training.task_scores import TASK_SCORES, TaskScores, add_maps, category_ids_of

NUM_IMAGES = 4


class Scenes:
    """Digit scenes whose rows are drawn once, with category ids that have gaps and need 16 bits, or with their own."""

    def __init__(self, task: str, *, gaps: bool = False) -> None:
        scenes = DigitScenes("validation", task=task, image_size=64, num_images=NUM_IMAGES, preset="hard")
        self.id2label, self.thing_ids, self.stuff_ids = scenes.id2label, scenes.thing_ids, scenes.stuff_ids
        self.rows = list(scenes)
        if gaps:
            self.category_ids = {class_id: 7 + 100 * class_id for class_id in scenes.id2label}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def as_result(row: Any, task: str) -> dict[str, Any]:
    """The ground truth as a model would predict it; written here in the plainest way."""
    masks, classes = torch.from_numpy(row["mask_labels"]), torch.from_numpy(row["class_labels"])
    if task == "instance":
        return {"masks": masks, "labels": classes, "scores": torch.linspace(0.9, 0.6, len(masks))}
    segmentation = torch.full(masks.shape[1:], NO_CLASS if task == "semantic" else 0)
    infos = []
    for number, (mask, label) in enumerate(zip(masks, classes.tolist(), strict=True), start=1):
        segmentation[mask] = label if task == "semantic" else number
        infos.append({"id": number, "label_id": label, "score": 0.8})
    return {"segmentation": segmentation} | ({"segments_info": infos} if task == "panoptic" else {})


def shifted(result: dict[str, Any]) -> dict[str, Any]:
    """Move a result down by three pixels: right in parts."""
    moved = {key: torch.roll(result[key], 3, dims=-2) for key in ("masks", "segmentation") if key in result}
    return {**result, **moved}


def pairs(dataset: Scenes, task: str, *, perfect: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
    for row in dataset.rows:
        result = as_result(row, task)
        yield row, result if perfect else shifted(result)


def collect(dataset: Scenes, task: str, *, perfect: bool) -> TaskScores:
    scores = TASK_SCORES[task](dataset)
    for row, result in pairs(dataset, task, perfect=perfect):
        scores.add(row, result)
    return scores


def write_files(dataset: Scenes, task: str, folder: Path, *, perfect: bool) -> None:
    scores = TASK_SCORES[task](dataset)
    predictions, truths, images = [], [], []
    for row, result in pairs(dataset, task, perfect=perfect):
        predictions += scores.write(row["image_id"], result, folder / "predictions")
        truths += scores.write_truth(row, folder / "ground_truth")
        images.append({"id": row["image_id"], "file_name": f"{row['image_id']}.png", "height": 64, "width": 64})
    files = {
        "predictions": scores.prediction_file(predictions),
        "ground_truth": scores.truth_file(truths, images),
    }
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))


def score_written(task: str, folder: Path, *words: str) -> dict[str, Any]:
    ending = "" if task == "semantic" else ".json"
    paths = ["--ground-truth", str(folder / f"ground_truth{ending}")]
    paths += ["--predictions", str(folder / f"predictions{ending}")]
    return score_files.score_files(score_files.make_parser().parse_args([task, *paths, *words]))


def by_category(scores: Any, category_ids: dict[int, int]) -> Any:
    """Replace classes by categories; those that are written nowhere are missing in files without a list of classes."""
    if not isinstance(scores, dict):
        return scores
    return {category_ids.get(key, key): by_category(value, category_ids) for key, value in scores.items()}


def without_undefined(scores: Any) -> Any:
    """Leave out classes without a score."""
    if not isinstance(scores, dict):
        return scores
    return {key: without_undefined(value) for key, value in scores.items() if value is not None}


# ------------------------------------------------------------------------------------------------------------ all tasks


@pytest.mark.parametrize("task", TASKS)
def test_the_ground_truth_as_prediction_scores_one(task):
    dataset = Scenes(task)
    scores = collect(dataset, task, perfect=True)
    headlines = {name: value for name, value, _ in scores.headlines(scores.scores.compute())}
    assert len(headlines) >= 5
    for name, value in headlines.items():
        assert value == pytest.approx(1.0, abs=1e-9) or (task == "instance" and value == -1), name
    counts = scores.analysis.compute().total
    assert counts.errors == 0
    assert counts.correct == counts.objects == sum(len(row["class_labels"]) for row in dataset.rows)


@pytest.mark.parametrize("perfect", [True, False])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_the_written_files_score_what_the_model_scores(task, gaps, perfect, tmp_path):
    dataset = Scenes(task, gaps=gaps)
    write_files(dataset, task, tmp_path, perfect=perfect)
    words = ["--ignore-index", "65535"] if task == "semantic" and gaps else []
    written = score_written(task, tmp_path, *words)
    computed = collect(dataset, task, perfect=perfect).scores.compute()
    expected = by_category(computed, category_ids_of(dataset))
    assert without_undefined(written) == without_undefined(expected)
    first = {"instance": "AP", "panoptic": "All", "semantic": "mIoU"}[task]
    quality = computed[first]["pq"] if task == "panoptic" else computed[first]
    assert quality == pytest.approx(1.0) if perfect else 0.05 < quality < 0.95


@pytest.mark.parametrize("task", TASKS)
def test_scores_of_classes_and_of_all_are_found_and_printed(task):
    dataset = Scenes(task)
    scores = collect(dataset, task, perfect=False)
    computed = scores.scores.compute()
    for class_id in dataset.id2label:
        values = scores.class_values(computed, class_id)
        assert len(values) == len(scores.columns)
        if task == "instance":
            assert values == tuple(computed["per_class"][class_id][name] for name in ("AP", "AP50", "AP75", "AR100"))
        elif task == "panoptic":
            assert values == tuple(computed["per_class"][class_id][name] for name in ("pq", "sq", "rq"))
        else:
            assert values == (computed["per_class_IoU"][class_id], computed["per_class_accuracy"][class_id])
    headlines = scores.headlines(computed)
    lines = scores.table(computed).splitlines()
    assert len(lines) == len(headlines)
    for line, (name, value, meaning) in zip(lines, headlines, strict=True):
        assert line.startswith(name)
        assert line.endswith(meaning)
        assert f" {100 * value:.1f} " in line or (value == -1 and " - " in line)


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_boundary_scores_are_computed_when_asked_for(task):
    dataset = Scenes(task)
    [plain, boundary] = [TASK_SCORES[task](dataset, boundary=wanted) for wanted in (False, True)]
    for row, result in pairs(dataset, task, perfect=False):
        plain.add(row, result)
        boundary.add(row, result)
    if task == "instance":
        assert boundary.scores.compute()["AP"] < plain.scores.compute()["AP"]
        return
    assert boundary.columns == ("IoU", "accuracy", "boundary IoU")
    computed = boundary.scores.compute()
    assert [name for name, _, _ in boundary.headlines(computed)][-1] == "boundary mIoU"
    assert computed["boundary_mIoU"] < computed["mIoU"]
    values = boundary.class_values(computed, 10)
    assert values[2] == computed["per_class_boundary_IoU"][10]


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_ids_with_slashes_name_files_in_subfolders(task, tmp_path):
    dataset = Scenes(task)
    row = {**dataset[0], "image_id": "city/0001"}
    scores = TASK_SCORES[task](dataset)
    scores.write("city/0001", as_result(row, task), tmp_path / "predictions")
    scores.write_truth(row, tmp_path / "ground_truth")
    assert (tmp_path / "predictions" / "city" / "0001.png").exists()
    assert (tmp_path / "ground_truth" / "city" / "0001.png").exists()


def test_classes_without_official_ids_count_from_one():
    assert category_ids_of(Scenes("instance")) == {class_id: class_id + 1 for class_id in range(10)}


# ------------------------------------------------------------------------------------------------------------ instances


def test_stuff_has_no_instance_scores():
    dataset = Scenes("panoptic")
    scores = TASK_SCORES["instance"](dataset)
    assert scores.class_values(scores.scores.compute(), dataset.stuff_ids[0]) == (None,) * 4


def test_pictures_of_instances_leave_out_lower_scores():
    result = as_result(Scenes("instance")[0], "instance")
    result["scores"] = torch.tensor([0.9, 0.5, 0.4, 0.2])[: len(result["labels"])]
    shown = TASK_SCORES["instance"](Scenes("instance")).displayed(result, 0.5)
    assert shown["scores"].tolist() == pytest.approx([value for value in result["scores"].tolist() if value >= 0.5])
    assert len(shown["masks"]) == len(shown["labels"]) == len(shown["scores"])


def test_an_image_without_predictions_and_one_without_objects_are_scored():
    dataset = Scenes("instance")
    nothing = {"masks": torch.zeros(0, 64, 64, dtype=torch.bool), "labels": torch.zeros(0, dtype=torch.int64)}
    nothing["scores"] = torch.zeros(0)
    empty = {**dataset[1], "mask_labels": np.zeros((0, 64, 64), bool), "class_labels": np.zeros(0, np.int64)}
    scores = TASK_SCORES["instance"](dataset)
    scores.add(dataset[0], nothing)
    scores.add(empty, as_result(dataset[1], "instance"))
    counts = scores.analysis.compute().total
    assert counts.missed == counts.objects == len(dataset[0]["class_labels"])
    assert counts.background == len(dataset[1]["class_labels"])
    assert scores.write(0, nothing, Path("unused")) == []


# ------------------------------------------------------------------------------------------------------------- panoptic

# Two things (classes 0, 1) and a crowd of class 1 on a map of 4 x 8; `.` is void.
TRUE_MAP = """
aaaa....
aaaabbcc
aaaabbcc
....bbcc
"""
PREDICTED_MAP = """
1111....
11112233
4444..33
4444..33
"""
CLASS_OF = {"a": 0, "b": 1, "1": 0, "2": 1, "3": 1, "4": 1}


def read_map(text: str) -> np.ndarray:
    return np.array([list(line) for line in text.split()])


def scene() -> tuple[dict[str, Any], dict[str, Any]]:
    true, predicted = read_map(TRUE_MAP), read_map(PREDICTED_MAP)
    row = {
        "image_id": 5,
        "image": Image.new("RGB", (8, 4)),
        "mask_labels": np.stack([true == "a", true == "b"]),
        "class_labels": np.array([0, 1]),
        "crowd_masks": (true == "c")[None],
        "crowd_labels": np.array([1]),
    }
    ids = np.where(predicted == ".", "0", predicted).astype(np.int32)
    infos = [{"id": key, "label_id": CLASS_OF[str(key)], "score": 1 - key / 10} for key in (1, 2, 3, 4)]
    return row, {"segmentation": torch.from_numpy(ids), "segments_info": infos}


class Things:
    id2label, thing_ids, stuff_ids = {0: "zero", 1: "one"}, (0, 1), ()


def test_void_and_crowds_are_no_errors_in_scores_and_analysis():
    """1 lies on a: 8 of 12 pixels. 2 lies on b: 2 of 6. 3 lies on the crowd of its class. 4: 4 on a, 4 on void, half."""
    scores = TASK_SCORES["panoptic"](Things)
    scores.add(*scene())
    quality = scores.scores.compute()["per_class"]
    assert quality[0] == {"pq": 8 / 12, "sq": 8 / 12, "rq": 1.0}
    assert quality[1] == {"pq": 0.0, "sq": 0.0, "rq": 0.0}
    [(_, image)] = [json.loads(line) for line in scores.analysis.dump()]
    # 2 is badly placed, 3 ignored, 4 not: just half of it is excused, and its IoU with a is 4 / 12.
    assert image["outcomes"] == "+lib"
    assert image["classes"] == [0, 1, 1, 1]
    assert image["ious"] == [8 / 12]
    assert image["objects"] == [0, 1]
    assert scores.analysis.compute().total.missed == 0  # b is explained by 2


def test_the_ground_truth_file_has_crowds_and_areas(tmp_path):
    scores = TASK_SCORES["panoptic"](Things)
    [entry] = scores.write_truth(scene()[0], tmp_path)
    assert entry == {
        "image_id": 5,
        "file_name": "5.png",
        "segments_info": [
            {"id": 1, "category_id": 1, "iscrowd": 0, "area": 12},
            {"id": 2, "category_id": 2, "iscrowd": 0, "area": 6},
            {"id": 3, "category_id": 2, "iscrowd": 1, "area": 6},
        ],
    }
    written = decode_segment_ids(Image.open(tmp_path / "5.png"))
    letters = np.array([".", "a", "b", "c"])[written]
    assert (letters == read_map(TRUE_MAP)).all()


def test_written_predictions_with_void_and_crowds_score_the_same(tmp_path):
    scores = TASK_SCORES["panoptic"](Things)
    row, result = scene()
    scores.add(row, result)
    files = {
        "predictions": scores.prediction_file(scores.write(5, result, tmp_path / "predictions")),
        "ground_truth": scores.truth_file(
            scores.write_truth(row, tmp_path / "ground_truth"),
            [{"id": 5, "file_name": "5.png", "height": 4, "width": 8}],
        ),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert score_written("panoptic", tmp_path) == by_category(scores.scores.compute(), {0: 1, 1: 2})


def test_overlaps_become_ious_with_void_out_of_the_union_and_crowds_by_the_area_of_the_prediction():
    analysis = ErrorAnalysis([0, 1])
    overlaps = {(1, 1): 6, (1, 0): 4, (2, 2): 5, (2, 3): 5, (3, 2): 3, (3, 0): 3, (3, 3): 4, (4, 2): 4, (0, 1): 2}
    predicted, true = {1: 0, 2: 1, 3: 1, 4: 0}, {1: 0, 2: 1, 3: 0}
    add_maps(analysis, "x", overlaps, predicted, true, scores=[0.9, 0.8, 0.7, 0.6], crowd=[2])
    [(_, image)] = [json.loads(line) for line in analysis.dump()]
    # 1: union 10 - 4 (void) + 8 - 6 = 8. 2: 5 of 10 pixels on the crowd of its class, which is not more than half; of the
    # segment 3, of the other class, it has 5 / (10 + 9 - 5). 3: 3 + 3 of 10 on crowd and void. 4: on the crowd of the other class.
    assert image["ious"] == [6 / 8]
    assert image["outcomes"] == "+bib"


def test_segments_that_overlap_are_refused_with_the_name_of_the_image():
    row, result = scene()
    row["mask_labels"][1, 0, 0] = True
    with pytest.raises(ValueError, match="The masks overlap"):
        TASK_SCORES["panoptic"](Things).add(row, result)


# ------------------------------------------------------------------------------------------------------------- semantic


@pytest.mark.parametrize(("gaps", "mode", "nothing"), [(False, "L", 255), (True, "I;16", 65535)])
def test_maps_hold_category_ids_in_as_many_bits_as_they_need(gaps, mode, nothing, tmp_path):
    dataset = Scenes("semantic", gaps=gaps)
    scores = TASK_SCORES["semantic"](dataset)
    assert scores.no_category == nothing
    scores.write(3, {"segmentation": torch.tensor([[0, 11], [NO_CLASS, 5]])}, tmp_path)
    image = Image.open(tmp_path / "3.png")
    assert image.mode == mode
    ids = category_ids_of(dataset)
    assert np.asarray(image).tolist() == [[ids[0], ids[11]], [nothing, ids[5]]]
    assert (scores.prediction_file([]), scores.truth_file([], [])) == (None, None)


def test_void_and_pixels_without_prediction_are_no_segments_of_the_analysis():
    dataset = Scenes("semantic")
    masks = np.zeros((2, 2, 4), bool)
    masks[0, 0], masks[1, 1, :2] = True, True  # the rest of the second row is void
    row = {**dataset[0], "mask_labels": masks, "class_labels": np.array([3, 10])}
    predicted = torch.tensor([[3, 3, 3, NO_CLASS], [4, 4, 4, NO_CLASS]])
    scores = TASK_SCORES["semantic"](dataset)
    scores.add(row, {"segmentation": predicted})
    [(_, image)] = [json.loads(line) for line in scores.analysis.dump()]
    assert image["classes"] == [3, 4]
    assert image["objects"] == [3, 10]
    # 4 has 2 pixels of the 2 of class 10; its third one is on void.
    assert image["outcomes"] == "+c"
    assert image["ious"] == [3 / 4]
    assert scores.scores.compute()["per_class_IoU"][3] == 3 / 4
    assert scores.scores.compute()["per_class_IoU"][10] == 0.0


def test_pictures_of_semantic_maps_show_each_class_as_a_mask():
    scores = TASK_SCORES["semantic"](Scenes("semantic"))
    shown = scores.displayed({"segmentation": torch.tensor([[10, NO_CLASS], [2, 10]])}, 0.5)
    assert shown["class_labels"].tolist() == [2, 10]
    assert shown["mask_labels"].tolist() == [[[False, False], [True, False]], [[True, False], [False, True]]]
    empty = scores.displayed({"segmentation": torch.full((2, 2), NO_CLASS)}, 0.5)
    assert empty["mask_labels"].shape == (0, 2, 2)
