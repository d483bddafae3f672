"""Any backbone with strides 4, 8, 16 and 32 works, pretrained ones included; others are refused by their strides."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ResNetForImageClassification,
    ResNetModel,
    SwinForImageClassification,
    TimmBackboneConfig,
    ViTConfig,
    VitDetConfig,
    ViTModel,
)

from mpformer_hf import MPFormerForUniversalSegmentation
from tests.factories import (
    BACKBONE_KINDS,
    random_batch,
    random_images,
    tiny_backbone_config,
    tiny_config,
    tiny_model,
)
from tests.unit.model_contract import ROUNDING, predict

PLAIN = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
PLAIN_VITS = {
    "vitdet": (VitDetConfig(**PLAIN, image_size=64, patch_size=16, out_indices=[1, 2, 3, 4]), "16, 16, 16, 16"),
    "dinov2": (Dinov2Config(**PLAIN, image_size=56, patch_size=14, out_indices=[1, 2, 3, 4]), "14, 14, 14, 14"),
    "timm": (TimmBackboneConfig(backbone="test_vit", out_indices=[0, 1]), "16, 16"),
}


def encoder_of(model: MPFormerForUniversalSegmentation) -> nn.Module:
    return model.model.pixel_level_module.encoder


# -------------------------------------------------------------------------------------------------------------- new backbones


@pytest.mark.parametrize(
    ("kind", "size"),
    [(kind, (64, 96)) for kind in BACKBONE_KINDS] + [(kind, (50, 77)) for kind in BACKBONE_KINDS if kind != "convnext"],
    ids=str,
)
def test_backbone_feeds_the_network(kind, size):
    output = predict(tiny_model(kind), random_images(2, size), output_hidden_states=True)
    expected = [tuple(-(-length // stride) for length in size) for stride in (4, 8, 16, 32)]
    assert [tuple(level.shape[-2:]) for level in output.encoder_hidden_states] == expected
    assert output.masks_queries_logits.isfinite().all()


def test_backbone_that_cuts_off_a_rest_refuses_images_that_have_one():
    with pytest.raises(ValueError, match=r"multiples of 32, because `convnext` .*got 50x77"):
        predict(tiny_model("convnext"), random_images(1, (50, 77)))


@pytest.mark.parametrize("kind", BACKBONE_KINDS)
def test_backbone_trains(kind):
    model = tiny_model(kind).train()
    model(**random_batch([1, 2], (64, 64))).loss.backward()
    first = next(weight for weight in encoder_of(model).parameters() if weight.requires_grad)
    assert first.grad.abs().sum() > 0


def test_other_timm_models_work():
    backbone = TimmBackboneConfig(backbone="test_convnext", out_indices=[0, 1, 2, 3])
    assert predict(tiny_model(backbone_config=backbone), random_images(1)).masks_queries_logits.shape[-2:] == (16, 24)


def test_backbone_may_have_other_channels_than_colours():
    backbone = tiny_backbone_config("resnet")
    backbone.num_channels = 1
    images = random_images(1)[:, :1]
    assert predict(tiny_model(backbone_config=backbone), images).masks_queries_logits.shape[-2:] == (16, 24)


def test_last_norm_of_swin_is_not_trained_because_nothing_reads_it():
    frozen = [name for name, weight in tiny_model("swin").named_parameters() if not weight.requires_grad]
    assert [name.split("encoder.")[1] for name in frozen] == ["swin.layernorm.weight", "swin.layernorm.bias"]


# ------------------------------------------------------------------------------------------------------------ wrong backbones


@pytest.mark.parametrize("kind", PLAIN_VITS)
def test_plain_vit_is_refused_with_its_strides(kind):
    backbone, strides = PLAIN_VITS[kind]
    with pytest.raises(
        ValueError, match=rf"strides 4, 8, 16, 32, but `{backbone.model_type}` gives strides {strides}\b"
    ):
        MPFormerForUniversalSegmentation(tiny_config(backbone_config=backbone))


def test_model_that_is_no_backbone_is_refused_with_the_strides():
    with pytest.raises(ValueError, match=r"`vit` cannot be built as a backbone .*strides 4, 8, 16, 32"):
        MPFormerForUniversalSegmentation(tiny_config(backbone_config=ViTConfig(**PLAIN, image_size=64)))


@pytest.mark.parametrize(
    ("stages", "strides"),
    [(["stage2", "stage3", "stage4"], "8, 16, 32"), (["stem", "stage1", "stage2", "stage3"], "4, 4, 8, 16")],
    ids=["three maps", "wrong maps"],
)
def test_backbone_with_other_outputs_is_refused_with_the_way_to_choose_them(stages, strides):
    backbone = tiny_backbone_config("resnet")
    backbone.out_features = stages
    with pytest.raises(ValueError, match=rf"gives strides {strides}\b.*`out_features`"):
        MPFormerForUniversalSegmentation(tiny_config(backbone_config=backbone))


def test_timm_model_without_chosen_outputs_is_refused():
    with pytest.raises(ValueError, match=r"gives strides 32\b.*`out_indices`"):
        MPFormerForUniversalSegmentation(tiny_config(backbone_config=TimmBackboneConfig(backbone="test_resnet")))


# ------------------------------------------------------------------------------------------------------- pretrained backbones


def save_with_random_weights(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Save a model none of whose weights could be the result of an initialisation."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    model.save_pretrained(folder)
    return model.state_dict()


@pytest.mark.parametrize(
    ("model_class", "kind", "without_counterpart"),
    [
        (ResNetModel, "resnet", ""),
        (ResNetForImageClassification, "resnet", "classifier."),
        (SwinForImageClassification, "swin", "classifier."),
        (ConvNextModel, "convnext", "layernorm."),
    ],
)
def test_weights_of_a_transformers_folder_are_taken_over(model_class, kind, without_counterpart, tmp_path):
    pretrained = save_with_random_weights(model_class(tiny_backbone_config(kind)), tmp_path)
    model = MPFormerForUniversalSegmentation.from_backbone(tmp_path.as_posix(), tiny_config())
    ours = encoder_of(model).state_dict()
    by_short_name = {name.removeprefix("resnet.").removeprefix("swin."): weight for name, weight in ours.items()}
    compared = 0
    for name, weight in pretrained.items():
        short = name.removeprefix("resnet.").removeprefix("swin.")
        if without_counterpart and short.startswith(without_counterpart):
            continue
        assert torch.equal(by_short_name[short], weight), name
        compared += 1
    assert compared > 20
    added = {name for name in ours if "hidden_states_norms" in name}
    assert len(ours) == compared + len(added)
    for name in added:  # of Swin and ConvNeXt: norms of the outputs, which no pretrained model has
        assert torch.equal(ours[name], torch.full_like(ours[name], float(name.endswith("weight"))))


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("resnet")
    save_with_random_weights(ResNetModel(tiny_backbone_config("resnet")), folder)
    return folder.as_posix()


def test_rest_of_the_model_is_initialised_as_ever(resnet_folder):
    model = MPFormerForUniversalSegmentation.from_backbone(resnet_folder, tiny_config(num_queries=50))
    queries = model.model.transformer_module.queries_features.weight.detach()
    assert abs(float(queries.std()) - 1) < 0.1
    assert not model.model.pixel_level_module.decoder.encoder.layers[0].self_attn.attention_weights.weight.any()


def test_batch_norms_of_a_pretrained_backbone_are_frozen(resnet_folder):
    model = MPFormerForUniversalSegmentation.from_backbone(resnet_folder, tiny_config()).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training or norm.weight.requires_grad or norm.bias.requires_grad for norm in norms)


def test_given_config_keeps_its_fields_and_single_fields_win(resnet_folder):
    config = tiny_config("swin", num_queries=9, pilot_groups=3, id2label={0: "cat", 1: "dog"})
    before = config.to_dict()
    model = MPFormerForUniversalSegmentation.from_backbone(resnet_folder, config, pilot_groups=5)
    assert (model.config.num_queries, model.config.pilot_groups) == (9, 5)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.config.backbone_config.model_type == "resnet"
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("classes", "names"),
    [({"num_labels": 2}, ["LABEL_0", "LABEL_1"]), ({"id2label": {0: "cat", 1: "dog"}}, ["cat", "dog"])],
    ids=["number", "names"],
)
def test_new_classes_replace_those_of_the_config(classes, names, resnet_folder):
    model = MPFormerForUniversalSegmentation.from_backbone(resnet_folder, tiny_config(num_labels=4), **classes)
    assert list(model.config.id2label.values()) == names
    assert model.config.label2id == {name: index for index, name in enumerate(names)}
    assert model.class_predictor.out_features == 3


def test_fields_alone_make_a_model(resnet_folder):
    small = {name: getattr(tiny_config(), name) for name in ("feature_size", "hidden_dim", "mask_feature_size")}
    model = MPFormerForUniversalSegmentation.from_backbone(
        resnet_folder, **small, num_labels=5, encoder_layers=1, decoder_layers=2, num_attention_heads=4
    )
    assert model.config.num_labels == 5
    assert predict(model.eval(), random_images(1)).class_queries_logits.shape == (1, 100, 6)


def test_model_with_a_pretrained_backbone_is_saved_and_loaded_without_it(resnet_folder, tmp_path):
    shutil.copytree(resnet_folder, tmp_path / "pretrained")
    model = MPFormerForUniversalSegmentation.from_backbone(f"{tmp_path}/pretrained", tiny_config()).eval()
    model.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "pretrained")
    loaded, images = MPFormerForUniversalSegmentation.from_pretrained(tmp_path), random_images(1)
    assert torch.equal(predict(loaded, images).masks_queries_logits, predict(model, images).masks_queries_logits)


def save_timm_model(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Save a timm model as its own hub format has it; the name `local-dir:` and the folder loads it."""
    model = timm.create_model(name, num_classes=5)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    (folder / "config.json").write_text(
        json.dumps({"architecture": name, "num_classes": 5, "pretrained_cfg": {"num_classes": 5, "classifier": "fc"}})
    )
    save_file(model.state_dict(), folder / "model.safetensors")
    return model.state_dict()


def test_weights_of_a_timm_model_are_taken_over(tmp_path):
    pretrained = save_timm_model("test_resnet", tmp_path)
    model = MPFormerForUniversalSegmentation.from_backbone(f"timm:local-dir:{tmp_path}", tiny_config())
    ours = {name.removeprefix("_backbone."): weight for name, weight in encoder_of(model).state_dict().items()}
    assert set(pretrained) - set(ours) == {"fc.weight", "fc.bias"}
    assert set(ours) <= set(pretrained)
    for name, weight in ours.items():
        assert torch.equal(weight, pretrained[name]), name


def test_timm_outputs_are_chosen_by_their_strides(tmp_path):
    save_timm_model("test_resnet", tmp_path)  # its first output has stride 2
    model = MPFormerForUniversalSegmentation.from_backbone(f"timm:local-dir:{tmp_path}", tiny_config()).eval()
    maps = predict(model, random_images(1, (64, 64)), output_hidden_states=True).encoder_hidden_states
    assert [level.shape[-1] for level in maps] == [16, 8, 4, 2]


def test_features_of_a_pretrained_timm_backbone_are_those_of_timm(tmp_path):
    save_timm_model("test_resnet", tmp_path)
    model = MPFormerForUniversalSegmentation.from_backbone(f"timm:local-dir:{tmp_path}", tiny_config()).eval()
    reference = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    images = 0.01 * random_images(1)
    maps = predict(model, images, output_hidden_states=True).encoder_hidden_states
    with torch.no_grad():
        expected = reference(images)[1:]
    assert_close(list(maps), expected, **ROUNDING)


def test_pretrained_timm_vit_is_refused_with_its_strides():
    with pytest.raises(ValueError, match=r"`timm:test_vit` gives strides 16"):
        MPFormerForUniversalSegmentation.from_backbone("timm:test_vit", tiny_config())


@pytest.mark.parametrize(
    ("model", "strides"),
    [
        (Dinov2Model(PLAIN_VITS["dinov2"][0]), "gives strides 14, 14, 14, 14"),
        (ViTModel(ViTConfig(**PLAIN, intermediate_size=16, image_size=64)), r"maps of strides \(4, 8, 16, 32\)"),
    ],
    ids=["dinov2", "vit"],
)
def test_pretrained_plain_vit_is_refused_with_the_strides(model, strides, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=strides):
        MPFormerForUniversalSegmentation.from_backbone(tmp_path.as_posix(), tiny_config())


def test_folder_that_lacks_weights_is_refused(resnet_folder, tmp_path):
    weights = load_file(Path(resnet_folder, "model.safetensors"))
    (tmp_path / "config.json").write_text(Path(resnet_folder, "config.json").read_text())
    kept = {name: weight for name, weight in weights.items() if "stages.2" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a resnet backbone.*stages\.2"):
        MPFormerForUniversalSegmentation.from_backbone(tmp_path.as_posix(), tiny_config())
