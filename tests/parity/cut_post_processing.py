"""Cut the recorded inference results of the original code down to what the post-processing test reads.

    python tests/parity/cut_post_processing.py SOURCE_FOLDER

SOURCE_FOLDER holds one folder a case (`a_mpformer_r50_instance`, ...) with `golden.safetensors`, `meta.json` and
`config.yaml`, as they were recorded. `goldens/post_processing_<case>.safetensors` beside this file gets the last class and
mask logits and, for each recorded variant of the inference switches, `<variant>.*`: the semantic map (argmax of the
recorded scores), the panoptic map, and scores, classes and packed masks of the instances. Sizes, thresholds, switches and
segments stand as JSON in the metadata of the file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
CASES = {"a": "a_mpformer_r50_instance", "b": "b_mpformer_swin_panoptic", "c": "c_mask2former_r50_semantic"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the full recordings")
    source = parser.parse_args().source
    for case, folder in CASES.items():
        cut_case(source / folder, GOLDENS / f"post_processing_{case}.safetensors")


def cut_case(source: Path, target: Path) -> None:
    """Write the small version of one case.

    Args:
        source: folder of the full recording.
        target: file to write.
    """
    tensors = load_file(source / "golden.safetensors")
    meta = json.loads((source / "meta.json").read_text())["infer"]
    config = yaml.safe_load((source / "config.yaml").read_text())
    last = max(int(name.rsplit(".", 1)[1]) for name in tensors if name.startswith("infer.pred_logits."))
    small = {
        "class_logits": tensors[f"infer.pred_logits.{last}"],
        "mask_logits": tensors[f"infer.pred_masks.{last}"],
    }
    for variant, facts in meta["post"].items():
        small |= {f"{variant}.{name}": tensor for name, tensor in cut_variant(tensors, variant, facts).items()}
    test = config["MODEL"]["MASK_FORMER"]["TEST"]
    facts = {
        "input_size": meta["input_size"],
        "output_size": meta["output_size"],
        "thing_ids": meta["things"],
        "top_k": config["TEST"]["DETECTIONS_PER_IMAGE"],
        "score_threshold": test["OBJECT_MASK_THRESHOLD"],
        "overlap_mask_area_threshold": test["OVERLAP_THRESHOLD"],
        "variants": meta["post"],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in small.items()}
    save_file(contiguous, target, metadata={"facts": json.dumps(facts)})
    target.chmod(0o644)


def cut_variant(tensors: dict[str, Tensor], variant: str, facts: dict[str, Any]) -> dict[str, Tensor]:
    """Choose what one setting of the inference switches recorded."""
    recorded = {
        name.removeprefix(f"infer.post.{variant}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"infer.post.{variant}.")
    }
    small = {}
    if facts["semantic_on"]:
        small["semantic"] = recorded["sem_seg"].argmax(0).to(torch.uint8)
    if facts["panoptic_on"]:
        small["panoptic"] = recorded["panoptic_seg"].to(torch.uint8)
    if facts["instance_on"]:
        for name in ("scores", "classes", "masks_packed"):
            small[name] = recorded[f"instances.{name}"]
    return small


if __name__ == "__main__":
    main()
