"""Configuration of MP-Former: every field of transformers' Mask2Former, plus those of mask-piloted training.

Names, meanings and defaults of the shared fields are Mask2Former's (arXiv 2112.01527, section 4.1); the `pilot_*` fields are
those of MP-Former (arXiv 2303.07336, section 3).
"""

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import consolidate_backbone_kwargs_to_config
from transformers.dynamic_module_utils import get_relative_import_files

PILOT_MASK_NOISES = ("point", "shift", "scale", "shift_scale", "none")
FEATURE_STRIDES = (4, 8, 16, 32)
NUM_GROUP_NORM_GROUPS = 32

# Accepted so that files and code written for transformers' Mask2Former keep working; they change nothing here.
FIELDS_FOR_COMPATIBILITY = frozenset({"ignore_value", "init_std"})

# Ways in which older transformers code names a pretrained backbone. Dropping them silently would train a random one.
LEGACY_BACKBONE_ARGUMENTS = ("backbone", "use_pretrained_backbone", "backbone_kwargs")

# What `trust_remote_code=True` loads from a saved folder for people without this package: file and class, beside config.json.
# `pipeline` takes the class for image segmentation, never the one for universal segmentation. The image processor stands
# here and not in preprocessor_config.json, where it would make `pipeline` ask people who have this package a question.
AUTO_MAP = {
    "AutoConfig": "configuration_mpformer.MPFormerConfig",
    "AutoModel": "modeling_mpformer.MPFormerModel",
    "AutoModelForUniversalSegmentation": "modeling_mpformer.MPFormerForUniversalSegmentation",
    "AutoModelForImageSegmentation": "modeling_mpformer.MPFormerForUniversalSegmentation",
    "AutoImageProcessor": "image_processing_mpformer.MPFormerImageProcessor",
}


@strict
class MPFormerConfig(PreTrainedConfig):
    r"""Configuration of [`MPFormerModel`] and [`MPFormerForUniversalSegmentation`].

    Args:
        backbone_config: config (or its dictionary) of a transformers backbone or of `timm_backbone`, with four outputs of
            strides 4, 8, 16 and 32. `None` is the Swin of transformers' Mask2Former.
        feature_size: channels of the pixel decoder; a multiple of 32 (group norm) and of the number of heads.
        mask_feature_size: channels of the per-pixel embedding and of the mask embeddings.
        hidden_dim: channels of the transformer decoder; a multiple of 4 and of the number of heads.
        encoder_feedforward_dim: width of the feed-forward networks of the pixel decoder.
        activation_function: activation of the transformer decoder's feed-forward networks.
        encoder_layers: deformable attention layers of the pixel decoder.
        decoder_layers: supervised levels of the transformer decoder, at least 2. One more than its layers, because the
            learnable queries are supervised before the first layer too.
        num_attention_heads: heads of every attention, in the pixel decoder and in the transformer decoder.
        dropout: probability in [0, 1). Only dropout: it never skips a whole layer.
        dim_feedforward: width of the feed-forward networks of the transformer decoder.
        pre_norm: layer norms before (True) or after (False) attention and feed-forward in the transformer decoder.
        enforce_input_projection: a 1x1 convolution in front of the transformer decoder even where the widths agree.
        common_stride: stride of the per-pixel embedding; 4.
        ignore_value: accepted for compatibility, without effect on the model.
        num_queries: learnable queries, at least 1.
        no_object_weight: weight of the class "no object" in the cross entropy, >= 0.
        class_weight, mask_weight, dice_weight: weights of the three losses and matching costs, >= 0.
        train_num_points: points sampled for matching and for each mask loss, >= 1.
        oversample_ratio: candidates for the importance sampling, as a multiple of `train_num_points`, >= 1.
        importance_sample_ratio: share of the points taken from the most uncertain candidates, in [0, 1].
        init_std: accepted for compatibility, without effect on the model.
        init_xavier_std: gain of the Xavier initialisation.
        use_auxiliary_loss: supervise every level (True) or only the last one (False).
        feature_strides: strides of the backbone's outputs; (4, 8, 16, 32).
        output_auxiliary_logits: return the logits of all levels by default.
        freeze_backbone_norm: batch norms of the backbone keep their statistics and affine parameters.
        query_position_embedding: learnable position embedding of the queries, as in Mask2Former. Released MP-Former
            checkpoints have none.
        mask_piloting: the mask-piloted branch in the training forward. `False` is exactly Mask2Former.
        pilot_groups: copies of the ground truth that are fed as MP queries, each with noise of its own, >= 1.
        pilot_query_budget: if set, overrides `pilot_groups`: groups = budget // most segments in one image of the global
            batch. No group at all means no piloting in that step.
        pilot_layers: the first n decoder layers whose cross-attention is piloted by ground-truth masks, from 1 to
            `decoder_layers - 1`; `None` is all of them.
        pilot_mask_noise: "point", "shift", "scale", "shift_scale" or "none".
        pilot_mask_noise_ratio: strength relative to the area or the box of each mask, in [0, 1].
        pilot_label_noise_ratio: probability that a label is replaced by a uniform draw, in [0, 1].
        pilot_noise_per_head: draw point noise for every attention head.
        pilot_label_loss: classification loss on the MP queries.
        max_nonfinite_steps: consecutive training steps with non-finite matching costs after which training stops with
            `FloatingPointError`, >= 1.

    Raises:
        ValueError: a value out of range, a relation between fields that cannot work, a misspelt field, or one of
            transformers' legacy arguments for pretrained backbones.

    Examples:
    ```python
    >>> from mpformer_hf import MPFormerConfig

    >>> config = MPFormerConfig(num_labels=3, pilot_groups=2)
    >>> config.pilot_groups
    2

    ```
    """

    model_type = "mpformer"
    _auto_class = "AutoConfig"  # `save_pretrained` copies this file
    # `sub_configs_defaults` does not exist before transformers 5.18; this form works in all supported versions.
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - transformers reads it from the class
    attribute_map = {"hidden_size": "hidden_dim", "num_hidden_layers": "decoder_layers"}  # noqa: RUF012
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "loss_dict",
        "image_sizes",
        "auxiliary_logits",
        "encoder_last_hidden_state",
        "pixel_decoder_last_hidden_state",
        "transformer_decoder_last_hidden_state",
        "encoder_hidden_states",
        "pixel_decoder_hidden_states",
        "transformer_decoder_hidden_states",
        "attentions",
        "pilot_class_queries_logits",
        "pilot_masks_queries_logits",
        "pilot_auxiliary_logits",
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    feature_size: int = 256
    mask_feature_size: int = 256
    hidden_dim: int = 256
    encoder_feedforward_dim: int = 1024
    activation_function: str = "relu"
    encoder_layers: int = 6
    decoder_layers: int = 10
    num_attention_heads: int = 8
    dropout: float | int = 0.0
    dim_feedforward: int = 2048
    pre_norm: bool = False
    enforce_input_projection: bool = False
    common_stride: int = 4
    ignore_value: int = 255
    num_queries: int = 100
    no_object_weight: float | int = 0.1
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    init_std: float = 0.02
    init_xavier_std: float | int = 1.0
    use_auxiliary_loss: bool = True
    feature_strides: list[int] | tuple[int, ...] = FEATURE_STRIDES
    output_auxiliary_logits: bool | None = None
    freeze_backbone_norm: bool = True
    query_position_embedding: bool = True
    mask_piloting: bool = True
    pilot_groups: int = 1
    pilot_query_budget: int | None = None
    pilot_layers: int | None = None
    pilot_mask_noise: str = "point"
    pilot_mask_noise_ratio: float | int = 0.2
    pilot_label_noise_ratio: float | int = 0.2
    pilot_noise_per_head: bool = False
    pilot_label_loss: bool = True
    max_nonfinite_steps: int = 20

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_legacy_backbone_arguments(kwargs)
        self._refuse_misspelt_fields(kwargs)
        self.backbone_config, kwargs = consolidate_backbone_kwargs_to_config(
            backbone_config=self.backbone_config,
            default_config_type="swin",
            default_config_kwargs={
                "depths": [2, 2, 18, 2],
                "drop_path_rate": 0.3,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            **kwargs,
        )
        super().__post_init__(**kwargs)
        if self.label2id is None and self.id2label is not None:
            self.label2id = {str(name): int(index) for index, name in self.id2label.items()}
        # transformers runs the validators after this and wraps what they raise; callers are promised a ValueError.
        self.validate_architecture()

    @staticmethod
    def _refuse_legacy_backbone_arguments(kwargs: dict[str, Any]) -> None:
        for name in LEGACY_BACKBONE_ARGUMENTS:
            if kwargs.get(name):
                raise ValueError(
                    f"`{name}={kwargs[name]!r}` is not supported: transformers' arguments for pretrained backbones load "
                    "random weights without saying so. Use "
                    "`MPFormerForUniversalSegmentation.from_backbone(name_or_folder, config)` for pretrained weights, or "
                    "pass `backbone_config=` for random ones."
                )
        for name in (*LEGACY_BACKBONE_ARGUMENTS, "use_timm_backbone"):
            kwargs.pop(name, None)  # empty values stand in the config files of transformers' Mask2Former

    @classmethod
    def _refuse_misspelt_fields(cls, kwargs: dict[str, Any]) -> None:
        own_fields = [name for name in MPFormerConfig.__annotations__ if not name.startswith("_")]
        known = {"num_labels", "torch_dtype", "attn_implementation", "output_attentions", *cls.attribute_map}
        for name in set(kwargs) - known:
            near = [field for field in own_fields if edit_distance_at_most_two(name, field)]
            if near or name.startswith("pilot_"):
                hint = (
                    f"Did you mean `{near[0]}`?"
                    if near
                    else f"Known: {', '.join(f for f in own_fields if 'pilot' in f)}."
                )
                raise ValueError(f"MPFormerConfig has no field `{name}`. {hint}")

    def count_labels(self) -> int:
        """K, the number of classes without "no object"."""
        return len(self.id2label or ())

    def validate_architecture(self) -> None:
        """Check ranges and relations between fields; called when a config or a model is made.

        Raises:
            ValueError: names the field, what was expected and what came.
        """
        super().validate_architecture()
        self._validate_widths()
        self._validate_ranges()
        self._validate_piloting()

    def _validate_widths(self) -> None:
        if tuple(self.feature_strides) != FEATURE_STRIDES or self.common_stride != FEATURE_STRIDES[0]:
            raise ValueError(
                f"Expected feature_strides {FEATURE_STRIDES} and common_stride {FEATURE_STRIDES[0]}, got "
                f"{tuple(self.feature_strides)} and {self.common_stride}. The pixel decoder is built for these strides; "
                "choose a backbone that gives them."
            )
        for name, divisors in {
            "feature_size": (NUM_GROUP_NORM_GROUPS, self.num_attention_heads),
            "hidden_dim": (4, self.num_attention_heads),
        }.items():
            width = getattr(self, name)
            for divisor in divisors:
                if divisor < 1 or width < 1 or width % divisor:
                    reason = "num_attention_heads" if divisor == self.num_attention_heads else "its layers' groups"
                    raise ValueError(f"`{name}` must be a positive multiple of {divisor} ({reason}), got {width}.")

    def _validate_ranges(self) -> None:
        at_least = {
            "decoder_layers": 2,
            "encoder_layers": 0,
            "num_queries": 1,
            "mask_feature_size": 1,
            "encoder_feedforward_dim": 1,
            "dim_feedforward": 1,
            "train_num_points": 1,
            "oversample_ratio": 1,
            "no_object_weight": 0,
            "class_weight": 0,
            "mask_weight": 0,
            "dice_weight": 0,
            "init_std": 0,
            "init_xavier_std": 0,
            "pilot_groups": 1,
            "max_nonfinite_steps": 1,
        }
        for name, minimum in at_least.items():
            if not getattr(self, name) >= minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(self, name)}.")
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"`activation_function` must be one of {', '.join(sorted(ACT2FN))}, got {self.activation_function!r}."
            )
        for name in ("importance_sample_ratio", "pilot_mask_noise_ratio", "pilot_label_noise_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}.")

    def _validate_piloting(self) -> None:
        if self.pilot_mask_noise not in PILOT_MASK_NOISES:
            raise ValueError(
                f"`pilot_mask_noise` must be one of {', '.join(map(repr, PILOT_MASK_NOISES))}, got {self.pilot_mask_noise!r}."
            )
        if self.pilot_layers is not None and not 1 <= self.pilot_layers <= self.decoder_layers - 1:
            raise ValueError(
                f"`pilot_layers` must be from 1 to decoder_layers - 1 = {self.decoder_layers - 1}, or None for all layers, "
                f"got {self.pilot_layers}."
            )
        if self.pilot_query_budget is not None and self.pilot_query_budget < 1:
            raise ValueError(
                f"`pilot_query_budget` must be at least 1, or None to use `pilot_groups`, got {self.pilot_query_budget}. "
                "To train without MP queries set `mask_piloting=False`."
            )
        if self.pilot_noise_per_head and self.pilot_mask_noise != "point":
            raise ValueError(
                f"`pilot_noise_per_head=True` draws point noise, but `pilot_mask_noise` is {self.pilot_mask_noise!r}. "
                "Set `pilot_mask_noise='point'` or `pilot_noise_per_head=False`."
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config file; one of transformers' Mask2Former is read as a MPFormer config."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "mask2former":
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs

    def to_dict(self) -> dict[str, Any]:
        """Serialise all fields, with the classes that load a saved folder, and without the names of folders of this machine."""
        config_dict = super().to_dict()
        # Classes that others have registered stay; references to the code of another repository ("repository--file.class") do
        # not: a folder is saved together with the code that wrote it.
        registered = config_dict.get("auto_map") or {}
        kept = {name: reference for name, reference in registered.items() if "--" not in reference}
        config_dict["auto_map"] = AUTO_MAP | kept
        for part in (config_dict, config_dict.get("backbone_config")):
            if isinstance(part, dict):
                part.pop("_name_or_path", None)
        return config_dict

    def to_diff_dict(self) -> dict[str, Any]:
        """Serialise what differs from the defaults; the label names always, also when there are two."""
        config_dict = super().to_diff_dict()
        full = self.to_dict()
        config_dict["id2label"] = full.get("id2label", self.id2label)
        config_dict["label2id"] = full.get("label2id", self.label2id)
        return config_dict

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the config, and the code that loads it for people without this package; models are saved through this too.

        Args:
            save_directory: folder, made if it does not exist.
            push_to_hub: upload it too; `push_to_hub()` is the better way.
            **kwargs: see transformers.
        """
        super().save_pretrained(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)
        copy_code(save_directory)


def copy_code(folder: str | os.PathLike) -> None:
    """Copy the files that `AUTO_MAP` names, and all that they import, into a saved folder.

    All of them whatever is saved: models and image processors share files, so a folder must not mix those of two versions.
    People without this package have only the files of what they have loaded; the others are in their folder, or not needed.
    """
    for module in sorted({reference.partition(".")[0] for reference in AUTO_MAP.values()}):
        entry = Path(__file__).with_name(f"{module}.py")
        if entry.is_file():
            for file in (entry, *map(Path, get_relative_import_files(entry))):
                shutil.copyfile(file, Path(folder, file.name))


def edit_distance_at_most_two(first: str, second: str) -> bool:
    """Whether at most two insertions, deletions or substitutions of characters turn one name into the other."""
    if abs(len(first) - len(second)) > 2:  # noqa: PLR2004
        return False
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        next_row = [i]
        for j, right in enumerate(second, start=1):
            next_row.append(min(row[j] + 1, next_row[j - 1] + 1, row[j - 1] + (left != right)))
        row = next_row
    return row[-1] <= 2  # noqa: PLR2004


__all__ = ["MPFormerConfig"]
