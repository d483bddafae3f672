"""MP-Former (CVPR 2023) for transformers: mask-piloted training of Mask2Former, and post-processing that can be trusted.

Importing the package registers its classes with transformers' Auto classes and its operator with torch, and gives pushed models
their card; nothing is compiled, downloaded or run.
"""

from pathlib import Path

from huggingface_hub import ModelCard
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
)

from . import ops
from .configuration_mpformer import MPFormerConfig
from .image_processing_mpformer import MPFormerImageProcessor
from .modeling_mpformer import MPFormerForUniversalSegmentation, MPFormerModel
from .pipeline_mpformer import MPFormerImageSegmentationPipeline

__version__ = "0.1.0"

ops.register()

AutoConfig.register(MPFormerConfig.model_type, MPFormerConfig, exist_ok=True)
AutoModel.register(MPFormerConfig, MPFormerModel, exist_ok=True)
AutoModelForUniversalSegmentation.register(MPFormerConfig, MPFormerForUniversalSegmentation, exist_ok=True)
AutoModelForImageSegmentation.register(MPFormerConfig, MPFormerForUniversalSegmentation, exist_ok=True)
AutoImageProcessor.register(MPFormerConfig, fast_image_processor_class=MPFormerImageProcessor, exist_ok=True)


def _write_card(
    model: MPFormerForUniversalSegmentation, folder: Path, repository: str, repository_has_card: bool
) -> None:
    """Write the README.md of a folder that is to be pushed; a person's, which transformers has fetched, stays."""
    from .model_card import add_tags, card_for_model, is_by_a_person  # noqa: PLC0415 - only who pushes a model needs it

    file = folder / "README.md"
    fetched_or_default = file.read_text(encoding="utf-8")
    if repository_has_card and is_by_a_person(fetched_or_default):
        return
    asked_for = ModelCard(fetched_or_default).data.get("tags") or []
    card = add_tags(card_for_model(model, name=repository.rpartition("/")[-1]), asked_for)
    file.write_text(card, encoding="utf-8", newline="\n")


MPFormerForUniversalSegmentation.write_card = _write_card

__all__ = [
    "MPFormerConfig",
    "MPFormerForUniversalSegmentation",
    "MPFormerImageProcessor",
    "MPFormerImageSegmentationPipeline",
    "MPFormerModel",
    "__version__",
]
