"""`pip install mpformer-hf` without extras is enough to import, run, save and load a model.

A second environment would cost gigabytes. Instead a child process sees a folder of links to exactly the packages that pip
would install without extras: the closure of the requirements that the installed packages declare themselves.
"""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS_ONLY = ["accelerate", "datasets", "evaluate", "pycocotools", "sklearn", "matplotlib", "peft", "pytest"]

CHILD = """
import importlib.util
import sys
import warnings

site, absent, folder = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
sys.path.insert(0, site)
present = [name for name in absent if importlib.util.find_spec(name) is not None]
assert not present, f"{present} can be imported, so this process is not bare"
warnings.simplefilter("error")

import numpy
import torch
from transformers import ResNetConfig

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation, MPFormerImageProcessor

backbone = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
    out_features=["stage1", "stage2", "stage3", "stage4"],
)
config = MPFormerConfig(
    backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
    encoder_feedforward_dim=32, decoder_layers=3, dim_feedforward=32, num_attention_heads=2, num_queries=5, num_labels=3,
)
model = MPFormerForUniversalSegmentation(config).eval()
processor = MPFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
model.save_pretrained(folder)
processor.save_pretrained(folder)
loaded = MPFormerForUniversalSegmentation.from_pretrained(folder).eval()
reader = MPFormerImageProcessor.from_pretrained(folder)

image = numpy.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=numpy.uint8)
before, after = processor(image, return_tensors="pt"), reader(image, return_tensors="pt")
with torch.no_grad():
    before, after = model(**before), loaded(**after)
for name in ("class_queries_logits", "masks_queries_logits"):
    assert torch.equal(getattr(before, name), getattr(after, name)), f"{name} changed by saving and loading"
(segmentation,) = reader.post_process_semantic_segmentation(after, target_sizes=[(48, 80)])
assert segmentation.shape == (48, 80)
"""


def packages_installed_without_extras() -> set[str]:
    """Canonical names of the distributions in the closure of the project's requirements."""
    seen, queue = set(), [Requirement(line) for line in PROJECT["dependencies"]]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in requirement.extras or {""}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                needed = [Requirement(line) for line in metadata.requires(name) or []]
                queue += [line for line in needed if line.marker is None or line.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


@pytest.fixture(scope="module")
def bare_site(tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("bare_site")
    (site / "mpformer_hf").symlink_to(ROOT / "mpformer_hf")
    for name in packages_installed_without_extras():
        distribution = metadata.distribution(name)
        tops = {Path(file).parts[0] for file in distribution.files}
        for top in tops - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():  # several distributions fill `nvidia/`
                link.symlink_to(distribution.locate_file(top))
    return site


def test_the_extras_are_no_part_of_an_installation_without_them():
    installed = packages_installed_without_extras()
    assert {"torch", "numpy", "safetensors", "pillow"} <= installed
    assert not installed & {"accelerate", "datasets", "evaluate", "pycocotools", "scikit-learn", "matplotlib", "pytest"}


def test_a_model_can_be_made_saved_loaded_and_used_without_extras(bare_site, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    # -I and -S: nothing of the environment, of the user or of site-packages; the folder of links alone.
    command = [sys.executable, "-I", "-S", script, bare_site, ",".join(EXTRAS_ONLY), tmp_path / "model"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert outcome.returncode == 0, outcome.stderr
