"""A training on a small data set in each format: one step, a score, and the options that only real data have."""

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from tests import data_folders
from tests.integration.test_training import RECIPE
from training.arguments import parse_arguments
from training.preparation import prepare_run
from training.stopping import Stopped
from training.train import main, train

WRITERS = {
    "coco_instances": (data_folders.write_coco_instances, "instance"),
    "coco_panoptic": (data_folders.write_coco_panoptic, "panoptic"),
    "ade20k": (data_folders.write_ade20k, "semantic"),
    "cityscapes": (data_folders.write_cityscapes, "panoptic"),
    "mapillary_vistas": (data_folders.write_mapillary, "panoptic"),
    "class_index": (data_folders.write_class_index, "semantic"),
    "yolo": (data_folders.write_yolo, "instance"),
}
SCORES = {"instance": "AP", "panoptic": "All", "semantic": "mIoU"}
STEP = ("--max_steps", "1", "--warmup_steps", "0", "--batch_size", "2", "--model.num_queries", "20")


@pytest.fixture(scope="module", autouse=True)
def index_cache(tmp_path_factory):
    """Indices of the data sets are written where they disappear."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("indices"))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    lines = [line for line in RECIPE.splitlines() if not line.startswith(("dataset_options", "train_options", "valid"))]
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text("\n".join(lines) + "\nvalidation_pictures: 0\n")
    return path


def write_folder(name, folder):
    write, task = WRITERS[name]
    for split in ("train", "validation"):
        write(data_folders.make_scenes(split), folder, split)
    return task


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_trains_and_is_scored(recipe, tmp_path, name):
    task = write_folder(name, tmp_path / "data")
    words = ["--dataset", "auto", "--task", task, "--dataset_options.path", str(tmp_path / "data")]
    words += ["--augmentation.kind", "large_scale_jitter", "--augmentation.size", "64", "--exclude_ignored", "true"]
    words += ["--output_dir", str(tmp_path / "out")]
    words += ["--dataset_options.ignore_index", "65535"] if name == "class_index" else []
    results = train(parse_arguments([str(recipe), *words, *STEP]))
    assert results["num_images"] == 3
    score = results["scores"][SCORES[task]]
    assert 0 <= (score["pq"] if task == "panoptic" else score) <= 1


def test_all_that_a_recipe_can_ask_for_works_together(recipe, tmp_path):
    task = write_folder("coco_instances", tmp_path / "data")
    settings = {
        "dataset": "coco_instances",
        "task": task,
        "dataset_options.path": tmp_path / "data",
        "augmentation.preset": "coco",
        "augmentation.size": 64,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": "true",
        "frozen": "backbone",
        "model.freeze_backbone_norm": "true",
        "class_weights.digit": 2,
        "repeat_threshold": 0.9,
        "average_decay": 0.9,
        "reference_batch_size": 16,
        "evaluation_steps": 1,
        "early_stopping": 1,
        "keep_best": "true",
        "mixed_precision": "bf16",
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "warmup_steps": 0,
        "batch_size": 1,
        "num_workers": 1,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    results = train(parse_arguments([str(recipe), *words]))
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    scores = [line["scores"]["AP"] for line in lines if "scores" in line]
    assert results["steps"] == len(scores) >= 2
    assert results["scores"]["AP"] == max(scores)


def test_broken_images_are_passed_over_and_too_many_stop_the_run(recipe, tmp_path, capsys):
    task = write_folder("coco_instances", tmp_path / "data")
    broken = sorted((tmp_path / "data").rglob("*.jpg")) or sorted((tmp_path / "data").rglob("*.png"))
    broken = next(path for path in broken if "train" in str(path))
    broken.write_bytes(broken.read_bytes()[:200])
    words = [str(recipe), "--dataset", "auto", "--task", task, "--dataset_options.path", str(tmp_path / "data")]
    words += ["--output_dir", str(tmp_path / "out"), *STEP, "--max_steps", "3", "--num_workers", "1"]
    main([*words, "--evaluate", "false"])
    errors = capsys.readouterr().err
    assert errors.count("Passed over, and another image taken instead") == 1
    assert broken.name in errors
    with pytest.raises(SystemExit) as stop:
        main([*words, "--max_broken_images", "0", "--output_dir", str(tmp_path / "other")])
    assert "1 images cannot be read, and at most 0 may be passed over (`max_broken_images`)" in stop.value.code
    assert "Traceback" not in stop.value.code
    assert not (tmp_path / "other").exists()


def test_a_stream_trains_and_goes_on_where_it_was(recipe, tmp_path):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "masks": datasets.List(datasets.Image()),
            "labels": datasets.List(datasets.Value("int64")),
        }
    )
    for split in ("train", "validation"):
        rows = [scene.row for scene in data_folders.make_scenes(split, crowd=False)]
        columns = [
            {
                "image": row["image"],
                "masks": [Image.fromarray(mask) for mask in row["mask_labels"]],
                "labels": row["class_labels"].tolist(),
            }
            for row in rows
        ]
        table = datasets.Dataset.from_list(columns, features=features)
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    settings = {
        "dataset": "hub_stream",
        "dataset_options.path": tmp_path / "data",
        "dataset_options.mask_form": "masks",
        "dataset_options.mask_column": "masks",
        "dataset_options.label_column": "labels",
        "dataset_options.classes": "[digit, china, flower]",
        "task": "semantic",
        "batch_size": 2,
        "evaluate": "false",
        "warmup_steps": 0,
    }
    words = [str(recipe), *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]
    main([*words, "--max_steps", "4", "--output_dir", str(tmp_path / "whole")])

    run = prepare_run(parse_arguments([*words, "--max_steps", "4", "--output_dir", str(tmp_path / "part")]))
    stop_after(run, 2)
    with pytest.raises(Stopped):
        run.train_steps()
    main([*words, "--max_steps", "4", "--output_dir", str(tmp_path / "part")])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert weights[0] == weights[1]


def stop_after(run, step):
    """Let a run be stopped in order when it has taken a step."""
    end_step = run._end_step

    def end_and_stop():
        end_step()
        if run.step == step:
            raise Stopped(15, in_order=True)

    run._end_step = end_and_stop
