"""Records of a scoring run: one line an image, written when the image is scored, so that a stopped run can go on.

    .NAME.unfinished/settings.json           what was asked for; another request begins anew
    .NAME.unfinished/records-RUN-RANK.jsonl  the images that one process has scored in one run

A line that a killed process left incomplete is passed over: its image is scored again.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from training.folders import write_text
from training.metrics.image_scores import ImageId

SETTINGS_FILE = "settings.json"
RECORDS = re.compile(r"records-(\d+)-\d+\.jsonl")


@dataclass(frozen=True)
class ImageRecord:
    """What is known of a scored image.

    Attributes:
        index: its place in the data set.
        image_id: of the data set.
        height, width: of the ground truth.
        scores: line of `ImageScores.dump` of the task's scores.
        analysis: likewise, of the error analysis.
        layers: likewise, of layer consistency; `None` if it was not asked for.
        predictions: entries of the official JSON file.
        truths: entries of the ground truth in the same form; empty if it was not asked for.
    """

    index: int
    image_id: ImageId
    height: int
    width: int
    scores: str
    analysis: str
    layers: str | None = None
    predictions: list[dict[str, Any]] = field(default_factory=list)
    truths: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class RecordFolder:
    """Folder of an unfinished run; it becomes the folder of the results."""

    path: Path

    @classmethod
    def beside(cls, output_dir: Path) -> "RecordFolder":
        """Name the folder that belongs to the results in `output_dir`."""
        return cls(output_dir.with_name(f".{output_dir.name}.unfinished"))

    def begin(self, settings: Mapping[str, Any]) -> int:
        """Make the folder, or keep it if the same was asked for before; returns the number of this run."""
        known = self.path / SETTINGS_FILE
        text = json.dumps(settings, indent=2, sort_keys=True)
        if not known.exists() or known.read_text(encoding="utf-8") != text:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            write_text(known, text)
        return max((int(match[1]) for match in map(RECORDS.fullmatch, self._names()) if match), default=0) + 1

    def open(self, run: int, rank: int) -> TextIO:
        """Open the file into which a process writes its records, one line each."""
        return (self.path / f"records-{run}-{rank}.jsonl").open("x", encoding="utf-8", buffering=1)

    def read(self) -> Iterator[ImageRecord]:
        """Read the records of all processes and runs, each image once; in no particular order."""
        seen = set()
        for name in self._names():
            if RECORDS.fullmatch(name):
                with (self.path / name).open(encoding="utf-8") as lines:
                    for line in lines:
                        if line.endswith("\n"):
                            record = ImageRecord(**json.loads(line))
                            if record.index not in seen:
                                seen.add(record.index)
                                yield record

    def clear(self) -> None:
        """Remove what is of no use once the results are there."""
        for name in self._names():
            if name == SETTINGS_FILE or RECORDS.fullmatch(name):
                (self.path / name).unlink()

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())
