"""`pipeline("image-segmentation")` for batches of images of different sizes.

transformers' own pipeline stacks what the image processor returns for each image, so it needs a processor that pads to one
size (`pad_size`). This one pads each batch to its largest image instead; all else is transformers'.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ImageSegmentationPipeline
from transformers.utils.generic import ModelOutput


class MPFormerImageSegmentationPipeline(ImageSegmentationPipeline):
    r"""transformers' image segmentation pipeline, for images of any sizes in one batch.

    Load it with `pipeline("image-segmentation", model=folder, pipeline_class=MPFormerImageSegmentationPipeline)`; call it
    as documented there. Thresholds that are not given are the pipeline's (0.9, 0.5 and 0.5), not the image processor's.
    """

    # The signatures are those of the parent, which differ from those of its own base.
    def preprocess(  # type: ignore[override]
        self, image: object, subtask: str | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """Prepare one image; its tensors go into lists, which the data loader leaves alone."""
        inputs = super().preprocess(image, subtask=subtask, timeout=timeout)
        return {name: [value] if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def _forward(self, model_inputs: dict[str, Any]) -> ModelOutput:  # type: ignore[override]
        padded = {
            name: pad_to_largest(value) if name.startswith("pixel_") else value for name, value in model_inputs.items()
        }
        return super()._forward(padded)


def pad_to_largest(images: list[Tensor] | list[list[Tensor]]) -> Tensor:
    """Pad images with zeros at the right and the bottom and join them to one batch.

    Args:
        images: (1, ..., height, width) each; one list, or a list for each image of a batch.

    Returns:
        (B, ..., height, width) of the largest.
    """
    flat = [image for entry in images for image in ([entry] if isinstance(entry, Tensor) else entry)]
    height, width = (max(image.shape[axis] for image in flat) for axis in (-2, -1))
    return torch.cat(
        [nn.functional.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in flat]
    )


__all__ = ["MPFormerImageSegmentationPipeline"]
