"""Runs that are killed or stopped, and go on: what comes out is, bit by bit, what an uninterrupted run gives.

A session is a forked process, which spares it the imports; it ends itself with a signal at an instant that the test names.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from mpformer_hf import MPFormerForUniversalSegmentation
from tests.integration.test_training import RECIPE, start_program
from training.arguments import parse_arguments
from training.checkpoints import CheckpointFolder
from training.preparation import prepare_run
from training.progress import MEASURED
from training.train import main, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

# Sums of the log, and of the gradients, stand at values that are not zero when a checkpoint is written.
SETTINGS = """
save_every: 2
logging_steps: 4
gradient_accumulation_steps: 2
average_decay: 0.9
evaluation_steps: 3
evaluate: false
"""
NUM_STEPS = 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE.replace("logging_steps: 3", SETTINGS))
    return str(path)


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> Path:
    """Folder of a run that nothing has stopped, made in this process: forked ones find what it has imported."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        main([recipe, "--output_dir", str(folder)])
    torch.set_num_threads(threads)
    forget_accelerate()
    return folder


def forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_session(recipe, output_dir, *words, at: tuple[str, int] | None = None, number: int = signal.SIGKILL):
    """(exit code, all that it said) of a session that sends itself a signal at the n-th call, from 1, of a function."""
    log = output_dir.parent / f"{output_dir.name}.said"
    # After a GPU was used, a fork cannot train.
    context = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")
    process = context.Process(target=session, args=(log, [recipe, "--output_dir", str(output_dir), *words], at, number))
    process.start()
    process.join(100)
    assert process.exitcode is not None
    said = log.read_text()
    log.unlink()
    return process.exitcode, said


def session(log: Path, words: list[str], at: tuple[str, int] | None, number: int) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    forget_accelerate()
    if at is not None:
        send_at_call(*at, number)
    main(words)


def send_at_call(path: str, count: int, number: int) -> None:
    module, *owners, name = path.split(":")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = []

    def watched(*arguments, **keywords):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    setattr(owner, name, watched)


def outcome(folder: Path):
    """All that a run leaves and that must not depend on its interruptions."""
    assert not CheckpointFolder(folder).path.exists()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
    return (folder / "model.safetensors").read_bytes(), log


PASS = "training.progress:TrainingProgress:add"  # after each backward pass, two in a step
INSTANTS = [
    ((PASS, 3), 0),  # in the second step: nothing is there yet
    (("training.checkpoints:DurableFile:write", 3), 0),  # in the first file of the first checkpoint
    (("training.checkpoints:CheckpointFolder:_complete", 1), 0),  # all files but one are there
    (("training.checkpoints:CheckpointFolder:_prune", 1), 2),  # it is complete
    (("training.loop:evaluate_model", 1), 2),  # after the third step
    (("training.loop:TrainingRun:_save_checkpoint", 1), 2),  # after the fourth
    ((PASS, 6), 4),  # in the fifth
    (("training.checkpoints:shutil:rmtree", 3), 6),  # while the checkpoint before it is removed
    (("training.loop:TrainingRun:save", 1), 6),  # in the folder of the model
    (("training.checkpoints:CheckpointFolder:remove", 1), 6),  # the model is there
]


def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_one_that_was_not(recipe, tmp_path, uninterrupted):
    output_dir = tmp_path / "out"
    for instant, step in INSTANTS:
        code, said = run_session(recipe, output_dir, at=instant)
        assert code == -signal.SIGKILL, (instant, said)
        steps = CheckpointFolder(output_dir).steps()
        assert (steps[-1] if steps else 0) == step, instant
    code, said = run_session(recipe, output_dir)
    assert code == 0, said
    assert f"Going on after step 6 of {NUM_STEPS}" in said
    assert outcome(output_dir) == outcome(uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("instant", "step", "number"),
    [
        ((PASS, 5), 3, signal.SIGTERM),  # between two checkpoints
        ((PASS, 12), 6, signal.SIGINT),  # in the last step
        (("training.evaluation:PanopticQuality:add", 1), 3, signal.SIGTERM),  # while it is scored
    ],
)
def test_a_run_that_is_stopped_repeats_no_step(recipe, tmp_path, uninterrupted, instant, step, number):
    output_dir = tmp_path / "out"
    code, said = run_session(recipe, output_dir, at=instant, number=number)
    assert code == 128 + number, said
    checkpoints = CheckpointFolder(output_dir)
    assert f"Stopped: step {step} is saved in {checkpoints.path}; start the same command again" in said
    assert checkpoints.find().progress.step == step
    code, said = run_session(recipe, output_dir)
    assert code == 0, said
    assert f"Going on after step {step} of {NUM_STEPS}, from {checkpoints.path}" in said
    assert outcome(output_dir) == outcome(uninterrupted)


def test_another_recipe_is_refused_unless_it_is_to_begin_anew(recipe, tmp_path, uninterrupted):
    output_dir = tmp_path / "out"
    run_session(recipe, output_dir, "--seed", "1", at=(PASS, 6))
    code, said = run_session(recipe, output_dir, "--model.num_queries", "9")
    assert code == 1
    assert "holds an unfinished run, at step 2, of another recipe" in said
    assert "`model.num_queries` (8 before, 9 now); `seed` (1 before, 0 now). Go on with the settings" in said
    assert "pass --resume false" in said
    assert CheckpointFolder(output_dir).steps() == [2]
    code, said = run_session(recipe, output_dir, "--resume", "false")
    assert code == 0, said
    assert "Going on" not in said
    assert outcome(output_dir) == outcome(uninterrupted)


def test_settings_that_change_no_weight_may_change_on_the_way(recipe, tmp_path, uninterrupted):
    output_dir = tmp_path / "out"
    run_session(recipe, output_dir, at=(PASS, 6))
    code, said = run_session(recipe, output_dir, "--num_workers", "1", "--evaluation_steps", "4", "--save_every", "1")
    assert code == 0, said
    assert outcome(output_dir)[0] == outcome(uninterrupted)[0]


def test_a_data_set_of_another_length_is_refused(recipe, tmp_path):
    output_dir = tmp_path / "out"
    run_session(recipe, output_dir, at=(PASS, 6))
    run = prepare_run(parse_arguments([recipe, "--output_dir", str(output_dir)]))
    run.train_data = [run.train_data[index] for index in range(4)]
    with pytest.raises(
        RuntimeError, match="cannot be used: it belongs to a training split of 5 images, which has 4 now"
    ):
        run.train_steps()


def test_a_full_disk_ends_with_a_sentence_and_the_run_goes_on_when_there_is_room(
    recipe, tmp_path, uninterrupted, monkeypatch, capsys
):
    output_dir = tmp_path / "out"
    write = CheckpointFolder._write_files

    def fail_after_the_first(folder, state, accelerator):
        if state.progress.step > 2:
            raise OSError(28, "No space left on device")
        return write(folder, state, accelerator)

    monkeypatch.setattr(CheckpointFolder, "_write_files", staticmethod(fail_after_the_first))
    with pytest.raises(SystemExit) as stop:
        main([recipe, "--output_dir", str(output_dir)])
    monkeypatch.undo()
    assert stop.value.code.startswith("error: The checkpoint ")
    assert "No space left on device. Those before are untouched: step 2 is saved in" in stop.value.code
    assert CheckpointFolder(output_dir).find().progress.step == 2
    assert run_session(recipe, output_dir)[0] == 0
    assert outcome(output_dir) == outcome(uninterrupted)


# ------------------------------------------------------------------------------------------- averages, and the best one


def test_averages_are_the_model_or_lie_beside_it(recipe, tmp_path):
    def weights_of(name, *words):
        train(parse_arguments([recipe, "--output_dir", str(tmp_path / name), *words]))
        return load_file(tmp_path / name / "model.safetensors")

    raw = weights_of("raw", "--average_decay", "null")
    averaged = weights_of("instead")
    assert all(torch.equal(raw[name], tensor) for name, tensor in weights_of("b", "--save_average", "beside").items())
    beside = load_file(tmp_path / "b" / "average" / "model.safetensors")
    assert all(torch.equal(averaged[name], tensor) for name, tensor in beside.items())
    assert not torch.equal(raw["class_predictor.weight"], averaged["class_predictor.weight"])
    counts = [name for name in raw if name.endswith("running_mean")]
    assert counts
    assert all(torch.equal(raw[name], averaged[name]) for name in counts)
    MPFormerForUniversalSegmentation.from_pretrained(tmp_path / "b" / "average")


def test_averages_are_those_of_the_weights_after_each_step(recipe, tmp_path):
    run = prepare_run(parse_arguments([recipe, "--output_dir", str(tmp_path / "out"), "--evaluation_steps", "null"]))
    weights = [run.model.class_predictor.weight.detach().double().clone()]
    end_step = run._end_step
    run._end_step = lambda: (weights.append(run._network.class_predictor.weight.detach().double().clone()), end_step())
    run.train_steps()
    average = weights[0]
    for step, weight in enumerate(weights[1:], start=1):
        decay = min(0.9, step / (step + 10))
        average = decay * average + (1 - decay) * weight
    assert len(weights) == NUM_STEPS + 1
    torch.testing.assert_close(run.model.class_predictor.weight.double(), average, rtol=1e-5, atol=1e-7)


def test_the_model_is_that_of_the_best_score_when_asked_for(recipe, tmp_path, monkeypatch):
    words = ["--evaluate", "true", "--evaluation_steps", "1", "--keep_best", "true", "--average_decay", "null"]
    run = prepare_run(parse_arguments([recipe, "--output_dir", str(tmp_path / "out"), *words]))
    evaluate, weights = run.evaluate, {}

    def evaluate_with_a_peak(**options):
        weights[run.step] = {name: tensor.clone() for name, tensor in run._network.state_dict().items()}
        scores = evaluate(**options)
        scores["All"]["pq"] = 1.0 - abs(run.step - 3) / 10
        return scores

    monkeypatch.setattr(run, "evaluate", evaluate_with_a_peak)
    run.train_steps()
    assert sorted(weights) == [1, 2, 3, 4, 5, 6]
    assert run.checkpoints.steps() == [3, 6]
    assert all(torch.equal(weights[3][name], tensor) for name, tensor in run._network.state_dict().items())
    assert not torch.equal(weights[3]["class_predictor.weight"], weights[6]["class_predictor.weight"])


# ---------------------------------------------------------------------------------------------------- several processes


def launch(num_processes: int, *words: str):
    # Accelerate starts several processes on CPUs only through MPI, but joins those that torchrun has started.
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return start_program(*program, "training/train.py", *words, ACCELERATE_USE_CPU="true")


@pytest.mark.slow
def test_three_processes_are_stopped_together_and_go_on_as_two(recipe, tmp_path):
    words = [recipe, "--output_dir", str(tmp_path / "out"), "--evaluation_steps", "null", "--save_every", "null"]
    words += ["--warmup_steps", "2", "--max_steps", "16"]
    program = launch(3, *words)
    for line in program.stdout:
        if "million parameters on 3 x cpu" in line:
            break
    program.stderr.read(1)
    # As at a terminal: every process gets it, and the launcher hands it on.
    os.killpg(program.pid, signal.SIGTERM)
    _, errors = program.communicate()
    assert program.returncode != 0
    checkpoint = CheckpointFolder(tmp_path / "out").find()
    assert checkpoint is not None, errors
    step, samples = checkpoint.progress.step, checkpoint.progress.samples
    assert (checkpoint.num_processes, samples) == (3, step * 3 * 2 * 2)
    states = [checkpoint.read_own(index)["random"]["torch"] for index in range(3)]
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])
    assert f"Stopped: step {step} is saved in" in errors

    program = launch(2, *words)
    output, errors = program.communicate()
    assert program.returncode == 0, errors
    assert f"Going on after step {step} of 16" in output
    assert "It was written by 3 processes, and there are 2 now: a step has 8 images from here on" in output
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_that_did_not_exist_draws_from_a_seed_of_its_own(recipe, tmp_path, monkeypatch):
    output_dir = tmp_path / "out"
    run_session(recipe, output_dir, at=(PASS, 6))
    draws = []
    for _ in range(2):
        run = prepare_run(parse_arguments([recipe, "--output_dir", str(output_dir)]))
        monkeypatch.setattr(Accelerator, "process_index", 5)
        monkeypatch.setattr(run, "_take_steps", lambda: draws.append(torch.rand(4).tolist()))
        run.train_steps()
        monkeypatch.undo()
    assert draws[0] == draws[1]
    known = CheckpointFolder(output_dir).find().read_own(0)["random"]["torch"]
    assert draws[0] != torch.rand(4, generator=torch.Generator().set_state(known)).tolist()
