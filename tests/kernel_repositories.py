"""Kernel repositories as the kernels hub has them, in plain Python, and broken ones: for tests of what is done with kernels."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

LAYER = "MultiScaleDeformableAttention"
SIGNATURE = (
    "self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index, "
    "sampling_locations, attention_weights, im2col_step"
)
# Right, but strict: it refuses what a CUDA kernel would read wrongly, and finds the levels by the two tensors alone.
GOOD = """
CALLS.append([str(value.dtype), str(sampling_locations.dtype), str(attention_weights.dtype), len(value), im2col_step])
tensors = (value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights)
assert all(tensor.is_contiguous() and tensor.device == value.device for tensor in tensors)
assert value.dtype == sampling_locations.dtype == attention_weights.dtype == torch.float32
assert value_spatial_shapes.dtype == level_start_index.dtype == torch.int64
assert len(value) % min(len(value), im2col_step) == 0
batch, _, heads, channels = value.shape
queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
total = 0
sizes = value_spatial_shapes.tolist()
assert [list(size) for size in value_spatial_shapes_list] == sizes
for level, ((height, width), start) in enumerate(zip(sizes, level_start_index.tolist())):
    cells = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
    grid = (2 * sampling_locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
    weight = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
    total = total + (F.grid_sample(cells, grid, align_corners=False) * weight[:, None]).sum(-1)
return total.view(batch, heads * channels, queries).transpose(1, 2)
"""
BODIES = {
    "good": GOOD,
    "wrong": GOOD.replace("return total", "return 1.01 * total"),
    "exiting": "os._exit(3)",
    # Good enough for a test, bad later.
    "unreliable": "if value.shape[3] == 4:\n    raise RuntimeError('head dimension 4')" + GOOD,
    "starving": "if value.shape[3] == 4:\n    raise torch.OutOfMemoryError('no memory left')" + GOOD,
}


INITS = {"deadly": "import os\n\nos._exit(17)\n"}  # as soon as it is imported


def write_repository(folder: Path, kind: str) -> Path:
    """Write the repository of a kernel that is good, wrong, exiting, deadly, unreliable or starving.

    Returns:
        Its folder, for `kernels.LocalLayerRepository`.
    """
    variant = folder / kind / "build" / "torch-universal"
    variant.mkdir(parents=True)
    body = "\n".join(f"        {line}" for line in BODIES.get(kind, GOOD).strip().splitlines())
    (variant / "__init__.py").write_text(INITS.get(kind, "from . import layers\n"))
    (variant / "layers.py").write_text(
        "import os\n\nimport torch\nimport torch.nn.functional as F\n\nCALLS = []\n\n\n"
        f"class {LAYER}(torch.nn.Module):\n    has_backward = True\n\n    def forward({SIGNATURE}):\n{body}\n"
    )
    metadata = {
        "name": f"msda-{kind}",
        "id": f"_msda_{kind}_{abs(hash(str(folder)))}",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return folder / kind


def import_kernel(repository: Path) -> ModuleType:
    """Import a kernel in the way of the library `kernels`: as a package of the name in the metadata. Returns its `layers`."""
    variant = repository / "build" / "torch-universal"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].layers
