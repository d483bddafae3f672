"""Images and labels to the tensors of MP-Former, and its outputs to results at the size of the image.

`MPFormerImageProcessor` has the call and `post_process_*` signatures of transformers' Mask2Former. Labels are read in
`segment_labels.py`, results are computed in `mask_post_processing.py`; here stand sizes, padding, defaults and output
formats.

Axes: B images, N segments of one image, K classes, H W the padded image, h w one image after resizing.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.generic import TensorType

from .mask_encoding import encode_rle
from .mask_post_processing import (
    InstancePrediction,
    check_share,
    instance_map,
    instance_segmentation,
    mask_boxes,
    panoptic_segmentation,
    semantic_segmentation,
)
from .segment_labels import (
    SegmentLabels,
    segments_from_coco_instances,
    segments_from_coco_panoptic,
    segments_from_map,
    segments_from_masks,
)

T = TypeVar("T")
Array = Tensor | np.ndarray
Size = tuple[int, int]  # height, width

POST_PROCESSING_FIELDS = (
    "score_threshold",
    "mask_threshold",
    "overlap_mask_area_threshold",
    "top_k",
    "label_ids_to_fuse",
    "combine_before_resize",
)
INSTANCE_PRESETS = ("display", "evaluation")

# In the files of other image processors; they mean nothing here, or are read under another name.
LEGACY_KEYS = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "use_fast", "backend")

IMAGE_RANK = 3
STACK_RANK = 3
RGB_CHANNELS = 3
RGBA_CHANNELS = 4
WHITE = 255
LARGEST_16_BIT = 65535


class SegmentationOutputs(Protocol):
    """What post-processing needs of a model's outputs. `image_sizes` is read too, where it is there."""

    class_queries_logits: Tensor
    masks_queries_logits: Tensor


class MPFormerImageProcessorKwargs(ImagesKwargs, total=False):
    """Fields of `MPFormerImageProcessor` beside those of every image processor; it documents them."""

    ignore_index: int | None
    do_reduce_labels: bool
    num_labels: int | None
    size_divisor: int
    score_threshold: float
    mask_threshold: float
    overlap_mask_area_threshold: float
    top_k: int
    label_ids_to_fuse: list[int] | tuple[int, ...]
    combine_before_resize: bool


@dataclass(frozen=True)
class LabelInputs:
    """The labels of a call as they came; at most one of maps, masks and annotations."""

    segmentation_maps: ImageInput | None = None
    instance_id_to_semantic_id: Sequence[Mapping[int, int]] | Mapping[int, int] | None = None
    mask_labels: Sequence[Any] | Array | None = None
    class_labels: Sequence[Any] | Array | None = None
    annotations: Sequence[Any] | Mapping[str, Any] | None = None


class MPFormerImageProcessor(TorchvisionBackend):
    r"""Prepare images and labels for MP-Former and turn its outputs into results.

    Images are resized, rescaled, normalised and padded with zeros at the right and the bottom, to the largest height
    and width of the batch rounded up to a multiple of `size_divisor`, or to `pad_size`. The aspect ratio is kept,
    except with a fixed `size` of height and width. EXIF rotation is not applied: pass
    `PIL.ImageOps.exif_transpose(image)` where it matters.

    Preprocessing fields:
        do_resize, size, resample: `size` is `{"shortest_edge", "longest_edge"}` (either or both), `{"height", "width"}`
            (fixed, stretches) or `{"max_height", "max_width"}` (fits inside).
        do_rescale, rescale_factor, do_normalize, image_mean, image_std, do_convert_rgb, device: as everywhere.
        do_pad, size_divisor, pad_size: padding; `size_divisor=1` only pads to the largest image.
        ignore_index, do_reduce_labels: values of `segmentation_maps` to drop, and whether classes count from 1 in them.
            They do not concern `mask_labels` and `annotations`.
        num_labels: if set, a class label of `num_labels` or above is an error.

    Post-processing fields, saved with the checkpoint. An argument of `post_process_*` that is `None` takes the field:
        score_threshold: 0.5, panoptic segments, and instances for display.
        mask_threshold: 0.5, of mask probabilities.
        overlap_mask_area_threshold: 0.8, least share of its own area that a segment keeps where others win pixels.
        top_k: 100, instances per image.
        label_ids_to_fuse: (), stuff classes: one segment each in panoptic results, none in instance results.
        combine_before_resize: False; True for semantic-only checkpoints of the original.

    >>> import numpy as np
    >>> processor = MPFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    >>> inputs = processor(np.zeros((60, 80, 3), dtype=np.uint8), return_tensors="pt")
    >>> inputs.pixel_values.shape, inputs.pixel_mask.sum().item() == 64 * 85
    (torch.Size([1, 3, 64, 96]), True)
    """

    valid_kwargs = MPFormerImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 - transformers reads it from the class
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 800, "longest_edge": 1333}  # noqa: RUF012
    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_pad = True
    size_divisor = 32
    do_reduce_labels = False
    score_threshold = 0.5
    mask_threshold = 0.5
    overlap_mask_area_threshold = 0.8
    top_k = 100
    label_ids_to_fuse: tuple[int, ...] = ()
    combine_before_resize = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**known_fields(kwargs))
        self.label_ids_to_fuse = tuple(sorted(int(label) for label in self.label_ids_to_fuse))
        for name in ("score_threshold", "mask_threshold", "overlap_mask_area_threshold"):
            check_share(name, getattr(self, name))
        if self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {self.top_k}.")
        if self.size_divisor < 0:
            raise ValueError(f"`size_divisor` must be at least 0, got {self.size_divisor}. 0 and 1 switch it off.")

    def to_dict(self) -> dict[str, Any]:
        """Serialise the fields.

        Neither `auto_map` nor `image_processor_type` is written: with one of them here, `pipeline` asks people who have
        this package whether to run custom code. `config.json` names the class instead.
        """
        fields = super().to_dict()
        for name in ("auto_map", "image_processor_type"):
            fields.pop(name, None)
        return fields

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        instance_id_to_semantic_id: list[dict[int, int]] | dict[int, int] | None = None,
        *,
        mask_labels: Sequence[Any] | Array | None = None,
        class_labels: Sequence[Any] | Array | None = None,
        annotations: Sequence[Any] | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images and, in one of three forms, their labels.

        Args:
            images: one image or several; PIL, numpy or torch, uint8 or (16 bit) uint16, or float with
                `do_rescale=False`.
            segmentation_maps: a map (height, width) for each image, of classes, or of segment ids (next argument).
            instance_id_to_semantic_id: class of each segment id; one dict, or one for each image.
            mask_labels: for each image bool, uint8 or float masks in [0, 1], (segments, height, width); they may
                overlap.
            class_labels: with `mask_labels`, for each image the classes (segments,).
            annotations: for each image a list of COCO instance dicts, a dict `{"annotations": that list}`, or a COCO
                panoptic dict with `segments_info` and `png` (image, array or path; else `file_name` is read as a path).
                `category_id` is the class label of the model.
            **kwargs: fields of the processor for this call, and `return_tensors`.

        Returns:
            `pixel_values` float32 (B, 3, H, W), `pixel_mask` int64 (B, H, W) with 1 on the image, and with labels
            `mask_labels`, a list of (N, H, W), bool or (where soft masks came) float32, 0 in the padding, and
            `class_labels`, a list of (N,) int64. Segments that vanish at this size are dropped.

        Raises:
            ValueError: names the image, what was expected, what came and what to do.
        """
        if misplaced := sorted(set(POST_PROCESSING_FIELDS) & set(kwargs)):
            raise ValueError(
                f"{misplaced} have no effect on preprocessing. Pass them to `post_process_*`, or to the processor's "
                "constructor."
            )
        labels = LabelInputs(segmentation_maps, instance_id_to_semantic_id, mask_labels, class_labels, annotations)
        require_one_form(labels)
        return super().preprocess(images, labels, **kwargs)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Read one image as a tensor (channels, height, width); with `do_convert_rgb`, of three channels."""
        if isinstance(image, PIL.Image.Image) and do_convert_rgb:
            image, input_data_format = pil_to_rgb(image), ChannelDimension.LAST
        if isinstance(image, Tensor | np.ndarray):
            image = eight_bit_range(image)
            input_data_format = input_data_format or channel_format(image)
        device = torch.device(device) if isinstance(device, str) else device
        tensor = super().process_image(image, False, input_data_format, device, **kwargs)
        return channels_to_rgb(tensor) if do_convert_rgb else tensor

    # The base class hands on whatever `preprocess` gives it, and every field of the processor.
    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: ImageInput,
        labels: LabelInputs,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        **fields: Any,
    ) -> BatchFeature:
        refuse_unsupported(fields)
        tensors = []
        for index, image in enumerate(cast("list[ImageInput]", self._prepare_images_structure(with_channels(images)))):
            with name_image(index):
                tensor = self.process_image(image, do_convert_rgb, input_data_format, device)
                if min(tensor.shape) < 1:
                    raise ValueError(f"it is empty: its shape is {tuple(tensor.shape)}.")
                tensors.append(tensor)
        model_sizes = [
            resized_size(size_of(tensor), fields["size"]) if fields["do_resize"] else size_of(tensor)
            for tensor in tensors
        ]
        padded = padded_size(model_sizes, fields["pad_size"], fields["size_divisor"]) if fields["do_pad"] else None
        segments = read_labels(
            labels,
            [size_of(tensor) for tensor in tensors],
            model_sizes,
            ignore_index=fields["ignore_index"],
            do_reduce_labels=fields["do_reduce_labels"],
        )
        check_class_labels(segments, fields["num_labels"])
        values = [self._pixel_values(one, size, fields) for one, size in zip(tensors, model_sizes, strict=True)]
        return batch_inputs(values, segments, padded, fields["return_tensors"])

    def _pixel_values(self, image: Tensor, model_size: Size, fields: Mapping[str, Any]) -> Tensor:
        """Resize, rescale and normalise one image (channels, height, width)."""
        if size_of(image) != model_size:
            image = self.resize(image, SizeDict(height=model_size[0], width=model_size[1]), fields["resample"])
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        return self.rescale_and_normalize(image, *(fields[name] for name in names))

    def post_process_semantic_segmentation(
        self,
        outputs: SegmentationOutputs,
        target_sizes: list[tuple[int, int]] | Tensor | None = None,
        return_segmentation_scores: bool = False,
        combine_before_resize: bool | None = None,
    ) -> list[Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Turn outputs into one map of classes an image.

        Args:
            outputs: anything with `class_queries_logits` (B, queries, K + 1) and `masks_queries_logits` (B, queries,
                height / 4, width / 4 of the padded images); `image_sizes`, where it has them, crop the padding away.
            target_sizes: (height, width) of each result; `None`: the size of each image after resizing, without
                padding.
            return_segmentation_scores: return the scores of all classes too.
            combine_before_resize: see the field of the same name.

        Returns:
            For each image an int64 map (height, width); with `return_segmentation_scores` an object with `segmentation`
            (the map) and `segmentation_scores`, float32 (K, height, width).
        """
        predictions = semantic_segmentation(
            outputs.class_queries_logits,
            outputs.masks_queries_logits,
            getattr(outputs, "image_sizes", None),
            target_sizes,
            combine_before_resize=self._or_field("combine_before_resize", combine_before_resize),
            return_scores=return_segmentation_scores,
        )
        if not return_segmentation_scores:
            return [prediction.segmentation for prediction in predictions]
        return [
            SemanticSegmentationPostProcessorOutput(
                data={"segmentation": prediction.segmentation, "segmentation_scores": prediction.scores}
            )
            for prediction in predictions
        ]

    def post_process_instance_segmentation(
        self,
        outputs: SegmentationOutputs,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        target_sizes: list[tuple[int, int]] | Tensor | None = None,
        return_coco_annotation: bool | None = False,
        return_binary_maps: bool | None = False,
        *,
        top_k: int | None = None,
        label_ids_to_fuse: Collection[int] | None = None,
        preset: str | None = None,
    ) -> list[dict[str, Any]]:
        """Turn outputs into instances, highest score first.

        Args:
            outputs: as for `post_process_semantic_segmentation`.
            threshold: least score (class probability times mean mask probability) of an instance.
            mask_threshold: a pixel belongs to a mask where its probability is above this.
            overlap_mask_area_threshold: least share of its own area that an instance keeps when higher scores take the
                pixels that they cover; others are dropped. 0, and `None` without a preset, keep all: one object in
                front of another is no error.
            target_sizes: (height, width) of each result; `None`: the size of each image after resizing, without
                padding.
            return_coco_annotation: `segmentation` is a list of compressed COCO run lengths, one for each instance.
            return_binary_maps: `segmentation` is the tensor `masks`.
            top_k: pairs of query and class that are taken, before any threshold.
            label_ids_to_fuse: stuff classes, which have no instances.
            preset: "display" takes the fields, `None` takes them but for that of overlap; "evaluation" takes the `top_k`
                field, as average precision wants it, and no threshold of score or overlap. An argument that is given
                wins.

        Returns:
            For each image a dict:
            `segmentation`, int32 map (height, width) in which each pixel has the id of the highest score that covers
            it, -1 where there is none (or see above);
            `segments_info`, a dict with `id` (from 0), `label_id`, `was_fused` (False) and `score` for each instance;
            and for the same instances in the same order `masks` bool (N, height, width), which may overlap, `scores`
            float32 (N,), `labels` int64 (N,) and `boxes` float32 (N, 4), x1, y1, x2, y2.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError(
                "`return_coco_annotation` and `return_binary_maps` both decide what `segmentation` is. Set one of "
                "them; the result has the binary masks under `masks` in any case."
            )
        if preset not in (None, *INSTANCE_PRESETS):
            raise ValueError(
                f"`preset` must be one of {', '.join(map(repr, INSTANCE_PRESETS))} or None, got {preset!r}."
            )
        if overlap_mask_area_threshold is None:
            overlap_mask_area_threshold = self.overlap_mask_area_threshold if preset == "display" else 0.0
        predictions = instance_segmentation(
            outputs.class_queries_logits,
            outputs.masks_queries_logits,
            getattr(outputs, "image_sizes", None),
            target_sizes,
            score_threshold=threshold if preset == "evaluation" else self._or_field("score_threshold", threshold),
            mask_threshold=self._or_field("mask_threshold", mask_threshold),
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            top_k=self._or_field("top_k", top_k),
            label_ids_to_drop=self._or_field("label_ids_to_fuse", label_ids_to_fuse),
        )
        return [instance_result(one, return_coco_annotation, return_binary_maps) for one in predictions]

    def post_process_panoptic_segmentation(
        self,
        outputs: SegmentationOutputs,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: list[tuple[int, int]] | Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """Turn outputs into one map of segments an image.

        Args:
            outputs: as for `post_process_semantic_segmentation`.
            threshold: a query takes part when the probability of its best class is above this.
            mask_threshold: a pixel stays void when the probability of its query's mask is below this.
            overlap_mask_area_threshold: a segment is dropped when it wins less than this share of its own mask.
            label_ids_to_fuse: stuff classes, whose segments become one.
            target_sizes: (height, width) of each result; `None`: the size of each image after resizing, without
                padding.

        Returns:
            For each image a dict: `segmentation`, int32 map (height, width) of segment ids, 0 = void; `segments_info`,
            a dict with `id` (from 1), `label_id`, `was_fused` (its class is in `label_ids_to_fuse`) and `score` for
            each segment.
        """
        predictions = panoptic_segmentation(
            outputs.class_queries_logits,
            outputs.masks_queries_logits,
            getattr(outputs, "image_sizes", None),
            target_sizes,
            score_threshold=self._or_field("score_threshold", threshold),
            mask_threshold=self._or_field("mask_threshold", mask_threshold),
            overlap_mask_area_threshold=self._or_field("overlap_mask_area_threshold", overlap_mask_area_threshold),
            label_ids_to_fuse=self._or_field("label_ids_to_fuse", label_ids_to_fuse),
        )
        return [
            {
                "segmentation": prediction.segmentation,
                "segments_info": [
                    {"id": one.id, "label_id": one.label_id, "was_fused": one.was_fused, "score": one.score}
                    for one in prediction.segments
                ],
            }
            for prediction in predictions
        ]

    def _or_field(self, name: str, argument: T | None) -> T:
        field: T = getattr(self, name)
        return field if argument is None else argument


def instance_result(
    prediction: InstancePrediction, return_coco_annotation: bool | None, return_binary_maps: bool | None
) -> dict[str, Any]:
    """Format the instances of one image as `post_process_instance_segmentation` documents it."""
    masks = prediction.masks
    tensor = masks if return_binary_maps else instance_map(masks)
    pairs = zip(prediction.labels.tolist(), prediction.scores.tolist(), strict=True)
    return {
        "segmentation": encode_rle(masks) if return_coco_annotation else tensor,
        "segments_info": [
            {"id": index, "label_id": label, "was_fused": False, "score": score}
            for index, (label, score) in enumerate(pairs)
        ],
        "masks": masks,
        "scores": prediction.scores,
        "labels": prediction.labels,
        "boxes": mask_boxes(masks),
    }


def known_fields(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the fields of a processor file, ours or one of transformers, and refuse misspelt ones."""
    fields = {name: value for name, value in kwargs.items() if not name.startswith("_") and name not in LEGACY_KEYS}
    reduce_labels = fields.pop("reduce_labels", None)
    if reduce_labels is not None:
        fields.setdefault("do_reduce_labels", reduce_labels)
    longest_edge = fields.pop("max_size", None) or kwargs.get("_max_size")
    size = size_with_longest_edge(fields.pop("size", None), longest_edge)
    if size is not None:
        fields["size"] = size
    own_fields = list(MPFormerImageProcessorKwargs.__annotations__)
    for name in set(fields) - set(own_fields):
        if near := difflib.get_close_matches(name, own_fields, n=1, cutoff=0.85):
            raise ValueError(f"MPFormerImageProcessor has no field `{name}`. Did you mean `{near[0]}`?")
    return fields


def size_with_longest_edge(
    size: int | Sequence[int] | dict[str, int] | SizeDict | None, longest_edge: int | None
) -> int | Sequence[int] | dict[str, int] | SizeDict | None:
    """Join `size` and the `max_size` of old processor files; `None` stays the default of the class."""
    if size is None and longest_edge is not None:
        return {**MPFormerImageProcessor.size, "longest_edge": longest_edge}
    shortest_edge = size.get("shortest_edge") if isinstance(size, dict) and len(size) == 1 else size
    if longest_edge is None or not isinstance(shortest_edge, int):
        return size
    return {"shortest_edge": shortest_edge, "longest_edge": longest_edge}


def require_one_form(labels: LabelInputs) -> None:
    """Refuse labels in two forms at once, and arguments that belong to another form."""
    forms = ("segmentation_maps", "mask_labels", "annotations")
    given = [name for name in forms if getattr(labels, name) is not None]
    if len(given) > 1:
        raise ValueError(f"Pass labels in one form, got {' and '.join(f'`{name}`' for name in given)}.")
    if (labels.mask_labels is None) != (labels.class_labels is None):
        raise ValueError("`mask_labels` and `class_labels` belong together: pass both, or neither.")
    if labels.instance_id_to_semantic_id is not None and labels.segmentation_maps is None:
        raise ValueError("`instance_id_to_semantic_id` belongs to `segmentation_maps`, which was not passed.")


def refuse_unsupported(kwargs: Mapping[str, Any]) -> None:
    """Refuse what every image processor of transformers accepts and this one would ignore."""
    if kwargs.get("do_center_crop") or kwargs.get("crop_size"):
        raise ValueError(
            "Cropping is not supported: crop images and labels before the processor, and set `do_center_crop=False`."
        )
    data_format = kwargs.get("data_format")
    if data_format is not None and str(getattr(data_format, "value", data_format)) != "channels_first":
        raise ValueError(f"`pixel_values` are always channels first, got `data_format={data_format!r}`. Leave it out.")


@contextmanager
def name_image(index: int) -> Iterator[None]:
    """Put the index of the image in front of an error that its content raises."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"Image {index}: {error}") from error


def size_of(image: Tensor) -> Size:
    """Height and width of (..., height, width)."""
    return image.shape[-2], image.shape[-1]


def with_channels(images: ImageInput) -> ImageInput:
    """Give gray arrays (height, width), alone or in a list, a first axis of one channel."""
    if isinstance(images, list | tuple):
        return cast("ImageInput", [with_channels(image) for image in images])
    return images[None] if isinstance(images, Tensor | np.ndarray) and images.ndim == IMAGE_RANK - 1 else images


def channel_format(image: Array) -> ChannelDimension:
    """Find the axis of the channels; one pixel high or wide is no channel where the other end has three or four."""
    colours = (RGB_CHANNELS, RGBA_CHANNELS)
    if image.shape[0] == 1 and image.shape[-1] in colours:
        return ChannelDimension.LAST
    if image.shape[-1] == 1 and image.shape[0] in colours:
        return ChannelDimension.FIRST
    # transformers reads the shape alone, and warns where both ends could be colours.
    return infer_channel_dimension_format(cast("np.ndarray", image), (1, *colours))


def pil_to_rgb(image: PIL.Image.Image) -> np.ndarray:
    """Convert a PIL image of any mode to (height, width, 3), 0 to 255; what is transparent becomes white."""
    if image.mode.startswith("I;16"):
        return np.repeat(eight_bit_range(np.array(image))[..., None], RGB_CHANNELS, axis=-1)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"a PIL image of mode {image.mode!r} has no defined range. Convert it to 8 bits first, for example with "
            "`PIL.Image.fromarray((values * 255).astype('uint8'))`."
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (WHITE,) * RGBA_CHANNELS), image)
    return np.array(image.convert("RGB"))


def eight_bit_range(image: Array) -> Array:
    """Bring a numpy or torch image of bool or integers to 0..255; uint8 and float stay as they are."""
    if isinstance(image, np.ndarray) and not image.flags.writeable:
        image = image.copy()  # torch warns of arrays that it may not write to
    kind = str(image.dtype).removeprefix("torch.")
    if kind == "uint8" or kind.startswith(("float", "bfloat")):
        return image
    values = image.astype(np.float32) if isinstance(image, np.ndarray) else image.float()
    if kind == "bool":
        return values * WHITE
    if kind == "uint16":
        return values / (LARGEST_16_BIT / WHITE)
    if math.prod(values.shape) and not (values.min() >= 0 and values.max() <= WHITE):
        raise ValueError(
            f"an image of type {kind} must hold 0 to {WHITE}, got {values.min():g} to {values.max():g}. Convert it to "
            "uint8, or to uint16 if it uses all 16 bits."
        )
    return values


def channels_to_rgb(image: Tensor) -> Tensor:
    """Convert (1, 3 or 4 channels, height, width) to three channels; what is transparent becomes white."""
    channels = image.shape[0]
    if channels == 1:
        return image.expand(RGB_CHANNELS, -1, -1)
    if channels == RGBA_CHANNELS:
        white = 1.0 if image.is_floating_point() and image.numel() and image.max() <= 1 else float(WHITE)
        opacity = image[RGB_CHANNELS:].float() / white
        blended = image[:RGB_CHANNELS].float() * opacity + white * (1 - opacity)
        return blended if image.is_floating_point() else blended.round().to(image.dtype)
    if channels != RGB_CHANNELS:
        raise ValueError(
            f"expected 1, 3 or 4 channels, got {channels}. Set `do_convert_rgb=False` for a model of {channels} "
            "channels."
        )
    return image


def resized_size(image_size: Size, size: SizeDict) -> Size:
    """Compute height and width after resizing; rounding as in Detectron2, so that 480 x 640 at 800 is 800 x 1067."""
    height, width = image_size
    if size.height and size.width:
        return size.height, size.width
    if size.max_height and size.max_width:
        scale = min(size.max_height / height, size.max_width / width)
    elif size.shortest_edge or size.longest_edge:
        limits = (
            size.shortest_edge / min(image_size) if size.shortest_edge else math.inf,
            size.longest_edge / max(image_size) if size.longest_edge else math.inf,
        )
        scale = min(limits)
    else:
        raise ValueError(
            "`size` must be a dict of `shortest_edge` and/or `longest_edge`, of `height` and `width`, or of "
            f"`max_height` and `max_width`, got {dict(size)}."
        )
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def padded_size(model_sizes: Sequence[Size], pad_size: SizeDict | None, size_divisor: int) -> Size:
    """Compute the common size of a batch."""
    divisor = max(1, size_divisor)
    largest = (max(height for height, _ in model_sizes), max(width for _, width in model_sizes))
    if pad_size is None:
        height, width = (math.ceil(length / divisor) * divisor for length in largest)
        return height, width
    if not (pad_size.height and pad_size.width):
        raise ValueError(f"`pad_size` must be a dict of `height` and `width`, got {dict(pad_size)}.")
    if pad_size.height % divisor or pad_size.width % divisor:
        raise ValueError(
            f"`pad_size` must be a multiple of `size_divisor` ({divisor}), got {pad_size.height} x {pad_size.width}. "
            "Round it up, or set `size_divisor=1` for a backbone of any size."
        )
    for index, (height, width) in enumerate(model_sizes):
        if height > pad_size.height or width > pad_size.width:
            raise ValueError(
                f"Image {index} is {height} x {width} after resizing, which does not fit into `pad_size` "
                f"{pad_size.height} x {pad_size.width}. Enlarge `pad_size` or lower `size`."
            )
    return pad_size.height, pad_size.width


def pad_with_zeros(values: Tensor, padded: Size | None) -> Tensor:
    """Pad (..., h, w) at the right and the bottom; `None` leaves it as it is."""
    height, width = values.shape[-2:]
    if padded is None or (height, width) == padded:
        return values
    result = values.new_zeros((*values.shape[:-2], *padded))
    result[..., :height, :width] = values
    return result


def batch_inputs(
    images: list[Tensor],
    segments: list[SegmentLabels] | None,
    padded: Size | None,
    return_tensors: str | TensorType | None,
) -> BatchFeature:
    """Pad images and labels to one size and collect them as the model's inputs."""
    sizes = {size_of(image) for image in images}
    if padded is None and return_tensors is not None and len(sizes) > 1:
        raise ValueError(
            f"Images of different sizes ({sorted(sizes)[:3]}) make no batch without padding. Set `do_pad=True`, or "
            "`return_tensors=None` for a list."
        )
    pixel_values = [pad_with_zeros(image, padded) for image in images]
    pixel_mask = [pad_with_zeros(image.new_ones(size_of(image), dtype=torch.int64), padded) for image in images]
    data: dict[str, Any] = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
    if return_tensors is not None:
        data = {name: torch.stack(tensors) for name, tensors in data.items()}
    inputs = BatchFeature(data=data, tensor_type=return_tensors)
    if segments is not None:
        # Their counts differ, so they stay lists.
        masks = [
            pad_with_zeros(one.masks.to(image.device), padded) for one, image in zip(segments, images, strict=True)
        ]
        classes = [one.class_labels.to(image.device) for one, image in zip(segments, images, strict=True)]
        is_numpy = return_tensors in (TensorType.NUMPY, TensorType.NUMPY.value)
        inputs["mask_labels"] = [mask.numpy() for mask in masks] if is_numpy else masks
        inputs["class_labels"] = [labels.numpy() for labels in classes] if is_numpy else classes
    return inputs


def check_class_labels(segments: list[SegmentLabels] | None, num_labels: int | None) -> None:
    """Refuse class labels that no class has; -1 in a map is usually an ignored value that was not named."""
    for index, segment in enumerate(segments or []):
        labels = segment.class_labels.tolist()
        if wrong := sorted(label for label in labels if label < 0 or (num_labels is not None and label >= num_labels)):
            raise ValueError(
                f"Image {index} has the class labels {wrong[:5]}, expected 0 to "
                f"{'the number of classes' if num_labels is None else num_labels} - 1. Name a value that means "
                "'nothing' by `ignore_index`; set `do_reduce_labels=True` where classes count from 1; `num_labels` is "
                "the number of classes."
            )


def read_labels(
    labels: LabelInputs,
    image_sizes: list[Size],
    model_sizes: list[Size],
    *,
    ignore_index: int | None,
    do_reduce_labels: bool,
) -> list[SegmentLabels] | None:
    """Read the labels of a batch in the form in which they came; `None` without labels."""
    num_images = len(image_sizes)
    if labels.segmentation_maps is not None:
        readers = map_readers(labels, num_images, ignore_index, do_reduce_labels)
    elif labels.mask_labels is not None and labels.class_labels is not None:
        readers = mask_readers(labels.mask_labels, labels.class_labels, num_images)
    elif labels.annotations is not None:
        annotations = one_per_image("annotations", list_annotations(labels.annotations), num_images)
        readers = [partial(read_annotation, annotation) for annotation in annotations]
    else:
        return None
    segments = []
    for index, (read, image_size, model_size) in enumerate(zip(readers, image_sizes, model_sizes, strict=True)):
        with name_image(index):
            segments.append(read(image_size=image_size, model_size=model_size))
    return segments


def one_per_image(name: str, entries: Sequence[T], num_images: int) -> Sequence[T]:
    """Check that there is an entry for each image."""
    if len(entries) != num_images:
        raise ValueError(f"`{name}` must have one entry for each of the {num_images} images, got {len(entries)}.")
    return entries


def map_readers(
    labels: LabelInputs, num_images: int, ignore_index: int | None, do_reduce_labels: bool
) -> list[Callable[..., SegmentLabels]]:
    """Make a reader of each image's map: one map, a stack, a list, or a list of lists."""
    maps: Any = labels.segmentation_maps
    if isinstance(maps, list | tuple):
        maps = [inner for entry in maps for inner in (entry if isinstance(entry, list | tuple) else [entry])]
    elif isinstance(maps, PIL.Image.Image) or maps.ndim != STACK_RANK or len(maps) != num_images:
        maps = [maps]
    arrays = [np.array(one) if isinstance(one, PIL.Image.Image) else one for one in maps]
    ids: Any = labels.instance_id_to_semantic_id
    ids = ids if isinstance(ids, list | tuple) else [ids] * num_images
    pairs = zip(
        one_per_image("segmentation_maps", arrays, num_images),
        one_per_image("instance_id_to_semantic_id", ids, num_images),
        strict=True,
    )
    read = partial(segments_from_map, ignore_index=ignore_index, do_reduce_labels=do_reduce_labels)
    return [partial(read, one, instance_id_to_semantic_id=one_ids) for one, one_ids in pairs]


def mask_readers(
    masks: Sequence[Any] | Array, classes: Sequence[Any] | Array, num_images: int
) -> list[Callable[..., SegmentLabels]]:
    """Make a reader of each image's masks; an array (segments, height, width) alone is one image."""
    if isinstance(masks, Tensor | np.ndarray) and masks.ndim == STACK_RANK:
        masks, classes = [masks], [classes]
    pairs = zip(
        one_per_image("mask_labels", list(masks), num_images),
        one_per_image("class_labels", list(classes), num_images),
        strict=True,
    )
    return [partial(segments_from_masks, one, labels) for one, labels in pairs]


def list_annotations(annotations: Sequence[Any] | Mapping[str, Any]) -> Sequence[Any]:
    """List the annotations of a batch; a dict alone, or a list of instance dicts, is one image."""
    if isinstance(annotations, Mapping):
        return [annotations]
    is_one_image = len(annotations) > 0 and all(
        isinstance(one, Mapping) and not {"annotations", "segments_info"} & set(one) for one in annotations
    )
    return [annotations] if is_one_image else annotations


def read_annotation(
    annotation: Sequence[Mapping[str, Any]] | Mapping[str, Any], image_size: Size, model_size: Size
) -> SegmentLabels:
    """Read the annotation of one image in COCO's instance or panoptic form."""
    if isinstance(annotation, Mapping) and "segments_info" in annotation:
        colours = panoptic_png(annotation)
        return segments_from_coco_panoptic(colours, annotation["segments_info"], image_size, model_size)
    if isinstance(annotation, Mapping) and "annotations" not in annotation:
        raise ValueError(
            f"its annotation needs `annotations` (instances) or `segments_info`, got {sorted(annotation)}."
        )
    instances = annotation["annotations"] if isinstance(annotation, Mapping) else annotation
    return segments_from_coco_instances(instances, image_size, model_size)


def panoptic_png(annotation: Mapping[str, Any]) -> Array:
    """Find the map of a panoptic annotation: an image, an array, or the path of a PNG."""
    png = annotation.get("png", annotation.get("file_name"))
    if png is None:
        raise ValueError(
            "its panoptic annotation needs `png` (an image, an array or a path) or `file_name`, got "
            f"{sorted(annotation)}."
        )
    if isinstance(png, Tensor | np.ndarray):
        return png
    if not isinstance(png, PIL.Image.Image):
        with PIL.Image.open(png) as image:
            png = image.copy()
    return np.array(png.convert("RGB") if png.mode in ("P", "RGBA") else png)


__all__ = ["MPFormerImageProcessor"]
