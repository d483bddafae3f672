"""The scoring program from a model to the report, with a tiny model that has learnt three images by heart and sees six."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.checkpoints import save_checkpoint
from tests.integration.test_training import RECIPE, arguments_for, start_program
from training import data
from training.data import TASKS, DigitScenes
from training.layer_plot import read_file
from training.score import main
from training.task_scores import TaskScores
from training.train import train

NUM_IMAGES = 6
# What depends on the model alone, not on how the images were shared out or named.
MEASURED = ("scores", "layer_consistency", "errors", "num_images")
WORDS = ["--split", "train", "--num-workers", "0", "--num-examples", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A panoptic model in the folder of its training."""
    folder = tmp_path_factory.mktemp("model")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    words = {"max_steps": "45", "learning_rate": "3e-3", "batch_size": "3", "warmup_steps": "10", "evaluate": "false"}
    words |= {"train_options.num_images": "3", "dataset_options.tell_digits_apart": "false"}
    options = [word for name, value in words.items() for word in (f"--{name}", value)]
    train(arguments_for(str(recipe), folder / "tiny", *options))
    return folder / "tiny"


def words_for(model: Path, output_dir: Path, *words: str, num_images: int = NUM_IMAGES) -> list[str]:
    size = ["--dataset-option", f"num_images={num_images}"]
    return ["--model", str(model), *WORDS, *size, "--output-dir", str(output_dir), *words]


def score(model: Path, output_dir: Path, *words: str, **options: Any) -> dict[str, Any]:
    """Run the program in this process; returns what it left in results.json."""
    main(words_for(model, output_dir, *words, **options))
    return json.loads((output_dir / "results.json").read_text())


def measured(results: dict[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in MEASURED}


@pytest.fixture(scope="module")
def scored(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """(folder, results) of each task."""
    root = tmp_path_factory.mktemp("scored")
    words = {
        "panoptic": ["--layer-consistency"],  # the task of the recipe
        "instance": ["--task", "instance"],
        "semantic": ["--task", "semantic"],
    }
    return {
        task: (root / task, score(model, root / task, "--write-ground-truth", *more)) for task, more in words.items()
    }


# ------------------------------------------------------------------------------------------------------------- results


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder_holds_scores_report_and_predictions_and_nothing_is_left_beside_it(scored):
    always, pngs = {"results.json", "report.html"}, {"predictions", "ground_truth"}
    jsons = {"predictions.json", "ground_truth.json"}
    layers = {"layer_consistency.png", "layers.png"}
    assert names_in(scored["panoptic"][0]) == always | pngs | jsons | layers
    assert names_in(scored["instance"][0]) == always | jsons
    assert names_in(scored["semantic"][0]) == always | pngs
    assert names_in(scored["semantic"][0].parent) == set(TASKS)
    for task in ("panoptic", "semantic"):
        for name in pngs:
            assert names_in(scored[task][0] / name) == {f"{number}.png" for number in range(NUM_IMAGES)}


def test_the_model_knows_what_it_has_learnt(scored):
    """Scores of nothing could not tell right from wrong."""
    assert 0.2 < scored["panoptic"][1]["scores"]["All"]["pq"] < 0.95
    assert 0.2 < scored["instance"][1]["scores"]["AP"] < 0.999
    assert 0.2 < scored["semantic"][1]["scores"]["mIoU"] < 0.95


def test_results_say_what_they_depend_on(scored, model):
    results = scored["panoptic"][1]
    assert results["model"] == str(model)
    assert (results["dataset"], results["split"], results["task"]) == ("digit_scenes", "train", "panoptic")
    assert results["num_images"] == NUM_IMAGES
    assert results["command"].startswith(f"python -m training.score --model {model} --split train")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results["date"])
    options = {"image_size": 64, "tell_digits_apart": False, "num_images": NUM_IMAGES, "task": "panoptic"}
    assert results["settings"]["dataset_options"] == options
    assert results["settings"]["versions"].keys() >= {"torch", "transformers"}
    assert ["model.safetensors", (model / "model.safetensors").stat().st_size] in [
        entry[:2] for entry in results["settings"]["files"]
    ]


def by_name(scores: Any, names: dict[str, str]) -> Any:
    """Call classes as the results do; files call them by the ids of their categories."""
    if not isinstance(scores, dict):
        return scores
    return {names.get(key, key): by_name(value, names) for key, value in scores.items()}


@pytest.mark.parametrize("task", TASKS)
def test_the_written_files_have_the_scores_of_the_results_to_the_digit(scored, task, capsys):
    folder, results = scored[task]
    ending = "" if task == "semantic" else ".json"
    paths = [f"--{name}={folder / path}{ending}" for name, path in FILES.items()]
    main(["files", task, *paths, "--details"])
    written = json.loads(capsys.readouterr().out)
    names = {"1": "digit", "2": "china", "3": "flower"}
    assert by_name(written, names) == results["scores"]


FILES = {"ground-truth": "ground_truth", "predictions": "predictions"}


def test_layer_consistency_is_in_the_results_the_plot_and_the_picture(scored):
    folder, results = scored["panoptic"]
    consistency = results["layer_consistency"]
    assert consistency["levels"] == 3
    assert consistency["num_images"] == consistency["num_images_matched"] == NUM_IMAGES
    for name in ("mIoU_L", "mIoU_L_matched", "Util"):
        assert len(consistency[name]) == 2
        assert all(0 < value < 1 for value in consistency[name])
    assert read_file(folder / "results.json") == consistency  # what `python -m training.layer_plot` reads
    for name in ("layer_consistency.png", "layers.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 20, name
    page = (folder / "report.html").read_text()
    assert "mIoU-L, matched queries" in page
    assert f"{100 * consistency['Util'][0]:.1f}" in page


@pytest.mark.parametrize("task", TASKS)
def test_the_report_shows_scores_and_images(scored, task):
    folder, results = scored[task]
    page = (folder / "report.html").read_text()
    main_score = {"panoptic": lambda scores: scores["All"]["pq"], "instance": lambda scores: scores["AP"]}
    value = main_score.get(task, lambda scores: scores["mIoU"])(results["scores"])
    assert f"{100 * value:.1f}" in page
    assert page.count("data:image/jpeg") >= 2  # the best and the worst image
    assert str(folder) in page  # the command


# --------------------------------------------------------------------------------------- how the images are shared out


def test_batches_do_not_change_the_results(scored, model, tmp_path):
    for task in TASKS:
        words = ["--layer-consistency"] if task == "panoptic" else ["--task", task]
        results = score(model, tmp_path / task, "--batch-size", "4", *words, "--num-examples", "0")
        expected = scored[task][1]
        assert [results[name] for name in MEASURED[:2]] == [expected[name] for name in MEASURED[:2]], task
        assert round_floats(results["errors"]) == round_floats(expected["errors"]), task


def round_floats(values: Any) -> Any:
    """A model's own scores, on which calibration rests, differ in their last digits in a batch."""
    if isinstance(values, dict):
        return {key: round_floats(value) for key, value in values.items()}
    if isinstance(values, list):
        return [round_floats(value) for value in values]
    return round(values, 5) if isinstance(values, float) else values


def check_processes(output_dir: Path, said: str, panoptic: tuple[Path, dict[str, Any]]) -> None:
    """Compare what several processes have left with the results of one."""
    folder, results = panoptic
    assert said.count("panoptic quality") == 1  # one process speaks for all
    assert measured(json.loads((output_dir / "results.json").read_text())) == measured(results)
    for name in ("predictions.json", "ground_truth.json"):
        assert (output_dir / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_two_processes_do_not_change_a_digit(scored, model, tmp_path):
    # Accelerate starts several processes on CPUs only through MPI, but joins those that torchrun has started.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "training/score.py"]
    words = words_for(model, tmp_path / "out", "--layer-consistency", "--write-ground-truth")
    program = start_program(*launch, *words, ACCELERATE_USE_CPU="true")
    output, errors = program.communicate()
    assert program.returncode == 0, errors
    assert names_in(tmp_path) == {"out"}
    check_processes(tmp_path / "out", output, scored["panoptic"])


def test_three_processes_do_not_change_a_digit(scored, model, tmp_path):
    words = words_for(model, tmp_path / "out", "--layer-consistency", "--write-ground-truth")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "ACCELERATE_USE_CPU": "true"}
    if sys.platform == "linux":
        common["GLOO_SOCKET_IFNAME"] = "lo"  # the name of this machine need not resolve
    processes = [
        start_fork(words, tmp_path / f"log {rank}", **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(3)
    ]
    for process in processes:
        wait_for(process)
    said = [(tmp_path / f"log {rank}").read_text() for rank in range(3)]
    assert [process.exitcode for process in processes] == [0, 0, 0], said
    assert re.search(rf"scoring.* {NUM_IMAGES // 3}/{NUM_IMAGES // 3} \[", said[0]), "each scores a third of the images"
    check_processes(tmp_path / "out", "".join(said), scored["panoptic"])


# ------------------------------------------------------------------------------------------------------ stop and go on


def run_in_fork(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Run the program in a forked process; a new one would take most of its time to import."""
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - in the place of pytest's
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)  # of a run in the parent, which was alone
    torch.set_num_threads(1)  # the others do not live in a fork
    main(words)


def start_fork(words: Sequence[str], log: Path, **environment: str) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=run_in_fork, args=(words, log, environment))
    process.start()
    return process


def wait_for(process: multiprocessing.Process) -> None:
    process.join(timeout=120)
    if process.is_alive():
        process.kill()
        process.join()


def count_records(output_dir: Path) -> int:
    unfinished = output_dir.with_name(f".{output_dir.name}.unfinished")
    return sum(path.read_bytes().count(b"\n") for path in unfinished.glob("records-*.jsonl"))


def stop_after(num_records: int, number: int, words: Sequence[str], output_dir: Path) -> tuple[int | None, str]:
    """Start the program and send it a signal when some images are scored; returns exit code, and what it said."""
    log = output_dir.with_name("log")
    process = start_fork(words, log)
    while count_records(output_dir) < num_records and process.is_alive():
        time.sleep(0.002)
    if process.is_alive():
        os.killpg(process.pid, number)
    wait_for(process)
    said = log.read_text()
    log.unlink()
    return process.exitcode, said


def test_a_run_that_was_stopped_and_then_killed_goes_on_and_ends_with_the_same_scores(model, tmp_path, capsys):
    folder, num_images = tmp_path / "out", 100
    words = words_for(model, folder, "--num-examples", "0", "--write-ground-truth", num_images=num_images)
    code, said = stop_after(3, signal.SIGINT, [*words, "--num-workers", "1"], folder)
    assert code == 130, said
    assert "Stopped: the same command goes on where this one was." in said
    assert "Traceback" not in said
    stopped = count_records(folder)
    code, said = stop_after(stopped + 3, signal.SIGKILL, words, folder)
    assert code == -signal.SIGKILL, said
    killed = count_records(folder)
    assert 3 <= stopped < killed < num_images
    assert not folder.exists()
    capsys.readouterr()
    results = score(model, folder, "--num-examples", "0", "--write-ground-truth", num_images=num_images)
    assert f"{killed} of {num_images} images were scored before; going on." in capsys.readouterr().out
    whole = score(model, tmp_path / "whole", "--num-examples", "0", "--write-ground-truth", num_images=num_images)
    assert measured(results) == measured(whole)
    assert (folder / "predictions.json").read_bytes() == (tmp_path / "whole" / "predictions.json").read_bytes()
    assert names_in(tmp_path) == {"out", "whole"}


def change_rows(patch: pytest.MonkeyPatch, change: Callable[[int, Any], Any]) -> None:
    """Let digit scenes be what `change` makes of the number of a row and of the row."""

    class Changed(DigitScenes):
        def __getitem__(self, index: int) -> Any:
            return change(index, super().__getitem__(index))

    patch.setitem(data.DATASETS, "digit_scenes", Changed)


def at_image(number: int, happens: Callable[[], Any]) -> Callable[[int, Any], Any]:
    def change(index: int, row: Any) -> Any:
        if index == number:
            happens()
        return row

    return change


def fail() -> None:
    raise OSError("the disk is gone")


def test_results_are_replaced_only_when_new_ones_are_complete(model, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    score(model, folder, "--max-images", "2")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with monkeypatch.context() as patch:
        change_rows(patch, at_image(4, fail))
        with pytest.raises(OSError, match="the disk is gone"):
            score(model, folder, "--max-images", "5")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    capsys.readouterr()
    results = score(model, folder, "--max-images", "5")
    assert "4 of 5 images were scored before; going on." in capsys.readouterr().out
    assert results["num_images"] == 5
    assert len(names_in(folder / "predictions")) == 5
    assert names_in(tmp_path) == {"out"}


def test_a_run_that_is_stopped_while_its_report_is_written_goes_on_with_nothing_to_score(
    model, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(TaskScores, "table", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            score(model, tmp_path / "out")
    assert stop.value.code == 143
    assert "Stopped: the same command goes on where this one was." in capsys.readouterr().err
    results = score(model, tmp_path / "out")
    assert f"{NUM_IMAGES} of {NUM_IMAGES} images were scored before; going on." in capsys.readouterr().out
    assert results["num_images"] == NUM_IMAGES


def test_fewer_images_than_an_unfinished_run_had_are_scored_anew(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        change_rows(patch, at_image(5, fail))
        with pytest.raises(OSError, match="the disk is gone"):
            score(model, tmp_path / "out")
    results = score(model, tmp_path / "out", "--max-images", "2")
    assert results["num_images"] == results["errors"]["num_images"] == 2
    assert names_in(tmp_path / "out" / "predictions") == {"0.png", "1.png"}


def test_a_model_that_has_changed_is_scored_anew(model, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(model, tmp_path / "copy")
    with monkeypatch.context() as patch:
        change_rows(patch, at_image(3, fail))
        with pytest.raises(OSError, match="the disk is gone"):
            score(copy, tmp_path / "out")
    os.utime(copy / "model.safetensors", (0, 0))
    capsys.readouterr()
    score(copy, tmp_path / "out")
    assert "were scored before" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- other models


OTHER_WORDS = ["--dataset", "digit_scenes", "--match-classes", "id", "--dataset-option", "image_size=[64, 96]"]


@pytest.mark.parametrize(("kind", "task"), [("mask2former", "panoptic"), ("eomt_windows", "semantic")])
def test_a_model_of_transformers_is_scored_on_any_data_set(kind, task, tmp_path, capsys):
    folder = save_checkpoint(kind, tmp_path / kind)
    results = score(folder, tmp_path / "out", *OTHER_WORDS, "--task", task, num_images=2)
    assert results["num_images"] == 2
    expected = "note: 9 classes of the data set are not in the model; their segments will be missed: 3, 4, 5, 6, 7 and"
    assert expected in capsys.readouterr().out
    assert "Classes that the model lacks: 3, 4, 5, 6, 7 and 4 more." in (tmp_path / "out" / "report.html").read_text()
    with Image.open(tmp_path / "out" / "predictions" / "0.png") as prediction:
        assert prediction.size == (96, 64)


def test_semantic_maps_of_several_views_are_scored(tmp_path):
    folder = save_checkpoint("mpformer", tmp_path / "mpformer")
    results = score(folder, tmp_path / "out", *OTHER_WORDS, "--task", "semantic", "--tta", "--boundary", num_images=1)
    assert 0 < results["scores"]["boundary_mIoU"] < 1
    assert "averages over several scales" in (tmp_path / "out" / "report.html").read_text()


# ------------------------------------------------------------------------------------------------------------ mistakes


def mistake(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the program; returns the sentence with which it ends."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code not in (0, None)
    return stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--dataset", "coco"], "--dataset must be one of digit_scenes, auto, coco_instances"),
        (["--task", "instance", "--tta"], "--tta averages the class scores of semantic maps; instance segments of"),
        (["--boundary"], "--boundary is for --task instance and semantic"),
        (
            ["--dataset-option", "colour=red"],
            "has no option 'colour'. Its options: preset, image_size, num_images, seed",
        ),
        (["--dataset-option", "preset=odd"], "cannot be made: preset must be one of 'easy', 'hard', got 'odd'."),
        (["--dataset-option", "preset"], "--dataset-option must be NAME=VALUE, got 'preset'."),
        (["--dataset-option", "image_size=[1"], "--dataset-option 'image_size=[1' has a value that is no YAML."),
        (["--dataset-option", "num_images=0"], "The train split of digit_scenes has no images."),
        (["--match-classes", "id", "--task", "depth"], "argument --task: invalid choice: 'depth'"),
        (["--max-images", "0"], "argument --max-images: expected a whole number of at least 1, got '0'"),
        (["--num-workers", "-1"], "argument --num-workers: expected a whole number of at least 0, got '-1'"),
        (["--num-examples", "some"], "argument --num-examples: expected a whole number of at least 0, got 'some'"),
        (["--threshold", "50"], "argument --threshold: expected a number above 0 and up to 1, got '50'"),
    ],
)
def test_a_mistake_ends_with_a_sentence_and_writes_nothing(model, tmp_path, capsys, words, sentence):
    said = mistake(words_for(model, tmp_path / "out", *words), capsys)
    assert sentence in said
    assert "error: " in said
    assert list(tmp_path.iterdir()) == []


def test_data_set_and_task_must_be_named_where_no_recipe_names_them(tmp_path, capsys):
    folder = save_checkpoint("eomt", tmp_path / "eomt")
    words = ["--model", str(folder), "--output-dir", str(tmp_path / "out")]
    assert mistake(words, capsys) == (
        f"error: --dataset is missing, and there is no recipe.yaml in {folder} that says it."
    )
    words += ["--dataset", "digit_scenes"]
    assert mistake(words, capsys).startswith("error: --task is missing, and there is no recipe.yaml in ")
    words += ["--task", "semantic"]
    assert mistake(words, capsys).startswith(
        "error: No class of the model (cat, dog, sky) has the name of a class of the"
    )
    words += ["--match-classes", "id", "--num-workers", "0", "--max-images", "1"]
    assert "--tta shows images at several sizes, but" in mistake([*words, "--tta"], capsys)
    assert mistake([*words, "--layer-consistency"], capsys).startswith(
        "error: --layer-consistency cannot be measured for this eomt model: "
    )


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(model, tmp_path, capsys):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    said = mistake(words_for(model, tmp_path), capsys)
    assert said.startswith(f"error: --output-dir {tmp_path} holds thesis.tex: no results of this program")
    said = mistake(words_for(model, thesis), capsys)
    assert said == f"error: --output-dir {thesis} is a file. Choose a folder."
    said = mistake(words_for(model, model), capsys)
    assert "no results of this program" in said
    assert names_in(tmp_path) == {"thesis.tex"}
    assert (model / "model.safetensors").exists()


def test_the_current_folder_may_hold_the_results(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--model", str(model), *WORDS, "--max-images", "1", "--output-dir", "scores/.."])
    assert (tmp_path / "results.json").exists()


def test_overlapping_masks_of_a_panoptic_data_set_are_refused_with_the_name_of_the_image(
    model, tmp_path, monkeypatch, capsys
):
    def overlap(index: int, row: Any) -> Any:
        masks = row["mask_labels"].copy()
        masks[:, 0, 0] |= index == 2
        return {**row, "image_id": f"photo {index}", "mask_labels": masks}

    change_rows(monkeypatch, overlap)
    said = mistake(words_for(model, tmp_path / "out"), capsys)
    assert said.startswith("error: Image 'photo 2' of digit_scenes cannot be scored: The masks overlap.")


def test_two_images_of_one_id_are_refused(model, tmp_path, monkeypatch, capsys):
    change_rows(monkeypatch, lambda index, row: {**row, "image_id": index // 2})
    said = mistake(words_for(model, tmp_path / "out"), capsys)
    assert said == "error: Images 0 and 1 of the data set have the same id 0. Ids must be unique."


def test_a_model_that_predicts_no_numbers_is_refused_with_the_name_of_the_image(model, tmp_path, capsys):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["class_predictor.bias"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    said = mistake(words_for(broken, tmp_path / "out", "--batch-size", "2"), capsys)
    assert said.startswith("error: The model cannot predict images 0, 1: ")
    assert "NaN" in said
