"""MP-Former (arXiv 2303.07336): Mask2Former (arXiv 2112.01527) whose training also reconstructs noised ground truth.

    pixel_values ── backbone ── pixel decoder ──┬── multi-scale features (1/32, 1/16, 1/8) ─┐
                                                └── per-pixel embedding (1/4) ──────────────┤
    learnable queries (Q) ───────────────────────────────────────────────── masked-attention decoder ── classes, masks
    labels of the ground truth (P, training only) ──────────────────────────────┘   ground-truth masks (training only)

In the training forward with labels, P pilot slots run beside the Q learnable queries: their content is the (noised) label of a
segment, their attention mask the (noised) mask of it. The learnable queries cannot see them, so in evaluation, where they do not
exist, the model is exactly Mask2Former.

Parameter names are those of transformers' Mask2Former; its weights load without a warning. The network sees padding like any other
pixel, as in the original: there is no padding mask, and results depend slightly on the amount of padding.

Axes: B images, H W padded size, Q learnable queries, P pilot slots, N = P + Q, V levels, K classes, C channels.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging
from transformers.utils.generic import ModelOutput
from transformers.utils.import_utils import is_timm_available

from .configuration_mpformer import FEATURE_STRIDES, MPFormerConfig
from .frozen_batch_norm import FrozenBatchNorm2d
from .global_batch import GlobalBatch
from .hub_kernel import KernelFallback
from .mask_decoder import DecoderFeatures, DecoderOutput, MaskedAttentionDecoder, Pilot
from .mask_losses import LevelPredictions, PointSettings, UniversalSegmentationCriterion
from .mask_matching import CostWeights
from .mask_piloting import (
    PilotMasks,
    PilotNoise,
    SlotLayout,
    count_pilot_groups,
    embed_pilot_labels,
    isolate_pilot_groups,
    lay_out_slots,
)
from .pixel_decoder import NUM_LEVELS, PixelDecoder, initialise_convolution
from .position_embedding import sine_position_embedding
from .target_checks import Targets, check_images, check_targets, measure_images

if is_timm_available():
    import timm

logger = logging.get_logger(__name__)


@dataclass
class MPFormerModelOutput(ModelOutput):
    """Output of [`MPFormerModel`]. The first fields are those of transformers' `Mask2FormerModelOutput`.

    Attributes:
        encoder_last_hidden_state: (B, channels, H / 32, W / 32), last map of the backbone.
        pixel_decoder_last_hidden_state: (B, mask_feature_size, H / 4, W / 4), the per-pixel embedding.
        transformer_decoder_last_hidden_state: (B, Q, C).
        encoder_hidden_states: maps of the backbone; with `output_hidden_states`.
        pixel_decoder_hidden_states: (B, feature_size, h, w) of strides 32, 16, 8; with `output_hidden_states`.
        transformer_decoder_hidden_states: V tensors (Q, B, C), as transformers has them; with `output_hidden_states`.
        transformer_decoder_intermediate_states: the same after the final layer norm; with `output_hidden_states`.
        masks_queries_logits: (B, Q, H / 4, W / 4) of all levels with `output_hidden_states`, else of the last level alone.
        attentions: one (B, heads, Q, Q) a layer, self-attention weights of the learnable queries; with `output_attentions`.
        image_sizes: int64, (B, 2), valid height and width of each padded image.
        level_states: V tensors (B, N, C) after the final layer norm, pilot slots first.
        level_mask_embeddings: V tensors (B, N, mask_feature_size), pilot slots first.
        targets: the checked ground truth, if labels were given.
        pilot_layout: which slot holds which segment; `None` without pilot slots.
    """

    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_intermediate_states: tuple[Tensor, ...] | None = None
    masks_queries_logits: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_sizes: Tensor | None = None
    level_states: tuple[Tensor, ...] | None = None
    level_mask_embeddings: tuple[Tensor, ...] | None = None
    targets: Targets | None = None
    pilot_layout: SlotLayout | None = None


@dataclass
class MPFormerForUniversalSegmentationOutput(ModelOutput):
    """Output of [`MPFormerForUniversalSegmentation`]. The first fields are those of transformers' Mask2Former.

    Attributes:
        loss: (), if labels were given.
        class_queries_logits: (B, Q, K + 1); the last class is "no object".
        masks_queries_logits: (B, Q, H / 4, W / 4).
        auxiliary_logits: one dictionary with both of these per level but the last; with `output_auxiliary_logits`.
        encoder_last_hidden_state ... attentions: see [`MPFormerModelOutput`].
        loss_dict: weighted terms of the loss, detached, summing to `loss`; the same keys in every training step.
        image_sizes: int64, (B, 2), valid height and width of each padded image; post-processing crops to it.
        pilot_class_queries_logits: (B, P, K + 1), in training with `output_auxiliary_logits`.
        pilot_masks_queries_logits: (B, P, H / 4, W / 4), likewise.
        pilot_auxiliary_logits: as `auxiliary_logits`, of the pilot slots.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    loss_dict: dict[str, Tensor] | None = None
    image_sizes: Tensor | None = None
    pilot_class_queries_logits: Tensor | None = None
    pilot_masks_queries_logits: Tensor | None = None
    pilot_auxiliary_logits: list[dict[str, Tensor]] | None = None


class MPFormerPreTrainedModel(KernelFallback, PreTrainedModel):
    """Initialisation and loading shared by the models."""

    config: MPFormerConfig
    config_class = MPFormerConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Whole modules: their parts exchange tensors that no device hook moves.
    _no_split_modules = ["PixelLevelModule", "TransformerModule"]  # noqa: RUF012 - transformers reads it from the class
    # Files of Mask2Former have no label embedding, older ones no class weights; a file with one loads without piloting.
    _keys_to_ignore_on_load_missing = [r"pilot_label_embedder\.weight", r"criterion\.empty_weight"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"pilot_label_embedder\.weight"]  # noqa: RUF012
    # Writes the README.md of a folder that is to be pushed to a repository; `True` says that it has one already. The package
    # sets it; people who have only this file, from the Hub, push transformers' card.
    write_card: ClassVar[Callable[[Any, Path, str, bool], None] | None] = None

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers' type
        """Write the model's card in the place of transformers' default; it goes into the same commit as the weights."""
        if self.write_card is not None:
            has_card = HfApi().file_exists(repo_id, "README.md", token=kwargs.get("token"))
            self.write_card(Path(working_dir), repo_id, has_card)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the original does; children come before their parents, what is loaded already stays.

        Queries, levels and label embeddings are N(0, 1); attention and feed-forward projections Xavier; the mask MLP and the class
        head keep PyTorch's default of a linear layer; sampling offsets start on a ring. Modules of our own say so themselves, in
        `initialise_weights(gain)`.
        """
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()  # PyTorch's default is the original's
        elif hasattr(module, "initialise_weights"):
            module.initialise_weights(self.config.init_xavier_std)  # type: ignore[operator] # torch types it as a tensor

    def _initialize_weights(self, module: nn.Module, *_: bool) -> None:
        """Visit every module: of custom code, transformers skips those without parameters of their own, such as our layers."""
        super()._initialize_weights(module)

    def get_input_embeddings(self) -> None:  # type: ignore[override] # transformers expects a module
        """There are none: images come in. Transformers' default raises, and Accelerate asks every model that it shards."""

    def enable_input_require_grads(self) -> None:
        """Let gradients pass checkpointed layers behind frozen weights. PEFT calls this for a model with gradient checkpointing.

        The images ask for the gradient: transformers' own way needs one tensor of input embeddings, which no backbone has.
        """
        self.disable_input_require_grads()

        def require_gradient(_: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(tensor.detach().requires_grad_(torch.is_grad_enabled()) for tensor in images)

        self._require_grads_hooks = [
            module.register_forward_pre_hook(require_gradient)
            for module in self.modules()
            if isinstance(module, PixelLevelModule)
        ]


class MPFormerModel(MPFormerPreTrainedModel):
    """Backbone, pixel decoder and transformer decoder, without the class head."""

    # Files of the whole model hold the class head and the criterion too.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"pilot_label_embedder\.weight",
        r"class_predictor\.",
        r"criterion\.empty_weight",
    ]

    def __init__(self, config: MPFormerConfig) -> None:
        super().__init__(config)
        config.validate_architecture()
        self.pixel_level_module = PixelLevelModule(config)
        self.transformer_module = TransformerModule(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        ignore_masks: list[Tensor | None] | None = None,
        global_batch: GlobalBatch | None = None,
    ) -> MPFormerModelOutput | tuple:
        """Run the network; in training with labels, the mask-piloted branch too.

        Args:
            pixel_values: (B, channels, H, W), normalised and padded; H and W at least 32.
            pixel_mask: (B, H, W), 1 (or True) for pixels of the image, 0 for padding at the right and the bottom. The network
                itself sees padding like any other pixel; the mask sets `image_sizes`.
            mask_labels: per image, (T, h, w), bool, uint8 or float in [0, 1]; of the padded size or of the image's own.
            class_labels: per image, int64, (T,).
            output_hidden_states: return features, hidden states and masks of all levels.
            output_attentions: return self-attention weights.
            return_dict: `False` returns a tuple of the fields that are tensors (or tuples of them).
            ignore_masks: as of [`MPFormerForUniversalSegmentation`]; the network does not see them, the targets hold them.
            global_batch: counts of the whole optimiser step; the pilot slots are laid out for its largest image.
        """
        output_hidden_states = self._choose(output_hidden_states, "output_hidden_states")
        output_attentions = self._choose(output_attentions, "output_attentions")
        check_images(pixel_values, pixel_mask)
        image_sizes = measure_images(pixel_values, pixel_mask)
        known_sizes = image_sizes if pixel_mask is not None else None
        targets = self._check_targets(
            pixel_values, known_sizes, mask_labels, class_labels, ignore_masks=ignore_masks, global_batch=global_batch
        )

        backbone_features, pixel_embedding, features = self.pixel_level_module(pixel_values)
        decoded, layout = self.transformer_module(features, pixel_embedding, targets, output_attentions)

        num_slots = 0 if layout is None else layout.num_slots
        masks = decoded.mask_embeddings if output_hidden_states else decoded.mask_embeddings[-1:]
        pixel_embedding = pixel_embedding.to(masks[0].device)
        attentions = decoded.attentions
        output = MPFormerModelOutput(
            encoder_last_hidden_state=backbone_features[-1],
            pixel_decoder_last_hidden_state=pixel_embedding,
            transformer_decoder_last_hidden_state=decoded.hidden_states[-1][:, num_slots:],
            encoder_hidden_states=backbone_features if output_hidden_states else None,
            pixel_decoder_hidden_states=features if output_hidden_states else None,
            transformer_decoder_hidden_states=queries_first(decoded.hidden_states, num_slots)
            if output_hidden_states
            else None,
            transformer_decoder_intermediate_states=(
                queries_first(decoded.normed_states, num_slots) if output_hidden_states else None
            ),
            masks_queries_logits=tuple(predict_masks(level[:, num_slots:], pixel_embedding) for level in masks),
            attentions=attentions and tuple(weights[:, :, num_slots:, num_slots:] for weights in attentions),
            image_sizes=image_sizes,
            level_states=decoded.normed_states,
            level_mask_embeddings=decoded.mask_embeddings,
            targets=targets,
            pilot_layout=layout,
        )
        if self._choose(return_dict, "return_dict"):
            return output
        return tuple(value for value in output.values() if not isinstance(value, Targets | SlotLayout))

    def _check_targets(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None,
        mask_labels: list | None,
        class_labels: list | None,
        **rest: Any,
    ) -> Targets | None:
        if mask_labels is None and class_labels is None:
            return None
        if mask_labels is None or class_labels is None:
            missing = "mask_labels" if mask_labels is None else "class_labels"
            raise ValueError(
                f"Expected `mask_labels` and `class_labels` together, got no `{missing}`. Pass both or neither."
            )
        num_labels = self.config.count_labels()
        return check_targets(pixel_values, image_sizes, mask_labels, class_labels, num_labels, **rest)

    def _choose(self, argument: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name) if argument is None else argument)


class MPFormerForUniversalSegmentation(MPFormerPreTrainedModel):
    """MP-Former for instance, semantic and panoptic segmentation.

    `save_pretrained` and `push_to_hub` write this code beside the weights: people without this package load the folder or
    repository with transformers' Auto classes or `pipeline("image-segmentation", ...)`, and `trust_remote_code=True`.

    Examples:
    ```python
    >>> import torch
    >>> from transformers import ResNetConfig
    >>> from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation

    >>> backbone = ResNetConfig(
    ...     embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic",
    ...     out_features=["stage1", "stage2", "stage3", "stage4"],
    ... )
    >>> config = MPFormerConfig(
    ...     backbone_config=backbone, num_labels=3, feature_size=32, mask_feature_size=32, hidden_dim=32,
    ...     encoder_layers=1, decoder_layers=4, num_queries=5,
    ... )
    >>> model = MPFormerForUniversalSegmentation(config).eval()
    >>> with torch.no_grad():
    ...     outputs = model(torch.zeros(1, 3, 64, 96))
    >>> outputs.class_queries_logits.shape, outputs.masks_queries_logits.shape
    (torch.Size([1, 5, 4]), torch.Size([1, 5, 16, 24]))

    ```
    """

    def __init__(self, config: MPFormerConfig) -> None:
        super().__init__(config)
        self.model = MPFormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.count_labels() + 1)
        self.criterion = UniversalSegmentationCriterion(
            config.count_labels(),
            no_object_weight=config.no_object_weight,
            weights=CostWeights(label=config.class_weight, mask=config.mask_weight, dice=config.dice_weight),
            points=PointSettings(config.train_num_points, config.oversample_ratio, config.importance_sample_ratio),
            max_nonfinite_steps=config.max_nonfinite_steps,
        )
        self.post_init()

    @classmethod
    def from_backbone(
        cls, name_or_folder: str, config: MPFormerConfig | None = None, **config_fields: Any
    ) -> "MPFormerForUniversalSegmentation":
        """Make a model with a pretrained backbone; the rest is initialised at random.

        Args:
            name_or_folder: a repository or folder of a transformers model that `AutoBackbone` knows, or `timm:` and the name of a
                timm model (`timm:resnet50`).
            config: configuration of the whole model; its `backbone_config` is replaced.
            **config_fields: fields of [`MPFormerConfig`], on top of `config`.

        Raises:
            ValueError: the backbone does not give four maps of strides 4, 8, 16 and 32.
        """
        backbone = load_pretrained_backbone(name_or_folder)
        check_strides(backbone, name_or_folder)
        replaced = {"model_type", "num_labels"}
        if {"num_labels", "id2label"} & config_fields.keys():  # new classes have none of the old names
            replaced |= {"id2label", "label2id"}
        fields = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in replaced}
        config = MPFormerConfig(**{**fields, **config_fields, "backbone_config": backbone.config})
        model = cls(config)
        model.model.pixel_level_module.encoder.load_state_dict(backbone.state_dict())
        return model

    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        ignore_masks: list[Tensor | None] | None = None,
        global_batch: GlobalBatch | None = None,
    ) -> MPFormerForUniversalSegmentationOutput | tuple:
        """Predict; with labels, compute the loss; in training with labels, with the mask-piloted branch.

        Args:
            pixel_values: (B, channels, H, W), normalised and padded; H and W at least 32.
            mask_labels: per image, (T, h, w), bool, uint8 or float in [0, 1]; of the padded size or of the image's own (top left;
                the rest is background). Zero segments are normal input.
            class_labels: per image, int64, (T,), in [0, num_labels).
            pixel_mask: (B, H, W), 1 (or True) for pixels of the image, 0 for padding at the right and the bottom.
            output_hidden_states: return features and hidden states of all levels.
            output_auxiliary_logits: return the logits of all levels, and in training those of the pilot slots.
            output_attentions: return self-attention weights.
            return_dict: `False` returns a tuple of the fields that are not `None`.
            ignore_masks: per image, bool, (h, w), True where no label is known, or `None`; of the padded size or of the image's own.
                Points of the matching and of the mask losses that touch such a pixel do not count, and the mask labels there have
                no influence on the loss; a segment none of whose points counts has mask losses of zero. The attention of
                pilot slots is unaffected. Without labels it means nothing.
            global_batch: from `count_global_batch`, for gradient accumulation. Without labels it means nothing.

        Raises:
            ValueError: images or labels that cannot be right; the message names the image.
            FloatingPointError: training has diverged; see `MPFormerConfig.max_nonfinite_steps`.
        """
        outputs = self.model(
            pixel_values,
            pixel_mask=pixel_mask,
            mask_labels=mask_labels,
            class_labels=class_labels,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            ignore_masks=ignore_masks,
            global_batch=global_batch,
        )
        auxiliary = self.config.output_auxiliary_logits if output_auxiliary_logits is None else output_auxiliary_logits
        layout = outputs.pilot_layout
        num_slots = 0 if layout is None else layout.num_slots
        all_levels = auxiliary or (outputs.targets is not None and self.config.use_auxiliary_loss)
        states = (outputs.level_states or ())[0 if all_levels else -1 :]
        class_logits = [self.class_predictor(level) for level in states]
        # Asked here: a function that is excluded from compilation would break the graph of evaluation.
        loss, loss_dict = (None, None) if outputs.targets is None else self._compute_loss(class_logits, outputs)
        logits = self._list_logits(class_logits, outputs) if auxiliary else {}
        result = MPFormerForUniversalSegmentationOutput(
            loss=loss,
            class_queries_logits=class_logits[-1][:, num_slots:],
            masks_queries_logits=outputs.masks_queries_logits[-1],
            auxiliary_logits=logits.get("auxiliary_logits"),
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            pixel_decoder_last_hidden_state=outputs.pixel_decoder_last_hidden_state,
            transformer_decoder_last_hidden_state=outputs.transformer_decoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            pixel_decoder_hidden_states=outputs.pixel_decoder_hidden_states,
            transformer_decoder_hidden_states=outputs.transformer_decoder_hidden_states,
            attentions=outputs.attentions,
            loss_dict=loss_dict,
            image_sizes=outputs.image_sizes,
            pilot_class_queries_logits=logits.get("pilot_class_queries_logits"),
            pilot_masks_queries_logits=logits.get("pilot_masks_queries_logits"),
            pilot_auxiliary_logits=logits.get("pilot_auxiliary_logits"),
        )
        returns_dict = self.config.return_dict if return_dict is None else return_dict
        return result if returns_dict else result.to_tuple()

    def count_global_batch(self, class_labels: Sequence[Sequence[Tensor]]) -> GlobalBatch:
        """Count the segments of an optimiser step of several forward passes, before the first of them.

        Without it, every pass is divided by its own number of segments (over all processes), and a step of M passes is not the
        step of one batch with all images. With it, passes are treated like further processes: the mean of the losses of
        all passes and processes, which gradient accumulation and DDP take, is the loss of the global batch, and so are
        the gradients. It is exact if no image has more segments than queries (see `GlobalBatch`).

        Of several processes, all must call it (of wrapped models, on the model inside); each passes the labels of its own
        batches, equally many on every process. That is the only time they wait for each other: forward passes with
        `global_batch` do not.

        Args:
            class_labels: for each pass of this process, `class_labels` of its batch: per image, int64, (T,).

        Examples:
        ```python
        batches = [next(loader) for _ in range(4)]
        counts = model.count_global_batch([batch["class_labels"] for batch in batches])
        for batch in batches:
            (model(**batch, global_batch=counts).loss / len(batches)).backward()
        optimizer.step()
        ```
        """
        return GlobalBatch.count(
            class_labels,
            num_labels=self.config.count_labels(),
            num_queries=self.config.num_queries,
            device=self.criterion.empty_weight.device,
        )

    @torch.compiler.disable
    def _compute_loss(
        self, class_logits: list[Tensor], outputs: MPFormerModelOutput
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert outputs.targets is not None  # asked before
        assert outputs.pixel_decoder_last_hidden_state is not None  # MPFormerModel always returns it
        num_levels = self.config.decoder_layers if self.config.use_auxiliary_loss else 1
        predictions = LevelPredictions(
            class_logits[-num_levels:],
            (outputs.level_mask_embeddings or ())[-num_levels:],
            outputs.pixel_decoder_last_hidden_state,
        )
        loss, terms = self.criterion(
            predictions, outputs.targets, outputs.pilot_layout, pilot_label_loss=self.config.pilot_label_loss
        )
        if self.training and self.config.mask_piloting and outputs.pilot_layout is None:
            # The same terms in every step, also in one without pilot slots.
            kinds = [name.removeprefix("loss_") for name in terms]
            terms |= {
                f"loss_pilot_{kind}": loss.new_zeros(())
                for kind in kinds
                if self.config.pilot_label_loss or not kind.startswith("cross_entropy")
            }
        return loss, terms

    def _list_logits(self, class_logits: list[Tensor], outputs: MPFormerModelOutput) -> dict[str, Any]:
        """Full-size masks of all levels, matched and piloted; only where they are asked for."""
        layout, pixels = outputs.pilot_layout, outputs.pixel_decoder_last_hidden_state
        assert pixels is not None  # MPFormerModel always returns it
        num_slots = 0 if layout is None else layout.num_slots
        masks = [predict_masks(embedding, pixels) for embedding in outputs.level_mask_embeddings or ()]

        def list_levels(part: slice) -> list[dict[str, Tensor]]:
            return [
                {"masks_queries_logits": level_masks[:, part], "class_queries_logits": level_classes[:, part]}
                for level_masks, level_classes in zip(masks[:-1], class_logits[:-1], strict=True)
            ]

        logits: dict[str, Any] = {"auxiliary_logits": list_levels(slice(num_slots, None))}
        if layout is not None:
            logits["pilot_class_queries_logits"] = class_logits[-1][:, :num_slots]
            logits["pilot_masks_queries_logits"] = masks[-1][:, :num_slots]
            logits["pilot_auxiliary_logits"] = list_levels(slice(0, num_slots))
        return logits


# ------------------------------------------------------------------------------------------------------------------- parts


class PixelLevelModule(nn.Module):
    """Backbone and pixel decoder."""

    def __init__(self, config: MPFormerConfig) -> None:
        super().__init__()
        backbone_config: Any = config.backbone_config
        if backbone_config._attn_implementation == "sdpa":  # noqa: SLF001 - the only name transformers has for it
            # Convolutional backbones refuse it; left to themselves, all others choose it.
            backbone_config._attn_implementation = None  # noqa: SLF001
        if backbone_config.model_type == "timm_backbone" and is_timm_available():
            backbone_config.backbone = name_timm_architecture(backbone_config.backbone)
        try:
            self.encoder = AutoBackbone.from_config(backbone_config)
        except ValueError as error:
            raise ValueError(
                f"`{backbone_config.model_type}` cannot be built as a backbone with four maps of strides "
                f"{', '.join(map(str, FEATURE_STRIDES))}, as ResNet, Swin and ConvNeXt can: {error}"
            ) from error
        traced = trace_backbone(self.encoder)
        if traced is not None:
            raise_for_strides(traced.map_sizes, traced.image_size, self.encoder.config.model_type)
        self.decoder = PixelDecoder(
            self.encoder.channels,
            feature_size=config.feature_size,
            mask_feature_size=config.mask_feature_size,
            num_heads=config.num_attention_heads,
            num_layers=config.encoder_layers,
            feedforward_dim=config.encoder_feedforward_dim,
            dropout=config.dropout,
        )
        self.freeze_norm = config.freeze_backbone_norm
        if self.freeze_norm:
            FrozenBatchNorm2d.replace_in(self.encoder)
        # Swin's last layer norm, for one: DDP would wait for its gradient.
        self.unused_parameters = frozenset() if traced is None else frozenset(traced.unused_parameters)
        self._freeze()

    def _freeze(self) -> None:
        """Switch off the gradients of frozen batch norms and of parameters that have no part in the maps."""
        for name, parameter in self.encoder.named_parameters():
            if name in self.unused_parameters:
                parameter.requires_grad_(False)
        if self.freeze_norm:
            for norm in self._backbone_norms():
                norm.requires_grad_(False)

    def _backbone_norms(self) -> list[nn.Module]:
        return [module for module in self.encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001

    def train(self, mode: bool = True) -> "PixelLevelModule":
        """Set the mode; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        self._freeze()  # `from_pretrained` puts in new parameters and ends with `eval()`
        if self.freeze_norm:
            for norm in self._backbone_norms():
                norm.eval()
        return self

    def forward(self, pixel_values: Tensor) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
        """Backbone maps, the per-pixel embedding (B, ., H / 4, W / 4), and features (B, ., h, w) of strides 32, 16, 8."""
        maps = tuple(self.encoder(pixel_values).feature_maps)
        sizes = [(level.shape[2], level.shape[3]) for level in maps]
        raise_for_strides(sizes, (pixel_values.shape[2], pixel_values.shape[3]), self.encoder.config.model_type)
        pixel_embedding, features = self.decoder(maps)
        return maps, pixel_embedding, features


class TransformerModule(nn.Module):
    """Learnable queries, the label embedding of the pilot slots, and the transformer decoder."""

    def __init__(self, config: MPFormerConfig) -> None:
        super().__init__()
        self.config = config
        if config.query_position_embedding:
            self.queries_embedder = nn.Embedding(config.num_queries, config.hidden_dim)
        self.queries_features = nn.Embedding(config.num_queries, config.hidden_dim)
        if config.mask_piloting:
            self.pilot_label_embedder = nn.Embedding(config.count_labels(), config.hidden_dim)
        needs_projection = config.feature_size != config.hidden_dim or config.enforce_input_projection
        self.input_projections = nn.ModuleList(
            nn.Conv2d(config.feature_size, config.hidden_dim, kernel_size=1) if needs_projection else nn.Sequential()
            for _ in range(NUM_LEVELS)
        )
        self.level_embed = nn.Embedding(NUM_LEVELS, config.hidden_dim)
        self.decoder = MaskedAttentionDecoder(
            hidden_dim=config.hidden_dim,
            mask_feature_size=config.mask_feature_size,
            num_layers=config.decoder_layers - 1,  # level 0 needs no layer
            num_heads=config.num_attention_heads,
            feedforward_dim=config.dim_feedforward,
            dropout=config.dropout,
            activation=config.activation_function,
            pre_norm=config.pre_norm,
        )
        # Training steps in which `pilot_query_budget` left no group; not saved.
        self.steps_without_pilot = 0

    def initialise_weights(self, gain: float) -> None:
        """Kaiming for the input projections, as for the pixel decoder's pyramid."""
        del gain
        for projection in self.input_projections.modules():
            if isinstance(projection, nn.Conv2d):
                initialise_convolution(projection)

    def forward(
        self,
        features: tuple[Tensor, ...],
        pixel_embedding: Tensor,
        targets: Targets | None,
        output_attentions: bool = False,
    ) -> tuple[DecoderOutput, SlotLayout | None]:
        """Decode, with pilot slots in training with targets."""
        decoder_features = self._prepare_features(features, pixel_embedding)
        device = pixel_embedding.device
        queries = look_up(self.queries_features, device).expand(len(pixel_embedding), -1, -1)
        layout, pilot = None, None
        if self.training and self.config.mask_piloting and targets is not None:
            # Once in every step, whatever the images hold: of sharded weights, each call is work of all processes.
            label_embedding = look_up(self.pilot_label_embedder, device)
            layout, pilot = self._make_pilot(targets, decoder_features.sizes, label_embedding)
            if layout is None or not layout.num_segments:
                # DDP wants every parameter in every step's graph.
                queries = queries + 0.0 * label_embedding.sum()
        decoded = self.decoder(
            queries,
            look_up(self.queries_embedder, device) if self.config.query_position_embedding else None,
            decoder_features,
            pilot=pilot,
            output_attentions=output_attentions,
            use_sdpa=self.config._attn_implementation != "eager",  # noqa: SLF001 - the only name transformers has for it
        )
        return decoded, layout

    def _prepare_features(self, features: tuple[Tensor, ...], pixel_embedding: Tensor) -> DecoderFeatures:
        values, positions, sizes = [], [], []
        level_embeddings = look_up(self.level_embed, pixel_embedding.device)
        for level, (feature, project) in enumerate(zip(features, self.input_projections, strict=True)):
            cells = project(feature).flatten(2).transpose(1, 2) + level_embeddings[level]
            height, width = feature.shape[2:]
            values.append(cells)
            positions.append(sine_position_embedding(height, width, cells.shape[2], cells.dtype, cells.device))
            sizes.append((height, width))
        return DecoderFeatures(values, positions, sizes, pixel_embedding)

    def _lay_out(self, targets: Targets, device: torch.device) -> SlotLayout | None:
        """Slots of this step; `None` when no group fits."""
        config = self.config
        if targets.global_batch is None:
            max_targets = maximum_over_processes(max(targets.num_segments, default=0), device)
        else:
            max_targets = targets.global_batch.max_segments
        num_groups = count_pilot_groups(max_targets, config.pilot_groups, config.pilot_query_budget)
        if num_groups == 0:
            if max_targets > 0:
                self._count_step_without_pilot(max_targets)
            return None
        return lay_out_slots(targets.num_segments, num_groups, max_targets, device)

    def _count_step_without_pilot(self, max_targets: int) -> None:
        self.steps_without_pilot += 1
        if self.steps_without_pilot == 1:
            logger.warning(
                "No mask piloting in this step: an image has %d segments, more than pilot_query_budget = %d. Raise the budget, "
                "or use `pilot_groups`. (Later cases are counted in `steps_without_pilot`, not reported.)",
                max_targets,
                self.config.pilot_query_budget,
            )

    @torch.compiler.disable  # every new number of segments would be another graph
    def _make_pilot(
        self, targets: Targets, sizes: Sequence[tuple[int, int]], label_embedding: Tensor
    ) -> tuple[SlotLayout | None, Pilot | None]:
        """The pilot slots of this step, for an embedding of labels (K, C); both `None` when no group fits."""
        config, device = self.config, label_embedding.device
        layout = self._lay_out(targets, device)
        if layout is None:
            return None, None
        noise = PilotNoise(config.pilot_mask_noise, config.pilot_mask_noise_ratio, config.pilot_noise_per_head)
        queries = embed_pilot_labels(
            torch.cat(targets.class_labels), label_embedding, layout, config.pilot_label_noise_ratio
        )
        return layout, Pilot(
            queries=queries,
            self_attention_mask=isolate_pilot_groups(layout.num_groups, layout.max_targets, config.num_queries, device),
            masks=PilotMasks.prepare(
                targets.mask_labels, targets.padded_size, sizes, layout, noise, num_heads=config.num_attention_heads
            ),
            num_layers=config.decoder_layers - 1 if config.pilot_layers is None else config.pilot_layers,
        )


def look_up(embedding: nn.Embedding, device: torch.device) -> Tensor:
    """All rows of an embedding, (rows, C). By a call: offloaded or sharded, a weight may exist during the call alone."""
    return embedding(torch.arange(embedding.num_embeddings, device=device))


def predict_masks(mask_embeddings: Tensor, pixel_embedding: Tensor) -> Tensor:
    """Mask logits: (B, N, C) and (B, C, h, w) to (B, N, h, w)."""
    return (mask_embeddings @ pixel_embedding.flatten(2)).unflatten(2, pixel_embedding.shape[2:])


def queries_first(states: tuple[Tensor, ...], num_slots: int) -> tuple[Tensor, ...]:
    """Drop the pilot slots of (B, N, C) and put the query axis first: (Q, B, C), as transformers returns them."""
    return tuple(level[:, num_slots:].transpose(0, 1) for level in states)


def maximum_over_processes(number: int, device: torch.device) -> int:
    """The largest of a number over all processes. Waits for the device when there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    largest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


# ---------------------------------------------------------------------------------------------------------------- backbones


def load_pretrained_backbone(name_or_folder: str) -> PreTrainedModel:
    """Load a transformers backbone, or a timm one when the name begins with `timm:`, with pretrained weights."""
    if name_or_folder.startswith("timm:"):
        return _load_timm_backbone(name_or_folder.removeprefix("timm:"))
    config = AutoConfig.from_pretrained(name_or_folder)
    stages = getattr(config, "stage_names", None)
    if not stages or len(stages) <= len(FEATURE_STRIDES):
        raise ValueError(
            f"`{name_or_folder}` is a {config.model_type} model without stages of different strides. Choose a backbone with maps of "
            f"strides {FEATURE_STRIDES}, such as ResNet, Swin or ConvNeXt, or `timm:` and the name of a timm model."
        )
    config.out_features = stages[-len(FEATURE_STRIDES) :]
    with torch.device("meta"):
        backbone_class = type(AutoBackbone.from_config(config))
    backbone, report = backbone_class.from_pretrained(name_or_folder, config=config, output_loading_info=True)
    fresh = [
        key for key in report["missing_keys"] if "hidden_states_norms" not in key
    ]  # Swin and ConvNeXt add norms to their outputs
    if fresh:
        raise ValueError(
            f"`{name_or_folder}` lacks {len(fresh)} weights of a {config.model_type} backbone, among them {fresh[0]}. Pass a "
            "complete pretrained model."
        )
    return backbone


def _load_timm_backbone(name: str) -> PreTrainedModel:
    if not is_timm_available():
        raise ImportError(f"`timm:{name}` needs timm, which is not installed. Run `pip install timm`.")
    from transformers import TimmBackbone, TimmBackboneConfig  # noqa: PLC0415 - needs timm

    with torch.device("meta"):
        reductions = timm.create_model(name, features_only=True).feature_info.reduction()  # type: ignore[operator, union-attr]
    indices = [reductions.index(stride) for stride in FEATURE_STRIDES if stride in reductions]
    if len(indices) != len(FEATURE_STRIDES):
        raise ValueError(_strides_message(f"timm:{name}", reductions))
    # Not `TimmBackbone.from_pretrained`: it sets the statistics of batch norms to 0 and 1 after timm has loaded them.
    backbone = TimmBackbone(TimmBackboneConfig(backbone=name, out_indices=indices))  # type: ignore[call-arg] # a property
    pretrained = timm.create_model(name, pretrained=True, features_only=True, out_indices=indices)
    backbone._backbone.load_state_dict(pretrained.state_dict())  # noqa: SLF001 - the only name transformers has for it
    return backbone


def name_timm_architecture(name: str) -> str:
    """The name in timm's registry of a model in a folder (`local-dir:`) or a repository (`hf-hub:`); other names stay.

    A saved model has the weights itself: to be loaded, it must need neither that folder, which other machines have not, nor that
    repository.

    Raises:
        ValueError: the folder's arguments make another network than the architecture's name alone.
    """
    if not name or ":" not in name:
        return name
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
        architecture = str(model.pretrained_cfg["architecture"])  # type: ignore[index] # torch types it as a tensor
        plain = timm.create_model(architecture, features_only=True)
    if repr(plain) != repr(model) or measure_parameters(plain) != measure_parameters(model):
        raise ValueError(
            f"`{name}` is a timm {architecture} with arguments of its own (`model_args` of its config.json), which a "
            "saved config cannot express. Choose a model that its architecture's name describes, or a backbone of transformers."
        )
    return architecture


def measure_parameters(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of all parameters and buffers that are saved."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def check_strides(backbone: nn.Module, name: str) -> None:
    """Refuse a backbone whose outputs do not have strides 4, 8, 16 and 32; what cannot be traced is checked in forward."""
    traced = trace_backbone(backbone)
    if traced is not None:
        raise_for_strides(traced.map_sizes, traced.image_size, name)


@dataclass(frozen=True)
class TracedBackbone:
    """Shapes of a backbone's outputs, and parameters that have no part in them."""

    image_size: tuple[int, int]
    map_sizes: list[tuple[int, int]]
    unused_parameters: list[str]


def trace_backbone(backbone: nn.Module) -> TracedBackbone | None:
    """Run the shapes of a backbone, forward and backward, on the meta device; `None` where that does not work."""
    size = getattr(backbone.config, "image_size", None)
    size = size if isinstance(size, int) and size >= FEATURE_STRIDES[-1] else 2 * FEATURE_STRIDES[-1]
    images = torch.empty(1, getattr(backbone.config, "num_channels", 3), size, size, device="meta")
    parameters = {key: torch.empty_like(tensor, device="meta") for key, tensor in backbone.named_parameters()}
    buffers = {key: torch.empty_like(tensor, device="meta") for key, tensor in backbone.named_buffers()}
    was_training = backbone.training
    try:
        with torch.enable_grad():
            parameters = {key: tensor.requires_grad_() for key, tensor in parameters.items()}
            maps = torch.func.functional_call(backbone.eval(), (parameters, buffers), (images,)).feature_maps
            total = sum(level.sum() for level in maps)
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    finally:
        backbone.train(was_training)
    return TracedBackbone(
        image_size=(size, size),
        map_sizes=[(level.shape[-2], level.shape[-1]) for level in maps],
        unused_parameters=[key for key, gradient in zip(parameters, gradients, strict=True) if gradient is None],
    )


def raise_for_strides(sizes: list[tuple[int, int]], image_size: tuple[int, int], name: str) -> None:
    """Refuse maps whose sizes are not those of strides 4, 8, 16 and 32."""
    expected = [tuple(math.ceil(length / stride) for length in image_size) for stride in FEATURE_STRIDES]
    if sizes != expected and sizes == [tuple(length // stride for length in image_size) for stride in FEATURE_STRIDES]:
        raise ValueError(
            f"Expected images whose height and width are multiples of {FEATURE_STRIDES[-1]}, because `{name}` cuts off the rest, "
            f"got {image_size[0]}x{image_size[1]}. Pad them (the image processor does)."
        )
    if sizes != expected:
        strides = [round(image_size[0] / height) if height else 0 for height, _ in sizes]
        raise ValueError(_strides_message(name, strides))


def _strides_message(name: str, strides: list[int]) -> str:
    return (
        f"Expected a backbone with four maps of strides {', '.join(map(str, FEATURE_STRIDES))}, but `{name}` gives strides "
        f"{', '.join(map(str, strides))}. Choose its outputs (`out_features`, `out_indices`), or another backbone such as ResNet, Swin or "
        "ConvNeXt; a plain ViT has one stride only."
    )


# The pipeline "image-segmentation" warns about classes that are not in this list, although it runs them.
modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES.setdefault("mpformer", "MPFormerForUniversalSegmentation")

__all__ = [
    "MPFormerForUniversalSegmentation",
    "MPFormerForUniversalSegmentationOutput",
    "MPFormerModel",
    "MPFormerModelOutput",
    "MPFormerPreTrainedModel",
]
