"""What the losses divide by when an optimiser step consists of several forward passes (gradient accumulation).

A step of M passes on each of W processes has W * M parts. Each part's loss is divided by counts of the whole step, so that the mean of
all parts' losses is the loss of one batch with all images: `GlobalBatch` holds these counts. They are known before the first
pass, since they depend on the class labels alone.

Axes: K classes, Q queries of the model, G pilot groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """Counts of all images of an optimiser step, over all passes of all processes. Make it with `count`.

    Numbers are exact integers: wrappers that cast floating-point arguments (mixed precision of sharded models) leave them alone.

    Attributes:
        num_passes: M, forward passes of each process, >= 1.
        num_processes: W, >= 1.
        num_images: of all parts.
        num_segments: of all parts.
        num_matched: segments that a query can be found for, at most Q of each image.
        max_segments: most segments in one image; every part lays out as many pilot slots a group.
        class_counts: int64, (K,), segments of each class, of all parts.
    """

    num_passes: int
    num_processes: int
    num_images: int
    num_segments: int
    num_matched: int
    max_segments: int
    class_counts: Tensor

    @classmethod
    @torch.no_grad()
    def count(
        cls,
        class_labels: Sequence[Sequence[Tensor]],
        *,
        num_labels: int,
        num_queries: int,
        device: torch.device | str = "cpu",
    ) -> "GlobalBatch":
        """Count the segments of a step. When there are several processes, all must call it; they wait for each other.

        Args:
            class_labels: for each pass of this process, for each image of its batch, int64 (segments,).
            num_labels: K. Labels outside of [0, K) are counted as the nearest one; the forward pass refuses them.
            num_queries: Q.
            device: where `class_counts` is going to be; of several processes, one that their backend can send from.

        Raises:
            ValueError: there is no pass, or processes differ in the number of passes.
        """
        if not class_labels:
            raise ValueError(
                "Expected the class labels of at least one forward pass, got none. Pass one list for each batch of the step."
            )
        images = [labels for batch in class_labels for labels in batch]
        sizes = [len(labels) for labels in images]
        labels = torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *(each.to(device) for each in images)])
        counts = torch.zeros(num_labels, dtype=torch.int64, device=device)
        counts.index_add_(0, labels.long().clamp(0, num_labels - 1), torch.ones_like(labels, dtype=torch.int64))
        matched = sum(min(size, num_queries) for size in sizes)
        facts = [len(class_labels), len(images), sum(sizes), matched, max(sizes, default=0)]
        processes, counts = _gather(facts, counts)
        passes, num_images, num_segments, num_matched, max_segments = zip(*processes, strict=True)
        if len(set(passes)) > 1:
            raise ValueError(
                f"Expected equally many forward passes on every process, got {', '.join(map(str, passes))}. Give every process as "
                "many batches in a step; a batch may have another number of images."
            )
        return cls(
            num_passes=passes[0],
            num_processes=len(processes),
            num_images=sum(num_images),
            num_segments=sum(num_segments),
            num_matched=sum(num_matched),
            max_segments=max(max_segments),
            class_counts=counts,
        )

    @property
    def num_parts(self) -> int:
        """W * M, forward passes whose losses are averaged."""
        return self.num_passes * self.num_processes

    def divide_masks(self) -> float:
        """Number of masks that each part's mask losses are divided by, >= 1."""
        return max(self.num_segments / self.num_parts, 1.0)

    def weigh_matched_labels(self, class_weights: Tensor, num_queries: int) -> Tensor:
        """Sum of the class weights of all matched queries, of all parts.

        Exact if no image has more segments than queries. Otherwise it is not known ahead which segments stay unmatched, and
        those that are matched have the mean weight of all segments.

        Args:
            class_weights: float32, (K + 1,); the last is that of "no object".
            num_queries: Q.

        Returns:
            float32, ().
        """
        share = self.num_matched / max(self.num_segments, 1)
        num_empty = self.num_images * num_queries - self.num_matched
        return share * self._weigh_segments(class_weights) + num_empty * class_weights[-1]

    def weigh_pilot_labels(self, class_weights: Tensor, num_groups: int) -> Tensor:
        """Sum of the class weights of all pilot slots, of all parts: float32, (). Empty slots are "no object"."""
        num_empty = self.num_images * self.max_segments - self.num_segments
        return num_groups * (self._weigh_segments(class_weights) + num_empty * class_weights[-1])

    def _weigh_segments(self, class_weights: Tensor) -> Tensor:
        return (self.class_counts.to(class_weights.device, class_weights.dtype) * class_weights[:-1]).sum()


def _gather(facts: list[int], counts: Tensor) -> tuple[list[list[int]], Tensor]:
    """Facts of every process, and the sum of their counts. One collective, and one wait for it, if there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [facts], counts
    own = torch.cat([torch.tensor(facts).to(counts.device, non_blocking=True), counts])
    gathered = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, own)
    numbers = torch.stack(gathered)
    return numbers[:, : len(facts)].tolist(), numbers[:, len(facts) :].sum(dim=0)
