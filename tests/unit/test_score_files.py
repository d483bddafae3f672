"""`python -m training.score files`: equal to the official tools' recorded scores, and clear about files that are wrong."""

import contextlib
import copy
import io
import itertools
import json
import math
import pickle
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training import score, score_files
from training.official_files import FileError, decode_segment_ids, encode_segment_ids

GOLDEN = Path(__file__).parent / "metrics_golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
# Of the acceptance: the official tools' numbers to 1e-9, pycocotools' to 1e-6.
TASKS = {"panoptic": ("panoptic", 1e-9), "semantic": ("semantic", 1e-9), "instance": ("coco_segm", 1e-6)}


@dataclass(frozen=True)
class Recordings:
    """A copy of the recorded files, PNG folders beside the JSON files under their names."""

    folder: Path

    @property
    def truth(self):
        return self.folder / "panoptic_gt.json"

    @property
    def predictions(self):
        return self.folder / "panoptic_pred.json"

    @property
    def instances(self):
        return self.folder / "instances_gt.json"

    @property
    def results(self):
        return self.folder / "instances_pred.json"

    def options(self, task):
        paths = (self.instances, self.results) if task == "instance" else (self.truth, self.predictions)
        return [task, "--ground-truth", str(paths[0]), "--predictions", str(paths[1])]

    def png(self, kind, number):
        return self.folder / f"panoptic_{kind}" / f"{number:03}.png"


@pytest.fixture
def files(tmp_path):
    for name in ("panoptic_gt.json", "panoptic_pred.json", "instances_gt.json", "instances_pred.json"):
        shutil.copy(GOLDEN / name, tmp_path)
    for kind in ("gt", "pred"):
        shutil.copytree(GOLDEN / kind, tmp_path / f"panoptic_{kind}")
    return Recordings(tmp_path)


@pytest.fixture
def run(capsys):
    """Run the program in this process and read what it prints, which is one JSON object."""

    def run_in_process(*options):
        score.main(["files", *map(str, options)])
        return json.loads(capsys.readouterr().out)

    return run_in_process


@pytest.fixture
def complaint(capsys):
    """Run the program in this process and return the sentence with which it ends."""

    def run_in_process(*options):
        with pytest.raises(SystemExit) as end:
            score.main(["files", *map(str, options)])
        assert capsys.readouterr().out == ""
        assert isinstance(end.value.code, str), "Python prints text to stderr, and exits with 1"
        assert end.value.code.startswith("error: ")
        assert "\n" not in end.value.code
        return end.value.code

    return run_in_process


def change(path, function):
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(function(content) or content))


def read_ids(path):
    with Image.open(path) as image:
        return decode_segment_ids(image)


def assert_equal(scores, expected, tolerance):
    """Compare nested dictionaries of numbers; the keys must be the same."""
    if not isinstance(expected, dict):
        assert scores == pytest.approx(expected, rel=0, abs=tolerance)
        return
    assert set(scores) == set(expected)
    for key, value in expected.items():
        assert_equal(scores[key], value, tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# The official tools' numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_scores_equal_those_of_the_official_tool(task, files, run):
    entry, tolerance = TASKS[task]
    assert_equal(run(*files.options(task)), EXPECTED[entry], tolerance)


def score_with_pycocotools(ground_truth, predictions):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(ground_truth))
        evaluation = COCOeval(truth, truth.loadRes(str(predictions)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_boxes_of_results_decide_what_is_small_as_in_the_official_tool(files, run):
    predictions = files.folder / "instances_pred.json"
    before = score_with_pycocotools(files.folder / "instances_gt.json", predictions)
    change(
        predictions,
        lambda content: [entry.update(bbox=[0, 0, 40, 30 + 5 * (n % 2)]) for n, entry in enumerate(content)] and None,
    )
    expected = score_with_pycocotools(files.folder / "instances_gt.json", predictions)
    assert np.abs(np.array(expected) - before).max() > 0.01, "the boxes change nothing here"
    assert list(run(*files.options("instance")).values()) == pytest.approx(expected, rel=0, abs=1e-12)


def test_area_of_a_result_is_passed_over_as_in_the_official_tool(files, run):
    expected = run(*files.options("instance"))
    change(files.results, lambda content: [entry.update(area=50.0**2) for entry in content] and None)
    assert list(expected.values()) == pytest.approx(score_with_pycocotools(files.instances, files.results), abs=1e-12)
    assert run(*files.options("instance")) == expected


@pytest.mark.parametrize("box", [[0, 0, -1e308, 1e308], [0, 0, 10**300, 10**300], [0, 0, math.nan, 1], [1, 2], "box"])
def test_boxes_without_an_area_are_named(files, complaint, box):
    change(files.results, lambda content: [entry.update(bbox=box) for entry in content] and None)
    assert re.search("(result|Prediction) 0 .*image 1.* has the (`bbox`|area)", complaint(*files.options("instance")))


def test_boxes_of_some_results_alone_are_an_error(files, complaint):
    change(files.folder / "instances_pred.json", lambda content: content[0].update(bbox=[0, 0, 3, 3]))
    assert "result 1 (image" in complaint(*files.options("instance"))


@pytest.mark.parametrize("task", TASKS)
def test_folders_of_png_files_may_be_named(task, run):
    folders = ["--ground-truth-folder", GOLDEN / "gt", "--predictions-folder", GOLDEN / "pred"]
    scores = run(*Recordings(GOLDEN).options(task), *([] if task == "instance" else folders))
    assert_equal(scores, EXPECTED[TASKS[task][0]], TASKS[task][1])


def test_program_prints_one_json_object_and_nothing_else():
    command = [sys.executable, "-m", "training.score", "files", *Recordings(GOLDEN).options("instance")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert_equal(json.loads(done.stdout), EXPECTED["coco_segm"], 1e-6)
    assert done.stderr == ""


@pytest.mark.parametrize("task", TASKS)
def test_order_of_the_entries_of_a_file_does_not_change_a_digit(task, files, run):
    expected = run(*files.options(task))
    shuffle = random.Random(3).shuffle

    def shuffle_entries(content):
        for entries in [content] if isinstance(content, list) else content.values():
            shuffle(entries)

    for path in files.folder.glob("*.json"):
        change(path, shuffle_entries)
    assert run(*files.options(task)) == expected


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_number_of_pieces_does_not_change_a_digit(task, files, run, monkeypatch):
    expected = run(*files.options(task))
    monkeypatch.setattr(score_files, "IMAGES_IN_A_PIECE", 3)
    assert run(*files.options(task)) == expected


def test_number_of_processes_does_not_change_a_digit(files, run, monkeypatch):
    expected = run(*files.options("panoptic"))
    monkeypatch.setattr(score_files, "IMAGES_IN_A_PIECE", 3)
    assert run(*files.options("panoptic"), "--num-workers", 2) == expected


def test_error_of_another_process_arrives_as_it_is():
    error = pickle.loads(pickle.dumps(FileError("a.png is missing")))
    assert type(error) is FileError
    assert str(error) == "a.png is missing"


# ---------------------------------------------------------------------------------------------------------------------
# Ground truth as prediction
# ---------------------------------------------------------------------------------------------------------------------


def test_panoptic_ground_truth_as_prediction_is_exactly_one(files, run):
    scores = run("panoptic", "--ground-truth", files.truth, "--predictions", files.truth)
    for group in ("All", "Things", "Stuff"):
        assert [scores[group][key] for key in ("pq", "sq", "rq")] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("boundary", [[], ["--boundary"]])
def test_semantic_ground_truth_as_prediction_is_exactly_one(files, run, boundary):
    scores = run("semantic", "--ground-truth", files.truth, "--predictions", files.truth, *boundary)
    assert {scores[key] for key in ("mIoU", "pixel_accuracy", *(["boundary_mIoU"] if boundary else []))} == {1.0}


@pytest.mark.parametrize("boundary", [[], ["--boundary"]])
def test_instance_ground_truth_as_prediction_is_one_or_undefined(files, run, boundary):
    annotations = json.loads(files.instances.read_text())["annotations"]
    results = [
        {key: entry[key] for key in ("image_id", "category_id", "segmentation")} | {"score": 1.0}
        for entry in annotations
        if not entry["iscrowd"]
    ]
    files.results.write_text(json.dumps(results))
    scores = run(*files.options("instance"), *boundary)
    # AR1 and AR10 are below 1 where an image has several objects of a class, as in pycocotools.
    perfect = {key: value for key, value in scores.items() if key not in ("AR1", "AR10") and value != -1.0}
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1.0), rel=0, abs=1e-9)
    assert {key for key, value in scores.items() if value == -1.0} == {"APl", "ARl"}, "no object has 96**2 pixels"
    assert 0 < scores["AR1"] < scores["AR10"] <= 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Class-index PNG files
# ---------------------------------------------------------------------------------------------------------------------


def write_class_indices(files, kind, mode, ignore_index=255):
    """Write the categories of a panoptic file as one number a pixel; void is `ignore_index`."""
    folder = files.folder / f"{kind}_{mode.replace(';', '')}"
    folder.mkdir()
    for annotation in json.loads((files.folder / f"panoptic_{kind}.json").read_text())["annotations"]:
        ids = read_ids(files.folder / f"panoptic_{kind}" / annotation["file_name"])
        classes = np.full(ids.shape, ignore_index, dtype=np.uint16 if mode == "I;16" else np.uint8)
        for segment in annotation["segments_info"]:
            classes[ids == segment["id"]] = segment["category_id"]
        image = Image.fromarray(classes)
        if mode == "P":
            image.putpalette(list(itertools.islice(itertools.cycle(range(0, 256, 5)), 768)))
        image.save(folder / annotation["file_name"])
        with Image.open(folder / annotation["file_name"]) as written:
            assert written.mode in (mode, "I"), "older Pillow reads 16 bits as I"
    return folder


@pytest.mark.parametrize(("mode", "ignore_index"), [("L", 255), ("I;16", 65535), ("P", 255)])
def test_class_index_files_score_as_the_panoptic_files_of_the_same_maps(files, run, mode, ignore_index):
    expected = run(*files.options("semantic"), "--details", "--boundary")
    truth, predictions = (write_class_indices(files, kind, mode, ignore_index) for kind in ("gt", "pred"))
    options = ["--ignore-index", ignore_index, "--details", "--boundary"]
    pairs = [(truth, predictions), (files.truth, predictions), (truth, files.predictions)]
    for truth_path, predictions_path in pairs:
        scores = run("semantic", "--ground-truth", truth_path, "--predictions", predictions_path, *options)
        assert scores == expected


def test_class_index_files_in_subfolders_belong_together_by_their_paths(tmp_path, run):
    for side, value in itertools.product(("truth", "found"), (3, 5)):
        folder = tmp_path / side / f"city{value}"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((2, 2), value, dtype=np.uint8)).save(folder / "same_name.png")
    scores = run("semantic", "--ground-truth", tmp_path / "truth", "--predictions", tmp_path / "found")
    assert scores == {"mIoU": 1.0, "per_class_IoU": {"3": 1.0, "5": 1.0}, "pixel_accuracy": 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# What else may be in a file, and options
# ---------------------------------------------------------------------------------------------------------------------


def test_segment_ids_may_be_as_large_as_a_colour_can_hold(files, run):
    expected = run(*files.options("panoptic"))
    for kind, path in (("gt", files.truth), ("pred", files.predictions)):
        for annotation in json.loads(path.read_text())["annotations"]:
            file = files.folder / f"panoptic_{kind}" / annotation["file_name"]
            ids = read_ids(file).astype(np.int64)
            encode_segment_ids(np.where(ids > 0, 256**3 - ids, 0)).save(file)

        def renumber(content):
            for segment in itertools.chain(*(entry["segments_info"] for entry in content["annotations"])):
                segment["id"] = 256**3 - segment["id"]

        change(path, renumber)
    assert read_ids(files.png("gt", 0)).max() == 256**3 - 1
    assert run(*files.options("panoptic")) == expected


@pytest.mark.parametrize("task", TASKS)
def test_image_ids_may_be_text(task, files, run):
    expected = run(*files.options(task))

    def rename(content):
        entries = [content] if isinstance(content, list) else [content.get("images", []), content["annotations"]]
        for entry in itertools.chain(*entries):
            key = "image_id" if "image_id" in entry else "id"
            entry[key] = f"image {entry[key]:02}"

    for path in files.folder.glob("*.json"):
        change(path, rename)
    assert run(*files.options(task)) == expected


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_predictions_of_further_images_are_passed_over(task, files, run):
    change(files.truth, lambda content: {**content, "annotations": content["annotations"][:4]})
    expected = run(*files.options(task))
    change(files.predictions, lambda content: {**content, "annotations": content["annotations"][:4]})
    assert run(*files.options(task)) == expected


def test_true_segment_that_is_not_in_its_png_is_missed_as_in_the_official_tool(files, run):
    before = run("panoptic", "--ground-truth", files.truth, "--predictions", files.truth)["per_class"]["13"]

    def list_one_more(content):
        content["annotations"][0]["segments_info"].append({"id": 4242, "category_id": 13, "iscrowd": 0, "area": 10})

    shutil.copy(files.truth, files.folder / "panoptic_pred.json")
    shutil.rmtree(files.folder / "panoptic_pred")
    shutil.copytree(files.folder / "panoptic_gt", files.folder / "panoptic_pred")
    num_segments = sum(
        segment["category_id"] == 13 and not segment["iscrowd"]
        for entry in json.loads(files.truth.read_text())["annotations"]
        for segment in entry["segments_info"]
    )
    change(files.truth, list_one_more)
    after = run(*files.options("panoptic"))["per_class"]["13"]
    assert before == {"pq": 1.0, "sq": 1.0, "rq": 1.0}
    assert after == {"pq": num_segments / (num_segments + 0.5), "sq": 1.0, "rq": num_segments / (num_segments + 0.5)}


def test_details_add_what_the_official_tools_do_not_print(files, run):
    assert set(run(*files.options("instance"), "--details")) == {*EXPECTED["coco_segm"], "per_class"}
    details = run(*files.options("semantic"), "--details")
    assert set(details) - set(EXPECTED["semantic"]) == {"fwIoU", "mean_accuracy", "per_class_accuracy", "PQ_St"}


def test_boundary_is_of_effect_with_and_without_details(files, run):
    plain, boundary = run(*files.options("instance")), run(*files.options("instance"), "--boundary")
    assert boundary["AP"] < plain["AP"]
    scores = run(*files.options("semantic"), "--boundary")
    assert set(scores) == {*EXPECTED["semantic"], "boundary_mIoU", "per_class_boundary_IoU"}


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("panoptic", ["--boundary"], "--boundary is for instance and semantic"),
        ("instance", ["--predictions-folder", "pred"], "--predictions-folder is for panoptic and semantic"),
        ("semantic", ["--ground-truth", ".", "--ground-truth-folder", "gt"], "--ground-truth is a folder already"),
        ("semantic", ["--num-workers", "-1"], "--num-workers: must be at least 0, got -1"),
        ("semantic", ["--num-workers", "two"], "invalid.* value: 'two'"),
        ("boxes", [], "invalid choice: 'boxes'"),
    ],
)
def test_options_without_effect_are_refused(task, options, message, capsys):
    with pytest.raises(SystemExit) as end:
        score.main(["files", *Recordings(GOLDEN).options(task), *options])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


# ---------------------------------------------------------------------------------------------------------------------
# Files that cannot be scored
# ---------------------------------------------------------------------------------------------------------------------


def entry_of(content, image_id):
    """Entry of an image in a panoptic file."""
    return next(entry for entry in content["annotations"] if entry["image_id"] == image_id)


def in_truth(function):
    return lambda files: change(files.truth, function)


def in_predictions(function):
    return lambda files: change(files.predictions, function)


def in_segment(**values):
    """Change the first predicted segment of image 3."""
    return in_predictions(lambda content: entry_of(content, 3)["segments_info"][0].update(values))


def without(key, of=lambda content: content):
    return lambda content: of(content).pop(key) and None


PANOPTIC_DAMAGE = {
    "predicted category that the ground truth lacks": (
        in_segment(category_id=99),
        r"panoptic_pred\.json: image 3, segment \d+ has category 99",
    ),
    "true category that is not listed": (
        in_truth(without(-1, lambda content: content["categories"])),
        r"panoptic_gt\.json: image 1, segment 1 has category 13",
    ),
    "predicted segment without its pixels": (
        in_predictions(lambda content: entry_of(content, 3)["segments_info"].append({"id": 4242, "category_id": 1})),
        r"prediction of image 3: ids \[\] are only in the map, ids \[4242\] only in the list.*panoptic_pred/002\.png",
    ),
    "predicted pixels without their segment": (
        in_predictions(lambda content: entry_of(content, 3)["segments_info"].clear()),
        r"prediction of image 3: ids \[\d+.*\] are only in the map, ids \[\] only in the list.*panoptic_pred/002\.png",
    ),
    "segment listed twice": (
        in_predictions(
            lambda content: entry_of(content, 3)["segments_info"].append(entry_of(content, 3)["segments_info"][0])
        ),
        r"panoptic_pred\.json: image 3 lists segment id \d+ twice",
    ),
    "true segment listed twice, as thing and stuff": (
        in_truth(
            lambda content: entry_of(content, 2)["segments_info"].append(
                entry_of(content, 2)["segments_info"][0] | {"category_id": 1}
            )
        ),
        r"panoptic_gt\.json: image 2 lists segment id 1 twice",
    ),
    "image without prediction": (
        in_predictions(lambda content: content["annotations"].remove(entry_of(content, 3))),
        r"panoptic_pred\.json has no prediction for 1 of the images of .*panoptic_gt\.json, such as 3",
    ),
    "no predictions at all": (
        in_predictions(lambda content: content | {"annotations": []}),
        r"panoptic_pred\.json has no prediction for 10 of the images",
    ),
    "image ids that are text on one side": (
        in_predictions(lambda content: entry_of(content, 3).update(image_id="3")),
        r"no prediction for 1 of the images of .*panoptic_gt\.json, such as 3\. It has one for '3': a number and its text",
    ),
    "no image at all": (
        in_truth(lambda content: content | {"annotations": []}),
        r"panoptic_gt\.json holds no image",
    ),
    "image predicted twice": (
        in_predictions(lambda content: content["annotations"].append(entry_of(content, 3))),
        r"panoptic_pred\.json: `image_id` 3 occurs twice",
    ),
    "true image listed twice": (
        in_truth(lambda content: content["annotations"].append(entry_of(content, 3))),
        r"panoptic_gt\.json: `image_id` 3 occurs twice",
    ),
    "category listed twice": (
        in_truth(lambda content: content["categories"].append(content["categories"][0])),
        r"panoptic_gt\.json: `id` 1 occurs twice in `categories`",
    ),
    "category without isthing": (
        in_truth(without("isthing", lambda content: content["categories"][2])),
        r"panoptic_gt\.json: category 3 has no `isthing`",
    ),
    "isthing in words": (
        in_truth(lambda content: content["categories"][2].update(isthing="no")),
        r"category 3 has the `isthing` 'no'\. Expected 0 or 1",
    ),
    "negative category": (
        in_truth(lambda content: content["categories"][0].update(id=-1)),
        r"panoptic_gt\.json: category id -1 is no integer from 0",
    ),
    "no categories": (in_truth(without("categories")), r"panoptic_gt\.json: `categories` is missing"),
    "empty categories": (
        in_truth(lambda content: content | {"categories": []}),
        r"panoptic_gt\.json: `categories` is empty",
    ),
    "segment id 0": (in_segment(id=0), r"panoptic_pred\.json: image 3 has the segment id 0.*0 is void"),
    "segment id that no colour can hold": (in_segment(id=256**3), "image 3 has the segment id 16777216"),
    "segment id as text": (in_segment(id="7"), r"panoptic_pred\.json: image 3 has a segment without an integer `id`"),
    "segment without category": (
        in_predictions(without("category_id", lambda content: entry_of(content, 3)["segments_info"][0])),
        r"panoptic_pred\.json: image 3 has a segment without an integer `id` and `category_id`",
    ),
    "crowd in words": (in_segment(iscrowd="0"), r"image 3, segment \d+ has the `iscrowd` '0'"),
    "area that is no number": (in_segment(area=math.nan), r"segment \d+ has the `area` nan"),
    "negative area": (in_segment(area=-4), r"segment \d+ has the `area` -4. Expected a number of at least 0"),
    "true area below the overlap": (
        in_truth(
            lambda content: [segment.update(area=1) for segment in entry_of(content, 1)["segments_info"]] and None
        ),
        r"Segment \d+ in the ground truth of image 1 has area 1, but more pixels.*panoptic_gt/000\.png",
    ),
    "image without file name": (
        in_predictions(without("file_name", lambda content: entry_of(content, 3))),
        r"panoptic_pred\.json: image 3 has no `file_name`",
    ),
    "image without id": (
        in_predictions(without("image_id", lambda content: content["annotations"][4])),
        r"panoptic_pred\.json: entry 4 of `annotations` has no `image_id`",
    ),
    "annotations of another form": (
        in_predictions(lambda content: content | {"annotations": {}}),
        r"panoptic_pred\.json: `annotations` is missing, or no list. Found: .*annotations",
    ),
    "a list": (
        in_predictions(lambda content: content["annotations"]),
        r"panoptic_pred\.json: expected an object .* a list",
    ),
    "null": (lambda files: files.truth.write_text("null"), r"panoptic_gt\.json: expected an object .* null"),
    "broken JSON": (
        lambda files: files.predictions.write_text('{"annotations": ['),
        r"panoptic_pred\.json is no valid JSON",
    ),
    "no JSON file": (lambda files: files.truth.unlink(), r"panoptic_gt\.json cannot be read: No such file"),
    "no folder": (
        lambda files: shutil.rmtree(files.folder / "panoptic_pred"),
        r"panoptic_pred is no folder.*panoptic_pred\.json",
    ),
    "no PNG file": (
        lambda files: files.png("pred", 2).unlink(),
        r"panoptic_pred/002\.png is missing: the PNG file of image 3 of .*panoptic_pred\.json",
    ),
    "truncated PNG file": (
        lambda files: files.png("gt", 2).write_bytes(files.png("gt", 2).read_bytes()[:-60]),
        r"panoptic_gt/002\.png, the PNG file of image 3 of .*panoptic_gt\.json, cannot be read: .*truncated",
    ),
    "PNG file without pictures": (
        lambda files: files.png("gt", 2).write_text("no image"),
        r"panoptic_gt/002\.png, the PNG file of image 3 .* cannot be read: it is no image file",
    ),
    "PNG file without colours": (
        lambda files: Image.new("L", (50, 86)).save(files.png("pred", 2)),
        r"panoptic_pred/002\.png has L pixels. Expected colours",
    ),
    "PNG files of two sizes": (
        lambda files: encode_segment_ids(read_ids(files.png("pred", 2))[:-1]).save(files.png("pred", 2)),
        r"Image 3 is \(86, 50\) in the ground truth and \(85, 50\) in the prediction.*panoptic_pred/002\.png",
    ),
}
PANOPTIC_ONLY = {
    "predicted segment without its pixels", "category without isthing", "true area below the overlap",
    "predicted pixels without their segment",
}  # fmt: skip


@pytest.mark.parametrize("name", PANOPTIC_DAMAGE)
def test_wrong_panoptic_files_are_named(name, files, complaint):
    damage, message = PANOPTIC_DAMAGE[name]
    damage(files)
    assert re.search(message, complaint(*files.options("panoptic")))


@pytest.mark.parametrize("name", sorted(PANOPTIC_DAMAGE.keys() - PANOPTIC_ONLY))
def test_wrong_panoptic_files_are_named_for_semantic_scores_too(name, files, complaint):
    damage, message = PANOPTIC_DAMAGE[name]
    damage(files)
    assert re.search(message, complaint(*files.options("semantic")))


def test_semantic_scores_need_every_predicted_pixel_listed_but_no_isthing(files, run, complaint):
    expected = run(*files.options("semantic"))
    PANOPTIC_DAMAGE["category without isthing"][0](files)
    PANOPTIC_DAMAGE["predicted segment without its pixels"][0](files)
    assert run(*files.options("semantic")) == expected
    PANOPTIC_DAMAGE["predicted pixels without their segment"][0](files)
    message = r"panoptic_pred/002\.png shows segment ids that .*panoptic_pred\.json does not list for image 3: \[\d+"
    assert re.search(message, complaint(*files.options("semantic")))


def in_instances(function):
    return lambda files: change(files.instances, function)


def in_result(**values):
    """Change the first result, which is for image 1."""
    return lambda files: change(files.results, lambda content: content[0].update(values))


def in_annotation(**values):
    """Change the annotation with the id 3, of image 1."""
    return in_instances(lambda content: content["annotations"][2].update(values))


INSTANCE_DAMAGE = {
    "result of an unknown category": (
        in_result(category_id=99),
        r"instances_pred\.json: result 0 \(image 1\) has category 99, .* of .*instances_gt\.json",
    ),
    "annotation of an unknown category": (
        in_annotation(category_id=99),
        r"instances_gt\.json: annotation 3 \(image 1\) has category 99",
    ),
    "category that is a list": (in_result(category_id=[5]), r"result 0 \(image 1\) has category \[5\]"),
    "result for an unknown image": (
        in_result(image_id=4000),
        r"instances_pred\.json: result 0 is for image 4000, .* images of .*instances_gt\.json",
    ),
    "result for an image that is an object": (in_result(image_id={"id": 1}), r"result 0 is for image \{'id': 1\}"),
    "image ids that are text on one side": (in_result(image_id="1"), "result 0 is for image '1'"),
    "annotation for no image": (in_annotation(image_id=None), r"instances_gt\.json: annotation 3 is for image None"),
    "annotations with the same id": (in_annotation(id=2), r"instances_gt\.json: `id` 2 occurs twice in `annotations`"),
    "images with the same id": (
        in_instances(lambda content: content["images"][1].update(id=1)),
        r"instances_gt\.json: `id` 1 occurs twice in `images`",
    ),
    "boxes instead of masks": (
        lambda files: change(
            files.results,
            lambda content: (
                [entry.update(bbox=[0, 0, 3, 3]) or entry.pop("segmentation") for entry in content] and None
            ),
        ),
        r"instances_pred\.json: result 0 \(image 1\) has no `segmentation`. Boxes alone",
    ),
    "mask of another size": (
        in_result(segmentation={"size": [84, 82], "counts": [0, 82 * 84]}),
        r"result 0 \(image 1\) has a mask of size \[84, 82\], but the image is \[82, 84\]",
    ),
    "true mask of another size": (
        in_annotation(segmentation={"size": 82, "counts": "0"}),
        r"annotation 3 \(image 1\) has a mask of size 82",
    ),
    "mask without size": (in_result(segmentation={"counts": "0"}), r"result 0 \(image 1\) has a mask of size None"),
    "mask without run lengths": (
        in_result(segmentation={"size": [82, 84]}),
        r"Prediction \d+ of image 1 has the segmentation .*instances_pred\.json",
    ),
    "run lengths that do not fill the image": (
        in_result(segmentation={"size": [82, 84], "counts": [0, 17]}),
        r"Prediction \d+ of image 1 is damaged.*6888.*instances_pred\.json",
    ),
    "run lengths in foreign characters": (
        in_annotation(segmentation={"size": [82, 84], "counts": "é!"}),
        r"True segment \d+ of image 1 is damaged.*instances_gt\.json",
    ),
    "polygon of two corners": (
        in_annotation(segmentation=[[0, 0, 1, 1]]),
        r"True segment \d+ of image 1 has the polygon \[0, 0, 1, 1\].*instances_gt\.json",
    ),
    "no score": (
        lambda files: change(files.results, without("score", lambda content: content[0])),
        r"instances_pred\.json: result 0 \(image 1\) has no `score`",
    ),
    "score that is no number": (in_result(score=math.nan), r"result 0 \(image 1\) has the `score` nan"),
    "score as text": (in_result(score="0.5"), r"result 0 \(image 1\) has the `score` '0\.5'. Expected a finite number"),
    "score that is infinite": (in_result(score=10**400), r"result 0 \(image 1\) has the `score` 1000"),
    "negative area": (in_annotation(area=-3), r"annotation 3 \(image 1\) has the `area` -3"),
    "crowd in words": (in_annotation(iscrowd="no"), r"annotation 3 \(image 1\) has the `iscrowd` 'no'"),
    "negative height": (
        in_instances(lambda content: content["images"][0].update(height=-82)),
        r"instances_gt\.json: image 1 has the height and width \(-82, 84\)",
    ),
    "no width": (
        in_instances(without("width", lambda content: content["images"][0])),
        r"instances_gt\.json: image 1 has the height and width \(82, None\)",
    ),
    "no results": (lambda files: files.results.write_text("[]"), r"instances_pred\.json holds no predictions"),
    "no images": (
        in_instances(lambda content: content | {"images": []}),
        r"instances_gt\.json: `images` is empty",
    ),
    "results in an object": (
        lambda files: change(files.results, lambda content: {"annotations": content}),
        r"instances_pred\.json: expected a list of results, the COCO form, got an object",
    ),
    "results that are no objects": (
        lambda files: files.results.write_text("[[1, 2]]"),
        r"instances_pred\.json: result 0 is a list. Expected an object",
    ),
    "ground truth in a list": (
        in_instances(lambda content: content["annotations"]),
        r"instances_gt\.json: expected an object with `images`, `annotations` and `categories`.* got a list",
    ),
    "no annotations": (in_instances(without("annotations")), r"instances_gt\.json: `annotations` is missing"),
    "broken JSON": (lambda files: files.results.write_text("[{"), r"instances_pred\.json is no valid JSON"),
}


@pytest.mark.parametrize("name", INSTANCE_DAMAGE)
def test_wrong_instance_files_are_named(name, files, complaint):
    damage, message = INSTANCE_DAMAGE[name]
    damage(files)
    assert re.search(message, complaint(*files.options("instance")))


@pytest.fixture
def class_folders(tmp_path):
    """Two folders of class-index PNG files, with the images `a` and `b`."""
    for side in ("truth", "found"):
        (tmp_path / side).mkdir()
        for name in ("a", "b"):
            Image.fromarray(np.full((3, 2), 4, dtype=np.uint8)).save(tmp_path / side / f"{name}.png")
    return tmp_path


CLASS_INDEX_DAMAGE = {
    "no prediction": (
        lambda folder: (folder / "found/b.png").unlink(),
        "found has no prediction for 1 of the images of .*truth, such as 'b'",
    ),
    "colours": (lambda folder: Image.new("RGB", (2, 3)).save(folder / "found/b.png"), r"found/b\.png has RGB pixels"),
    "another size": (
        lambda folder: Image.new("L", (3, 2)).save(folder / "truth/b.png"),
        r"Image 'b' is \(2, 3\) in the ground truth and \(3, 2\) in the prediction.*truth/b\.png, .*found/b\.png",
    ),
    "no PNG files": (lambda folder: [path.unlink() for path in folder.glob("truth/*")], "truth holds no PNG file"),
    "truncated PNG file": (
        lambda folder: (folder / "found/a.png").write_bytes((folder / "found/a.png").read_bytes()[:50]),
        r"found/a\.png, the PNG file of a semantic map, cannot be read",
    ),
    "no folder": (lambda folder: shutil.rmtree(folder / "truth"), "truth cannot be read: No such file or directory"),
}


@pytest.mark.parametrize("name", CLASS_INDEX_DAMAGE)
def test_wrong_class_index_files_are_named(name, class_folders, complaint):
    damage, message = CLASS_INDEX_DAMAGE[name]
    damage(class_folders)
    folders = ["--ground-truth", class_folders / "truth", "--predictions", class_folders / "found"]
    assert re.search(message, complaint("semantic", *folders))


def test_class_that_the_panoptic_ground_truth_does_not_list_is_named(files, complaint):
    folder = write_class_indices(files, "pred", "L")
    Image.fromarray(np.full((86, 50), 77, dtype=np.uint8)).save(folder / "002.png")
    message = complaint("semantic", "--ground-truth", files.truth, "--predictions", folder)
    assert re.search(r"prediction of image '002' holds 77.*panoptic_gt/002\.png, .*pred_L/002\.png", message)


def test_images_that_share_a_png_file_cannot_be_paired_with_class_indices(files, complaint):
    folder = write_class_indices(files, "pred", "L")
    change(files.truth, lambda content: entry_of(content, 3).update(file_name="000.png"))
    message = complaint("semantic", "--ground-truth", files.truth, "--predictions", folder)
    assert re.search(r"panoptic_gt\.json: images 1 and 3 both have the PNG file '000'", message)


# ---------------------------------------------------------------------------------------------------------------------
# Every value of a file replaced
# ---------------------------------------------------------------------------------------------------------------------

ABSURD = [None, True, -1, 2**40, 10**400, math.nan, "", [[]], {"size": [1, 1]}]


def places_of(content):
    """Yield the path to every value of a JSON document."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield (key,)
        yield from ((key, *rest) for rest in places_of(value))


def with_value(content, place, value):
    content = copy.deepcopy(content)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return content


def small(content):
    """Keep the first segment of the first image, and two categories; of results the first."""
    if isinstance(content, list):
        return content[:1]
    annotation = content["annotations"][0]
    segment = annotation
    if "segments_info" in annotation:
        segment = annotation["segments_info"][0]
        annotation["segments_info"] = [segment]
    categories = sorted(content.get("categories", []), key=lambda entry: entry["id"] != segment["category_id"])
    return {"images": content.get("images", [])[:1], "annotations": [annotation], "categories": categories[:2]}


@pytest.mark.parametrize("task", TASKS)
def test_absurd_value_anywhere_is_scored_or_an_error_that_names_the_file(task, files, capsys):
    """A small file, each of its values replaced by each of many others: no traceback, and no score beyond [-1, 1]."""
    for path in files.folder.glob("*.json"):
        change(path, small)
    for kind, path in (("gt", files.truth), ("pred", files.predictions)):
        segment = json.loads(path.read_text())["annotations"][0]["segments_info"][0]
        ids = read_ids(files.png(kind, 0))
        encode_segment_ids(np.where(ids == segment["id"], ids, 0)).save(files.png(kind, 0))
    score.main(["files", *files.options(task)])
    num_errors = num_scores = 0
    for path in (files.instances, files.results) if task == "instance" else (files.truth, files.predictions):
        content = json.loads(path.read_text())
        for place in places_of(content):
            for value in ABSURD:
                path.write_text(json.dumps(with_value(content, place, value)))
                capsys.readouterr()
                try:
                    score.main(["files", *files.options(task)])
                except SystemExit as end:
                    num_errors += 1
                    assert re.match(rf"error: .*{files.folder}", end.code), (place, value)  # noqa: PT017
                else:
                    num_scores += 1
                    assert numbers_within(json.loads(capsys.readouterr().out)), (place, value)
        path.write_text(json.dumps(content))
    assert num_errors > 50
    assert num_scores > 50, "names, boxes and licences may hold anything"


def numbers_within(scores):
    if isinstance(scores, dict):
        return all(key == "n" or numbers_within(value) for key, value in scores.items())
    return scores is None or -1 <= scores <= 1
