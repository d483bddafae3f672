"""Names of the original and ours: complete, the same in both directions, and those that transformers has."""

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig

from conversion import ConversionError
from conversion.key_map import (
    FIRST_CONVOLUTIONS,
    LABEL_EMBEDDING,
    RULES,
    count_kinds,
    flip_input_channels,
    original_name,
    relative_position_index,
    to_original,
    to_ours,
    update_names,
    with_versions,
)
from tests.detectron2_checkpoints import Original, plain_position_index
from tests.parity.golden_cases import load_case, to_our_names

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN = Original(swin=(16, (1, 2, 1, 1), (1, 2, 2, 4), 4))
RESNET = Original(position_embedding=True, label_embedding=False)
ORIGINALS = {
    "resnet": RESNET,
    "swin": SWIN,
    "resnet-101": Original(depth=101, width=8, stem=4),
    "resnet-18": Original(depth=18),
    "sync batch norm": Original(norm="SyncBN"),
    "projection": Original(convs_dim=64),
    "enforced projection": Original(swin=SWIN.swin, enforce_input_projection=True),
}
each_original = pytest.mark.parametrize("name", ORIGINALS)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["a", "b", "c", "d1"])
def test_recorded_checkpoints_are_renamed_as_another_table_does_it(name):
    weights = load_case(name).weights
    assert_same(to_ours(weights).tensors, to_our_names(weights))


@pytest.mark.parametrize("name", ["a", "b", "c", "d1"])
def test_recorded_checkpoints_come_back_bit_for_bit(name):
    weights = load_case(name).weights
    back = to_original(to_ours(weights).tensors, batch_norm_counters=False).tensors
    recomputed = {key: back.pop(key) for key in set(back) - set(weights)}
    assert all(key.endswith("relative_position_index") for key in recomputed)
    assert_same(back, weights)


@each_original
def test_complete_checkpoints_come_back_bit_for_bit(name):
    original = ORIGINALS[name]
    weights = original.weights()
    mapped = to_ours(weights)
    back = to_original(mapped.tensors, batch_norm_counters=original.norm == "SyncBN")
    assert_same(back.tensors, weights)
    assert set(mapped.sources.values()) | set(mapped.ignored) == set(weights)


@each_original
def test_names_and_shapes_are_those_of_transformers(name):
    original = ORIGINALS[name]
    with torch.device("meta"):
        model = transformers_model(original)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    ours = {key: tensor.shape for key, tensor in to_ours(original.weights()).tensors.items()}
    ours.pop(LABEL_EMBEDDING, None)
    only_theirs = {
        key for key in expected if "swin.layernorm." in key or "queries_embedder" in key or "num_batches" in key
    }
    assert {key: expected[key] for key in expected.keys() - (only_theirs - ours.keys())} == ours


def transformers_model(original: Original) -> nn.Module:
    if original.swin:
        embed_dim, depths, heads, window = original.swin
        backbone = SwinConfig(
            embed_dim=embed_dim, depths=list(depths), num_heads=list(heads), window_size=window, out_features=STAGES
        )
    else:
        depths = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[original.depth]
        kind = "basic" if original.depth == 18 else "bottleneck"
        backbone = ResNetConfig(
            embedding_size=original.stem,
            hidden_sizes=original.widths,
            depths=depths,
            layer_type=kind,
            out_features=STAGES,
        )
    fields = ("mask_dim", "hidden_dim", "num_queries", "dim_feedforward", "encoder_layers", "decoder_layers")
    names = {"mask_dim": "mask_feature_size"}
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=original.num_classes,
        feature_size=original.convs_dim,
        encoder_feedforward_dim=1024,
        num_attention_heads=original.num_heads,
        enforce_input_projection=original.enforce_input_projection,
        **{names.get(field, field): getattr(original, field) for field in fields},
    )
    return Mask2FormerForUniversalSegmentation(config)


def test_every_rule_is_needed():
    seen = {key for original in ORIGINALS.values() for key in original.shapes()}
    for template, _ in RULES:
        pattern = re.sub(r"\\\{\w+(\\\+\d+)?\\\}", r"\\w+", re.escape(template))
        assert any(re.fullmatch(pattern, key) for key in seen), template


def test_tensors_are_not_copied():
    weights = SWIN.weights()
    memory = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    assert all(tensor.untyped_storage().data_ptr() in memory for tensor in to_ours(weights).tensors.values())


def test_joined_projections_are_cut_in_query_key_value():
    weight = torch.arange(12.0).reshape(12, 1)
    name = "sem_seg_head.predictor.transformer_self_attention_layers.3.self_attn.in_proj_weight"
    parts = to_ours({name: weight}).tensors
    prefix = "model.transformer_module.decoder.layers.3.self_attn"
    assert_same(parts, {f"{prefix}.{part}_proj.weight": weight[4 * i : 4 * i + 4] for i, part in enumerate("qkv")})
    assert original_name(f"{prefix}.k_proj.weight") == name


@pytest.mark.parametrize("shape", [(), (0,), (4, 4)])
def test_a_joined_projection_of_another_shape_is_refused(shape):
    with pytest.raises(ConversionError, match="query, key and value"):
        to_ours({"backbone.layers.0.blocks.0.attn.qkv.bias": torch.zeros(shape)})


def test_a_missing_part_of_a_joined_projection_is_refused():
    ours = to_ours(RESNET.weights()).tensors
    del ours["model.transformer_module.decoder.layers.0.self_attn.v_proj.bias"]
    with pytest.raises(ConversionError, match=r"layers\.0\.self_attn\.in_proj_bias"):
        to_original(ours, batch_norm_counters=False)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.res2.0.conv1.norm.scale",
        "backbone.res1.0.conv1.weight",
        "backbone.stem.conv1_1.weight",
        "backbone.res02.0.conv1.weight",
        "sem_seg_head.predictor.query_feat.weight.x",
        "proposal_generator.weight",
        "",
    ],
)
def test_unknown_names_are_errors(name):
    with pytest.raises(ConversionError, match="not known"):
        to_ours({name: torch.zeros(3)})


def test_names_of_other_models_are_errors_on_the_way_back():
    with pytest.raises(ConversionError, match=r"encoder\.conv1"):
        to_original({"model.pixel_level_module.encoder.conv1.weight": torch.zeros(3)}, batch_norm_counters=False)


def test_what_can_be_recomputed_is_reported_as_unused():
    ignored = to_ours({"pixel_mean": torch.zeros(3, 1, 1), **SWIN.weights()}).ignored
    assert "pixel_mean" in ignored
    assert count_kinds(ignored)[-1].startswith("5 x backbone.layers.*.blocks.*.attn.relative_position_index")


# ------------------------------------------------------------------------------------------------------------- older names


def test_older_names_become_those_of_today():
    old = {
        "module.sem_seg_head.predictor.static_query.weight": torch.zeros(1),
        "module.sem_seg_head.adapter_1.norm.bias": torch.zeros(2),
        "module.backbone.stem.conv1.weight": torch.zeros(3),
        "sem_seg_head.pixel_decoder.mask_features.bias": torch.zeros(4),
    }
    updated, notes = update_names(old)
    assert list(updated) == [
        "sem_seg_head.predictor.query_feat.weight",
        "sem_seg_head.pixel_decoder.adapter_1.norm.bias",
        "backbone.stem.conv1.weight",
        "sem_seg_head.pixel_decoder.mask_features.bias",
    ]
    assert "3 weights" in notes[0]


def test_names_of_today_stay_without_a_note():
    assert update_names(SWIN.weights())[1] == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("sem_seg_head.predictor.static_query.weight", "sem_seg_head.predictor.query_feat.weight"),
        ("sem_seg_head.mask_features.bias", "sem_seg_head.pixel_decoder.mask_features.bias"),
        ("backbone.norm0.bias", "module.backbone.norm0.bias"),
    ],
)
def test_a_weight_under_its_old_and_its_new_name_is_an_error(first, second):
    for names in ((first, second), (second, first)):
        with pytest.raises(ConversionError, match="twice"):
            update_names(dict.fromkeys(names, torch.zeros(1)))


# ------------------------------------------------------------------------------------------------------ what is made again


@pytest.mark.parametrize("window", [1, 2, 4, 7, 12])
def test_position_indices_are_those_of_a_plain_loop(window):
    table = torch.zeros((2 * window - 1) ** 2, 3)
    index = relative_position_index(table)
    assert index.dtype == torch.int64
    assert torch.equal(index, plain_position_index(window))


def test_counters_of_batch_norms_come_back_only_where_the_original_has_them():
    ours = to_ours(Original(norm="SyncBN").weights()).tensors
    frozen = to_original(ours, batch_norm_counters=False)
    assert frozen.tensors.keys() == Original().shapes().keys()
    assert all(name.endswith("num_batches_tracked") for name in frozen.ignored)
    assert to_original(ours, batch_norm_counters=True).tensors.keys() == Original(norm="SyncBN").shapes().keys()


def test_versions_of_modules_are_those_that_the_original_does_not_upgrade():
    for norm, version in (("FrozenBN", 3), ("SyncBN", 2)):
        state = with_versions(Original(norm=norm).weights())
        versions = {name: entry["version"] for name, entry in state._metadata.items()}
        assert versions["sem_seg_head"] == versions["sem_seg_head.predictor"] == 2
        assert versions["backbone.res3.1.conv2.norm"] == versions["backbone.stem.conv1.norm"] == version
        assert versions[""] == versions["sem_seg_head.pixel_decoder.adapter_1.norm"] == versions["criterion"] == 1
        assert {name.rpartition(".")[0] for name in state} <= set(versions)


def test_flipping_the_input_channels_twice_changes_nothing():
    weights = RESNET.weights()
    flipped = flip_input_channels(weights)
    assert torch.equal(flipped[FIRST_CONVOLUTIONS[0]][:, 2], weights[FIRST_CONVOLUTIONS[0]][:, 0])
    assert_same(flip_input_channels(flipped), weights)
