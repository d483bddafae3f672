"""What `save_pretrained` writes: all that another machine needs, and nothing that points to this one."""

import ast
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageSegmentation,
    ResNetModel,
    TimmBackboneConfig,
    Trainer,
    TrainingArguments,
)

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation, MPFormerImageProcessor, MPFormerModel
from mpformer_hf.configuration_mpformer import AUTO_MAP
from mpformer_hf.model_card import card_for_model, is_by_a_person
from tests.factories import random_images, tiny_backbone_config, tiny_config, tiny_model
from tests.logs import recorded_log
from tests.unit.test_hub_closure import PACKAGE, closure_of

ENTRIES = ("configuration_mpformer", "image_processing_mpformer", "modeling_mpformer")
CODE = {file.name for entry in ENTRIES for file in closure_of(PACKAGE / f"{entry}.py")}


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def written_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def save_timm_model(name: str, folder: Path, **arguments: object) -> None:
    """A folder that timm loads as `local-dir:`; the arguments stand in its config, as timm writes them."""
    folder.mkdir()
    architecture = {"architecture": name, "model_args": arguments, "pretrained_cfg": {"classifier": "fc"}}
    (folder / "config.json").write_text(json.dumps(architecture))
    save_file(timm.create_model(name, **arguments).state_dict(), folder / "model.safetensors")


@pytest.mark.parametrize(("auto_class", "reference"), AUTO_MAP.items())
def test_every_class_for_strangers_is_in_the_file_that_is_named(auto_class: str, reference: str) -> None:
    module, name = reference.split(".")
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}, auto_class


@pytest.mark.parametrize(
    "part", [tiny_config, MPFormerImageProcessor, tiny_model], ids=["config", "processor", "model"]
)
def test_every_part_is_saved_with_all_of_the_code(part, tmp_path: Path) -> None:
    part().save_pretrained(tmp_path)
    own = {
        "tiny_config": {"config.json"},
        "MPFormerImageProcessor": {"preprocessor_config.json"},
        "tiny_model": {"config.json", "model.safetensors"},
    }[part.__name__]
    assert names_in(tmp_path) == CODE | own
    for name in CODE:
        assert (tmp_path / name).read_bytes() == (PACKAGE / name).read_bytes()


def test_with_the_package_its_own_classes_are_taken_even_with_trust_in_the_folder_s_code(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    MPFormerImageProcessor().save_pretrained(tmp_path)
    with recorded_log() as log:
        model = AutoModelForImageSegmentation.from_pretrained(tmp_path, trust_remote_code=True)
        processor = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert log == []
    assert type(model) is MPFormerForUniversalSegmentation
    assert type(processor) is MPFormerImageProcessor


def test_a_checkpoint_of_the_trainer_is_complete(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    Trainer(tiny_model(), arguments, processing_class=MPFormerImageProcessor()).save_model(str(tmp_path / "saved"))
    assert names_in(tmp_path / "saved") >= CODE | {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert written_config(tmp_path / "saved")["auto_map"] == AUTO_MAP


def test_an_adapter_is_saved_without_code(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(target_modules=["value_proj"]))
    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == {"adapter_config.json", "adapter_model.safetensors"}


def import_file(file: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("a_copy", file)
    assert specification is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_who_has_loaded_only_a_part_of_the_code_saves_that_part(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for file in closure_of(PACKAGE / "image_processing_mpformer.py"):
        shutil.copy(file, source)
    import_file(source / "configuration_mpformer.py").copy_code(target)
    assert names_in(target) == names_in(source) - {"__pycache__"}


def test_references_to_the_code_of_another_repository_are_not_saved(tmp_path: Path) -> None:
    config = tiny_config()
    config.auto_map = {name: f"somewhere/else--{reference}" for name, reference in AUTO_MAP.items()}
    config.save_pretrained(tmp_path)
    assert written_config(tmp_path)["auto_map"] == AUTO_MAP


def test_classes_that_others_register_are_saved(tmp_path: Path) -> None:
    config = tiny_config()
    config.auto_map = {"AutoModelForSemanticSegmentation": "theirs.Theirs"}
    config.save_pretrained(tmp_path)
    assert written_config(tmp_path)["auto_map"] == {**AUTO_MAP, "AutoModelForSemanticSegmentation": "theirs.Theirs"}


def test_a_config_is_the_same_after_its_dictionary() -> None:
    config = tiny_config(pilot_groups=2)
    again = MPFormerConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.to_diff_dict() == config.to_diff_dict()


def test_no_folder_of_this_machine_is_named(tmp_path: Path) -> None:
    ResNetModel(tiny_backbone_config()).save_pretrained(tmp_path / "pretrained")
    model = MPFormerForUniversalSegmentation.from_backbone(str(tmp_path / "pretrained"), tiny_config())
    model.save_pretrained(tmp_path / "first")
    MPFormerImageProcessor().save_pretrained(tmp_path / "first")
    loaded = MPFormerForUniversalSegmentation.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    MPFormerImageProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for file in sorted(tmp_path.glob("*/*config.json")):
        assert str(tmp_path) not in file.read_text(), file
    assert "_name_or_path" not in json.dumps([model.config.to_dict(), loaded.config.to_dict()])


def test_a_timm_backbone_from_a_folder_is_loaded_without_that_folder(tmp_path: Path) -> None:
    save_timm_model("test_resnet", tmp_path / "timm")
    model = MPFormerForUniversalSegmentation.from_backbone(f"timm:local-dir:{tmp_path}/timm", tiny_config()).eval()
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "timm")
    assert written_config(tmp_path / "saved")["backbone_config"]["backbone"] == "test_resnet"
    loaded = MPFormerForUniversalSegmentation.from_pretrained(tmp_path / "saved")
    images = random_images(1)
    with torch.no_grad():
        assert torch.equal(loaded(images).masks_queries_logits, model(images).masks_queries_logits)


def test_a_timm_folder_in_a_config_is_replaced_by_its_architecture(tmp_path: Path) -> None:
    save_timm_model("test_resnet", tmp_path / "timm")
    backbone = TimmBackboneConfig(backbone=f"local-dir:{tmp_path}/timm", out_indices=[1, 2, 3, 4])
    model = MPFormerForUniversalSegmentation(tiny_config(backbone_config=backbone))
    assert model.config.backbone_config.backbone == "test_resnet"


@pytest.mark.parametrize("arguments", [{"act_layer": "silu"}, {"stem_width": 24}], ids=["layers", "widths"])
def test_a_timm_folder_whose_network_its_architecture_does_not_describe_is_refused(arguments, tmp_path: Path) -> None:
    save_timm_model("test_resnet", tmp_path / "timm", **arguments)
    with pytest.raises(ValueError, match=r"timm test_resnet with arguments of its own"):
        MPFormerForUniversalSegmentation.from_backbone(f"timm:local-dir:{tmp_path}/timm", tiny_config())


# ---------------------------------------------------------------------------------------------------- the card of a push

DEFAULT_CARD = (
    "---\nlibrary_name: transformers\ntags: {tags}\n---\n\nThis model card has been automatically generated.\n"
)


def card_after_push(folder: Path, before: str, *, repository_has_card: bool) -> str:
    """README.md of a folder that is about to be uploaded; `before` is what transformers has put there."""
    (folder / "README.md").write_text(before)
    tiny_model().write_card(folder, "someone/crabs", repository_has_card)
    return (folder / "README.md").read_text()


def test_a_push_to_a_repository_without_a_card_has_the_package_s(tmp_path: Path) -> None:
    card = card_after_push(tmp_path, DEFAULT_CARD.format(tags=[]), repository_has_card=False)
    assert card == card_for_model(tiny_model(), name="crabs")
    assert '"OWNER/crabs"' in card
    assert not is_by_a_person(card)


def test_tags_of_a_push_stay(tmp_path: Path) -> None:
    card = card_after_push(tmp_path, DEFAULT_CARD.format(tags=["crabs", "vision"]), repository_has_card=False)
    tags = ModelCard(card_for_model(tiny_model())).data.tags
    assert "vision" in tags
    assert ModelCard(card).data.tags == [*tags, "crabs"]
    assert not is_by_a_person(card)


def test_a_person_s_card_stays(tmp_path: Path) -> None:
    card = "---\nlicense: mit\n---\n\n# My crabs\n"
    assert card_after_push(tmp_path, card, repository_has_card=True) == card


def test_an_earlier_card_of_the_package_is_replaced(tmp_path: Path) -> None:
    earlier = card_for_model(tiny_model(num_queries=3))
    card = card_after_push(tmp_path, earlier, repository_has_card=True)
    assert card == card_for_model(tiny_model(), name="crabs") != earlier


def test_a_model_without_class_head_has_no_card_of_the_package() -> None:
    assert MPFormerModel.write_card is None
