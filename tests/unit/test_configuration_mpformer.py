"""MPFormerConfig: what it shares with transformers' Mask2Former, what it refuses, and what it saves."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, Mask2FormerConfig, PreTrainedConfig, ResNetConfig

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation
from mpformer_hf.configuration_mpformer import FIELDS_FOR_COMPATIBILITY, edit_distance_at_most_two
from tests.factories import tiny_backbone_config, tiny_config, tiny_model
from tests.logs import recorded_log

OWN_FIELDS = {
    "freeze_backbone_norm": True,
    "query_position_embedding": True,
    "mask_piloting": True,
    "pilot_groups": 1,
    "pilot_query_budget": None,
    "pilot_layers": None,
    "pilot_mask_noise": "point",
    "pilot_mask_noise_ratio": 0.2,
    "pilot_label_noise_ratio": 0.2,
    "pilot_noise_per_head": False,
    "pilot_label_loss": True,
    "max_nonfinite_steps": 20,
}
INHERITED = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def declared_fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Fields of a config class that are not of every config, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(config_class) if field.name not in INHERITED}


# ------------------------------------------------------------------------------------------------------------------- defaults


def test_fields_and_defaults_are_those_of_mask2former_and_our_own():
    assert declared_fields(MPFormerConfig) == declared_fields(Mask2FormerConfig) | OWN_FIELDS


def test_every_field_is_documented():
    documented = inspect.getdoc(MPFormerConfig)
    names = {
        name for line in re.findall(r"^    ([a-z_, 0-9]+):", documented, re.MULTILINE) for name in line.split(", ")
    }
    assert declared_fields(MPFormerConfig).keys() <= names


def test_fields_without_effect_say_so():
    documented = inspect.getdoc(MPFormerConfig)
    for name in FIELDS_FOR_COMPATIBILITY:
        assert re.search(rf"^    {name}: .*without effect", documented, re.MULTILINE), name


def test_default_backbone_is_that_of_mask2former():
    ours, theirs = (config.backbone_config.to_dict() for config in (MPFormerConfig(), Mask2FormerConfig()))
    assert ours == theirs


def test_backbone_may_be_a_dictionary():
    config = tiny_config(backbone_config=tiny_backbone_config("resnet").to_dict())
    assert isinstance(config.backbone_config, ResNetConfig)
    assert config.backbone_config.hidden_sizes == [8, 16, 24, 32]


def test_other_names_of_transformers_work():
    config = tiny_config()
    assert (config.hidden_size, config.num_hidden_layers) == (32, 4)
    assert tiny_config(hidden_size=64).hidden_dim == 64


# --------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "expected", "came"),
    [
        ({"feature_size": 48}, "multiple of 32", "48"),
        ({"feature_size": 32, "hidden_dim": 36, "num_attention_heads": 12}, "multiple of 12", "32"),
        ({"hidden_dim": 34, "num_attention_heads": 2}, "multiple of 4", "34"),
        ({"num_attention_heads": 5}, "multiple of 5", "32"),
        ({"num_attention_heads": 0}, "multiple of 0", "32"),
        ({"hidden_dim": 0}, "positive multiple", "0"),
        ({"decoder_layers": 1}, "at least 2", "1"),
        ({"encoder_layers": -1}, "at least 0", "-1"),
        ({"num_queries": 0}, "at least 1", "0"),
        ({"mask_feature_size": 0}, "at least 1", "0"),
        ({"train_num_points": 0}, "at least 1", "0"),
        ({"oversample_ratio": 0.5}, "at least 1", "0.5"),
        ({"importance_sample_ratio": 1.5}, "[0, 1]", "1.5"),
        ({"dropout": -0.1}, "[0, 1", "-0.1"),
        ({"no_object_weight": -1.0}, "at least 0", "-1.0"),
        ({"class_weight": float("nan")}, "at least 0", "nan"),
        ({"activation_function": "relux"}, "relu", "'relux'"),
        ({"common_stride": 8}, "common_stride 4", "8"),
        ({"feature_strides": [8, 16, 32, 64]}, "(4, 8, 16, 32)", "(8, 16, 32, 64)"),
        ({"pilot_groups": 0}, "at least 1", "0"),
        ({"pilot_query_budget": 0}, "at least 1, or None", "0"),
        ({"pilot_layers": 0}, "from 1 to decoder_layers - 1 = 3", "0"),
        ({"pilot_layers": 4}, "from 1 to decoder_layers - 1 = 3", "4"),
        ({"pilot_mask_noise": "patch"}, "'point', 'shift', 'scale', 'shift_scale', 'none'", "'patch'"),
        ({"pilot_mask_noise_ratio": 1.2}, "[0, 1]", "1.2"),
        ({"pilot_label_noise_ratio": -0.2}, "[0, 1]", "-0.2"),
        ({"pilot_noise_per_head": True, "pilot_mask_noise": "shift"}, "pilot_mask_noise='point'", "'shift'"),
        ({"max_nonfinite_steps": 0}, "at least 1", "0"),
    ],
    ids=str,
)
def test_value_that_cannot_work_is_refused_with_what_was_expected_and_what_came(fields, expected, came):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the message is looked at below
        tiny_config(**fields)
    message = str(refusal.value)
    assert expected in message
    assert came in message
    assert any(name in message for name in fields)


@pytest.mark.parametrize("fields", [{"num_queries": "6"}, {"mask_piloting": 1}, {"pilot_mask_noise": None}], ids=str)
def test_value_of_a_wrong_type_is_refused(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        tiny_config(**fields)


def test_config_that_was_changed_into_nonsense_makes_no_model():
    config = tiny_config()
    config.pilot_layers = 9
    with pytest.raises(ValueError, match="pilot_layers"):
        MPFormerForUniversalSegmentation(config)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("num_querys", "num_queries"),
        ("pilot_group", "pilot_groups"),
        ("mask_pilotting", "mask_piloting"),
        ("freeze_backbone_norms", "freeze_backbone_norm"),
        ("no_object_wieght", "no_object_weight"),
    ],
)
def test_misspelt_field_is_refused_with_a_suggestion(misspelt, meant):
    with pytest.raises(ValueError, match=rf"no field `{misspelt}`.*Did you mean `{meant}`"):
        tiny_config(**{misspelt: 1})


def test_unknown_pilot_field_is_refused_with_a_list():
    with pytest.raises(ValueError, match=r"no field `pilot_everything`.*pilot_groups.*pilot_mask_noise_ratio"):
        tiny_config(pilot_everything=1)


def test_names_that_are_not_alike_are_kept_as_every_config_of_transformers_does():
    assert tiny_config(owner="me").owner == "me"


@pytest.mark.parametrize(
    ("first", "second", "near"),
    [
        ("abc", "abc", True),
        ("abc", "abxd", True),
        ("abc", "bc", True),
        ("abc", "acb", True),  # two substitutions
        ("abcd", "dcba", False),
        ("abc", "abcdef", False),
        ("", "ab", True),
        ("", "abc", False),
    ],
)
def test_edit_distance(first, second, near):
    assert edit_distance_at_most_two(first, second) is near
    assert edit_distance_at_most_two(second, first) is near


@pytest.mark.parametrize(
    "arguments",
    [
        {"backbone": "resnet18"},
        {"backbone": "microsoft/resnet-18", "use_pretrained_backbone": True},
        {"use_pretrained_backbone": True, "use_timm_backbone": True},
        {"backbone_kwargs": {"out_indices": [1, 2, 3, 4]}},
    ],
    ids=str,
)
def test_transformers_arguments_for_pretrained_backbones_are_refused_and_the_way_named(arguments):
    with pytest.raises(ValueError, match="from_backbone"):
        MPFormerConfig(**arguments)


def test_empty_values_of_those_arguments_are_accepted():
    config = MPFormerConfig(backbone=None, use_pretrained_backbone=False, use_timm_backbone=False, backbone_kwargs={})
    assert not {"backbone", "use_pretrained_backbone", "use_timm_backbone", "backbone_kwargs"} & config.to_dict().keys()


# --------------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("backbone", ["resnet", "swin", "convnext", "timm"])
def test_config_survives_saving_and_loading(backbone, tmp_path):
    config = tiny_config(
        backbone, pilot_groups=3, pilot_layers=2, pilot_mask_noise="scale", no_object_weight=0.3, pilot_query_budget=50
    )
    config.save_pretrained(tmp_path)
    with recorded_log() as log:
        loaded, found = MPFormerConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert log == []
    assert loaded.to_diff_dict() == found.to_diff_dict() == MPFormerConfig(**config.to_dict()).to_diff_dict()
    for name in declared_fields(MPFormerConfig).keys() - {"backbone_config", "feature_strides"}:
        assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.backbone_config.to_dict() == config.backbone_config.to_dict()


def test_fields_can_be_changed_while_loading(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert MPFormerConfig.from_pretrained(tmp_path, pilot_groups=4).pilot_groups == 4


def test_bad_field_given_while_loading_is_refused_by_the_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pilot_groups"):
        MPFormerForUniversalSegmentation.from_pretrained(tmp_path, pilot_groups=0)
    with pytest.raises(TypeError, match="pilot_group"):
        MPFormerForUniversalSegmentation.from_pretrained(tmp_path, pilot_group=2)


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_label_names_are_always_saved(num_labels, tmp_path):
    tiny_model(num_labels=num_labels).save_pretrained(tmp_path)
    saved = json.loads(Path(tmp_path, "config.json").read_text())
    assert saved["id2label"] == {str(index): f"LABEL_{index}" for index in range(num_labels)}
    assert saved["label2id"] == {f"LABEL_{index}": index for index in range(num_labels)}


def test_label_names_of_the_user_are_saved_both_ways(tmp_path):
    tiny_config(id2label={0: "cat", 1: "dog"}).save_pretrained(tmp_path)
    saved = json.loads(Path(tmp_path, "config.json").read_text())
    assert saved["id2label"] == {"0": "cat", "1": "dog"}
    assert saved["label2id"] == {"cat": 0, "dog": 1}
    loaded = MPFormerConfig.from_pretrained(tmp_path)
    assert loaded.id2label == {0: "cat", 1: "dog"}
    assert loaded.num_labels == loaded.count_labels() == 2


def test_config_file_as_mask2former_releases_have_it_is_read(tmp_path):
    """With the keys of older versions: a misspelt one of transformers' converter, old names, empty values."""
    backbone = tiny_backbone_config("swin").to_dict()
    file = {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "activation_function": "relu",
        "backbone_config": backbone,
        "class_weight": 2.0,
        "common_stride": 4,
        "decoder_layers": 10,
        "enforce_input_proj": False,
        "enforce_input_projection": False,
        "feature_size": 256,
        "feature_strides": [4, 8, 16, 32],
        "hidden_dim": 256,
        "id2label": {"0": "person", "1": "bicycle", "2": "car"},
        "label2id": {"person": 0, "bicycle": 1, "car": 2},
        "init_std": 0.02,
        "model_type": "mask2former",
        "num_attention_heads": 8,
        "num_hidden_layers": 10,
        "num_queries": 200,
        "output_auxiliary_logits": None,
        "torch_dtype": "float32",
        "transformers_version": "4.26.0.dev0",
        "use_pretrained_backbone": False,
    }
    Path(tmp_path, "config.json").write_text(json.dumps(file))
    with recorded_log() as log:
        config = MPFormerConfig.from_pretrained(tmp_path)
    assert log == []
    assert (config.model_type, config.num_queries, config.decoder_layers) == ("mpformer", 200, 10)
    assert config.id2label == {0: "person", 1: "bicycle", 2: "car"}
    assert config.backbone_config.embed_dim == 8
    assert config.mask_piloting is True


def test_two_configs_share_no_backbone_config():
    first, second = MPFormerConfig(), MPFormerConfig()
    assert first.backbone_config is not second.backbone_config
