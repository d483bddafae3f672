"""The order in which images are taken, and how often: a function of the seed and the epoch alone.

A position is (epoch, index, repeat): the image `index` for the `repeat`-th time in `epoch`, which is what augmentation depends on.
An order can be entered anywhere, so a run that goes on takes the images that it would have taken.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler
from tqdm.auto import tqdm

from training.data import SegmentationDataset
from training.progress import bar_interval

Position = tuple[int, int, int]


class ShuffledEpochs(Sampler[Position]):
    """Positions of all images: each once in an epoch, or as often as it should be repeated."""

    def __init__(
        self, num_images: int, num_samples: int, seed: int, *, start: int = 0, repeats: Sequence[float] | None = None
    ) -> None:
        """Describe the order.

        Args:
            num_images: length of the data set.
            num_samples: length of the whole training, which may end within an epoch.
            seed: of the order, >= 0.
            start: how many of the samples have been taken already.
            repeats: how often each image comes in an epoch, on average, >= 1; `None` is once. Of 2.3, the 0.3 is drawn in each epoch.
        """
        self.num_images = num_images
        self.num_samples = num_samples
        self.seed = seed
        self.start = start
        self.repeats = None if repeats is None else torch.tensor(repeats, dtype=torch.float64)

    def __len__(self) -> int:
        return self.num_samples - self.start

    def __iter__(self) -> Iterator[Position]:
        epoch, first = 0, 0  # first: number of the epoch's first sample
        if self.repeats is None:  # all epochs are of one length
            epoch = self.start // self.num_images
            first = epoch * self.num_images
        while first < self.num_samples:
            order = self._order(epoch)
            skipped = max(0, self.start - first)
            yield from ((epoch, index, repeat) for index, repeat in order[skipped : self.num_samples - first])
            first += len(order)
            epoch += 1

    def _order(self, epoch: int) -> list[tuple[int, int]]:
        """List index and repeat of an epoch."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        if self.repeats is None:
            return [(index, 0) for index in torch.randperm(self.num_images, generator=generator).tolist()]
        entries = list_repeats(self.repeats, generator)
        return [entries[place] for place in torch.randperm(len(entries), generator=generator).tolist()]


def list_repeats(repeats: Tensor, generator: torch.Generator) -> list[tuple[int, int]]:
    """Draw how often each image comes; returns (index, repeat) for each time, in order."""
    whole = repeats.floor()
    draws = torch.rand(len(repeats), generator=generator, dtype=torch.float64)
    counts = (whole + (draws < repeats - whole)).long().tolist()
    return [(index, repeat) for index, count in enumerate(counts) for repeat in range(count)]


def repeat_factors(classes_of_images: Sequence[frozenset[int]], threshold: float) -> list[float]:
    """Repeat images with rare classes (LVIS, Gupta et al. 2019, section 4).

    A class in a share f of the images has the factor max(1, sqrt(threshold / f)); an image has that of its rarest class.

    Args:
        classes_of_images: which classes each image shows.
        threshold: share of images below which a class is rare, in (0, 1].

    Returns:
        How often each image comes in an epoch, >= 1; images without classes once.
    """
    counts = Counter(class_id for classes in classes_of_images for class_id in classes)
    num_images = len(classes_of_images)
    factors = {key: max(1.0, math.sqrt(threshold * num_images / count)) for key, count in counts.items()}
    return [max((factors[key] for key in classes), default=1.0) for classes in classes_of_images]


def list_classes(dataset: SegmentationDataset, *, is_shown: bool = True) -> list[frozenset[int]]:
    """List the classes that each image shows; reads all labels, unless the data set has `classes_of(index)`.

    Args:
        dataset: any.
        is_shown: whether there is a progress bar.
    """
    indices = range(len(dataset))
    look_up: Callable[[int], Sequence[int]] | None = getattr(dataset, "classes_of", None)
    if look_up is not None:
        return [frozenset(look_up(index)) for index in indices]
    bar = tqdm(indices, desc="counting classes", unit="image", disable=not is_shown, mininterval=bar_interval())
    return [frozenset(dataset[index]["class_labels"].tolist()) for index in bar]
