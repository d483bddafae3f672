"""Cut the full recordings of the original code down to what the parity tests read.

    python tests/parity/cut_goldens.py SOURCE_FOLDER

SOURCE_FOLDER holds one folder a case (`a_mpformer_r50_instance`, ...) with `config.yaml`, `model_final.pth`, `golden.safetensors` and
`meta.json`, as they were recorded. `goldens/` beside this file gets, for each case, `config.yaml`, `meta.json` and up to three safetensors files
(`weights`, `infer`, `train`); `README.md` says what they hold. Everything that is left out because it is said to equal something
that is kept is compared first, so that a new recording with other facts stops here.

Axes: B images, Q matched queries, P pilot slots, L prediction levels, h w a map at 1/4 of the padded image.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"

# The case whose weights, inputs and forward passes a case repeats. Only the weights that differ are stored again.
SAME_WEIGHTS_AS = {"d1": "a", "d2": "a"}
SAME_FORWARD_AS = {"d2": "a"}

# Training feature maps and mask logits are stored at every n-th row and column: the logits of one query are one vector of
# `hidden_dim` (32) numbers times the feature map, so that 64 to 80 of its cells still determine all of them.
FEATURE_STRIDE = 2
MASK_STRIDE = 4

INFER_KEYS = (
    "image",
    "backbone.",
    "mask_features",
    "multi_scale_features.",
    "pred_logits.",
    "pred_masks.",
    "cross_attn_mask.",
)
VARIANT_KEYS = ("mp.", "cross_attn_mask.", "self_attn_mask", "mask_features", "pred_logits.", "pred_masks.")
VARIANT_FACTS = ("num_dn", "n_instances", "image_sizes", "padded_size", "pad_size", "max_num", "groups", "error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the full recordings")
    for folder in sorted(
        path for path in parser.parse_args().source.iterdir() if (path / "golden.safetensors").is_file()
    ):
        cut_case(folder, GOLDENS / case_name(folder))


def cut_case(source: Path, target: Path) -> None:
    """Write the small version of one case.

    Args:
        source: folder of the full recording.
        target: folder to fill; it is made where it lacks.
    """
    target.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / "golden.safetensors")
    meta = json.loads((source / "meta.json").read_text())
    shutil.copyfile(source / "config.yaml", target / "config.yaml")
    (target / "config.yaml").chmod(0o644)
    (target / "meta.json").write_text(json.dumps(cut_meta(source, tensors, meta), separators=(",", ":")) + "\n")
    if weights := cut_weights(source):
        write_tensors(weights, target / "weights.safetensors")
    if case_name(source) in SAME_FORWARD_AS:
        require_same_forward(tensors, load_file(sibling(source, SAME_FORWARD_AS) / "golden.safetensors"))
        return
    write_tensors(cut_inference(tensors), target / "infer.safetensors")
    write_tensors(cut_training(tensors, meta["train"]["variants"]), target / "train.safetensors")


def cut_weights(source: Path) -> dict[str, Tensor]:
    """Weights under their original names, without index buffers and without those that `SAME_WEIGHTS_AS` has already."""
    weights = read_weights(source)
    if case_name(source) not in SAME_WEIGHTS_AS:
        return weights
    stored = read_weights(sibling(source, SAME_WEIGHTS_AS))
    return {name: value for name, value in weights.items() if name not in stored or not same(value, stored[name])}


def cut_inference(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Input, backbone, pixel decoder, attention masks and all levels' logits of the evaluation forward, whole."""
    wanted = {name.removeprefix("infer."): value for name, value in tensors.items() if name.startswith("infer.")}
    return {name: value for name, value in wanted.items() if name.startswith(INFER_KEYS)}


def cut_training(tensors: dict[str, Tensor], variants: dict[str, Any]) -> dict[str, Tensor]:
    """Inputs and targets once, and of each variant its masks, queries and (thinned) predictions."""
    first = next(iter(variants))
    kept = {"fixed_points": tensors["train.fixed_points"]}
    for key in ("image", "labels", "masks"):
        for image in range(2):
            kept[f"{key}.{image}"] = tensors[f"train.{first}.{key}.{image}"]
    for variant, facts in variants.items():
        if "error" not in facts:
            require_same_inputs(tensors, first, variant, facts["n_instances"])
            kept |= {f"{variant}.{name}": thin(name, value) for name, value in variant_tensors(tensors, variant)}
    return kept


def variant_tensors(tensors: dict[str, Tensor], variant: str) -> Iterable[tuple[str, Tensor]]:
    """What a training variant recorded of its forward pass, by the name within the variant."""
    prefix = f"train.{variant}."
    for name, value in tensors.items():
        if name.startswith(prefix) and name.removeprefix(prefix).startswith(VARIANT_KEYS):
            yield name.removeprefix(prefix), value


def thin(name: str, value: Tensor) -> Tensor:
    """Every n-th row and column of a map at 1/4; other tensors as they are."""
    if name == "mask_features":
        return value[..., ::FEATURE_STRIDE, ::FEATURE_STRIDE].contiguous()
    if "pred_masks." in name:
        return value[..., ::MASK_STRIDE, ::MASK_STRIDE].contiguous()
    return value


def cut_meta(source: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a case: losses, gradient norms, assignments and the facts that tests need to set the model up."""
    variants = meta["train"]["variants"]
    names = list(next(iter(variants.values()))["fixed"]["grad_norm"])
    return {
        "source": source.name,
        "weights_as": SAME_WEIGHTS_AS.get(case_name(source)),
        "forward_as": SAME_FORWARD_AS.get(case_name(source)),
        "feature_stride": FEATURE_STRIDE,
        "mask_stride": MASK_STRIDE,
        "loss_weights": meta["train"]["weight_dict"],
        "num_seeds": meta["train"]["n_seeds"],
        "parameters": names,
        "variants": {name: cut_variant(name, facts, names, tensors) for name, facts in variants.items()},
    }


def cut_variant(
    variant: str, facts: dict[str, Any], parameters: list[str], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Numbers of one training variant; `grad_norm` is a list in the order of `parameters`."""
    kept = {key: facts[key] for key in VARIANT_FACTS if key in facts}
    if "error" in facts:
        return kept
    fixed = facts["fixed"]
    if fixed["no_grad"] or list(fixed["grad_norm"]) != parameters:
        raise ValueError(
            f"Variant {variant} has other gradients than the first one: {fixed['no_grad']}. Store names with each."
        )
    kept["losses"] = fixed["losses"]
    kept["total"] = fixed["total"]
    kept["grad_norm"] = [fixed["grad_norm"][name] for name in parameters]
    levels = range(facts["n_prediction_layers"])
    kept["matches"] = [[tensors[f"train.{variant}.fixed.match.{k}.{b}"].tolist() for b in range(2)] for k in levels]
    if "seeds" in facts:
        kept["seeds"] = {"losses": facts["seeds"]["losses"], "total": facts["seeds"]["total"]}
    return kept


def require_same_inputs(tensors: dict[str, Tensor], first: str, variant: str, num_instances: list[int]) -> None:
    """Stop unless a variant differs from the first one only by images without instances."""
    for image, count in enumerate(num_instances):
        keys = ["image", "labels", "masks"] if count else ["image"]
        for key in keys:
            if not same(tensors[f"train.{first}.{key}.{image}"], tensors[f"train.{variant}.{key}.{image}"]):
                raise ValueError(f"Variant {variant} has another {key}.{image} than {first}. Store the inputs of both.")


def require_same_forward(tensors: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Stop unless every forward tensor of a case equals the one of the case that it repeats."""
    for name, value in tensors.items():
        if ".grad." not in name and not name.startswith("infer.post.") and not same(value, stored[name]):
            raise ValueError(
                f"{name} differs although the case is listed in SAME_FORWARD_AS. Remove it from that list."
            )


def read_weights(source: Path) -> dict[str, Tensor]:
    """Floating-point weights of a recording; Swin's integer index buffers follow from the window size."""
    weights = torch.load(source / "model_final.pth", weights_only=True)["model"]
    return {name: value for name, value in weights.items() if value.is_floating_point()}


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Save tensors; masks (bool, or uint8 of 0 and 1) as packed bits, their shapes and dtypes in the file's metadata."""
    packed = {name: value for name, value in tensors.items() if value.dtype == torch.bool or is_target_mask(name)}
    plain = {name: value.contiguous() for name, value in tensors.items() if name not in packed}
    bits = {f"{name}.bits": torch.from_numpy(np.packbits(value.bool().numpy())) for name, value in packed.items()}
    layout = {name: f"{value.dtype} {list(value.shape)}".removeprefix("torch.") for name, value in packed.items()}
    # One entry: the order of several would differ from run to run, and the files with it.
    save_file(plain | bits, file, metadata={"packed": json.dumps(layout)} if layout else None)


def is_target_mask(name: str) -> bool:
    return name.startswith("masks.")


def same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)


def case_name(folder: Path) -> str:
    return folder.name.split("_")[0]


def sibling(source: Path, table: dict[str, str]) -> Path:
    """Folder of the case that `table` names for this one."""
    return next(source.parent.glob(f"{table[case_name(source)]}_*"))


if __name__ == "__main__":
    main()
