"""Any transformers checkpoint for universal segmentation, behind one interface: images in, results in the classes of a data set out.

MPFormer, Mask2Former, MaskFormer, OneFormer, EoMT and DETR with a mask head. Images are prepared as the checkpoint expects them
(`load_processor`). Post-processing is that of `MPFormerImageProcessor` for all: at the original resolution, without padding.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForUniversalSegmentation, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES

from mpformer_hf import MPFormerImageProcessor
from mpformer_hf.image_tiles import move_to_model
from mpformer_hf.mask_post_processing import MASK_STRIDE, valid_sizes
from mpformer_hf.semantic_views import augmented_semantic_segmentation, sliding_window_semantic_segmentation
from training.data import SegmentationDataset, Task

NO_CLASS = -1
# Fields that image processors of transformers share with ours.
SHARED_FIELDS = ("image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize", "do_resize", "resample")


class PredictorError(ValueError):
    """A checkpoint that cannot be used for what was asked; the message is for the user as it is."""


@dataclass
class Predictor:
    """A model with its image processor, for one task.

    It can be called as a model by the functions of `mpformer_hf` that run one: keyword inputs of the processor in; `class_queries_logits`,
    `masks_queries_logits` and `image_sizes` out, whatever the model calls them.

    Attributes:
        model: in evaluation mode.
        processor: makes its inputs and results.
        task: `"instance"`, `"panoptic"` or `"semantic"`.
        further_inputs: of the model beside images: the task's tokens of OneFormer.
        sees_squares: True for models that take square images of one size alone and see their padding, which is black (EoMT).
        joins_windows: True if a semantic map is made of square windows side by side (EoMT, where the checkpoint says so).
    """

    model: nn.Module
    processor: MPFormerImageProcessor
    task: Task
    further_inputs: dict[str, Tensor] = field(default_factory=dict)
    sees_squares: bool = False
    joins_windows: bool = False
    training: bool = field(default=False, init=False)

    @classmethod
    def load(
        cls, name: str, task: Task, *, revision: str | None = None, trust_remote_code: bool = False
    ) -> "Predictor":
        """Load a folder or a repository of the Hub.

        Raises:
            PredictorError: it cannot be loaded, is no model for universal segmentation of images, or lacks weights.
        """
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        require_folder(name)
        try:
            config = AutoConfig.from_pretrained(name, **options)
            kind = config.model_type
            if not trust_remote_code:
                require_supported(name, kind)
            model, report = AutoModelForUniversalSegmentation.from_pretrained(name, output_loading_info=True, **options)
            require_weights(name, model, report["missing_keys"])
            processor = load_processor(name, kind, task, options)
            further_inputs = task_tokens(name, task, config.task_seq_len, options) if kind == "oneformer" else {}
        except PredictorError:
            raise
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise PredictorError(f"{name} cannot be loaded: {error}") from error
        sees_squares = kind.startswith("eomt")
        return cls(
            model.eval(), processor, task, further_inputs, sees_squares, sees_squares and fills_square(processor)
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Float type of the model."""
        return next(self.model.parameters()).dtype

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the model's classes."""
        return {int(key): str(name) for key, name in self.model.config.id2label.items()}

    def run(self, images: Sequence[Image.Image], **options: Any) -> Any:  # noqa: ANN401 - outputs of any model
        """Run the model on some images, RGB, of any sizes; `options` are further arguments of its forward."""
        return self(**self.processor(list(images), return_tensors="pt"), **options)

    @torch.inference_mode()
    def __call__(self, **inputs: Any) -> Any:  # noqa: ANN401 - outputs of any model
        """Run the model; valid sizes that it does not return are read from the pixel mask.

        Raises:
            PredictorError: its masks have another resolution than 1/4.
        """
        num_images = len(inputs["pixel_values"])
        if self.sees_squares:
            inputs["pixel_values"] = with_black_padding(inputs["pixel_values"], inputs["pixel_mask"], self.processor)
        further = {name: values.expand(num_images, *values.shape[1:]) for name, values in self.further_inputs.items()}
        known = inspect.signature(self.model.forward).parameters
        given = {name: value for name, value in {**inputs, **further}.items() if name in known}
        outputs = self.model(**move_to_model(given, self.model))
        if not hasattr(outputs, "class_queries_logits"):  # DETR's names
            outputs = DetrOutputs(class_queries_logits=outputs.logits, masks_queries_logits=outputs.pred_masks)
        require_stride(outputs.masks_queries_logits, inputs["pixel_values"], type(self.model).__name__)
        if getattr(outputs, "image_sizes", None) is None:
            outputs.image_sizes = valid_sizes(inputs["pixel_mask"])
        return outputs

    def post_process(
        self,
        outputs: Any,  # noqa: ANN401 - of any model
        target_sizes: Sequence[tuple[int, int]],
        labels: "LabelMap",
    ) -> list[dict[str, Any]]:
        """Turn outputs into results at the sizes of the ground truth, in the classes of the data set.

        Returns:
            For each image: instances as `masks`, `scores`, `labels`; panoptic segments as `segmentation` (0 is void) and `segments_info`; a
            semantic map as `segmentation`, `NO_CLASS` where the model has a class that the data set lacks.
        """
        sizes = list(target_sizes)
        if self.task == "semantic":
            maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            return [{"segmentation": labels.map_classes(classes)} for classes in maps]
        if self.task == "instance":
            results = self.processor.post_process_instance_segmentation(
                outputs, target_sizes=sizes, preset="evaluation", label_ids_to_fuse=labels.without_instances
            )
            return [labels.map_instances(result) for result in results]
        results = self.processor.post_process_panoptic_segmentation(
            outputs, target_sizes=sizes, label_ids_to_fuse=labels.stuff
        )
        return [labels.map_segments(result) for result in results]

    def predict(
        self, images: Sequence[Image.Image], target_sizes: Sequence[tuple[int, int]], labels: "LabelMap"
    ) -> list[dict[str, Any]]:
        """Run the model on some images and post-process; see `post_process`."""
        if self.joins_windows:
            return [self._predict_in_windows(image, labels) for image in images]
        return self.post_process(self.run(images), target_sizes, labels)

    def predict_augmented(self, image: Image.Image, labels: "LabelMap") -> dict[str, Any]:
        """Average several scales and mirrored views of one image, as the original does; semantic maps alone."""
        prediction = augmented_semantic_segmentation(self, self.processor, image, progress=False)
        return {"segmentation": labels.map_classes(prediction.segmentation)}

    def _predict_in_windows(self, image: Image.Image, labels: "LabelMap") -> dict[str, Any]:
        side = min(image.size)
        prediction = sliding_window_semantic_segmentation(
            self, self.processor, image, window_size=(side, side), overlap=0, progress=False
        )
        return {"segmentation": labels.map_classes(prediction.segmentation)}


SUPPORTED_MODELS = (
    "mpformer",
    *(name for name in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES if name not in ("mpformer", "videomt")),
)


class DetrOutputs(SimpleNamespace):
    """DETR's outputs under the names that the other models use."""


def require_folder(name: str) -> None:
    """Refuse a path that is not there; for the Hub's client it would be a badly formed name of a repository."""
    is_path = Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise PredictorError(
            f"{name} is no folder. Pass the folder of a saved model, or the name of a repository on the Hub (USER/NAME)."
        )


def require_supported(name: str, kind: str) -> None:
    """Refuse models of other kinds."""
    if kind not in SUPPORTED_MODELS:
        raise PredictorError(
            f"{name} is a {kind} model. Expected one for universal segmentation of images: {', '.join(SUPPORTED_MODELS)}."
        )


def require_weights(name: str, model: nn.Module, missing: Iterable[str]) -> None:
    """Refuse a checkpoint without all weights: the others would be random, and so would the scores."""
    parameters = {key for key, _ in model.named_parameters() if not key.startswith("criterion.")}
    random = sorted(parameters.intersection(missing))
    if random:
        raise PredictorError(
            f"{name} lacks {len(random)} of the {len(parameters)} weights of {type(model).__name__}: {few(random, 3)}. "
            "Pass a checkpoint of a whole model for universal segmentation."
        )


def require_stride(mask_logits: Tensor, pixel_values: Tensor, name: str) -> None:
    """Refuse masks that post-processing would put in the wrong places."""
    expected = tuple(math.ceil(side / MASK_STRIDE) for side in pixel_values.shape[-2:])
    if mask_logits.shape[-2:] != expected:
        raise PredictorError(
            f"{name} predicts masks of {tuple(mask_logits.shape[-2:])} cells for images of {tuple(pixel_values.shape[-2:])} pixels. "
            f"Expected {expected}: one cell for {MASK_STRIDE} x {MASK_STRIDE} pixels. This checkpoint cannot be scored here."
        )


def load_processor(name: str, kind: str, task: Task, options: Mapping[str, Any]) -> MPFormerImageProcessor:
    """Make an `MPFormerImageProcessor` that prepares images as the checkpoint expects them.

    That is what its own processor does, except that the sides of a resized image are rounded and not cut off (one pixel at most), and
    that for Mask2Former and MaskFormer images are padded to a multiple of 32, as in Detectron2, where transformers stretches them.
    """
    if kind in ("mpformer", "mask2former", "maskformer"):
        return MPFormerImageProcessor.from_pretrained(name, **options)
    if kind == "oneformer":  # its own processor would have to load names of classes from the Hub
        return MPFormerImageProcessor.from_pretrained(name, size_divisor=1, **options)
    theirs = AutoImageProcessor.from_pretrained(name, **options)
    fields = {field_name: getattr(theirs, field_name) for field_name in SHARED_FIELDS if hasattr(theirs, field_name)}
    if not kind.startswith("eomt"):
        return MPFormerImageProcessor(
            **fields, size=dict(theirs.size), pad_size=getattr(theirs, "pad_size", None), size_divisor=1
        )
    side = min(int(length) for length in dict(theirs.size).values() if length is not None)
    square = {"height": side, "width": side}
    # Square windows are enlarged or reduced as they are; otherwise the image is made to fit, and padded.
    size = square if task == "semantic" and theirs.do_split_image else {"longest_edge": side}
    return MPFormerImageProcessor(**fields, size=size, pad_size=square, size_divisor=1)


def with_black_padding(pixel_values: Tensor, pixel_mask: Tensor, processor: MPFormerImageProcessor) -> Tensor:
    """Make the padding what black pixels are after normalisation, which our processor leaves at 0.

    Args:
        pixel_values: (B, 3, H, W).
        pixel_mask: (B, H, W), 0 in the padding.
        processor: which made both.
    """
    if not processor.do_normalize:
        return pixel_values
    mean, std = (
        pixel_values.new_tensor(values).reshape(1, -1, 1, 1) for values in (processor.image_mean, processor.image_std)
    )
    return torch.where(pixel_mask[:, None].bool(), pixel_values, -mean / std)


def fills_square(processor: MPFormerImageProcessor) -> bool:
    """Whether images are stretched to a fixed size."""
    return processor.size.height is not None


def task_tokens(name: str, task: Task, length: int, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tokens, int64 (1, length), of the sentence that tells OneFormer its task; 0 behind it, as its processor writes them."""
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    tokens = tokenizer(
        [f"the task is {task}"], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return {"task_inputs": tokens["input_ids"] * tokens["attention_mask"]}


# ---------------------------------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelMap:
    """Classes of a model in those of a data set.

    Attributes:
        classes: int64, (number of the model's classes,): the class of the data set, or `NO_CLASS`.
        stuff: classes of the model that are stuff in the data set.
        without_instances: classes of the model that are no things of the data set.
        unknown: names of the model's classes that the data set lacks.
        never_predicted: names of the data set's classes that the model lacks.
    """

    classes: Tensor
    stuff: tuple[int, ...]
    without_instances: tuple[int, ...]
    unknown: tuple[str, ...]
    never_predicted: tuple[str, ...]

    @classmethod
    def by_name(cls, id2label: Mapping[int, str], dataset: SegmentationDataset) -> "LabelMap":
        """Pair classes of the same name; upper and lower case, `-` and `_` do not matter.

        Raises:
            PredictorError: no name is the same.
        """
        wanted = {plain_name(name): class_id for class_id, name in dataset.id2label.items()}
        mapped = {key: wanted.get(plain_name(name), NO_CLASS) for key, name in id2label.items()}
        if all(class_id == NO_CLASS for class_id in mapped.values()):
            raise PredictorError(
                f"No class of the model ({few(id2label.values())}) has the name of a class of the data set "
                f"({few(dataset.id2label.values())}). Score it on the data it was trained on, correct `id2label` in its "
                "config.json, or pair the classes by their numbers (--match-classes id)."
            )
        return cls.of(mapped, id2label, dataset)

    @classmethod
    def by_id(cls, id2label: Mapping[int, str], dataset: SegmentationDataset) -> "LabelMap":
        """Pair classes of the same number, whatever they are called.

        Raises:
            PredictorError: no number is the same.
        """
        mapped = {key: key if key in dataset.id2label else NO_CLASS for key in id2label}
        if all(class_id == NO_CLASS for class_id in mapped.values()):
            raise PredictorError(
                f"No class of the model (numbers {few(id2label)}) has the number of a class of the data set "
                f"({few(dataset.id2label)}). Pair the classes by their names (--match-classes name)."
            )
        return cls.of(mapped, id2label, dataset)

    @classmethod
    def of(cls, mapped: Mapping[int, int], id2label: Mapping[int, str], dataset: SegmentationDataset) -> "LabelMap":
        """Make a map of pairs (class of the model, class of the data set)."""
        classes = torch.full((max(mapped) + 1,), NO_CLASS, dtype=torch.int64)
        for key, class_id in mapped.items():
            classes[key] = class_id
        predicted = set(mapped.values())
        return cls(
            classes=classes,
            stuff=tuple(key for key, class_id in mapped.items() if class_id in dataset.stuff_ids),
            without_instances=tuple(key for key, class_id in mapped.items() if class_id not in dataset.thing_ids),
            unknown=tuple(id2label[key] for key, class_id in mapped.items() if class_id == NO_CLASS),
            never_predicted=tuple(name for class_id, name in dataset.id2label.items() if class_id not in predicted),
        )

    def map_classes(self, classes: Tensor) -> Tensor:
        """Map a map of classes, int64 (H, W)."""
        return self.classes.to(classes.device)[classes]

    def map_instances(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Map the labels of instances; those without class are left out."""
        mapped = self.map_classes(result["labels"])
        kept = mapped != NO_CLASS
        return {"masks": result["masks"][kept], "scores": result["scores"][kept], "labels": mapped[kept]}

    def map_segments(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Map the labels of panoptic segments; pixels of those without class become void."""
        segmentation, segments = result["segmentation"], []
        for segment in result["segments_info"]:
            class_id = int(self.classes[segment["label_id"]])
            if class_id == NO_CLASS:
                segmentation = segmentation.masked_fill(segmentation == segment["id"], 0)
            else:
                segments.append({**segment, "label_id": class_id})
        return {"segmentation": segmentation, "segments_info": segments}


def plain_name(name: str) -> str:
    """Name of a class without differences that mean nothing."""
    return " ".join(name.casefold().replace("-", " ").replace("_", " ").split())


def few(names: Iterable[object], limit: int = 5) -> str:
    """List the first names."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
