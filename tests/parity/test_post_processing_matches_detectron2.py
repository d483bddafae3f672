"""Recorded logits of the original code must give its recorded results; `cut_post_processing.py` says what was kept.

The original's instances come unsorted and, with panoptic inference on, without stuff. Ours are sorted by score.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mpformer_hf.image_processing_mpformer import MPFormerImageProcessor

GOLDENS = Path(__file__).parent / "goldens"

SAME_PIXELS = 0.999  # float order decides pixels whose best two scores, or whose logit and the threshold, agree to 1e-5
SCORE_ERROR = 1e-4
MASK_IOU = 0.995
SEGMENT_IOU = 0.99


@dataclass(frozen=True)
class Recording:
    """Logits, results and facts of one case."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def outputs(self) -> SimpleNamespace:
        return SimpleNamespace(
            class_queries_logits=self.tensors["class_logits"],
            masks_queries_logits=self.tensors["mask_logits"],
            image_sizes=torch.tensor([self.facts["input_size"]]),
        )

    @property
    def target_sizes(self) -> list[tuple[int, int]]:
        return [tuple(self.facts["output_size"])]

    def processor(self, variant: str) -> MPFormerImageProcessor:
        switches = self.facts["variants"][variant]
        num_classes = self.tensors["class_logits"].shape[-1] - 1
        return MPFormerImageProcessor(
            score_threshold=self.facts["score_threshold"],
            overlap_mask_area_threshold=self.facts["overlap_mask_area_threshold"],
            top_k=self.facts["top_k"],
            label_ids_to_fuse=sorted(set(range(num_classes)) - set(self.facts["thing_ids"])),
            combine_before_resize=not switches["sem_seg_postprocess_before_inference"],
        )


def load(case: str) -> Recording:
    with safe_open(GOLDENS / f"post_processing_{case}.safetensors", framework="pt") as file:
        return Recording(
            {name: file.get_tensor(name) for name in list(file.keys())}, json.loads(file.metadata()["facts"])
        )


def recorded_with(switch: str) -> list[tuple[str, str]]:
    return [
        (case, variant)
        for case in ("a", "b", "c")
        for variant, switches in load(case).facts["variants"].items()
        if switches[switch]
    ]


def iou(first: Tensor, second: Tensor) -> float:
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


@pytest.mark.parametrize(("case", "variant"), recorded_with("semantic_on"))
def test_semantic_map_equals_the_original(case: str, variant: str) -> None:
    recording = load(case)
    (ours,) = recording.processor(variant).post_process_semantic_segmentation(
        recording.outputs, target_sizes=recording.target_sizes
    )
    same = (ours == recording.tensors[f"{variant}.semantic"]).float().mean()
    assert same >= SAME_PIXELS


def test_the_order_of_combining_and_resizing_matters() -> None:
    recording = load("c")
    recorded = [recording.tensors[f"{variant}.semantic"] for variant in ("cfg", "before")]
    assert (recorded[0] == recorded[1]).float().mean() < SAME_PIXELS


@pytest.mark.parametrize(("case", "variant"), recorded_with("instance_on"))
def test_instances_equal_the_original(case: str, variant: str) -> None:
    recording = load(case)
    (ours,) = recording.processor(variant).post_process_instance_segmentation(
        recording.outputs, target_sizes=recording.target_sizes, preset="evaluation"
    )
    scores = recording.tensors[f"{variant}.scores"]
    height, width = recording.facts["output_size"]
    bits = np.unpackbits(recording.tensors[f"{variant}.masks_packed"].numpy(), axis=1)[:, : height * width]
    masks = torch.from_numpy(bits.reshape(-1, height, width).astype(bool))
    order = scores.argsort(descending=True)

    torch.testing.assert_close(ours["scores"], scores[order], atol=SCORE_ERROR, rtol=0)
    assert ours["labels"].tolist() == recording.tensors[f"{variant}.classes"][order].tolist()
    for index, recorded_mask in enumerate(masks[order]):
        assert iou(ours["masks"][index], recorded_mask) > MASK_IOU


@pytest.mark.parametrize(("case", "variant"), recorded_with("panoptic_on"))
def test_panoptic_segments_equal_the_original(case: str, variant: str) -> None:
    recording = load(case)
    (ours,) = recording.processor(variant).post_process_panoptic_segmentation(
        recording.outputs, target_sizes=recording.target_sizes
    )
    recorded_map = recording.tensors[f"{variant}.panoptic"]
    recorded = recording.facts["variants"][variant]["segments_info"]
    assert [(segment["id"], segment["label_id"]) for segment in ours["segments_info"]] == [
        (segment["id"], segment["category_id"]) for segment in recorded
    ]
    assert [segment["was_fused"] for segment in ours["segments_info"]] == [not one["isthing"] for one in recorded]
    for segment_id in range(len(recorded) + 1):  # 0 is void
        assert iou(ours["segmentation"] == segment_id, recorded_map == segment_id) > SEGMENT_IOU
