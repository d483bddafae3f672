"""What every metric here keeps of an image, and how the images of several processes become one sum.

A metric reduces each image to a small score at once; the masks are gone before the next image comes. Scores are kept by image
id and summed in the order of the ids, so that neither the order of the images, nor the size of the batches, nor the number of
processes changes a digit. An image that two processes have scored (samplers repeat images to fill a batch) counts once.
"""

import json
from collections.abc import Iterator
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

ImageId = int | str
Score = TypeVar("Score")


class ImageScores(Generic[Score]):
    """Base of the metrics: one score for each image id. A score holds numbers, strings, lists and dictionaries only.

    A subclass has `add`, which calls `keep`, and `compute`, which sums over `in_order`.
    """

    def __init__(self) -> None:
        """Begin without images."""
        self._scores: dict[ImageId, Score] = {}

    def __len__(self) -> int:
        """Count the images collected so far."""
        return len(self._scores)

    def __contains__(self, image_id: ImageId) -> bool:
        """Whether the image was added, or taken over from another process."""
        return image_id in self._scores

    def refuse_known(self, image_id: ImageId) -> None:
        """Raise if the image was added before: its pixels would count twice."""
        if image_id in self:
            raise ValueError(f"Image {image_id!r} was added before. Add each image once, or call reset() first.")

    def keep(self, image_id: ImageId, score: Score) -> None:
        """Keep the score of an image that is not known yet."""
        self.refuse_known(image_id)
        self._scores[image_id] = score

    def in_order(self) -> Iterator[tuple[ImageId, Score]]:
        """Go through all images: integer ids first, by value, then strings, by alphabet."""
        return iter(sorted(self._scores.items(), key=lambda entry: (isinstance(entry[0], str), entry[0])))

    def settings(self) -> dict[str, Any]:
        """Name what two collections must have in common to be merged; subclasses name their classes here."""
        return {}

    def merge(self, other: Self) -> None:
        """Take over the images of another collection with the same settings; an image known to both counts once."""
        if type(other) is not type(self):
            raise ValueError(
                f"Only collections of the same kind can be merged: {type(self).__name__} here, {type(other).__name__} there."
            )
        if other.settings() != self.settings():
            raise ValueError(
                f"Only collections with the same settings can be merged: {self.settings()} here, {other.settings()} there."
            )
        self._scores = {**other._scores, **self._scores}

    def reset(self) -> None:
        """Forget all images."""
        self._scores = {}

    def dump(self) -> list[str]:
        """Write each image as one line of JSON, from which `load` makes the same score again, digit by digit."""
        return [json.dumps([image_id, score]) for image_id, score in self._scores.items()]

    def load(self, lines: list[str]) -> None:
        """Take over images that `dump` wrote; one that is known already counts once."""
        for line in lines:
            image_id, score = json.loads(line)
            self._scores.setdefault(image_id, score)


def to_numpy(values: ArrayLike | torch.Tensor) -> NDArray[Any]:
    """Return an array, or a tensor on any device, as an array."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
