"""The training program from the recipe to the picture, with a model and images that are as small as they can be."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from mpformer_hf import MPFormerForUniversalSegmentation, MPFormerImageProcessor
from mpformer_hf.model_card import card_for_model
from training import predictions
from training.arguments import parse_arguments
from training.evaluation import evaluate_model
from training.preparation import prepare_run
from training.stopping import Stopped, StopSignals
from training.train import main, train
from training.training_record import hide_folders

ROOT = Path(__file__).parents[2]
RECIPE = """
max_steps: 6
batch_size: 2
num_workers: 0
logging_steps: 3
validation_pictures: 0
learning_rate: 1e-3
warmup_steps: 2
dataset_options: {image_size: 64}
train_options: {num_images: 5}
validation_options: {num_images: 3}
model:
  backbone_config:
    model_type: resnet
    embedding_size: 8
    hidden_sizes: [8, 16, 24, 32]
    depths: [1, 1, 1, 1]
    layer_type: basic
    out_features: [stage1, stage2, stage3, stage4]
  freeze_backbone_norm: false
  feature_size: 32
  mask_feature_size: 32
  hidden_dim: 32
  encoder_layers: 1
  encoder_feedforward_dim: 32
  decoder_layers: 3
  dim_feedforward: 32
  num_attention_heads: 4
  num_queries: 8
  train_num_points: 64
processor: {size: {max_height: 64, max_width: 64}, pad_size: {height: 64, width: 64}, score_threshold: 0.0}
"""

WITH_PICTURES = ("--evaluation_steps", "3", "--validation_pictures", "2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return str(path)


def arguments_for(recipe, output_dir, *words):
    return parse_arguments([recipe, "--output_dir", str(output_dir), *words])


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """(folder, results) of a run of six steps, with scores after the third too."""
    folder = tmp_path_factory.mktemp("run") / "outputs" / "tiny"
    return folder, train(arguments_for(recipe, folder, *WITH_PICTURES))


def start_program(*command: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
    # In a shell's background job Ctrl-C is ignored, and children inherit that; a program at a terminal gets it.
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads start children here
        **pipes,
    )


def test_the_folder_holds_model_processor_scores_recipe_and_log(trained):
    folder, results = trained
    # Beside the code that loads the model without the package.
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".py") == [
        "README.md",
        "config.json",
        "log.jsonl",
        "model.safetensors",
        "pictures",
        "plots",
        "preprocessor_config.json",
        "recipe.yaml",
        "results.json",
    ]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    assert sorted(path.name for path in (folder / "plots").iterdir()) == ["curves.png", "levels.png"]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert json.loads((folder / "results.json").read_text()) == results


def test_the_results_say_what_they_depend_on(trained, recipe):
    folder, results = trained
    assert {"All", "Things", "Stuff", "per_class"} <= results["scores"].keys()
    assert list(results["scores"]["per_class"])[-2:] == ["china", "flower"]
    assert results["num_images"] == 3
    assert results["settings"] == arguments_for(recipe, folder, *WITH_PICTURES).to_dict()
    assert results["versions"]["torch"] == torch.__version__


def test_the_card_has_the_scores_settings_and_weights_of_the_run(trained):
    folder, results = trained
    text = (folder / "README.md").read_text()
    [model] = ModelCard(text).data.to_dict()["model-index"]
    metrics = {metric["type"]: metric["value"] for metric in model["results"][0]["metrics"]}
    expected = {name: 100 * results["scores"]["All"][name] for name in ("pq", "sq", "rq")}
    expected |= {f"pq_{group.lower()}": 100 * results["scores"][group]["pq"] for group in ("Things", "Stuff")}
    assert metrics == pytest.approx(expected, abs=1e-4)
    assert f"torch {torch.__version__}" in text
    assert "| Steps | 6, of 2 images |" in text
    assert "| Validation split | 3 images |" in text
    assert str(folder.parent) not in text
    assert card_for_model(MPFormerForUniversalSegmentation.from_pretrained(folder)) == text


def test_a_card_that_a_person_has_changed_outlives_the_next_training(recipe, tmp_path, capsys):
    words = [recipe, "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--evaluate", "false"]
    main(words)
    card = tmp_path / "out" / "README.md"
    assert "has not been scored" in card.read_text()
    main([*words, "--seed", "5"])
    assert "| Seed | 5 |" in card.read_text()
    card.write_text("# Mine\n")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    capsys.readouterr()
    main([*words, "--seed", "6"])
    assert card.read_text() == "# Mine\n"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert capsys.readouterr().out.count("README.md was written by a person, and is left as it is.") == 1


def test_folders_of_this_machine_are_not_on_the_card():
    settings = {"dataset_options": {"folder": "/home/someone/photos", "sizes": [64, "/data/x"]}, "schedule": "poly"}
    assert hide_folders(settings) == {"dataset_options": {"folder": "photos", "sizes": [64, "x"]}, "schedule": "poly"}


def test_the_saved_recipe_is_that_of_the_run(trained):
    folder, results = trained
    assert parse_arguments([str(folder / "recipe.yaml")]).to_dict() == results["settings"]


def test_the_saved_model_has_the_scores_of_the_trained_one(trained):
    folder, results = trained
    model = MPFormerForUniversalSegmentation.from_pretrained(folder)
    processor = MPFormerImageProcessor.from_pretrained(folder)
    run = prepare_run(parse_arguments([str(folder / "recipe.yaml")]))
    scores = evaluate_model(model, processor, run.validation_data, Accelerator(cpu=True), "panoptic")
    assert {name: scores[name] for name in ("All", "Things", "Stuff")} == {
        name: score for name, score in results["scores"].items() if name != "per_class"
    }
    assert model.config.id2label == run.train_data.id2label
    assert processor.label_ids_to_fuse == run.train_data.stuff_ids


def test_the_log_has_the_terms_of_the_loss_and_the_scores_on_the_way(trained):
    folder, _ = trained
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [3, 6]
    terms = [f"{part}{kind}" for part in ("", "pilot_") for kind in ("cross_entropy", "mask", "dice")]
    for line in losses:
        assert sum(line[term] for term in terms) == pytest.approx(line["loss"])
        assert line["images_per_second"] > 0
    assert [line["learning_rate"] for line in losses] == pytest.approx([1e-3 * (4 / 6) ** 0.9, 1e-3 * (1 / 6) ** 0.9])
    names = {"PQ", "PQ things", "PQ stuff", "SQ", "RQ"}
    assert [(line["step"], set(line["scores"])) for line in lines if "loss" not in line] == [(3, names), (6, names)]


def test_a_saved_model_gives_the_logits_of_the_trained_one_and_training_changed_it(recipe, tmp_path):
    run = prepare_run(arguments_for(recipe, tmp_path / "out", "--max_steps", "2"))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.train_steps()
    run.gather()
    run.save(tmp_path)
    loaded = MPFormerForUniversalSegmentation.from_pretrained(tmp_path).eval()
    inputs = MPFormerImageProcessor.from_pretrained(tmp_path)(run.validation_data[0]["image"], return_tensors="pt")
    with torch.no_grad():
        expected, outputs = run.model.eval()(**inputs), loaded(**inputs)
    assert torch.equal(outputs.class_queries_logits, expected.class_queries_logits)
    assert torch.equal(outputs.masks_queries_logits, expected.masks_queries_logits)
    unchanged = [name for name, parameter in run.model.named_parameters() if torch.equal(before[name], parameter)]
    assert unchanged == []


def test_training_on_few_images_lowers_every_loss(recipe, tmp_path):
    words = ["--max_steps", "40", "--train_options.num_images", "2", "--learning_rate", "3e-3", "--logging_steps", "10"]
    run = prepare_run(arguments_for(recipe, tmp_path / "out", *words))
    run.train_steps()
    first, *_, last = run.log
    terms = [f"{part}{kind}" for part in ("", "pilot_") for kind in ("cross_entropy", "mask", "dice")]
    assert [term for term in terms if not last[term] < 0.8 * first[term]] == []


def test_a_seed_gives_the_same_weights_whoever_prepares_the_batches(recipe, tmp_path):
    def weights_after_training(*words):
        run = prepare_run(arguments_for(recipe, tmp_path / "out", "--max_steps", "2", *words))
        run.train_steps()
        return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])

    weights = weights_after_training()
    assert torch.equal(weights_after_training("--num_workers", "1"), weights)
    assert not torch.equal(weights_after_training("--seed", "1"), weights)


def test_gradient_accumulation_takes_more_images_for_each_step(recipe, tmp_path):
    run = prepare_run(arguments_for(recipe, tmp_path / "out", "--gradient_accumulation_steps", "3", "--max_steps", "2"))
    calls = []
    run.model.register_forward_hook(lambda *_: calls.append(1))
    run.train_steps()
    assert len(calls) == 6
    assert run.log[-1]["step"] == 2


def test_training_goes_on_from_a_saved_model_with_its_processor(trained, recipe, tmp_path):
    folder, _ = trained
    words = ["--model", "{}", "--processor", "{}", "--model_name_or_path", str(folder)]
    run = prepare_run(arguments_for(recipe, tmp_path / "out", *words))
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in run.model.state_dict().items())
    assert run.processor.pad_size == MPFormerImageProcessor.from_pretrained(folder).pad_size
    assert run.processor.score_threshold == 0.0


def test_a_model_for_other_classes_keeps_everything_but_what_depends_on_them(trained, recipe, tmp_path):
    folder, _ = trained
    words = ["--model", "{}", "--model_name_or_path", str(folder), "--task", "instance", "--evaluate", "false"]
    run = prepare_run(arguments_for(recipe, tmp_path / "out", *words))
    saved = load_file(folder / "model.safetensors")
    state = run.model.state_dict()
    changed = {name for name, tensor in state.items() if tensor.shape != saved[name].shape}
    assert changed == {
        "class_predictor.weight",
        "class_predictor.bias",
        "criterion.empty_weight",
        "model.transformer_module.pilot_label_embedder.weight",
    }
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state.items() if name not in changed)
    assert state["criterion.empty_weight"].tolist() == pytest.approx([1.0] * 10 + [0.1])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max_step", "3"], "Did you mean `--max_steps`?"),
        (["--model.pilot_mask_noise", "points"], "The model cannot be made: `pilot_mask_noise` must be one of"),
        (["--model.num_queries", "many"], "The model cannot be made: "),
        (["--processor.top_k", "0"], "The image processor cannot be made: `top_k` must be at least 1"),
        (["--dataset_options.preset", "impossible"], "The data set cannot be made: preset must be one of"),
        (["--train_options.num_images", "0"], "The training split of digit_scenes has no images."),
    ],
)
def test_a_mistake_ends_with_a_sentence_and_writes_nothing(recipe, tmp_path, words, sentence):
    with pytest.raises(SystemExit) as stop:
        main([recipe, "--output_dir", str(tmp_path / "out"), *words])
    assert str(stop.value.code).startswith("error: ")
    assert sentence in stop.value.code
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_drawn_in_a_new_process(trained):
    folder, _ = trained
    program = start_program("-m", "training.predictions", str(folder), "--num-images", "2")
    output, errors = program.communicate()
    assert program.returncode == 0, errors
    assert str(folder / "predictions.png") in output
    picture = np.asarray(Image.open(folder / "predictions.png"))
    assert picture.shape[2] == 3
    assert picture.shape[1] > 3 * 300  # three panels side by side
    assert picture.shape[0] > 2 * 300
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000
    assert re.search("warning", errors, re.IGNORECASE) is None, errors


def test_predictions_need_the_folder_of_a_training(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no recipe.yaml. Pass the output_dir of a finished training."):
        predictions.main([str(tmp_path)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_twice_at_once_is_one_request(number):
    """A launcher hands on what the program got already."""
    finished = []
    with pytest.raises(Stopped) as stop:
        take_steps(StopSignals(), finished, [number, number])
    assert finished == [0]
    assert stop.value.in_order


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_writes_a_checkpoint_and_says_how_to_go_on(recipe, tmp_path, number, code):
    words = [recipe, "--output_dir", str(tmp_path / "out"), "--max_steps", "100000", "--num_workers", "1"]
    program = start_program("-m", "training.train", *words)
    for line in program.stdout:
        if "million parameters" in line:
            break
    program.stderr.read(1)  # the progress bar: the steps, or the processes that prepare batches, are starting
    os.killpg(program.pid, number)  # as Ctrl-C does: the processes that prepare batches get it too
    _, errors = program.communicate()
    assert program.returncode == code, errors
    assert [path.name for path in tmp_path.iterdir()] == ["out.checkpoints"]
    [checkpoint] = (tmp_path / "out.checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert "Stopping after this step." in errors
    assert f"Stopped: step {step} is saved in {checkpoint.parent}; start the same command again to go on" in errors
    assert "Traceback" not in errors


def take_steps(signals, finished, numbers):
    """Two steps; the signals arrive in the first one."""
    with signals.receive(), signals.hold():
        for step in range(2):
            for number in numbers:
                signal.raise_signal(number)
            finished.append(step)
            signals.check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_waits_for_the_end_of_a_step_and_the_second_does_not(number, capsys):
    before = signal.getsignal(number)
    finished = []
    with pytest.raises(Stopped) as stop:
        take_steps(StopSignals(), finished, [number])
    assert finished == [0]
    assert stop.value.exit_code == 128 + number
    assert "Once more, 5 seconds later, to stop at once." in capsys.readouterr().err
    with pytest.raises(Stopped) as stop:
        take_steps(StopSignals(same_request_seconds=0), finished, [number, number])
    assert finished == [0]
    assert not stop.value.in_order
    assert signal.getsignal(number) == before


KILLED_WHILE_SAVING = """
import os, signal
from training.loop import TrainingRun
from training.train import main

save = TrainingRun.save
def save_and_die(self, folder):
    save(self, folder)
    os.kill(os.getpid(), signal.SIGKILL)
TrainingRun.save = save_and_die
main()
"""


def test_a_run_that_is_killed_while_it_saves_leaves_no_model_and_the_next_one_none_of_its_files(recipe, tmp_path):
    words = [recipe, "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--evaluate", "false"]
    program = start_program("-c", KILLED_WHILE_SAVING, *words)
    _, errors = program.communicate()
    assert program.returncode == -signal.SIGKILL, errors
    assert len(list(tmp_path.iterdir())) == 1
    assert not (tmp_path / "out").exists()
    main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").exists()


WITHOUT_FURTHER_PACKAGES = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"datasets", "evaluate", "pycocotools", "faster_coco_eval", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
from training.train import main

main(sys.argv[1:])
"""


def test_digit_scenes_are_trained_and_scored_without_what_other_data_need(recipe, tmp_path):
    words = [recipe, "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--validation_pictures", "1"]
    program = start_program("-c", WITHOUT_FURTHER_PACKAGES, *words)
    _, errors = program.communicate()
    assert program.returncode == 0, errors
    assert "The curves cannot be drawn: ModuleNotFoundError: No module named 'matplotlib'" in errors
    assert "scores" in json.loads((tmp_path / "out" / "results.json").read_text())
    assert [path.name for path in (tmp_path / "out" / "pictures").iterdir()] == ["step-00000002.png"]


@pytest.mark.slow
def test_two_processes_train_and_score_together(recipe, tmp_path):
    # Accelerate starts several processes on CPUs only through MPI, but joins those that torchrun has started.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    output_dir = tmp_path / "out"
    words = ["training/train.py", recipe, "--output_dir", str(output_dir), "--max_steps", "2"]
    program = start_program(*launch, *words, ACCELERATE_USE_CPU="true")
    output, errors = program.communicate()
    assert program.returncode == 0, errors
    assert "on 2 x cpu" in output
    results = json.loads((output_dir / "results.json").read_text())
    assert results["num_processes"] == 2
    # The scores of both halves, joined, are those that one process finds for the saved model.
    run = prepare_run(parse_arguments([str(output_dir / "recipe.yaml")]))
    model = MPFormerForUniversalSegmentation.from_pretrained(output_dir)
    scores = evaluate_model(model, run.processor, run.validation_data, Accelerator(cpu=True), "panoptic")
    assert scores["All"] == results["scores"]["All"]
