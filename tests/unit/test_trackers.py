"""Trackers: what they are sent, under which names, and how a run that goes on appends to what it has sent before."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from training import trackers
from training.arguments import RecipeError
from training.trackers import (
    Trackers,
    flatten,
    name_picture,
    require_trackers,
    scalars_of_line,
    tracker_options,
)

ROOT = Path(__file__).parents[2]
LINE = {
    "step": 10,
    "loss": 12.0,
    "mask": 1.0,
    "pilot_mask": 2.0,
    "levels": {"mask": [0.75, 0.25], "pilot_mask": [1.5, 0.5]},
    "learning_rate": 1e-4,
    "images_per_second": 8.0,
}
SCALARS = {
    "train/loss": 12.0,
    "train/loss_mask": 1.0,
    "train/pilot_mask": 2.0,
    "train/learning_rate": 1e-4,
    "train/images_per_second": 8.0,
    "level/0/mask": 0.75,
    "level/0/pilot_mask": 1.5,
    "level/1/mask": 0.25,
    "level/1/pilot_mask": 0.5,
}


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}, which is not installed")


class Recorder(GeneralTracker):
    """A tracker that remembers what it was sent, and can be told to fail."""

    requires_logging_directory = False

    def __init__(self, name="recorder", fails=()):
        self.name = name
        super().__init__()
        self.fails = fails
        self.sent = []

    @property
    def tracker(self):
        return self

    def _take(self, *what):
        if what[0] in self.fails:
            raise ConnectionError("the server\nis away")
        self.sent.append(what)

    def start(self):
        self._take("start")

    def store_init_configuration(self, values):
        self._take("settings", values)

    def log(self, values, step=None, **_):
        self._take("log", step, values)

    def log_images(self, values, step=None, **keywords):
        self._take("images", step, {name: images.shape for name, images in values.items()}, keywords)

    def finish(self):
        self._take("finish")


def begin(folder, *recorders, step=0, settings=None):
    accelerator = Accelerator(cpu=True, log_with=list(recorders))
    names = [recorder.name for recorder in recorders]
    return Trackers(accelerator, names, folder, "my run", settings or {}, step=step)


def write_picture(path, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 200, dtype=np.uint8)).save(path)
    return path


def test_every_number_of_a_line_has_a_flat_name():
    assert scalars_of_line(LINE) == SCALARS
    flat_levels = {name: value for name, value in LINE.items() if name != "levels"}
    flat_levels |= {name: value for name, value in SCALARS.items() if name.startswith("level/")}
    assert scalars_of_line(flat_levels) == SCALARS
    assert scalars_of_line({"step": 3, "loss": 1.0, "alarms": ["one", "two"]}) == {"train/loss": 1.0, "train/alarms": 2}


def test_a_tracker_gets_settings_lines_scores_pictures_and_an_end(tmp_path):
    recorder = Recorder()
    sent = begin(
        tmp_path / "run", recorder, settings={"model": {"num_queries": 20}, "dataset_options": {"path": "/a/b"}}
    )
    sent.log_line(LINE)
    sent.log_evaluation({"step": 10, "scores": {"PQ": 0.5, "PQ things": 0.25}, "scores_of_average": {"PQ": 0.75}})
    paths = [
        write_picture(tmp_path / "pictures" / "step-00000010.png"),
        write_picture(tmp_path / "plots" / "curves.png"),
    ]
    sent.log_pictures(10, paths)
    sent.finish()
    sent.finish()
    sent.log_line(LINE)
    assert recorder.sent == [
        ("start",),
        ("settings", {"model.num_queries": 20, "dataset_options.path": "b"}),
        ("log", 10, SCALARS),
        ("log", 10, {"validation/PQ": 0.5, "validation/PQ_things": 0.25, "validation/PQ_of_average": 0.75}),
        ("images", 10, {"pictures": (1, 4, 6, 3), "plots/curves": (1, 4, 6, 3)}, {}),
        ("finish",),
    ]


def test_a_run_that_goes_on_sends_only_what_is_new_to_those_who_remember(tmp_path):
    first = begin(tmp_path, Recorder("wandb"))
    for step in (10, 20, 30):
        first.log_line({"step": step, "loss": 1.0})
    first.log_scores(20, {"PQ": 0.5})
    own_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    remembering, other = Recorder("wandb"), Recorder("other")
    second = begin(tmp_path, remembering, other, step=20)  # the checkpoint is older than what was sent
    for step in (30, 40):
        second.log_line({"step": step, "loss": 1.0})
    second.log_scores(20, {"PQ": 0.5})
    second.log_scores(40, {"PQ": 0.5})
    assert [entry[1] for entry in remembering.sent if entry[0] == "log"] == [40, 40]
    assert [entry[1] for entry in other.sent if entry[0] == "log"] == [30, 40, 20, 40]
    assert [entry[0] for entry in other.sent].count("settings") == 0
    state = json.loads((tmp_path / "trackers.json").read_text())
    assert state == {"id": own_id, "sent": {"line": 40, "scores": 40}}
    assert own_id.startswith("my_run-")


def test_a_run_that_begins_anew_has_another_name(tmp_path):
    ids = []
    for _ in range(2):
        begin(tmp_path, Recorder()).log_line(LINE)
        ids.append(json.loads((tmp_path / "trackers.json").read_text())["id"])
    assert ids[0] != ids[1]


def test_what_was_sent_is_forgotten_if_its_file_is_damaged(tmp_path):
    (tmp_path / "trackers.json").write_text('{"id": ')
    recorder = Recorder("wandb")
    begin(tmp_path, recorder, step=20).log_line(LINE)
    assert [entry[0] for entry in recorder.sent] == ["start", "settings", "log"]


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, capsys):
    broken, well = Recorder("broken", fails=("log",)), Recorder()
    sent = begin(tmp_path, broken, well)
    for step in (10, 20):
        sent.log_line({"step": step, "loss": 1.0})
    sent.finish()
    assert [entry[1] for entry in well.sent if entry[0] == "log"] == [10, 20]
    assert [entry[0] for entry in broken.sent] == ["start", "settings"]
    assert capsys.readouterr().err == (
        "broken has failed (ConnectionError: the server is away), and gets nothing more. The training goes on.\n"
    )


def test_a_tracker_that_cannot_begin_stops_the_program_with_a_sentence(tmp_path):
    with pytest.raises(RecipeError, match=r"The trackers recorder cannot begin: ConnectionError: the server is away"):
        begin(tmp_path, Recorder(fails=("start",)))


def test_without_trackers_nothing_happens(tmp_path):
    sent = Trackers(Accelerator(cpu=True), [], tmp_path / "run", "run", {})
    sent.log_line(LINE)
    sent.log_pictures(3, [])
    sent.finish()
    assert tracker_options([], tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    require_trackers(["tensorboard", "trackio"])
    with pytest.raises(RecipeError, match=r"names wandb, which is not installed\. Run `pip install wandb`"):
        require_trackers(["tensorboard", "wandb"])
    with pytest.raises(RecipeError, match="no choice 'comet'"):
        require_trackers(["comet"])


def test_settings_become_one_level_of_plain_values():
    settings = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None, "f": math.inf, "g": True, "h": "text"}
    assert flatten(settings) == {"a.b.c": 1, "a.d": "[1, 2]", "e": None, "f": "inf", "g": True, "h": "text"}


def test_pictures_of_steps_have_the_name_of_their_folder():
    assert name_picture(Path("run/pictures/step-00000100.png")) == "pictures"
    assert name_picture(Path("run/plots/levels.png")) == "plots/levels"


# ---------------------------------------------------------------------------------------------- the real ones, where they are

# Of a run that is killed after step 30, and goes on from the checkpoint of step 20.
SESSIONS = ((0, 30), (20, 40))
PROGRAM = "import sys; from tests.unit.test_trackers import run_sessions; run_sessions(sys.argv[1], sys.argv[2])"


def run_sessions(name, folder):
    folder = Path(folder)
    for start, end in SESSIONS:
        require_trackers([name])
        accelerator = Accelerator(cpu=True, **tracker_options([name], folder / "log"))
        settings = {"seed": 3, "model": {"a": [1]}}
        sent = Trackers(accelerator, [name], folder / "log", "my run", settings, step=start)
        for step in range(start + 10, end + 1, 10):
            sent.log_line({"step": step, "loss": float(step), "levels": {"mask": [1.0, math.nan]}})
        sent.log_scores(end, {"PQ": end / 100})
        sent.log_pictures(end, [write_picture(folder / "pictures" / f"step-{end:08d}.png")])
        sent.finish()
        accelerator.end_training()


def run_sessions_in_child(name, folder, **variables):
    """Trackers leave threads and settings behind in their process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_"))}
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, str(folder)],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert "has failed" not in child.stderr
    return json.loads((folder / "log" / "trackers.json").read_text())


@needs("tensorboard")
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_shows_one_run_without_the_steps_after_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    run_sessions("tensorboard", tmp_path)
    assert [path.name for path in (tmp_path / "log").iterdir() if path.is_dir()] == ["mpformer"]
    events = EventAccumulator(str(tmp_path / "log" / "mpformer")).Reload()
    assert events.Tags()["images"] == ["pictures"]
    assert [event.step for event in events.Images("pictures")] == [40]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (s, float(s)) for s in (10, 20, 30, 40)
    ]
    assert [event.step for event in events.Scalars("validation/PQ")] == [40]
    assert {"level/0/mask", "level/1/mask"} < set(events.Tags()["scalars"])
    (text,) = events.Tensors("settings/text_summary")
    assert b"model.a: '[1]'" in text.tensor_proto.string_val[0]


@needs("trackio")
def test_trackio_has_every_step_once_in_one_run(tmp_path):
    state = run_sessions_in_child("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    look = (
        "import json, sys, trackio; api = trackio.Api(); (run,) = api.runs('mpformer'); "
        "from trackio.sqlite_storage import SQLiteStorage; "
        "print(json.dumps([run.name, SQLiteStorage.get_logs('mpformer', run.name)]))"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    child = subprocess.run(
        [sys.executable, "-c", look], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
    name, logs = json.loads(child.stdout.splitlines()[-1])
    assert name == state["id"]
    assert [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log] == [
        (s, s) for s in (10, 20, 30, 40)
    ]
    assert [(log["step"], log["validation/PQ"]) for log in logs if "validation/PQ" in log] == [(30, 0.3), (40, 0.4)]
    assert sum("pictures" in log for log in logs) == 2


@needs("wandb")
def test_wandb_goes_on_under_the_same_id(tmp_path):
    state = run_sessions_in_child(
        "wandb", tmp_path, WANDB_MODE="offline", WANDB_SILENT="true", HOME=str(tmp_path / "home")
    )
    folders = sorted(path.name for path in (tmp_path / "log" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.endswith(state["id"]) for folder in folders)
    assert state["sent"] == {"line": 40, "scores": 40, "pictures": 40}
