"""Tiny random checkpoints of every kind of model that can be scored, saved as their users save them."""

import json
import string
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    BaseImageProcessor,
    CLIPTokenizer,
    DetrConfig,
    DetrForSegmentation,
    DetrImageProcessor,
    EomtImageProcessor,
    Mask2FormerImageProcessor,
    MaskFormerImageProcessor,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    OneFormerImageProcessor,
    OneFormerProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from mpformer_hf import MPFormerImageProcessor
from tests.factories import tiny_backbone_config, tiny_model
from tests.unit.test_docs import tiny_eomt, tiny_mask2former, tiny_maskformer

Names = dict[int, str]
NAMES: Names = {0: "cat", 1: "dog", 2: "sky"}
SIZE = {"shortest_edge": 64, "longest_edge": 96}
SQUARE = {"shortest_edge": 96, "longest_edge": 96}


def tiny_detr() -> PreTrainedModel:
    config = DetrConfig(
        backbone_config=tiny_backbone_config(),
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=6,
        num_labels=len(NAMES),
    )
    return DetrForSegmentation(config)


def tiny_oneformer() -> PreTrainedModel:
    config = OneFormerConfig(
        backbone_config=tiny_backbone_config("swin"),
        num_labels=len(NAMES),
        num_queries=6,
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_attention_heads=4,
        encoder_layers=1,
        decoder_layers=4,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=64,
        text_encoder_n_ctx=4,
    )
    return OneFormerForUniversalSegmentation(config)


def tiny_oneformer_processor(folder: Path) -> OneFormerProcessor:
    """Its tokenizer spells."""
    marks = ["<|startoftext|>", "<|endoftext|>"]
    entries = [*marks, *string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    (folder / "vocab.json").write_text(json.dumps({entry: number for number, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    classes = {str(key): {"name": name, "isthing": int(name != "sky")} for key, name in NAMES.items()}
    (folder / "classes.json").write_text(json.dumps(classes))
    image_processor = OneFormerImageProcessor(
        size=SIZE, repo_path=str(folder), class_info_file="classes.json", num_text=4
    )
    return OneFormerProcessor(image_processor=image_processor, tokenizer=CLIPTokenizer.from_pretrained(folder))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mpformer": tiny_model,
    "mask2former": tiny_mask2former,
    "maskformer": tiny_maskformer,
    "oneformer": tiny_oneformer,
    "eomt": tiny_eomt,
    "eomt_windows": tiny_eomt,
    "detr": tiny_detr,
}
PROCESSORS = {
    "mpformer": lambda _: MPFormerImageProcessor(size=SIZE),
    "mask2former": lambda _: Mask2FormerImageProcessor(size=SIZE),
    "maskformer": lambda _: MaskFormerImageProcessor(size=SIZE),
    "oneformer": tiny_oneformer_processor,
    "eomt": lambda _: EomtImageProcessor(size=SQUARE, do_pad=True),
    "eomt_windows": lambda _: EomtImageProcessor(size={**SQUARE, "longest_edge": None}, do_split_image=True),
    "detr": lambda _: DetrImageProcessor(size=SIZE),
}


def save_checkpoint(kind: str, folder: Path) -> Path:
    """Save a model and its processor."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save_taught(MODELS[kind](), PROCESSORS[kind](folder), NAMES, folder)


def save_taught(
    model: PreTrainedModel, processor: ProcessorMixin | BaseImageProcessor, names: Names, folder: Path
) -> Path:
    """Change a model so that each query is sure of a class, without which results would be empty, and save both."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    teach_classes(model.eval(), len(names) + 1)
    model.config.id2label = names
    model.config.label2id = {name: key for key, name in names.items()}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def teach_classes(model: PreTrainedModel, num_classes: int) -> None:
    """Set the head of the classes so that the queries of an image get one class after the other, "no object" among them."""
    [head] = [
        module
        for name, module in model.named_modules()
        if "class" in name and getattr(module, "out_features", None) == num_classes
    ]
    seen = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    further = {"task_inputs": torch.ones(1, 77, dtype=torch.int64)} if hasattr(model.config, "task_seq_len") else {}
    model(pixel_values=torch.randn(1, 3, 96, 96), **further)
    hook.remove()
    num_queries = getattr(model.config, "decoder_config", model.config).num_queries
    hidden = seen[-1].reshape(-1, head.in_features)[-num_queries:]  # of the last level
    wanted = 4.0 * torch.eye(num_classes)[torch.arange(len(hidden)) % num_classes]
    centered = hidden - hidden.mean(0)
    head.weight.data = (torch.linalg.pinv(centered, rtol=1e-2) @ (wanted - wanted.mean(0))).T.contiguous()
    head.bias.data = wanted.mean(0) - head.weight @ hidden.mean(0)
