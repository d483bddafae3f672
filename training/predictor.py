"""Any transformers checkpoint for universal segmentation, behind one interface: images in, results in the classes of a data set out.

MPFormer, Mask2Former, MaskFormer, OneFormer, EoMT and DETR with a mask head. Post-processing is that of `MPFormerImageProcessor` for all of
them: at the original resolution, without padding.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForUniversalSegmentation, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES

from mpformer_hf import MPFormerImageProcessor
from mpformer_hf.image_tiles import move_to_model
from mpformer_hf.mask_post_processing import valid_sizes
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
        sees_squares: True for models that take square images alone (EoMT); semantic maps are then made of square windows.
    """

    model: nn.Module
    processor: MPFormerImageProcessor
    task: Task
    further_inputs: dict[str, Tensor] = field(default_factory=dict)
    sees_squares: bool = False
    training: bool = field(default=False, init=False)

    @classmethod
    def load(
        cls, name: str, task: Task, *, revision: str | None = None, trust_remote_code: bool = False
    ) -> "Predictor":
        """Load a folder or a repository of the Hub.

        Raises:
            PredictorError: it cannot be loaded, or is no model for universal segmentation of images.
        """
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(name, **options)
            if config.model_type not in SUPPORTED_MODELS and not trust_remote_code:
                raise PredictorError(
                    f"{name} is a {config.model_type} model. Expected one for universal segmentation of images: "
                    f"{', '.join(SUPPORTED_MODELS)}."
                )
            model = AutoModelForUniversalSegmentation.from_pretrained(name, **options).eval()
            processor = load_processor(name, config.model_type, task, options)
            further_inputs = task_tokens(name, task, options) if config.model_type == "oneformer" else {}
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, PredictorError):
                raise
            raise PredictorError(f"{name} cannot be loaded: {error}") from error
        return cls(model, processor, task, further_inputs, config.model_type.startswith("eomt"))

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
        """Run the model; valid sizes that it does not return are read from the pixel mask."""
        num_images = len(inputs["pixel_values"])
        further = {name: values.expand(num_images, *values.shape[1:]) for name, values in self.further_inputs.items()}
        known = inspect.signature(self.model.forward).parameters
        given = {name: value for name, value in {**inputs, **further}.items() if name in known}
        outputs = self.model(**move_to_model(given, self.model))
        if not hasattr(outputs, "class_queries_logits"):  # DETR's names
            outputs = SimpleNamespace(class_queries_logits=outputs.logits, masks_queries_logits=outputs.pred_masks)
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
        if self.task == "semantic" and self.sees_squares:
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


def load_processor(name: str, model_type: str, task: Task, options: Mapping[str, Any]) -> MPFormerImageProcessor:
    """Make an `MPFormerImageProcessor` that prepares images as the checkpoint's own processor does."""
    if model_type in ("mpformer", "mask2former", "maskformer", "oneformer"):
        return MPFormerImageProcessor.from_pretrained(name, **options)
    theirs = AutoImageProcessor.from_pretrained(name, **options)
    fields = {field_name: getattr(theirs, field_name) for field_name in SHARED_FIELDS if hasattr(theirs, field_name)}
    if not model_type.startswith("eomt"):
        return MPFormerImageProcessor(**fields, size=dict(theirs.size))
    side = min(int(length) for length in dict(theirs.size).values() if length is not None)
    square = {"height": side, "width": side}
    # Semantic maps are made of square windows; otherwise the image is shrunk into the square, and padded.
    size = square if task == "semantic" else {"longest_edge": side}
    return MPFormerImageProcessor(**fields, size=size, pad_size=square)


def task_tokens(name: str, task: Task, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tokens of the sentence that tells OneFormer its task."""
    processor = AutoProcessor.from_pretrained(name, **options)
    inputs = processor(images=[Image.new("RGB", (64, 64))], task_inputs=[task], return_tensors="pt")
    return {"task_inputs": inputs["task_inputs"]}


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
        """Pair classes of the same number, whatever they are called."""
        mapped = {key: key if key in dataset.id2label else NO_CLASS for key in id2label}
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


def few(names: Any, limit: int = 5) -> str:  # noqa: ANN401 - any iterable of text
    """List the first names."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
