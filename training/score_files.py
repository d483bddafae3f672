"""Score prediction files against ground-truth files, as the official tools do: `python -m training.score files`.

instance    COCO instances JSON against a list of COCO results             pycocotools
panoptic    COCO panoptic JSON and PNG files, both                         panopticapi
semantic    panoptic JSON and PNG, or a folder of class-index PNG files    mIoU as of the semantic benchmarks
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from training.data import TASKS
from training.metrics.image_scores import ImageId, ImageScores
from training.metrics.panoptic_quality import PanopticQuality
from training.metrics.semantic_quality import IGNORED, NOTHING, SemanticQuality
from training.official_files import (
    Category,
    FileError,
    InstanceFile,
    PanopticFile,
    class_index_files,
    read_class_indices,
)

Scores = TypeVar("Scores", bound=ImageScores)
IMAGES_IN_A_PIECE = 32
EXAMPLES = """\
examples:
  python -m training.score files instance --ground-truth instances_val.json --predictions results.json
  python -m training.score files panoptic --ground-truth panoptic_val.json --predictions panoptic.json
  python -m training.score files semantic --ground-truth labels/ --predictions predicted_labels/ --details
"""
# What the official tools print, and what --boundary adds; --details adds the rest.
OFFICIAL_KEYS = {
    "instance": ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
    "panoptic": ("All", "Things", "Stuff", "per_class"),
    "semantic": ("mIoU", "per_class_IoU", "pixel_accuracy", "boundary_mIoU", "per_class_boundary_IoU"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program: one JSON object on standard output, a sentence and exit code 1 for files that cannot be scored."""
    parser = make_parser()
    options = parser.parse_args(argv)
    require_useful_options(parser, options)
    try:
        scores = score_files(options)
    except FileError as error:
        sys.exit(f"error: {error}")
    if not options.details:
        scores = {key: scores[key] for key in OFFICIAL_KEYS[options.task] if key in scores}
    print(json.dumps(scores, indent=2))


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.score files",
        description="Score prediction files as the official tools do. Prints one JSON object; scores are fractions.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "task", choices=TASKS, help="instance: COCO AP and AR; panoptic: PQ, SQ, RQ; semantic: mIoU and pixel accuracy"
    )
    parser.add_argument(
        "--ground-truth",
        type=Path,
        required=True,
        metavar="PATH",
        help="COCO instances or panoptic JSON; for semantic also a folder of class-index PNG files",
    )
    parser.add_argument(
        "--predictions",
        type=Path,
        required=True,
        metavar="PATH",
        help="COCO results (a JSON list), panoptic JSON, or for semantic also a folder of class-index PNG files",
    )
    help_of_folder = "folder of the PNG files of the panoptic form (default: the path of the JSON file without .json)"
    parser.add_argument("--ground-truth-folder", type=Path, metavar="FOLDER", help=help_of_folder)
    parser.add_argument("--predictions-folder", type=Path, metavar="FOLDER", help=help_of_folder)
    parser.add_argument(
        "--ignore-index",
        type=int,
        default=IGNORED,
        metavar="N",
        help="value of class-index PNG files that is void, or no prediction: 255 (default), 65535 in 16-bit files of "
        "training.score, 0 in ADE20K's",
    )
    parser.add_argument(
        "--boundary",
        action="store_true",
        help="instance: boundary AP in the place of AP; semantic: also boundary IoU",
    )
    parser.add_argument("--details", action="store_true", help="all that is known: per class, fwIoU, PQ^St, ...")
    parser.add_argument(
        "--num-workers",
        type=not_negative,
        default=0,
        metavar="N",
        help="processes that read PNG files; 0: this one (default)",
    )
    return parser


def not_negative(text: str) -> int:
    """Read an integer that is at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {number}")
    return number


def require_useful_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    if options.task == "panoptic" and options.boundary:
        parser.error("--boundary is for instance and semantic.")
    for name in ("ground_truth", "predictions"):
        if getattr(options, f"{name}_folder") is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if options.task == "instance":
            parser.error(f"{flag}-folder is for panoptic and semantic: COCO results have no PNG files.")
        if getattr(options, name).is_dir():
            parser.error(f"{flag} is a folder already. {flag}-folder belongs to a panoptic JSON file.")


def score_files(options: argparse.Namespace) -> dict[str, Any]:
    """Read the files that the command line names, and compute the scores of its task."""
    tasks: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "instance": score_instances,
        "panoptic": score_panoptic,
        "semantic": score_semantic,
    }
    return tasks[options.task](options)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------


def score_instances(options: argparse.Namespace) -> dict[str, Any]:
    """COCO mask AP and AR."""
    from training.metrics.average_precision import AveragePrecision  # noqa: PLC0415  (needs faster-coco-eval)

    truth = InstanceFile.read(options.ground_truth)
    predictions = truth.read_predictions(options.predictions)
    scores = AveragePrecision(truth.categories, boundary=options.boundary)
    for image_id in tqdm(truth.sizes, unit="image", disable=None):
        with naming(options.ground_truth, options.predictions):
            scores.add(image_id, predictions[image_id], truth.annotations[image_id], truth.sizes[image_id])
    return scores.compute()


def score_panoptic(options: argparse.Namespace) -> dict[str, Any]:
    """Panoptic quality."""
    truth = PanopticFile.read_truth(options.ground_truth, options.ground_truth_folder, needs_isthing=True)
    predictions = PanopticFile.read_predictions(
        options.predictions, options.predictions_folder, categories=truth.categories
    )
    require_predictions(truth.annotations, predictions.annotations, truth.path, predictions.path)
    return score_in_processes(
        partial(panoptic_scores, truth=truth, predictions=predictions), list(truth.annotations), options.num_workers
    ).compute()


def panoptic_scores(image_ids: Sequence[ImageId], truth: PanopticFile, predictions: PanopticFile) -> PanopticQuality:
    """Score some images."""
    things = [category.id for category in truth.categories.values() if category.is_thing]
    stuff = [category.id for category in truth.categories.values() if not category.is_thing]
    scores = PanopticQuality(things, stuff)
    for image_id in image_ids:
        with naming(truth.png(image_id), predictions.png(image_id)):
            scores.add(
                image_id,
                predictions.segment_map(image_id),
                predictions.annotations[image_id]["segments_info"],
                truth.segment_map(image_id),
                truth.annotations[image_id]["segments_info"],
            )
    return scores


def score_semantic(options: argparse.Namespace) -> dict[str, Any]:
    """Compute mIoU and its relatives of category maps, made of panoptic files or read from class-index files."""
    truth = SemanticMaps.find_truth(options.ground_truth, options.ground_truth_folder, options.ignore_index)
    predictions = SemanticMaps.find_predictions(
        options.predictions, options.predictions_folder, options.ignore_index, truth.categories
    )
    if truth.panoptic is None or predictions.panoptic is None:
        truth, predictions = truth.by_file_name(), predictions.by_file_name()
    require_predictions(truth.places, predictions.places, truth.path, predictions.path)
    count = partial(semantic_scores, truth=truth, predictions=predictions, boundary=options.boundary)
    return score_in_processes(count, list(truth.places), options.num_workers).compute()


def semantic_scores(
    image_ids: Sequence[ImageId], truth: "SemanticMaps", predictions: "SemanticMaps", boundary: bool
) -> SemanticQuality:
    """Score some images."""
    scores = SemanticQuality(truth.categories, boundary=boundary, ignore_index=NOTHING)
    for image_id in image_ids:
        with naming(truth.png(image_id), predictions.png(image_id)):
            scores.add(image_id, predictions.read(image_id), truth.read(image_id))
    return scores


@dataclass(frozen=True)
class SemanticMaps:
    """Category maps of one side, read one by one.

    `places` says for each image where it is: its id in the panoptic file, or its class-index file.
    """

    path: Path
    places: dict[ImageId, ImageId | Path]
    panoptic: PanopticFile | None
    ignore_index: int

    @classmethod
    def find_truth(cls, path: Path, folder: Path | None, ignore_index: int) -> "SemanticMaps":
        """Take a JSON file for the panoptic form, and a folder for class-index PNG files."""
        if path.is_dir():
            return cls(path, dict(class_index_files(path)), None, ignore_index)
        return cls._of_panoptic(PanopticFile.read_truth(path, folder, needs_isthing=False), ignore_index)

    @classmethod
    def find_predictions(
        cls, path: Path, folder: Path | None, ignore_index: int, categories: Mapping[int, Category] | None
    ) -> "SemanticMaps":
        """Do the same for predictions; `categories` are those of the ground truth, `None` if it lists none."""
        if path.is_dir():
            return cls(path, dict(class_index_files(path)), None, ignore_index)
        return cls._of_panoptic(PanopticFile.read_predictions(path, folder, categories=categories), ignore_index)

    @classmethod
    def _of_panoptic(cls, file: PanopticFile, ignore_index: int) -> "SemanticMaps":
        return cls(file.path, {image_id: image_id for image_id in file.annotations}, file, ignore_index)

    @property
    def categories(self) -> Mapping[int, Category] | None:
        """Classes that the ground truth lists; `None` when it lists none: then every value is a class."""
        return None if self.panoptic is None else self.panoptic.categories

    def by_file_name(self) -> "SemanticMaps":
        """Name the images by their PNG files, without the ending: what the two forms have in common."""
        if self.panoptic is None:
            return self
        names: dict[ImageId, ImageId | Path] = {}
        for image_id, entry in self.panoptic.annotations.items():
            name = Path(entry["file_name"]).with_suffix("").as_posix()
            if name in names:
                raise FileError(
                    f"{self.path}: images {names[name]!r} and {image_id!r} both have the PNG file {name!r}."
                )
            names[name] = image_id
        return replace(self, places=names)

    def png(self, image_id: ImageId) -> Path:
        """Path of the PNG file of an image."""
        place = self.places[image_id]
        return place if isinstance(place, Path) else self._panoptic().png(place)

    def read(self, image_id: ImageId) -> NDArray[np.int64]:
        """Read the map of an image, (H, W); `NOTHING` is void."""
        place = self.places[image_id]
        if isinstance(place, Path):
            return read_class_indices(place, self.ignore_index, NOTHING)
        return self._panoptic().category_map(place, NOTHING)

    def _panoptic(self) -> PanopticFile:
        assert self.panoptic is not None, "only maps of a panoptic file have ids for places"
        return self.panoptic


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def require_predictions(
    image_ids: Iterable[ImageId], predicted_ids: Collection[ImageId], truth: Path, predictions: Path
) -> None:
    """Refuse predictions that lack an image, as panopticapi does. Predictions of further images are passed over, as there."""
    missing = [image_id for image_id in image_ids if image_id not in predicted_ids]
    if missing:
        similar = [image_id for image_id in predicted_ids if str(image_id) == str(missing[0])]
        hint = "An image in which nothing was found needs an entry too."
        if similar:
            hint = f"It has one for {similar[0]!r}: a number and its text are two ids."
        raise FileError(
            f"{predictions} has no prediction for {len(missing)} of the images of {truth}, such as {missing[0]!r}. {hint}"
        )


def score_in_processes(
    score: Callable[[Sequence[ImageId]], Scores], image_ids: Sequence[ImageId], num_workers: int
) -> Scores:
    """Score images piece by piece, in this process or in several, and join the pieces."""
    pieces = [image_ids[start : start + IMAGES_IN_A_PIECE] for start in range(0, len(image_ids), IMAGES_IN_A_PIECE)]
    scores = score([])
    with tqdm(total=len(image_ids), unit="image", disable=None) as progress:
        for piece in map_in_order(score, pieces, num_workers):
            scores.merge(piece)
            progress.update(len(piece))
    return scores


def map_in_order(function: Callable[[Any], Any], inputs: Sequence[Any], num_workers: int) -> Iterator[Any]:
    """Apply a function to each input, in this process (0 workers) or in several."""
    if num_workers == 0:
        yield from map(function, inputs)
        return
    # The function holds the lists of all files: it is sent once to each process, and not with each piece.
    with ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_Worker.take, initargs=(function,)
    ) as pool:
        yield from pool.map(_Worker.apply, inputs)


class _Worker:
    """What a process of `map_in_order` keeps."""

    function: ClassVar[Callable[[Any], Any]]

    @classmethod
    def take(cls, function: Callable[[Any], Any]) -> None:
        cls.function = staticmethod(function)

    @classmethod
    def apply(cls, piece: Any) -> Any:  # noqa: ANN401 - whatever the function takes and returns
        return cls.function(piece)


@contextmanager
def naming(truth: Path, predictions: Path) -> Iterator[None]:
    """Say in which files it is that a metric refuses an image."""
    try:
        yield
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{error} (ground truth {truth}, prediction {predictions})") from None
