"""TensorBoard, trackio and wandb, through the trackers of Accelerate.

    require_trackers(names)                          before anything is loaded
    Accelerator(..., **tracker_options(names, folder))
    Trackers(accelerator, names, folder, ...)        log_line, log_scores, log_pictures, finish

A run that goes on appends to what it has sent before: TensorBoard forgets what lies behind the checkpoint, wandb and trackio have
it already, and are sent only what is new. What they have is in `trackers.json`, in the same folder. A tracker that fails while
the training runs is left out from then on: a log is not worth a training.
"""

import importlib.util
import json
import math
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from PIL import Image

from training.arguments import TRACKERS
from training.folders import write_text
from training.log_lines import KINDS, is_number, levels_of, name_levels, scores_of
from training.optional_work import describe, tell
from training.recipe_files import RecipeError
from training.training_record import hide_folders

PROJECT = "mpformer"
STATE_FILE = "trackers.json"
TENSORBOARD, TRACKIO, WANDB = TRACKERS
# They number their own steps, and have what was sent before a run was stopped.
REMEMBERING = (TRACKIO, WANDB)


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot be used; nothing is imported for it.

    Raises:
        RecipeError: there is no such tracker, or it is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise RecipeError(f"`trackers` has no choice {name!r}. Choices: {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(name) is None:
            raise RecipeError(
                f"`trackers` names {name}, which is not installed. Run `pip install {name}`, or leave it out."
            )


def tracker_options(names: Sequence[str], folder: str | Path) -> dict[str, Any]:
    """Arguments of `Accelerator` for these trackers; none without trackers.

    Args:
        names: of `TRACKERS`.
        folder: stays the same, and is kept, while the run lasts; TensorBoard's files come into `folder/mpformer`.
    """
    return {"log_with": list(names), "project_dir": str(folder)} if names else {}


class Trackers:
    """The trackers of a run. All processes make one and call its methods; the first one sends."""

    def __init__(
        self,
        accelerator: Accelerator,
        names: Sequence[str],
        output_dir: str | Path,
        run_name: str,
        settings: Mapping[str, Any],
        *,
        step: int = 0,
    ) -> None:
        """Begin the runs of the trackers, or go on with them.

        Args:
            accelerator: made with `tracker_options`.
            names: of `TRACKERS`; may be empty.
            output_dir: the same as for `tracker_options`.
            run_name: what a person calls this run.
            settings: the recipe.
            step: after which a run goes on; 0 begins anew.

        Raises:
            RecipeError: a tracker cannot begin; on all processes.
        """
        self._accelerator = accelerator
        self._file = Path(output_dir) / STATE_FILE
        self._state = self._read_state() if step else {}
        is_new = not self._state
        if is_new:
            self._state = {"id": f"{plain(run_name)}-{secrets.token_hex(4)}", "sent": {}}
        self._trackers: list[GeneralTracker] = []
        problem = self._start(run_name, names, purge_step=step + 1 if step else 0)
        for reason in filter(None, gather_object([problem])):
            raise RecipeError(f"The trackers {', '.join(names)} cannot begin: {reason}")
        if accelerator.is_main_process:
            self._trackers = list(accelerator.trackers)
            if is_new and names:
                self._send_settings(settings)

    def _start(self, run_name: str, names: Sequence[str], purge_step: int) -> str | None:
        """Begin, and say what is wrong; only the first process finds out."""
        own_id = self._state["id"]
        try:
            if names:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._accelerator.init_trackers(
                    PROJECT,
                    init_kwargs={
                        TENSORBOARD: {"purge_step": purge_step},
                        TRACKIO: {"name": own_id, "resume": "allow"},
                        WANDB: {"name": run_name, "id": own_id, "resume": "allow", "dir": str(self._file.parent)},
                    },
                )
        except Exception as error:  # of other people's programs and servers
            return describe(error)
        return None

    def log_line(self, line: Mapping[str, Any]) -> None:
        """Send the numbers of a line about steps; see `scalars_of_line` for their names."""
        scalars = scalars_of_line(line)
        self._send("line", line["step"], lambda tracker, step: tracker.log(scalars, step=step))

    def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Send scores of an evaluation, such as `{"PQ": 0.41, "PQ things": 0.38}`, as `validation/PQ` and so on."""
        scalars = {f"validation/{plain(name)}": value for name, value in scores.items() if is_number(value)}
        self._send("scores", step, lambda tracker, step: tracker.log(scalars, step=step))

    def log_evaluation(self, line: Mapping[str, Any]) -> None:
        """Send the scores of a line about an evaluation."""
        self.log_scores(line["step"], scores_of(line))

    def log_pictures(self, step: int, paths: Iterable[Path]) -> None:
        """Send pictures, named after their folder, and after themselves if they are not called after the step."""
        pictures = {name_picture(path): path for path in paths}
        if pictures:
            self._send("pictures", step, lambda tracker, step: send_pictures(tracker, pictures, step))

    def finish(self) -> None:
        """End the runs of the trackers; once more does nothing.

        Unlike `accelerator.end_training`, which may follow, it leaves the processes connected.
        """
        self._each(lambda tracker: tracker.finish())
        self._trackers = []
        self._accelerator.trackers.clear()

    def _send_settings(self, settings: Mapping[str, Any]) -> None:
        shown = flatten(hide_folders(settings))

        def send(tracker: GeneralTracker) -> None:
            # TensorBoard's page of settings would be a run of its own, called after the time.
            if tracker.name == TENSORBOARD:
                text = yaml.safe_dump(shown, sort_keys=False)
                tracker.log({"settings": "".join(f"    {line}\n" for line in text.splitlines())}, step=0)
            else:
                tracker.store_init_configuration(shown)

        self._each(send)
        self._write_state()

    def _send(self, kind: str, step: int, send: Callable[[GeneralTracker, int], None]) -> None:
        is_known = step <= self._state["sent"].get(kind, -1)
        self._each(lambda tracker: None if is_known and tracker.name in REMEMBERING else send(tracker, step))
        if self._trackers and not is_known:
            self._state["sent"][kind] = step
            self._write_state()

    def _each(self, act: Callable[[GeneralTracker], object]) -> None:
        """Do something with each tracker, and leave out those that fail."""
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:  # of other people's programs and servers
                self._trackers.remove(tracker)
                tell(f"{tracker.name} has failed ({describe(error)}), and gets nothing more. The training goes on.")

    def _read_state(self) -> dict[str, Any]:
        """What was sent before; nothing, if that is not known."""
        try:
            state = json.loads(self._file.read_text(encoding="utf-8"))
            return {"id": str(state["id"]), "sent": {str(kind): int(step) for kind, step in state["sent"].items()}}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write_state(self) -> None:
        try:
            write_text(self._file, json.dumps(self._state) + "\n")
        except OSError as error:
            tell(f"{self._file} cannot be written: {error}. If the run is stopped, its trackers will begin anew.")


def scalars_of_line(line: Mapping[str, Any]) -> dict[str, float]:
    """Name the numbers of a line about steps.

    Returns:
        `train/loss`, `train/loss_mask` and the like for matched queries, `train/pilot_mask` for pilots, `level/0/mask`,
        `train/learning_rate` and all other numbers, and `train/alarms`: how many there were.
    """
    scalars: dict[str, float] = {}
    for name, value in line.items():
        if is_number(value) and name != "step" and not name.startswith("level/"):
            scalars[f"train/loss_{name}" if name in KINDS else f"train/{name}"] = value
    scalars |= name_levels(levels_of(line))
    if line.get("alarms"):
        scalars["train/alarms"] = len(line["alarms"])
    return scalars


def name_picture(path: Path) -> str:
    """Name a picture for a tracker: `pictures/step-00000100.png` is one of many `pictures`, `plots/curves.png` is itself."""
    folder = path.resolve().parent.name
    return folder if re.fullmatch(r"step-\d+", path.stem) else f"{folder}/{path.stem}"


def send_pictures(tracker: GeneralTracker, pictures: Mapping[str, Path], step: int) -> None:
    """Send pictures to a tracker that can show them."""
    if tracker.name == TRACKIO:  # whose tracker in Accelerate has no `log_images`
        import trackio  # noqa: PLC0415 - where it is used

        tracker.log({name: trackio.Image(str(path)) for name, path in pictures.items()}, step=step)
    elif hasattr(tracker, "log_images"):
        arrays = {name: read_picture(path)[None] for name, path in pictures.items()}
        layout = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
        tracker.log_images(arrays, step=step, **layout)


def read_picture(path: Path) -> np.ndarray:
    """Read a picture, uint8 (H, W, 3)."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str | None]:
    """Bring settings into the one level that trackers know: `model.num_queries`; lists and the like become text."""
    flat: dict[str, bool | int | float | str | None] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            is_plain = value is None or (isinstance(value, bool | int | str | float) and not is_nonfinite(value))
            flat[f"{prefix}{name}"] = value if is_plain else str(value)
    return flat


def is_nonfinite(value: object) -> bool:
    """Whether this is a float that JSON does not know."""
    return isinstance(value, float) and not math.isfinite(value)


def plain(name: str) -> str:
    """Name without blanks and other signs that trackers replace, each in its way."""
    return re.sub(r"[^\w.^-]+", "_", name).strip("_") or "run"
