"""Everything that watches a training and changes nothing in it: trackers, alarms, curves, pictures, broken images.

While the run lasts, plots and pictures are beside its checkpoints, in `OUTPUT_DIR.checkpoints/live/`; afterwards in `OUTPUT_DIR`.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from training.alarms import Alarms, announce, collect_facts
from training.arguments import TrainingArguments
from training.broken_images import BrokenImages
from training.checkpoints import CheckpointFolder
from training.data import SegmentationDataset
from training.folders import PICTURES_FOLDER, PLOTS_FOLDER
from training.optional_work import optional_work
from training.trackers import STATE_FILE, Trackers
from training.validation_pictures import ValidationPictures

LIVE_FOLDER = "live"


def live_folder(checkpoints: CheckpointFolder) -> Path:
    """Where plots, pictures and the files of trackers are while the run lasts."""
    return checkpoints.path / LIVE_FOLDER


class Monitor:
    """Watches a run; every process has one, and the first one writes."""

    def __init__(
        self,
        arguments: TrainingArguments,
        accelerator: Accelerator,
        folder: Path,
        validation_data: SegmentationDataset | None,
        step: int,
    ) -> None:
        """Begin, or go on.

        Args:
            arguments: of the training.
            accelerator: made with the options of the trackers.
            folder: see `live_folder`.
            validation_data: whose images are drawn.
            step: after which the run goes on; 0 begins anew.
        """
        self.arguments = arguments
        self.accelerator = accelerator
        self.folder = folder
        self.name = Path(arguments.output_dir).resolve().name
        self.alarms = Alarms(
            arguments.max_steps,
            max_gradient_norm=arguments.max_gradient_norm,
            num_workers=arguments.num_workers,
            max_broken_images=arguments.max_broken_images,
        )
        self.broken = BrokenImages(arguments.max_broken_images)
        self.trackers = Trackers(accelerator, arguments.trackers, folder, self.name, arguments.to_dict(), step=step)
        self.pictures = None
        if validation_data is not None:
            self.pictures = ValidationPictures(
                validation_data, arguments.task, folder / PICTURES_FOLDER, arguments.validation_pictures, accelerator
            )
        self._last: tuple[Tensor, Sequence[Tensor]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What this process has to remember, for a checkpoint."""
        return {"alarms": self.alarms.state_dict(), "broken": self.broken.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what an earlier session has seen."""
        self.alarms.load_state_dict(state["alarms"])
        self.broken.load_state_dict(state["broken"])

    def see_batch(self, skipped: Iterable[Sequence[Any]], class_logits: Tensor, class_labels: Sequence[Tensor]) -> None:
        """Take what a forward pass has shown.

        Args:
            skipped: broken images that its batch would have had.
            class_logits: (B, Q, K + 1), of the matched queries, last level.
            class_labels: for each image int64 (n,).

        Raises:
            BrokenImagesError: there are too many.
        """
        self.broken.add(skipped)
        self._last = class_logits.detach(), class_labels

    def see_line(self, line: dict[str, Any], model: nn.Module) -> None:
        """Take a line about steps, and add the alarms that it gives to it."""
        if self.accelerator.num_processes > 1:
            self.broken.merge(gather_object([self.broken.found]))
        if not self.accelerator.is_main_process or self._last is None:
            return
        class_logits, class_labels = self._last
        facts = collect_facts(model, SimpleNamespace(class_queries_logits=class_logits), class_labels)
        if self.broken:
            names = [str(index) for index in self.broken.found]
            facts |= {"broken_images": len(self.broken), "broken_names": names}
        sentences = self.alarms.observe(line["step"], line, facts)
        if sentences:
            line["alarms"] = sentences
            announce(line["step"], sentences)
        self.trackers.log_line(line)

    def see_scores(self, line: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> None:
        """Take a line about an evaluation, and draw what there is to see; all processes call it."""
        picture = None if self.pictures is None else self.pictures.save(line["step"])
        if self.accelerator.is_main_process:
            plots = self.draw_curves(log)
            self.trackers.log_evaluation(line)
            self.trackers.log_pictures(line["step"], [*plots, *([] if picture is None else [picture])])

    def draw_curves(self, log: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Draw the curves anew; returns the pictures."""
        if not self.arguments.validation_pictures:
            return []
        with optional_work("The curves cannot be drawn"):
            from training.curves import write_curves  # noqa: PLC0415 - matplotlib, where there is one

            return write_curves(log, self.folder / PLOTS_FOLDER, title=self.name)
        return []

    def finish(self, log: Sequence[Mapping[str, Any]], output_dir: Path) -> None:
        """Close the trackers, and put all that was drawn beside the model."""
        self.trackers.finish()
        if self.accelerator.is_main_process:
            self.draw_curves(log)
            with optional_work(f"The plots cannot be copied to {output_dir}"):
                if self.folder.is_dir():
                    shutil.copytree(
                        self.folder, output_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STATE_FILE, ".*")
                    )
