"""How much memory a training step takes, estimated without a GPU, without weights and in seconds.

    weights        4 bytes a parameter; 4 more for averages of them
    gradients      4 bytes a trained parameter
    optimiser      8 bytes a trained parameter (AdamW: mean and mean square)
    activations    bytes of all tensors that a forward pass keeps for the backward, times `OVERHEAD`
    targets        1 byte a pixel of each mask

Activations are counted, not guessed: the model runs on tensors without memory (`FakeTensorMode`), and autograd says what it keeps,
once for each tensor, weights left out. Mask-piloted slots count as further queries. What the losses need, what is alive for a moment,
and gaps between tensors are in `OVERHEAD`, which was compared with the peak of whole steps on a CPU (ResNet-50, 512 x 512: 1.12 in
float32, 1.21 in bfloat16).
"""

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, PreTrainedConfig

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation, MPFormerImageProcessor
from training.arguments import PARTS, TrainingArguments
from training.augmentation import Augmentation
from training.data import SegmentationDataset
from training.starting_point import freeze

OVERHEAD = 1.25
CONTEXT_BYTES = 2**30  # of CUDA itself, and of libraries that it loads
BYTES = 4  # of float32
STRIDE = 32  # sizes are multiples of it
BACKBONE_STAGES = 4
COLOURS = 3


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on a GPU, by what they are for, and what they were computed for."""

    parameters: int
    trained_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    targets: int
    context: int
    batch_size: int
    height: int
    width: int
    queries: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.targets + self.context

    def to_dict(self) -> dict[str, int]:
        """Return it in the types of JSON."""
        return {**asdict(self), "total": self.total}


def estimate_memory(
    arguments: TrainingArguments, dataset: SegmentationDataset, most_segments: int, sizes: Sequence[tuple[int, int]]
) -> MemoryEstimate:
    """Estimate the memory of a step of a recipe, in each process.

    Args:
        arguments: of the training.
        dataset: its classes count.
        most_segments: in one image.
        sizes: of images, height and width.

    Raises:
        OSError: the configuration of the model or of the backbone cannot be loaded.
        ValueError: it does not fit.
    """
    config = configuration_of(arguments, dataset)
    with torch.device("meta"):
        model = MPFormerForUniversalSegmentation(config)
    freeze(model, PARTS, arguments.frozen)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    piloted = copy.deepcopy(config)
    piloted.num_queries += pilot_slots(config, most_segments)
    size = input_size(arguments, sizes)
    channels = getattr(config.backbone_config, "num_channels", COLOURS)
    with FakeTensorMode(allow_non_fake_inputs=True):  # tables that were made before and are kept have memory
        model = MPFormerForUniversalSegmentation(piloted).train()
        freeze(model, PARTS, arguments.frozen)
        if arguments.gradient_checkpointing:
            # The second name is that of transformers before 5.23.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        images = torch.zeros((arguments.batch_size, channels, *size))
        kept = bytes_kept(model, images, precision_of(arguments.mixed_precision))
    copies = 1 if arguments.average_decay is None else 2
    return MemoryEstimate(
        parameters=parameters,
        trained_parameters=trained,
        weights=copies * BYTES * parameters,
        gradients=BYTES * trained,
        optimizer=2 * BYTES * trained,
        activations=round(OVERHEAD * kept),
        targets=arguments.batch_size * most_segments * size[0] * size[1],
        context=CONTEXT_BYTES,
        batch_size=arguments.batch_size,
        height=size[0],
        width=size[1],
        queries=piloted.num_queries,
    )


def bytes_kept(model: nn.Module, images: Tensor, precision: AbstractContextManager) -> int:
    """Count the bytes that a forward pass keeps for the backward, without parameters and buffers.

    Args:
        model: `MPFormerForUniversalSegmentation`, in training mode.
        images: float32 (B, channels, H, W).
        precision: context of the forward pass.
    """
    owned = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}  # noqa: SLF001 - as below
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # or another tensor would get the place, and the name, of one that is gone

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 - tensors without memory have no other name for what several share
        if key not in owned and key not in kept:
            kept[key] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor), precision:
        model.model(images)
    return sum(kept.values())


def configuration_of(arguments: TrainingArguments, dataset: SegmentationDataset) -> MPFormerConfig:
    """Make the configuration of the model that a recipe trains, without its weights."""
    fields = {
        **arguments.model,
        "id2label": dataset.id2label,
        "label2id": {name: key for key, name in dataset.id2label.items()},
    }
    if arguments.model_name_or_path is not None:
        return MPFormerConfig.from_pretrained(arguments.model_name_or_path, **fields)
    if arguments.backbone is not None:
        fields["backbone_config"] = backbone_configuration(arguments.backbone)
    return MPFormerConfig(**fields)


def backbone_configuration(name: str) -> PreTrainedConfig:
    """Load the configuration of a pretrained backbone."""
    if name.startswith("timm:"):
        from transformers import TimmBackboneConfig  # noqa: PLC0415 - needs timm

        return TimmBackboneConfig(backbone=name.removeprefix("timm:"), out_indices=[-4, -3, -2, -1])
    config = AutoConfig.from_pretrained(name)
    config.out_features = config.stage_names[-BACKBONE_STAGES:]
    return config


def pilot_slots(config: MPFormerConfig, most_segments: int) -> int:
    """Queries that mask piloting adds to a batch in which one image has so many segments."""
    if not config.mask_piloting:
        return 0
    groups = config.pilot_groups
    if config.pilot_query_budget is not None:
        groups = config.pilot_query_budget // max(1, most_segments)
    return groups * most_segments


def input_size(arguments: TrainingArguments, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Height and width of a batch in training, at most, if they are known.

    Args:
        arguments: of the training.
        sizes: of images.
    """
    augmentation = Augmentation.from_recipe(arguments.augmentation) if arguments.augmentation else None
    if augmentation is not None:
        chosen = [augmentation.size] if augmentation.size else [largest(sizes)]
        if augmentation.size is None and augmentation.short_sides:
            chosen = [resize(size, max(augmentation.short_sides), augmentation.longest_side) for size in sizes]
    else:
        processor = MPFormerImageProcessor(**arguments.processor)
        pad = processor.pad_size
        chosen = [(pad["height"], pad["width"])] if pad else [processed(size, dict(processor.size)) for size in sizes]
    height, width = largest(chosen)  # type: ignore[arg-type] - a pair after `__post_init__`
    return -(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE


def processed(size: tuple[int, int], target: dict[str, int | None]) -> tuple[int, int]:
    """Height and width of an image after the processor has resized it."""
    if target.get("height"):
        return target["height"], target["width"]  # type: ignore[return-value]
    limits = target.get("max_height"), target.get("max_width")
    if limits[0] and limits[1]:
        factor = min(limits[0] / size[0], limits[1] / size[1])
        return round(size[0] * factor), round(size[1] * factor)
    return resize(size, target.get("shortest_edge"), target.get("longest_edge"))


def resize(size: tuple[int, int], shortest: int | None, longest: int | None) -> tuple[int, int]:
    """Resize to a shorter side, unless the longer one becomes too long."""
    factor = min((shortest or math.inf) / min(size), (longest or math.inf) / max(size))
    return round(size[0] * factor), round(size[1] * factor)


def largest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Largest height and largest width."""
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def precision_of(mixed_precision: str) -> AbstractContextManager:
    """Context of a forward pass; 16 bits are 16 bits, whichever they are."""
    return nullcontext() if mixed_precision == "no" else torch.autocast("cpu", torch.bfloat16)
