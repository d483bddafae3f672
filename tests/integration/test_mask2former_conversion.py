"""transformers' Mask2Former becomes a MP-Former with the same weights, and the other way round."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from conversion.convert_mask2former import main
from mpformer_hf import MPFormerForUniversalSegmentation, MPFormerImageProcessor
from tests.factories import random_images, tiny_backbone_config, tiny_model
from tests.parity.golden_cases import LABEL_EMBEDDING, POSITION_EMBEDDING

FIELDS = {
    "feature_size": 32,
    "mask_feature_size": 16,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 24,
    "dim_feedforward": 40,
    "encoder_layers": 1,
    "decoder_layers": 4,
    "num_attention_heads": 4,
    "num_queries": 6,
    "class_weight": 3.0,
    "id2label": {0: "cat", 1: "dog", 2: "sky"},
    "label2id": {"cat": 0, "dog": 1, "sky": 2},
}


@pytest.fixture(params=["swin", "resnet"])
def theirs(request, tmp_path) -> Path:
    config = Mask2FormerConfig(backbone_config=tiny_backbone_config(request.param), **FIELDS)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "theirs")
    Mask2FormerImageProcessor(size={"shortest_edge": 96, "longest_edge": 128}).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_all_weights_are_kept_and_the_label_embedding_is_new(theirs, tmp_path, capsys):
    assert main([str(theirs), "--output-dir", str(tmp_path / "ours")]) == 0
    assert f"`{LABEL_EMBEDDING}` begins fresh" in capsys.readouterr().out
    original = Mask2FormerForUniversalSegmentation.from_pretrained(theirs).eval()
    model, report = MPFormerForUniversalSegmentation.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    weights = weights_of(model)
    assert weights.pop(LABEL_EMBEDDING).shape == (3, 32)
    assert_same(weights, weights_of(original))
    assert model.config.mask_piloting
    assert (model.config.class_weight, model.config.id2label) == (3.0, FIELDS["id2label"])
    assert MPFormerImageProcessor.from_pretrained(tmp_path / "ours").size["shortest_edge"] == 96


def test_there_and_back_gives_the_same_folder(theirs, tmp_path):
    assert main([str(theirs), "--output-dir", str(tmp_path / "ours")]) == 0
    assert main([str(tmp_path / "ours"), "--to-mask2former", "--output-dir", str(tmp_path / "back")]) == 0
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), load_file(theirs / "model.safetensors"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "back")]
    for config in configs:
        config["backbone_config"].pop("dtype")  # unset in a model that was never loaded
    assert configs[0] == configs[1]
    processors = [(folder / "preprocessor_config.json").read_text() for folder in (theirs, tmp_path / "back")]
    assert processors[0] == processors[1]


def test_the_fresh_label_embedding_is_always_the_same(theirs, tmp_path):
    embeddings = []
    for name in ("first", "second"):
        assert main([str(theirs), "--output-dir", str(tmp_path / name)]) == 0
        embeddings.append(load_file(tmp_path / name / "model.safetensors")[LABEL_EMBEDDING])
    assert torch.equal(*embeddings)
    assert embeddings[0].std() > 0.5


def test_a_model_without_position_embedding_needs_zeros_that_are_asked_for(tmp_path, capsys):
    model = tiny_model(query_position_embedding=False)
    model.save_pretrained(tmp_path / "ours")
    arguments = [str(tmp_path / "ours"), "--to-mask2former", "--output-dir", str(tmp_path / "out" / "theirs")]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "query_position_embedding=False" in message
    assert "--zero-position-embedding" in message
    assert not (tmp_path / "out").exists()

    assert main([*arguments, "--zero-position-embedding"]) == 0
    converted = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out" / "theirs").eval()
    assert not converted.get_parameter(POSITION_EMBEDDING).any()
    images = random_images()
    with torch.no_grad():
        found, expected = converted(images), model(images)
    torch.testing.assert_close(found.class_queries_logits, expected.class_queries_logits)
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits)


def test_a_folder_without_image_processor_gives_one_without(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "ours")
    assert main([str(tmp_path / "ours"), "--to-mask2former", "--output-dir", str(tmp_path / "theirs")]) == 0
    assert "no image processor" in capsys.readouterr().out
    assert not (tmp_path / "theirs" / "preprocessor_config.json").exists()


def test_incomplete_and_other_models_are_refused(theirs, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "ours")
    output = ["--output-dir", str(tmp_path / "out" / "converted")]
    assert main([str(tmp_path / "nothing"), *output]) == 1
    assert "cannot be loaded" in capsys.readouterr().err
    (theirs / "model.safetensors").write_bytes((theirs / "model.safetensors").read_bytes()[:-100])
    assert main([str(theirs), *output]) == 1
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
