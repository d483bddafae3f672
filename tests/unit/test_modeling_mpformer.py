"""MPFormerForUniversalSegmentation: the contract of all models, then what mask piloting adds to it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor

from mpformer_hf import MPFormerForUniversalSegmentation, MPFormerImageProcessor, MPFormerModel
from mpformer_hf.configuration_mpformer import FIELDS_FOR_COMPATIBILITY, PILOT_MASK_NOISES
from tests.factories import random_batch, random_images, tiny_backbone_config, tiny_config, tiny_model
from tests.logs import recorded_log
from tests.unit.model_contract import ROUNDING, FieldEffect, ModelContract, predict, run_seeded

FIELD_EFFECTS = {
    "backbone_config": FieldEffect(tiny_backbone_config("convnext"), "graph"),
    "feature_size": FieldEffect(64, "graph"),
    "mask_feature_size": FieldEffect(24, "graph"),
    "hidden_dim": FieldEffect(64, "graph"),
    "encoder_feedforward_dim": FieldEffect(48, "graph"),
    "activation_function": FieldEffect("gelu", "prediction"),
    "encoder_layers": FieldEffect(2, "graph"),
    "decoder_layers": FieldEffect(5, "graph"),
    "num_attention_heads": FieldEffect(2, "graph"),
    "dropout": FieldEffect(0.5, "loss"),
    "dim_feedforward": FieldEffect(48, "graph"),
    "pre_norm": FieldEffect(True, "prediction"),
    "enforce_input_projection": FieldEffect(True, "graph"),
    "common_stride": FieldEffect(8, "error"),
    "num_queries": FieldEffect(7, "graph"),
    "no_object_weight": FieldEffect(0.3, "loss"),
    "class_weight": FieldEffect(3.0, "loss"),
    "mask_weight": FieldEffect(3.0, "loss"),
    "dice_weight": FieldEffect(3.0, "loss"),
    "train_num_points": FieldEffect(48, "loss"),
    "oversample_ratio": FieldEffect(2.0, "loss"),
    "importance_sample_ratio": FieldEffect(0.5, "loss"),
    "init_xavier_std": FieldEffect(2.0, "initial weights"),
    "use_auxiliary_loss": FieldEffect(False, "loss"),
    "feature_strides": FieldEffect((8, 16, 32, 64), "error"),
    "output_auxiliary_logits": FieldEffect(True, "output fields"),
    "freeze_backbone_norm": FieldEffect(False, "trained parameters"),
    "query_position_embedding": FieldEffect(False, "graph"),
    "mask_piloting": FieldEffect(False, "graph"),
    "pilot_groups": FieldEffect(2, "loss"),
    "pilot_query_budget": FieldEffect(6, "loss"),
    "pilot_layers": FieldEffect(1, "loss"),
    "pilot_mask_noise": FieldEffect("shift", "loss"),
    "pilot_mask_noise_ratio": FieldEffect(0.8, "loss"),
    "pilot_label_noise_ratio": FieldEffect(1.0, "loss"),
    "pilot_noise_per_head": FieldEffect(True, "loss"),
    "pilot_label_loss": FieldEffect(False, "loss"),
    "max_nonfinite_steps": FieldEffect(3, "patience", {"max_nonfinite_steps": 2}),
}


class TestContract(ModelContract):
    """The promises that every model makes."""

    model_class, base_class = MPFormerForUniversalSegmentation, MPFormerModel
    make_config = staticmethod(tiny_config)
    field_effects = FIELD_EFFECTS
    fields_without_effect = FIELDS_FOR_COMPATIBILITY


# ------------------------------------------------------------------------------------------------------------- mask piloting


def train_once(model: MPFormerForUniversalSegmentation, batch: dict[str, Any], **keywords: Any) -> Any:
    return run_seeded(model.train(), batch, output_auxiliary_logits=True, **keywords)


def list_pilot_levels(output: Any) -> list[dict[str, Tensor]]:
    """Logits of the pilot slots at all levels."""
    return [
        *output.pilot_auxiliary_logits,
        {
            "masks_queries_logits": output.pilot_masks_queries_logits,
            "class_queries_logits": output.pilot_class_queries_logits,
        },
    ]


def count_flops(model: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        predict(model, images)
    return counter.get_total_flops()


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_evaluation_costs_the_same_with_and_without_piloting(backbone):
    images = random_images(2)
    flops = [count_flops(tiny_model(backbone, mask_piloting=piloting), images) for piloting in (True, False)]
    assert flops[0] == flops[1] > 0


def test_pilots_run_only_in_training_with_labels():
    model, batch = tiny_model(), random_batch([2, 0, 3])
    layouts = {
        "training with labels": predict(model.train().model, **batch).pilot_layout,
        "training without labels": predict(model.train().model, batch["pixel_values"]).pilot_layout,
        "evaluation with labels": predict(model.eval().model, **batch).pilot_layout,
    }
    assert [name for name, layout in layouts.items() if layout is not None] == ["training with labels"]
    assert layouts["training with labels"].num_slots == 3


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_predictions_in_training_equal_those_of_evaluation(backbone):
    model, batch = tiny_model(backbone, pilot_groups=2), random_batch()
    expected = predict(model.eval(), batch["pixel_values"], output_auxiliary_logits=True, output_hidden_states=True)
    output = train_once(model, batch, output_hidden_states=True, output_attentions=True)
    for name in ("class_queries_logits", "masks_queries_logits", "auxiliary_logits"):
        assert_close(output[name], expected[name], **ROUNDING)
    assert_close(output.transformer_decoder_hidden_states, expected.transformer_decoder_hidden_states, **ROUNDING)
    for weights in output.attentions:
        assert weights.shape[-2:] == (model.config.num_queries,) * 2
        assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))


def test_learnable_queries_learn_nothing_about_the_ground_truth():
    model, images = tiny_model(), random_images(3)
    outputs = [
        train_once(model, random_batch(num_segments, seed=seed) | {"pixel_values": images})
        for num_segments, seed in (([2, 0, 3], 1), ([5, 5, 5], 2))
    ]
    assert_close(outputs[0].masks_queries_logits, outputs[1].masks_queries_logits, **ROUNDING)
    assert_close(outputs[0].class_queries_logits, outputs[1].class_queries_logits, **ROUNDING)


def test_pilot_logits_come_only_in_training_with_labels_when_asked_for():
    model, batch = tiny_model(pilot_groups=2), random_batch([2, 0, 3])
    output = train_once(model, batch)
    num_slots = 2 * 3
    assert output.pilot_class_queries_logits.shape == (3, num_slots, 4)
    assert output.pilot_masks_queries_logits.shape == (3, num_slots, 16, 24)
    assert len(output.pilot_auxiliary_logits) == model.config.decoder_layers - 1
    others = {
        "not asked for": run_seeded(model.train(), batch),
        "without labels": predict(model.train(), batch["pixel_values"], output_auxiliary_logits=True),
        "in evaluation": run_seeded(model.eval(), batch, output_auxiliary_logits=True),
        "without piloting": train_once(tiny_model(mask_piloting=False), batch),
        "without segments": train_once(model, random_batch([0, 0])),
    }
    for case, other in others.items():
        assert not [name for name in other if name.startswith("pilot_")], case


def test_evaluation_with_labels_returns_the_matched_loss_alone():
    batch = random_batch()
    with_piloting, without = (run_seeded(tiny_model(mask_piloting=on), batch) for on in (True, False))
    assert not [name for name in with_piloting.loss_dict if "pilot" in name]
    assert with_piloting.loss_dict.keys() == without.loss_dict.keys()


def test_training_has_three_more_terms_a_level_with_piloting():
    names = train_once(tiny_model(), random_batch()).loss_dict.keys()
    suffixes = ["", "_0", "_1", "_2"]
    kinds = [f"{pilot}{kind}" for pilot in ("", "pilot_") for kind in ("cross_entropy", "mask", "dice")]
    assert set(names) == {f"loss_{kind}{suffix}" for kind in kinds for suffix in suffixes}


def test_last_level_alone_is_supervised_without_auxiliary_loss():
    full, last = (
        run_seeded(tiny_model(use_auxiliary_loss=auxiliary).train(), random_batch()).loss_dict
        for auxiliary in (True, False)
    )
    assert last.keys() == {name for name in full if not name[-1].isdigit()}
    assert "loss_pilot_dice" in last


def test_groups_without_noise_predict_the_same():
    model = tiny_model(pilot_groups=3, pilot_mask_noise="none", pilot_label_noise_ratio=0.0)
    for level in list_pilot_levels(train_once(model, random_batch([2, 4]))):
        for logits in level.values():
            first, *others = logits.split(4, dim=1)
            assert len(others) == 2
            for other in others:
                assert_close(other, first, **ROUNDING)


def test_groups_have_noise_of_their_own():
    model = tiny_model(pilot_groups=2, pilot_label_noise_ratio=0.0, pilot_mask_noise_ratio=1.0)
    first, second = train_once(model, random_batch([4, 4])).pilot_masks_queries_logits.split(4, dim=1)
    assert not torch.isclose(first, second, **ROUNDING).all()


def test_content_of_a_pilot_is_the_embedding_of_its_label():
    model = tiny_model(pilot_label_noise_ratio=0.0)
    batch = random_batch([4, 1])
    batch["class_labels"] = [torch.tensor([2, 0, 2, 1]), torch.tensor([2])]
    states = predict(model.train().model, **batch, output_hidden_states=True).level_states[0]
    embedding = model.model.transformer_module.pilot_label_embedder.weight[[2, 0, 2, 1]]
    expected = model.model.transformer_module.decoder.layernorm(embedding)
    assert_close(states[0, :4], expected, **ROUNDING)
    assert_close(states[1, :1], expected[:1], **ROUNDING)
    assert_close(states[1, 1:4], model.model.transformer_module.decoder.layernorm(torch.zeros(3, 32)), **ROUNDING)


def test_later_layers_use_the_pilots_own_masks_when_piloting_is_partial():
    """Equal up to the last piloted layer, different behind it."""
    fields = {"pilot_mask_noise": "none", "pilot_label_noise_ratio": 0.0}
    batch = random_batch([3, 2])
    everywhere, partial = (
        list_pilot_levels(train_once(tiny_model(pilot_layers=layers, **fields), batch)) for layers in (None, 2)
    )
    equal = [
        torch.isclose(ours["masks_queries_logits"], theirs["masks_queries_logits"], **ROUNDING).all().item()
        for ours, theirs in zip(partial, everywhere, strict=True)
    ]
    assert equal == [True, True, True, False]


@pytest.mark.parametrize(
    ("noise", "per_head"), [*((noise, False) for noise in PILOT_MASK_NOISES), ("point", True)], ids=str
)
def test_every_noise_trains_with_finite_losses(noise, per_head):
    model = tiny_model(
        pilot_mask_noise=noise, pilot_noise_per_head=per_head, pilot_groups=2, pilot_mask_noise_ratio=0.9
    ).train()
    output = model(**random_batch())
    output.loss.backward()
    assert all(term.isfinite() for term in output.loss_dict.values())
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.requires_grad)


def test_query_budget_sets_the_number_of_groups():
    slots = {}
    for budget in (3, 7, 12):
        model = tiny_model(pilot_query_budget=budget, pilot_groups=50)
        slots[budget] = train_once(model, random_batch([2, 0, 3])).pilot_class_queries_logits.shape[1]
    assert slots == {3: 3, 7: 6, 12: 12}  # budget // 3 groups of 3 slots


def test_step_beyond_the_budget_is_not_piloted_but_counted_and_reported_once():
    model = tiny_model(pilot_query_budget=2).train()
    ordinary = run_seeded(model, random_batch([2, 1]))
    with recorded_log() as log:
        for _ in range(2):
            output = train_once(model, random_batch([2, 3]))
    assert model.model.transformer_module.steps_without_pilot == 2
    assert len(log) == 1
    assert "3 segments" in log[0]
    assert "pilot_query_budget = 2" in log[0]
    assert output.loss_dict.keys() == ordinary.loss_dict.keys()
    assert all(term == 0 for name, term in output.loss_dict.items() if "pilot" in name)
    assert "pilot_class_queries_logits" not in output


def test_step_without_segments_is_not_beyond_the_budget():
    model = tiny_model(pilot_query_budget=2).train()
    with recorded_log() as log:
        predict(model, **random_batch([0, 0]))
    assert model.model.transformer_module.steps_without_pilot == 0
    assert log == []


def test_steps_beyond_the_budget_reach_every_parameter():
    model = tiny_model(pilot_query_budget=2).train()
    model(**random_batch([2, 3])).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []


def test_without_label_loss_only_its_terms_are_gone():
    batch = random_batch()
    full, reduced = (run_seeded(tiny_model(pilot_label_loss=on).train(), batch).loss_dict for on in (True, False))
    assert reduced.keys() == {name for name in full if "pilot_cross_entropy" not in name}
    assert_close(reduced, {name: full[name] for name in reduced}, **ROUNDING)


def test_steps_without_pilots_have_the_same_terms_without_label_loss():
    model = tiny_model(pilot_label_loss=False).train()
    assert model(**random_batch([0])).loss_dict.keys() == model(**random_batch([2])).loss_dict.keys()


def test_queries_without_position_embedding_train_and_predict():
    model = tiny_model(query_position_embedding=False).train()
    assert not [name for name in model.state_dict() if "queries_embedder" in name]
    model(**random_batch()).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []


def test_position_embedding_of_the_queries_is_used_in_attention_alone():
    with_positions, without = tiny_model(), tiny_model(query_position_embedding=False)
    without.load_state_dict(with_positions.state_dict(), strict=False)
    images = random_images(1)
    states = [predict(model.model, images).level_states for model in (with_positions, without)]
    assert_close(states[0][0], states[1][0])  # before the first layer
    assert not torch.isclose(states[0][1], states[1][1], **ROUNDING).all()


# ------------------------------------------------------------------------------------------------------------ forms of labels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64, torch.float16])
def test_masks_of_any_type_give_the_same_loss(dtype):
    model, batch = tiny_model().train(), random_batch()
    expected = run_seeded(model, batch).loss
    batch["mask_labels"] = [masks.to(dtype) for masks in batch["mask_labels"]]
    assert_close(run_seeded(model, batch).loss, expected, **ROUNDING)


@pytest.mark.parametrize("noise", ["point", "shift", "none"])
def test_mask_of_the_images_own_size_is_the_padded_one(noise):
    model, batch = tiny_model(pilot_mask_noise=noise).train(), random_batch([2, 3])
    pixel_mask = torch.zeros(2, 64, 96, dtype=torch.int64)
    sizes = [(45, 96), (64, 70)]
    for mask, (height, width) in zip(pixel_mask, sizes, strict=True):
        mask[:height, :width] = 1
    own = [masks[:, :height, :width] for masks, (height, width) in zip(batch["mask_labels"], sizes, strict=True)]
    padded = [nn.functional.pad(masks, (0, 96 - masks.shape[2], 0, 64 - masks.shape[1])) for masks in own]
    ours, expected = (
        run_seeded(model, batch | {"mask_labels": masks, "pixel_mask": pixel_mask}) for masks in (own, padded)
    )
    assert_close(ours.loss_dict, expected.loss_dict, **ROUNDING)


# --------------------------------------------------------------------------------------------------------- frozen batch norms


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("backbone", ["resnet", "timm"])
@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
def test_batch_norms_of_the_backbone_stay_frozen_in_training(backbone, loaded, tmp_path):
    model = tiny_model(backbone)
    if loaded:
        model.save_pretrained(tmp_path)
        model = MPFormerForUniversalSegmentation.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}
    assert before
    model.train()
    predict(model, **random_batch())
    assert not any(norm.training for norm in batch_norms(model))
    assert not any(weight.requires_grad for norm in batch_norms(model) for weight in norm.parameters())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_batch_norms_train_when_they_are_not_frozen():
    model = tiny_model(freeze_backbone_norm=False).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}
    model(**random_batch()).loss.backward()
    assert all(norm.training for norm in batch_norms(model))
    assert all(weight.grad is not None for norm in batch_norms(model) for weight in norm.parameters())
    assert not any(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(norm.training for norm in batch_norms(model.eval()))


# ------------------------------------------------------------------------------------------------------------- initialisation


def assert_uniform(weight: Tensor, bound: float) -> None:
    """All within the bound, and spread like a uniform distribution on it: within 5 standard errors of its variance."""
    weight = weight.detach()
    assert weight.abs().max() <= bound
    variance, expected = float((weight**2).mean()), bound**2 / 3
    standard_error = bound**2 * math.sqrt(4 / 45 / weight.numel())  # of the mean square of uniform numbers
    assert abs(variance - expected) < 5 * standard_error


def assert_standard_normal(weight: Tensor) -> None:
    weight, count = weight.detach(), weight.numel()
    assert abs(float(weight.mean())) < 5 / math.sqrt(count)
    assert abs(float(weight.var()) - 1) < 5 * math.sqrt(2 / count)


@pytest.fixture(scope="module")
def wide_model() -> MPFormerForUniversalSegmentation:
    """Wide enough for statistics."""
    return tiny_model(
        hidden_dim=64, feature_size=96, mask_feature_size=48, num_queries=50, num_labels=40, dim_feedforward=80
    )


def test_queries_levels_and_labels_start_as_standard_normal(wide_model):
    transformer = wide_model.model.transformer_module
    assert_standard_normal(transformer.queries_features.weight)
    assert_standard_normal(transformer.queries_embedder.weight)
    assert_standard_normal(transformer.level_embed.weight)
    assert_standard_normal(transformer.pilot_label_embedder.weight)
    assert_standard_normal(wide_model.model.pixel_level_module.decoder.level_embed)


def test_decoder_projections_start_as_xavier(wide_model):
    for layer in wide_model.model.transformer_module.decoder.layers:
        assert_uniform(layer.fc1.weight, math.sqrt(6 / (64 + 80)))
        assert_uniform(layer.fc2.weight, math.sqrt(6 / (64 + 80)))
        # One (3 C, C) matrix in the original.
        assert_uniform(layer.cross_attn.in_proj_weight, math.sqrt(6 / (64 + 3 * 64)))
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            assert_uniform(projection.weight, math.sqrt(6 / (64 + 3 * 64)))
        for attention in (layer.self_attn, layer.cross_attn):
            assert_uniform(attention.out_proj.weight, math.sqrt(6 / (64 + 64)))
            assert not attention.out_proj.bias.any()
        assert not layer.cross_attn.in_proj_bias.any()


def test_mask_head_and_class_head_start_as_plain_linear_layers(wide_model):
    heads = list(wide_model.model.transformer_module.decoder.mask_predictor.modules())
    linear = [module for module in heads if isinstance(module, nn.Linear)] + [wide_model.class_predictor]
    assert len(linear) == 4
    for module in linear:
        bound = 1 / math.sqrt(module.in_features)
        assert_uniform(module.weight, bound)
        assert_uniform(module.bias, bound)


def test_deformable_attention_starts_uniform_on_a_ring(wide_model):
    (layer,) = wide_model.model.pixel_level_module.decoder.encoder.layers
    attention = layer.self_attn
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    assert not attention.attention_weights.bias.any()
    # Four heads look right, down, left and up; point k lies k + 1 cells away, the same on each of three levels.
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    ring = torch.stack([directions * radius for radius in (1, 2, 3, 4)], dim=1)  # (heads, points, 2)
    offsets = attention.sampling_offsets.bias.view(4, 3, 4, 2)
    assert_close(offsets, ring[:, None].expand(4, 3, 4, 2), rtol=0, atol=1e-6)
    assert_uniform(attention.value_proj.weight, math.sqrt(6 / (96 + 96)))
    assert_uniform(attention.output_proj.weight, math.sqrt(6 / (96 + 96)))
    assert not attention.value_proj.bias.any()
    assert_uniform(layer.fc1.weight, math.sqrt(6 / (96 + 32)))
    assert_uniform(layer.fc2.weight, math.sqrt(6 / (96 + 32)))


def test_convolutions_of_the_pixel_decoder_start_as_in_the_original(wide_model):
    decoder = wide_model.model.pixel_level_module.decoder
    for projection, channels in zip(decoder.input_projections, (32, 24, 16), strict=True):
        assert_uniform(projection[0].weight, math.sqrt(6 / (channels + 96)))
        assert not projection[0].bias.any()
    assert_uniform(decoder.layer_1[0].weight, math.sqrt(3 / (96 * 9)))  # Caffe2's Xavier: fan in alone
    assert_uniform(decoder.adapter_1[0].weight, math.sqrt(3 / 8))
    assert_uniform(decoder.mask_projection.weight, math.sqrt(3 / 96))
    assert not decoder.mask_projection.bias.any()
    for projection in wide_model.model.transformer_module.input_projections:
        assert_uniform(projection.weight, math.sqrt(3 / 96))


def test_class_weights_of_the_criterion_are_one_but_for_no_object():
    assert tiny_model(no_object_weight=0.25).criterion.empty_weight.tolist() == [1.0, 1.0, 1.0, 0.25]


# ---------------------------------------------------------------------------------------------------------------------- files


def test_file_with_label_embedding_loads_without_piloting(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with recorded_log() as log:
        loaded = MPFormerForUniversalSegmentation.from_pretrained(tmp_path, mask_piloting=False)
    assert log == []
    assert not [name for name in loaded.state_dict() if "pilot" in name]


def test_file_without_label_embedding_loads_with_a_new_one(tmp_path):
    tiny_model(mask_piloting=False).save_pretrained(tmp_path)
    with recorded_log() as log:
        loaded = MPFormerForUniversalSegmentation.from_pretrained(tmp_path, mask_piloting=True)
    assert log == []
    assert_standard_normal(loaded.model.transformer_module.pilot_label_embedder.weight)


def test_missing_weights_are_initialised_and_others_kept(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = MPFormerForUniversalSegmentation.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert loaded.class_predictor.weight.shape == (6, 32)
    assert_uniform(loaded.class_predictor.weight, 1 / math.sqrt(32))
    assert loaded.criterion.empty_weight.tolist() == [1.0] * 5 + [pytest.approx(0.1)]
    assert_standard_normal(loaded.model.transformer_module.pilot_label_embedder.weight)
    same = [name for name, weight in model.state_dict().items() if torch.equal(loaded.state_dict()[name], weight)]
    changed = set(model.state_dict()) - set(same)
    assert changed == {
        "class_predictor.weight",
        "class_predictor.bias",
        "criterion.empty_weight",
        "model.transformer_module.pilot_label_embedder.weight",
    }


def test_image_processor_is_found_in_the_folder_of_a_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    MPFormerImageProcessor(score_threshold=0.25).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is MPFormerImageProcessor
    assert processor.score_threshold == 0.25


# ----------------------------------------------------------------------------------------------------------- layers


def test_dropout_never_skips_a_layer():
    model, calls = tiny_model(dropout=0.9).train(), []
    for layer in model.model.transformer_module.decoder.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(5):
        predict(model, **random_batch([1]))
    assert len(calls) == 5 * (model.config.decoder_layers - 1)


# ---------------------------------------------------------------------------------------------------- unknown labels


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_ignore_masks_hide_ground_truth_from_the_loss(training: bool):
    """Without pilot slots, whose attention sees it."""
    model, batch = tiny_model(mask_piloting=False).train(training), random_batch([2, 3])
    ignore_masks = [torch.zeros(64, 96, dtype=torch.bool), None]
    ignore_masks[0][10:40, 20:70] = True
    other = batch | {"mask_labels": [batch["mask_labels"][0] ^ ignore_masks[0], batch["mask_labels"][1]]}

    def loss_of(given: dict[str, Any], **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return predict(model, **given, **options).loss

    assert loss_of(batch, ignore_masks=ignore_masks) == loss_of(other, ignore_masks=ignore_masks)
    assert loss_of(batch, ignore_masks=ignore_masks) != loss_of(batch)
    assert loss_of(batch) != loss_of(other)


def test_the_attention_of_pilot_slots_sees_what_ignore_masks_hide():
    model, batch = tiny_model().train(), random_batch([2, 3])
    unknown = [torch.ones(64, 96, dtype=torch.bool)] * 2
    outputs = []
    for options in ({}, {"ignore_masks": unknown}):
        torch.manual_seed(0)
        outputs.append(predict(model, **batch, **options, output_auxiliary_logits=True))
    assert torch.equal(outputs[0].pilot_masks_queries_logits, outputs[1].pilot_masks_queries_logits)
    assert torch.equal(outputs[0].masks_queries_logits, outputs[1].masks_queries_logits)


def test_a_model_has_no_input_embeddings_and_does_not_raise():
    """Accelerate asks each model that it shards."""
    model = tiny_model()
    assert model.get_input_embeddings() is None
    assert model.model.get_input_embeddings() is None
