"""Checkpoints of Detectron2, of transformers' Mask2Former and of ImageNet backbones, to ours and back. See README.md."""


class ConversionError(ValueError):
    """A file that cannot be converted. The message says what was expected, what came, and what to do."""
