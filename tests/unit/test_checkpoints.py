"""Folders of checkpoints: what counts as complete, what goes, and what a full disk or a killed writer leaves."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from training import checkpoints
from training.checkpoints import (
    CheckpointError,
    CheckpointFolder,
    DurableFile,
    Progress,
    TrainingState,
    find_differences,
    measure_file,
    preserved_random_states,
    random_states,
    require_same_settings,
    restore_random_states,
    seed_new_process,
)

SETTINGS = {"seed": 3, "model": {"num_queries": 50}}


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "out")


def make_state(
    step: int, *, score: float | None = None, size: int = 4, sums: int = 4, value: float = 0.5
) -> TrainingState:
    return TrainingState(
        progress=Progress(step=step, samples=8 * step, seconds=1.5 * step, num_images=5, score=score),
        settings=SETTINGS,
        log=[{"step": step, "loss": 0.1}],
        model={"weight": torch.full((size,), value), "count": torch.tensor(step)},
        optimizer={"state": {0: {"step": torch.tensor(1.0), "sums": torch.arange(sums)}}, "rate": 1e-3, "scaler": None},
        own={"random": random_states(torch.device("cpu"))},
    )


def names_in(path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_what_is_written_is_read_again(folder, accelerator):
    state = make_state(12, score=0.25)
    assert folder.write(state, accelerator) == folder.path / "step-00000012"
    found = folder.find()
    assert (found.progress, found.settings, found.num_processes) == (state.progress, SETTINGS, 1)
    assert found.read_log() == state.log
    assert {name: tensor.tolist() for name, tensor in found.read_model().items()} == {"weight": [0.5] * 4, "count": 12}
    assert found.read_average() is None
    optimizer = found.read_optimizer()
    assert optimizer["state"][0]["sums"].tolist() == [0, 1, 2, 3]
    assert (optimizer["rate"], optimizer["scaler"]) == (1e-3, None)
    assert torch.equal(found.read_own(0)["random"]["torch"], state.own["random"]["torch"])
    assert found.read_own(1) is None


def test_names_that_share_their_memory_are_saved(folder, accelerator):
    shared = torch.arange(6.0)
    state = make_state(1)
    state = TrainingState(**{**state.__dict__, "model": {"a": shared, "b": shared, "c": shared.view(2, 3).T}})
    folder.write(state, accelerator)
    model = folder.find().read_model()
    assert model["a"].tolist() == model["b"].tolist() == [0, 1, 2, 3, 4, 5]
    assert model["c"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_run_that_never_saved_has_no_checkpoint(folder):
    assert folder.find() is None
    assert folder.describe_newest() == "there is no checkpoint yet"
    folder.remove()


def test_only_the_newest_are_left(folder, accelerator):
    for step in (2, 4, 6, 8):
        folder.write(make_state(step), accelerator, keep=2)
    assert names_in(folder.path) == ["step-00000006", "step-00000008"]
    assert folder.find().progress.step == 8


def test_the_best_is_left_when_asked_for_and_the_newer_of_two_equal_ones(folder, accelerator):
    for step, score in ((1, 0.5), (2, 0.75), (3, 0.75), (4, None), (5, 0.25)):
        folder.write(make_state(step, score=score), accelerator, keep=1, keep_best=True)
    assert folder.steps() == [3, 5]
    assert folder.find_step(3).progress.score == 0.75
    folder.write(make_state(6), accelerator, keep=1)
    assert folder.steps() == [6]


def test_older_ones_are_removed_when_the_new_one_is_complete_and_not_before(folder, accelerator, monkeypatch):
    folder.write(make_state(1), accelerator)
    seen = []
    prune = CheckpointFolder._prune

    def watch(self, *arguments, **keywords):
        seen.append((self.steps(), self.find().progress.step))
        prune(self, *arguments, **keywords)

    monkeypatch.setattr(CheckpointFolder, "_prune", watch)
    folder.write(make_state(2), accelerator)
    assert seen == [([1, 2], 2)]
    assert folder.steps() == [2]


def test_checkpoints_of_later_steps_are_removed_by_a_run_that_had_to_pass_over_them(folder, accelerator):
    folder.write(make_state(4), accelerator)
    folder.write(make_state(9), accelerator, keep=2)
    (folder.path / "step-00000009" / "model.safetensors").write_bytes(b"")
    assert folder.find(tell=lambda _: None).progress.step == 4
    folder.write(make_state(6), accelerator, keep=2)
    assert folder.steps() == [4, 6]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "process-00000.pt", "log.jsonl", "checkpoint.json"]
)
@pytest.mark.parametrize("damage", [cut, flip_bit, os.remove])
def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(folder, accelerator, file, damage):
    folder.write(make_state(1), accelerator)
    folder.write(make_state(2), accelerator, keep=2)
    path = folder.path / "step-00000002" / file
    if (file, damage) == ("checkpoint.json", cut):
        path.write_bytes(path.read_bytes()[:-3])  # its last byte says nothing
    elif (file, damage) == ("checkpoint.json", flip_bit):
        path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 0'))
    else:
        damage(path)
    told = []
    assert folder.find(told.append).progress.step == 1
    [sentence] = told
    assert "step-00000002 is damaged" in sentence
    assert folder.find_step(2) is None


def test_files_are_not_unpickled(tmp_path):
    torch.save({"optimizer": Trap()}, tmp_path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.read_safely(tmp_path / "optimizer.pt")


class Trap:
    def __reduce__(self):
        return print, ("code was run",)


# ------------------------------------------------------------------------------------------------- writers that stop


def test_a_full_disk_is_a_sentence_and_the_last_good_one_stays(folder, accelerator, monkeypatch):
    folder.write(make_state(1), accelerator)
    before = measure_file(folder.path / "step-00000001" / "model.safetensors")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as `write` and `fsync` do, without a name

    monkeypatch.setattr(checkpoints.os, "fsync", fail)
    with pytest.raises(CheckpointError) as failure:
        folder.write(make_state(2), accelerator)
    monkeypatch.undo()
    assert "step-00000002 cannot be written: process-00000.pt: No space left on device" in str(failure.value)
    assert f"step 1 is saved in {folder.path}; start the same command again" in str(failure.value)
    assert names_in(folder.path) == ["step-00000001"]
    assert measure_file(folder.path / "step-00000001" / "model.safetensors") == before
    folder.write(make_state(2), accelerator)
    assert folder.steps() == [2]


def test_a_folder_that_may_not_be_made_is_a_sentence(tmp_path, accelerator):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"cannot be written: out\.checkpoints: Not a directory.* there is no checkpoint yet"
    ):
        CheckpointFolder(tmp_path / "file" / "out").write(make_state(1), accelerator)


def in_child(act) -> int:
    """Exit code of a forked process that does something; its threads are those of the parent no more."""

    def run() -> None:
        torch.set_num_threads(1)
        act()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


@needs_fork
@pytest.mark.parametrize(
    ("sizes", "file"), [({"size": 100_000}, "model.safetensors"), ({"sums": 100_000}, "optimizer.pt")]
)
def test_a_limit_of_the_system_on_the_size_of_files_is_a_sentence(folder, accelerator, sizes, file):
    """The second file is written by C++."""
    folder.write(make_state(1), accelerator)
    state = make_state(2, **sizes)

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        with pytest.raises(CheckpointError, match=f"{file}: File too large"):
            folder.write(state, accelerator)

    assert in_child(write) == 0
    assert names_in(folder.path) == ["step-00000001"]
    assert folder.find().progress.step == 1


def calls_of_a_write(folder, accelerator) -> int:
    """How many calls of the system the second checkpoint takes, by a count of them."""
    folder.write(make_state(1), accelerator)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        before_each_call(patch, calls.append)
        folder.write(make_state(2), accelerator)
    assert calls.count("rename") == 2  # of the new one, and of the old one before it is removed
    return len(calls)


def before_each_call(patch, act) -> None:
    """Call `act` before each write, flush, rename and removal."""

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*arguments, **keywords):
            act(name)
            return original(*arguments, **keywords)

        patch.setattr(owner, name, watched)

    watch(DurableFile, "write")
    watch(checkpoints.os, "fsync")
    watch(checkpoints.Path, "mkdir")
    watch(checkpoints.Path, "rename")
    watch(checkpoints.shutil, "rmtree")


@needs_fork
def test_a_writer_that_is_killed_anywhere_leaves_the_old_or_the_new_one_and_nothing_that_stays(tmp_path, accelerator):
    count = calls_of_a_write(CheckpointFolder(tmp_path / "counted"), accelerator)
    assert count > 20
    found = []
    for instant in range(count):
        folder = CheckpointFolder(tmp_path / f"out{instant}")
        folder.write(make_state(1, value=1.0), accelerator)

        def write(folder=folder, instant=instant) -> None:
            left = [None] * instant

            def die_in_time(_name) -> None:
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left.pop()

            with pytest.MonkeyPatch.context() as patch:
                before_each_call(patch, die_in_time)
                folder.write(make_state(2, value=2.0), accelerator)

        assert in_child(write) == -signal.SIGKILL
        told = []
        checkpoint = folder.find(told.append)
        assert told == []
        assert checkpoint.read_model()["weight"].tolist() == [checkpoint.progress.step] * 4
        found.append(checkpoint.progress.step)
        folder.write(make_state(3), accelerator)
        assert names_in(folder.path) == ["step-00000003"]
    assert set(found) == {1, 2}
    assert found == sorted(found)


@needs_fork
def test_a_step_that_is_written_twice_is_there_whenever_the_writer_is_killed(tmp_path, accelerator):
    for instant in range(2):
        folder = CheckpointFolder(tmp_path / f"out{instant}")
        folder.write(make_state(1, value=1.0), accelerator)

        def write(folder=folder, instant=instant) -> None:
            renames = [None] * instant
            rename = checkpoints.Path.rename

            def die_after(path, target):
                rename(path, target)
                if not renames:
                    os.kill(os.getpid(), signal.SIGKILL)
                renames.pop()

            checkpoints.Path.rename = die_after
            folder.write(make_state(1, value=2.0), accelerator)

        assert in_child(write) == -signal.SIGKILL
        assert folder.find().read_model()["weight"][0] == 1.0 + instant


def test_all_checkpoints_are_removed_with_what_killed_runs_have_left(folder, accelerator, tmp_path):
    folder.write(make_state(1), accelerator)
    (folder.path / ".step-00000002.unfinished").mkdir()
    (tmp_path / ".out.checkpoints.removed-1").mkdir()
    (tmp_path / "other").mkdir()
    folder.remove()
    assert names_in(tmp_path) == ["other"]


# ---------------------------------------------------------------------------------------------------------- randomness


def draw() -> list[float]:
    np_draws = np.random.rand(3).tolist() + np.random.randn(1).tolist()  # noqa: NPY002 - what libraries draw from
    return [random.random(), random.gauss(0, 1), *np_draws, *torch.rand(3).tolist(), torch.randn(1).item()]


def test_random_states_come_back_from_a_file(tmp_path):
    draw()
    torch.save(random_states(torch.device("cpu")), tmp_path / "states.pt")
    expected = draw()
    assert draw() != expected
    restore_random_states(checkpoints.read_safely(tmp_path / "states.pt"), torch.device("cpu"))
    assert draw() == expected


@pytest.mark.gpu
def test_the_state_of_a_gpu_comes_back():
    device = torch.device("cuda", torch.cuda.current_device())
    states = random_states(device)
    expected = torch.rand(4, device=device)
    restore_random_states(states, device)
    assert torch.equal(torch.rand(4, device=device), expected)


def test_a_block_leaves_random_numbers_as_they_were():
    states = random_states(torch.device("cpu"))
    expected = draw()
    restore_random_states(states, torch.device("cpu"))
    with preserved_random_states(torch.device("cpu")):
        draw()
    assert draw() == expected


def test_new_processes_get_random_numbers_of_their_own_that_depend_on_seed_and_step():
    def draws_of(*arguments):
        seed_new_process(*arguments)
        return tuple(draw())

    assert draws_of(0, 10, 2) == draws_of(0, 10, 2)
    assert len({draws_of(0, 10, 2), draws_of(0, 10, 1), draws_of(0, 11, 2), draws_of(1, 10, 2)}) == 4


# ------------------------------------------------------------------------------------------------------------ settings


def test_settings_that_differ_are_named_with_both_values():
    before = {"seed": 1, "model": {"num_queries": 50, "hidden_dim": 32}, "task": "panoptic"}
    now = {"seed": 1, "model": {"num_queries": 100, "hidden_dim": 32}, "average_decay": None}
    assert list(find_differences(before, now)) == [
        "`average_decay` (not set before, null now)",
        "`model.num_queries` (50 before, 100 now)",
        '`task` ("panoptic" before, not set now)',
    ]


def test_another_recipe_is_refused_but_free_settings_may_differ(folder, accelerator):
    folder.write(make_state(7), accelerator)
    checkpoint = folder.find()
    require_same_settings(checkpoint, {**SETTINGS, "seed": 4}, free=("seed",), way_out="")
    with pytest.raises(CheckpointError) as failure:
        require_same_settings(checkpoint, {**SETTINGS, "seed": 4}, free=(), way_out="Go elsewhere.")
    assert str(failure.value) == (
        f"{folder.path} holds an unfinished run, at step 7, of another recipe: `seed` (3 before, 4 now). Go elsewhere."
    )
    assert json.loads((checkpoint.folder / "checkpoint.json").read_text())["settings"] == SETTINGS
