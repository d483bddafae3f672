"""MP-Former (CVPR 2023) for transformers: mask-piloted training of Mask2Former, and post-processing that can be trusted.

Importing the package registers its classes with transformers' Auto classes and its operator with torch; nothing is compiled,
downloaded or run.
"""

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

__all__ = [
    "MPFormerConfig",
    "MPFormerForUniversalSegmentation",
    "MPFormerImageProcessor",
    "MPFormerImageSegmentationPipeline",
    "MPFormerModel",
    "__version__",
]
