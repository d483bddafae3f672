"""Cut the recorded noise of the original code down to what `test_noise_matches_detectron2.py` reads.

    python tests/parity/cut_noise.py SOURCE_FOLDER

SOURCE_FOLDER is the full recording of case `a`, with `golden.safetensors` and `noise_stats.json`. Written beside the
other recordings, in `goldens/`:

* `noise.safetensors`: `masks.b` bool (n, h, w), target masks of image b at its own size; `labels` int64 (S,);
  `clean.L` bool (S, h, w), cells of level L that the mask touches; `visible_probability.MODE.L` float32 (S, h, w),
  share of draws in which a cell is visible.
* `noise.json`: sizes, number of draws and, for each mode, level and mask, mean and standard deviation of the share of
  flipped cells, and the mean overlap with the clean mask; for each mode the share of flipped labels with its standard
  error.

Only point noise is kept (MODE: `points`, `points_head_dn` with `.ns` and the ratio). The geometric kinds of the
original are broken and not imitated.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
MODES = ("points.ns0.2", "points.ns0.5", "points_head_dn.ns0.2", "points_head_dn.ns0.5")
STATISTICS = (
    "mean_flip_fraction",
    "std_flip_fraction",
    "mean_iou_with_clean",
    "label_noise_ratio",
    "label_flip_rate",
    "label_flip_rate_expected",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the full recording of case a")
    source = parser.parse_args().source
    statistics = json.loads((source / "noise_stats.json").read_text())
    save_file(
        cut_tensors(load_file(source / "golden.safetensors"), len(statistics["size_list"])),
        GOLDENS / "noise.safetensors",
    )
    (GOLDENS / "noise.json").write_text(json.dumps(cut_statistics(statistics), separators=(",", ":")) + "\n")


def cut_tensors(tensors: dict[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Masks, labels, clean cells and visible shares under the names of this module's docstring."""
    kept = {f"masks.{image}": tensors[f"noise.masks.{image}"].bool() for image in range(2)}
    kept["labels"] = torch.cat([tensors[f"noise.labels.{image}"] for image in range(2)])
    for level in range(num_levels):
        kept[f"clean.{level}"] = tensors[f"noise.clean_points_rule.{level}"]
        for mode in MODES:
            name = f"visible_probability.{mode}.{level}"
            kept[name] = tensors[f"noise.{mode}.visible_probability.{level}"]
    return kept


def cut_statistics(statistics: dict[str, Any]) -> dict[str, Any]:
    """Statistics of the kept modes; the number of labels follows from the expected share of flipped ones."""
    modes = {mode: {key: statistics["modes"][mode][key] for key in STATISTICS} for mode in MODES}
    first = modes[MODES[0]]
    num_labels = round(1 / (1 - first["label_flip_rate_expected"] / first["label_noise_ratio"]))
    return {
        "num_draws": statistics["n_seeds"],
        "num_labels": num_labels,
        "level_sizes": statistics["size_list"],
        "padded_size": [32 * side for side in statistics["size_list"][0]],
        "modes": modes,
    }


if __name__ == "__main__":
    main()
