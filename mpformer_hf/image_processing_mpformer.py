"""Images and labels to the tensors of MP-Former, and its outputs to results at the size of the image.

`MPFormerImageProcessor` has the call and `post_process_*` signatures of transformers' Mask2Former. Images are read
in `image_reading.py`, labels in `segment_labels.py`, results are computed in `mask_post_processing.py`; here stand sizes,
padding, defaults and output formats.

Axes: B images, N segments of one image, K classes, H W the padded image, h w one image after resizing.
"""

import difflib
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

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
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.generic import TensorType

from .configuration_mpformer import copy_code
from .image_reading import (
    FILE_TYPES,
    LARGEST_SCALED,
    WHITE,
    channels_first,
    channels_to_rgb,
    decode,
    eight_bit_range,
    flatten_images,
    open_image,
    pil_to_array,
    pil_to_rgb,
)
from .mask_encoding import encode_rle
from .mask_polygons import trace_polygons
from .mask_post_processing import (
    InstancePrediction,
    check_share,
    instance_map,
    instance_segmentation,
    panoptic_segmentation,
    semantic_segmentation,
)
from .segment_labels import (
    SegmentLabels,
    plain_tensor,
    segments_from_coco_instances,
    segments_from_coco_panoptic,
    segments_from_map,
    segments_from_masks,
)

logger = logging.get_logger(__name__)

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

# The other two of Pillow, box and hamming, are not in torch.
RESAMPLING = (
    PILImageResampling.NEAREST,
    PILImageResampling.BILINEAR,
    PILImageResampling.BICUBIC,
    PILImageResampling.LANCZOS,
)

STACK_RANK = 3
LARGEST_ENLARGED = 2**28  # pixels; 3 GiB as float32


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
    size_buckets: list[Any] | tuple[Any, ...]
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
    and width of the batch rounded up to a multiple of `size_divisor`, to `pad_size`, or to one of `size_buckets`. The
    aspect ratio is kept, except with a fixed `size` of height and width. EXIF rotation is not applied, neither to PIL
    images nor to files, because labels belong to the pixels as they are stored: pass
    `PIL.ImageOps.exif_transpose(image)` where it matters.

    Preprocessing fields:
        do_resize, size, resample: `size` is `{"shortest_edge", "longest_edge"}` (either or both), `{"height", "width"}`
            (fixed, stretches) or `{"max_height", "max_width"}` (fits inside).
        do_rescale, rescale_factor, do_normalize, image_mean, image_std, do_convert_rgb, device: as everywhere.
        disable_grouping: whether images are processed one by one, and not those of one size together; `None` does so on
            the CPU. The results are the same.
        do_pad, size_divisor, pad_size: padding; `size_divisor=1` only pads to the largest image.
        size_buckets: (), instead of `pad_size`: pairs (height, width), or dicts of `height` and `width`. A batch is
            padded to the bucket of the smallest area into which all its images fit, so that a compiled model sees few
            shapes. As an argument of a call, `()` switches the buckets of the processor off.
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
    _auto_class = "AutoImageProcessor"  # `save_pretrained` copies this file and those that it imports
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
    size_buckets: tuple[Size, ...] = ()
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
        self.size_buckets = bucket_sizes(self.size_buckets)
        check_fields({name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__})

    def to_dict(self) -> dict[str, Any]:
        """Serialise the fields.

        Neither `auto_map` nor `image_processor_type` is written: with one of them here, `pipeline` asks people who have
        this package whether to run custom code. `config.json` names the class instead.
        """
        fields = super().to_dict()
        for name in ("auto_map", "image_processor_type"):
            fields.pop(name, None)
        return fields

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save the fields, and the code that reads them for people without this package.

        Args:
            save_directory: folder, made if it does not exist; the model's, whose `config.json` names this class.
            push_to_hub: upload it too; `push_to_hub()` is the better way.
            **kwargs: see transformers.

        Returns:
            The files of fields.
        """
        files = super().save_pretrained(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)
        copy_code(save_directory)
        return files

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
            images: one image or several: PIL, numpy or torch, or the path, URL or base64 text of a file. Integers are
                0 to 255, and uint16 0 to 65535; floats are 0 to 255, or 0 to 1 with `do_rescale=False`.
            segmentation_maps: a map (height, width) for each image, of classes, or of segment ids (next argument);
                PIL (of a palette image its indices), numpy or torch, or the path of a file.
            instance_id_to_semantic_id: class of each segment id; one dict, or one for each image.
            mask_labels: for each image bool, uint8 or float masks in [0, 1], (segments, height, width); they may
                overlap.
            class_labels: with `mask_labels`, for each image the classes (segments,).
            annotations: for each image a list of COCO instance dicts, a dict `{"annotations": that list}`, or a COCO
                panoptic dict with `segments_info` and `png` (image, array or path; else `file_name` is read as a path).
                `category_id` is the class label of the model.
            **kwargs: fields of the processor for this call, and `return_tensors`. `None` takes the field, unless the
                field has no default of its own (`ignore_index`, `num_labels`, `pad_size`).

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
        for name in [name for name, value in kwargs.items() if value is None]:
            if getattr(type(self), name, None) is not None:
                del kwargs[name]
        return super().preprocess(images, labels, **kwargs)

    def process_image(
        self,
        image: ImageInput | str | os.PathLike[str],
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | int | torch.device | None = None,
        do_rescale: bool | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Read one image as a tensor (channels, height, width); with `do_convert_rgb`, of three channels.

        Integers become uint8, and uint16 and floats float32; only floats can be beyond 0 to 255.
        """
        if isinstance(image, FILE_TYPES):
            image = open_image(image)
        if isinstance(image, PIL.Image.Image):
            image = pil_to_rgb(image) if do_convert_rgb else pil_to_array(image)
            input_data_format = ChannelDimension.LAST
        if not isinstance(image, Tensor | np.ndarray):
            raise TypeError(
                "expected a PIL image, a numpy array, a torch tensor, or the path of a file, got "
                f"{type(image).__name__}. Encoded bytes become an image by `PIL.Image.open(io.BytesIO(data))`."
            )
        tensor = channels_first(plain_tensor(image), input_data_format)
        if min(tensor.shape) < 1:
            raise ValueError(f"it is empty: its shape is {tuple(tensor.shape)}. Leave it out of the batch.")
        do_rescale = self.do_rescale if do_rescale is None else do_rescale
        is_scaled = tensor.is_floating_point() and not do_rescale
        tensor = eight_bit_range(tensor).to(device)
        return channels_to_rgb(tensor, 1 if is_scaled and tensor.max() <= 1 else WHITE) if do_convert_rgb else tensor

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
        fields["size_buckets"] = bucket_sizes(fields["size_buckets"])
        check_fields({**fields, "input_data_format": input_data_format})
        tensors, model_sizes = [], []
        listed = flatten_images(images)
        if not listed:
            raise ValueError("Expected an image or several, got none. Skip empty batches.")
        for index, image in enumerate(listed):
            with name_image(index):
                tensor = self.process_image(image, do_convert_rgb, input_data_format, device, fields["do_rescale"])
                check_values(tensor, fields)
                tensors.append(tensor)
                model_sizes.append(resized_size(size_of(tensor), fields["size"] if fields["do_resize"] else None))
        padded = padded_size(model_sizes, fields) if fields["do_pad"] else None
        segments = read_labels(
            labels,
            [size_of(tensor) for tensor in tensors],
            model_sizes,
            ignore_index=fields["ignore_index"],
            do_reduce_labels=fields["do_reduce_labels"],
        )
        check_class_labels(segments, fields["num_labels"])
        values = self._pixel_values(tensors, model_sizes, fields)
        return batch_inputs(values, segments, padded, fields["return_tensors"])

    def _pixel_values(self, images: list[Tensor], model_sizes: list[Size], fields: Mapping[str, Any]) -> list[Tensor]:
        """Resize, rescale and normalise images (channels, height, width), those of one size and type in one go."""
        groups: dict[Any, list[int]] = {}
        for index, image in enumerate(images):
            is_alone = fields["disable_grouping"]
            if is_alone is None:
                is_alone = image.device.type == "cpu"  # as transformers: there stacking costs more than it saves
            groups.setdefault(index if is_alone else (image.shape, image.dtype), []).append(index)
        values: dict[int, Tensor] = {}
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        for members in groups.values():
            stacked = torch.stack([images[index] for index in members])
            height, width = model_sizes[members[0]]
            if size_of(stacked) != (height, width):
                stacked = self.resize(stacked, SizeDict(height=height, width=width), fields["resample"])
            stacked = self.rescale_and_normalize(stacked, *(fields[name] for name in names))
            values.update(zip(members, stacked.float(), strict=True))
        return [values[index] for index in range(len(images))]

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
        return_polygons: bool = False,
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
            return_polygons: add `polygons`, the outlines of the masks.

        Returns:
            For each image a dict:
            `segmentation`, int32 map (height, width) in which each pixel has the id of the highest score that covers
            it, -1 where there is none (or see above);
            `segments_info`, a dict with `id` (from 0), `label_id`, `was_fused` (False) and `score` for each instance;
            and for the same instances in the same order `masks` bool (N, height, width), which may overlap, `scores`
            float32 (N,), `labels` int64 (N,) and `boxes` float32 (N, 4), x1, y1, x2, y2; with `return_polygons` also
            `polygons`, for each instance COCO's list of `[x0, y0, x1, y1, ...]` along the edges of its pixels.
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
        results = [instance_result(one, return_coco_annotation, return_binary_maps) for one in predictions]
        if return_polygons:
            for result in results:
                result["polygons"] = [trace_polygons(mask) for mask in result["masks"]]
        return results

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
    segmentation: Tensor | list[dict[str, Any]]
    if return_coco_annotation:
        segmentation = encode_rle(masks)
    else:
        segmentation = masks if return_binary_maps else instance_map(masks, prediction.boxes)
    pairs = zip(prediction.labels.tolist(), prediction.scores.tolist(), strict=True)
    return {
        "segmentation": segmentation,
        "segments_info": [
            {"id": index, "label_id": label, "was_fused": False, "score": score}
            for index, (label, score) in enumerate(pairs)
        ],
        "masks": masks,
        "scores": prediction.scores,
        "labels": prediction.labels,
        "boxes": prediction.boxes,
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


def check_fields(fields: Mapping[str, Any]) -> None:
    """Refuse fields that cannot be, or that have no effect; those of the processor, or of a call."""
    refuse_unsupported(fields)
    check_padding(fields["pad_size"], fields["size_divisor"], fields["size_buckets"])
    if fields["do_resize"]:
        check_size(fields["size"])
        if fields["resample"] not in RESAMPLING:
            raise ValueError(
                f"`resample` must be one of {', '.join(f'{int(one)} ({one.name.lower()})' for one in RESAMPLING)}, got "
                f"{fields['resample']!r}."
            )
    check_normalisation(fields)


def refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """Refuse what every image processor of transformers accepts and this one would ignore."""
    if fields.get("do_center_crop") or fields.get("crop_size"):
        raise ValueError(
            "Cropping is not supported: crop images and labels before the processor, and set `do_center_crop=False`."
        )
    data_format = fields.get("data_format")
    if data_format is not None and str(getattr(data_format, "value", data_format)) != "channels_first":
        raise ValueError(f"`pixel_values` are always channels first, got `data_format={data_format!r}`. Leave it out.")
    input_format = fields.get("input_data_format")
    if input_format is not None and input_format not in tuple(ChannelDimension):
        raise ValueError(
            f"`input_data_format` must be 'channels_first' or 'channels_last', got {input_format!r}. Leave it out to "
            "have it read from the shape."
        )
    if fields.get("image_seq_length") is not None:
        raise ValueError("`image_seq_length` belongs to models of text and images. Leave it out.")


def check_size(size: SizeDict) -> None:
    """Check that `size` has one of its forms."""
    lengths = dict(size)
    forms = ({"shortest_edge"}, {"longest_edge"}, {"shortest_edge", "longest_edge"})
    if set(lengths) not in (*forms, {"height", "width"}, {"max_height", "max_width"}):
        raise ValueError(
            "`size` must be a dict of `shortest_edge` and/or `longest_edge`, of `height` and `width`, or of "
            f"`max_height` and `max_width`, got {lengths}."
        )
    if not all(is_length(length) for length in lengths.values()):
        raise ValueError(f"`size` must hold integers of at least 1, got {lengths}.")


def check_normalisation(fields: Mapping[str, Any]) -> None:
    """Check factor, mean and standard deviation, and that the mean belongs to the range that the factor leaves."""
    factor = fields["rescale_factor"] if fields["do_rescale"] else math.inf
    if not factor > 0:
        raise ValueError(f"`rescale_factor` must be above 0, got {factor}.")
    if not fields["do_normalize"]:
        return
    if not np.min(fields["image_std"]) > 0:
        raise ValueError(f"`image_std` must be above 0, got {fields['image_std']}.")
    if np.max(fields["image_mean"]) > WHITE * factor:
        raise ValueError(
            f"`image_mean` {fields['image_mean']} lies above {WHITE * factor:g}, to which `rescale_factor` brings white. "
            "Divide `image_mean` and `image_std` by 255, or set `do_rescale=False`."
        )


def check_padding(pad_size: SizeDict | None, size_divisor: int, size_buckets: Sequence[Size]) -> None:
    """Check the fields of padding, and that the backbone can take every size that they name."""
    if size_divisor < 0:
        raise ValueError(f"`size_divisor` must be at least 0, got {size_divisor}. 0 and 1 switch it off.")
    name, sizes = "size_buckets", list(size_buckets)
    if pad_size is not None:
        if size_buckets:
            raise ValueError(
                "`pad_size` and `size_buckets` both decide to what a batch is padded. Drop `size_buckets` (set it to "
                "`()`) to pad every batch to one size, or `pad_size` to pad each to the smallest bucket that holds it."
            )
        if not (is_length(pad_size.height) and is_length(pad_size.width)):
            raise ValueError(f"`pad_size` must be a dict of `height` and `width`, at least 1, got {dict(pad_size)}.")
        name, sizes = "pad_size", [(pad_size["height"], pad_size["width"])]
    divisor = max(1, size_divisor)
    for height, width in sizes:
        if height % divisor or width % divisor:
            raise ValueError(
                f"`{name}` must be a multiple of `size_divisor` ({divisor}), got {height} x {width}. Round it up to "
                f"{round_up(height, divisor)} x {round_up(width, divisor)}, or set `size_divisor=1` for a backbone of "
                "any size."
            )


def bucket_sizes(buckets: Sequence[Any]) -> tuple[Size, ...]:
    """Read `size_buckets`, pairs or dicts, as pairs of height and width, the smallest area first."""
    if not isinstance(buckets, list | tuple):
        raise ValueError(  # noqa: TRY004 - as for every other value of a field
            f"`size_buckets` must be a list of pairs (height, width), got {buckets!r}."
        )
    sizes = set()
    for bucket in buckets:
        lengths = dict(bucket) if isinstance(bucket, Mapping | SizeDict) else bucket
        if isinstance(lengths, dict) and set(lengths) == {"height", "width"}:
            lengths = (lengths["height"], lengths["width"])
        is_pair = isinstance(lengths, list | tuple) and len(lengths) == 2  # noqa: PLR2004 - height and width
        if not (is_pair and all(is_length(length) for length in lengths)):
            raise ValueError(
                "`size_buckets` must hold pairs (height, width) of integers of at least 1, or dicts of `height` and "
                f"`width`, got {bucket!r}."
            )
        sizes.add(tuple(lengths))
    return tuple(sorted(sizes, key=lambda size: (size[0] * size[1], size)))


def is_length(value: object) -> bool:
    """Tell whether a value is a number of pixels."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def round_up(length: int, divisor: int) -> int:
    """Round up to a multiple of `divisor`."""
    return math.ceil(length / divisor) * divisor


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


def check_values(image: Tensor, fields: Mapping[str, Any]) -> None:
    """Refuse images that the given rescaling and normalisation would turn into noise.

    Args:
        image: uint8 or float32, (channels, height, width).
        fields: of the call.
    """
    means = np.atleast_1d(fields["image_mean"]) if fields["do_normalize"] else np.zeros(1)
    if len(means) not in (1, len(image)):
        raise ValueError(
            f"it has {len(image)} channels, but `image_mean` has {len(means)} values. Set `do_convert_rgb=True`, or "
            "give `image_mean` and `image_std` one value for each channel."
        )
    is_rescaled = fields["do_rescale"] and fields["rescale_factor"] < 1
    needs_scaled = fields["do_normalize"] and not fields["do_rescale"] and means.max() <= 1
    if image.dtype == torch.uint8 and not needs_scaled:
        return
    low, high = (float(value) for value in image.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("it has values that are not finite (NaN or infinite). Replace them, or leave the image out.")
    if is_rescaled and image.is_floating_point() and high <= LARGEST_SCALED and (low, high) != (0, 0):
        raise ValueError(
            f"it holds floats from {low:g} to {high:g}, which seem to be scaled already, and `do_rescale=True` would "
            f"multiply them by {fields['rescale_factor']:.4g}. Set `do_rescale=False` (and `do_normalize=False` if they "
            "are normalised too), or pass floats from 0 to 255, or uint8."
        )
    if needs_scaled and high > (LARGEST_SCALED if image.is_floating_point() else 1):
        raise ValueError(
            f"it holds values up to {high:g}, but with `do_rescale=False` and this `image_mean` they should be in "
            "[0, 1]. Set `do_rescale=True`, or divide them by 255."
        )


def resized_size(image_size: Size, size: SizeDict | None) -> Size:
    """Compute height and width after resizing; rounding as in Detectron2, so that 480 x 640 at 800 is 800 x 1067.

    Args:
        image_size: height and width before.
        size: a form that `check_size` takes; `None` keeps the image as it is.
    """
    if size is None:
        return image_size
    if size.height and size.width:
        return size.height, size.width
    height, width = image_size
    if size.max_height and size.max_width:
        scale = min(size.max_height / height, size.max_width / width)
    else:
        scale = min(
            size.shortest_edge / min(image_size) if size.shortest_edge else math.inf,
            size.longest_edge / max(image_size) if size.longest_edge else math.inf,
        )
    new_height, new_width = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    if new_height * new_width > max(LARGEST_ENLARGED, height * width):
        raise ValueError(
            f"it is {height} x {width} and would be enlarged to {new_height} x {new_width} by `size` {dict(size)}. Add "
            "`longest_edge`, or leave images out that are so narrow."
        )
    return new_height, new_width


def padded_size(model_sizes: Sequence[Size], fields: Mapping[str, Any]) -> Size:
    """Compute the common size of a batch."""
    pad_size, buckets = fields["pad_size"], fields["size_buckets"]
    if buckets:
        return smallest_bucket(model_sizes, buckets)
    if pad_size is None:
        divisor = max(1, fields["size_divisor"])
        height, width = (round_up(max(lengths), divisor) for lengths in zip(*model_sizes, strict=True))
        return height, width
    for index, (height, width) in enumerate(model_sizes):
        if height > pad_size.height or width > pad_size.width:
            raise ValueError(
                f"Image {index} is {height} x {width} after resizing, which does not fit into `pad_size` "
                f"{pad_size.height} x {pad_size.width}. Enlarge `pad_size` or lower `size`."
            )
    return pad_size.height, pad_size.width


def smallest_bucket(model_sizes: Sequence[Size], buckets: Sequence[Size]) -> Size:
    """Find the first bucket, in ascending area, into which every image fits."""

    def fitting(height: int, width: int) -> list[Size]:
        return [bucket for bucket in buckets if height <= bucket[0] and width <= bucket[1]]

    listed = ", ".join(f"{height} x {width}" for height, width in buckets)
    for index, (height, width) in enumerate(model_sizes):
        if not fitting(height, width):
            raise ValueError(
                f"Image {index} is {height} x {width} after resizing, which fits into none of `size_buckets` "
                f"({listed}). Add a bucket that holds {height} x {width}, or lower `size`."
            )
    heights, widths = zip(*model_sizes, strict=True)
    if fits := fitting(max(heights), max(widths)):
        return fits[0]
    tallest, widest = heights.index(max(heights)), widths.index(max(widths))
    sizes = [f"image {index} ({heights[index]} x {widths[index]} after resizing)" for index in (tallest, widest)]
    raise ValueError(
        f"No bucket of `size_buckets` ({listed}) holds both {sizes[0]} and {sizes[1]}. Add a bucket that holds "
        f"{max(heights)} x {max(widths)}, or put tall and wide images into batches of their own."
    )


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
    channels = {len(image) for image in images}
    if return_tensors is not None and len(channels) > 1:
        raise ValueError(f"Images of {sorted(channels)} channels make no batch. Set `do_convert_rgb=True`.")
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
        inputs["mask_labels"] = [mask.cpu().numpy() for mask in masks] if is_numpy else masks
        inputs["class_labels"] = [labels.cpu().numpy() for labels in classes] if is_numpy else classes
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


def one_per_image(name: str, entries: object, num_images: int) -> list[Any]:
    """Check that there is an entry for each image."""
    if not isinstance(entries, list | tuple | np.ndarray | Tensor):
        raise ValueError(  # noqa: TRY004 - as for every other bad input
            f"`{name}` must be a list of one entry for each of the {num_images} images, got {type(entries).__name__}."
        )
    if len(entries) != num_images:
        raise ValueError(f"`{name}` must have one entry for each of the {num_images} images, got {len(entries)}.")
    return list(entries)


def map_readers(
    labels: LabelInputs, num_images: int, ignore_index: int | None, do_reduce_labels: bool
) -> list[Callable[..., SegmentLabels]]:
    """Make a reader of each image's map: one map, a stack, a list, or a list of lists."""
    maps: Any = labels.segmentation_maps
    if isinstance(maps, list | tuple):
        maps = [inner for entry in maps for inner in (entry if isinstance(entry, list | tuple) else [entry])]
    elif num_images == 1 or not isinstance(maps, Tensor | np.ndarray) or maps.ndim < STACK_RANK:
        maps = [maps]
    ids: Any = labels.instance_id_to_semantic_id
    ids = ids if isinstance(ids, list | tuple) else [ids] * num_images
    pairs = zip(
        one_per_image("segmentation_maps", maps, num_images),
        one_per_image("instance_id_to_semantic_id", ids, num_images),
        strict=True,
    )
    read = partial(read_map, ignore_index=ignore_index, do_reduce_labels=do_reduce_labels)
    return [partial(read, one, instance_id_to_semantic_id=one_ids) for one, one_ids in pairs]


def read_map(segmentation_map: object, **arguments: Any) -> SegmentLabels:
    """Read a map of one image in any form; of a palette image the indices, whatever their colours."""
    return segments_from_map(label_array("segmentation map", segmentation_map), **arguments)


def label_array(what: str, values: object) -> Array:
    """Read an array, a PIL image or a file without a change of its values."""
    if isinstance(values, FILE_TYPES):
        values = open_image(values)
    if isinstance(values, PIL.Image.Image):
        decode(values)
        return np.array(values)
    if not isinstance(values, Tensor | np.ndarray):
        raise TypeError(
            f"its {what} must be a PIL image, a numpy array, a torch tensor, or the path of a file, got "
            f"{type(values).__name__}."
        )
    return values


def mask_readers(
    masks: Sequence[Any] | Array, classes: Sequence[Any] | Array, num_images: int
) -> list[Callable[..., SegmentLabels]]:
    """Make a reader of each image's masks; an array (segments, height, width) alone is one image."""
    if isinstance(masks, Tensor | np.ndarray) and masks.ndim == STACK_RANK:
        masks, classes = [masks], [classes]
    pairs = zip(
        one_per_image("mask_labels", masks, num_images),
        one_per_image("class_labels", classes, num_images),
        strict=True,
    )
    return [partial(segments_from_masks, one, labels) for one, labels in pairs]


def list_annotations(annotations: Sequence[Any] | Mapping[str, Any]) -> Sequence[Any]:
    """List the annotations of a batch; a dict alone, or a list of instance dicts, is one image."""
    if isinstance(annotations, Mapping):
        return [annotations]
    is_one_image = (
        isinstance(annotations, list | tuple)
        and len(annotations) > 0
        and all(isinstance(one, Mapping) and not {"annotations", "segments_info"} & set(one) for one in annotations)
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
    if isinstance(png, FILE_TYPES):
        png = open_image(png)
    if isinstance(png, PIL.Image.Image) and png.mode in ("P", "RGBA"):
        decode(png)
        png = png.convert("RGB")
    return label_array("panoptic map", png)


__all__ = ["MPFormerImageProcessor"]
