"""All backends of the deformable attention side by side: `python -m benchmarks.deformable_attention --help`.

Shapes are those of the pixel decoder's encoder (levels 1/32, 1/16, 1/8; 8 heads of 32 channels; 4 points), queries look around
themselves with a spread of two cells. Repeats are interleaved and the minimum counts, because other work on the machine can only
make a run slower. Each backend is beside the bound of the machine's memory: the bytes that must be read and written at least, at the
speed of copying, measured in the same run. Memory is what one forward and backward adds at its peak: on a CPU the resident set of
a child process of its own, on a GPU what torch allocates.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.measuring import measure_added_memory, measure_times, write_report
from mpformer_hf.deformable_attention import cell_centres
from mpformer_hf.ops.backends import Backend, backends

NUM_HEADS, HEAD_DIM, NUM_POINTS = 8, 32, 4
STRIDES = (32, 16, 8)
SMALL = "64x64"
IMAGES = {SMALL: (64, 64), "512x512": (512, 512), "800x1333": (800, 1333), "1024x2048": (1024, 2048)}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Case:
    """What is run."""

    image: str
    dtype: str
    device: str
    batch_size: int = 1

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Sizes of the levels, rounded up as a backbone does."""
        height, width = IMAGES[self.image]
        return tuple((-(-height // stride), -(-width // stride)) for stride in STRIDES)


@dataclass(frozen=True)
class Inputs:
    """Arguments of the operator, and a gradient of its output."""

    shapes: tuple[tuple[int, int], ...]
    value: Tensor
    locations: Tensor
    weights: Tensor
    grad_output: Tensor

    def forward_bytes(self) -> int:
        """Least traffic of a forward: each argument is read once, the output written once."""
        return sum(tensor.nbytes for tensor in (self.value, self.locations, self.weights, self.grad_output))

    def backward_bytes(self) -> int:
        """Least traffic of a backward: the same is read, three gradients are written."""
        grads = sum(tensor.nbytes for tensor in (self.value, self.locations, self.weights))
        return self.forward_bytes() + grads


def draw_inputs(case: Case) -> Inputs:
    """Inputs that need gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = case.shapes
    num_cells = sum(height * width for height, width in shapes)
    size = (case.batch_size, num_cells, NUM_HEADS, len(shapes), NUM_POINTS)
    cells = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float32)[:, None]
    centres = cell_centres(shapes, torch.device("cpu"))[None, :, None, None, None]
    value = torch.randn(case.batch_size, num_cells, NUM_HEADS, HEAD_DIM, generator=generator)
    locations = centres + 2 * torch.randn(*size, 2, generator=generator) / cells
    weights = torch.rand(size, generator=generator).flatten(3).softmax(-1).view(size)
    grad_output = torch.randn(value.shape, generator=generator)
    dtype = TYPES[case.dtype]
    leaves = [value.to(case.device, dtype), locations.to(case.device), weights.to(case.device)]
    value, locations, weights = (leaf.requires_grad_() for leaf in leaves)
    return Inputs(shapes, value, locations, weights, grad_output.to(case.device, dtype))


def run_forward(backend: Backend, inputs: Inputs) -> Callable[[], None]:
    """The operator without a graph."""
    arguments = (inputs.value.detach(), inputs.shapes, inputs.locations.detach(), inputs.weights.detach())
    return lambda: backend.run(*arguments)


def run_both(backend: Backend, inputs: Inputs) -> Callable[[], None]:
    """Forward and backward with all three gradients."""
    leaves = (inputs.value, inputs.locations, inputs.weights)

    def run() -> None:
        output = backend.run(inputs.value, inputs.shapes, inputs.locations, inputs.weights)
        torch.autograd.grad(output, leaves, inputs.grad_output)

    return run


def usable_backends(device: str) -> dict[str, Backend]:
    """Those that can run on the device."""
    return {backend.name: backend for backend in backends() if backend.explain_absence(torch.device(device)) is None}


def measure_milliseconds(runs: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    """Least milliseconds of each."""
    return {name: 1e3 * seconds["min"] for name, seconds in measure_times(runs, repeats, device).items()}


def measure_copy(device: str, repeats: int) -> float:
    """Bytes a second that copying reads and writes together, into memory that is there already."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    milliseconds = measure_milliseconds({"copy": lambda: target.copy_(source)}, max(repeats, 5), device)["copy"]
    return 2 * COPY_BYTES / (milliseconds / 1e3)


def measure_memory(case: Case, name: str, threads: int) -> float:
    """MiB that one forward and backward adds at its peak, in a process of its own."""
    arguments = ["--child", json.dumps(asdict(case)), name, "--threads", str(threads)]
    command = [sys.executable, "-m", "benchmarks.deformable_attention", *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.strip().splitlines()[-1])


def run_child(case: Case, name: str) -> None:
    """Print the MiB that the first run adds."""
    backend = usable_backends(case.device)[name]
    run_both(backend, draw_inputs(Case(SMALL, case.dtype, case.device)))()  # libraries and threads are loaded
    print(measure_added_memory(run_both(backend, draw_inputs(case)), case.device))


def measure_case(case: Case, repeats: int, bytes_a_second: float, threads: int) -> dict[str, object]:
    """Times and memory of all backends, and the bound."""
    found, inputs = usable_backends(case.device), draw_inputs(case)
    forward = measure_milliseconds({name: run_forward(it, inputs) for name, it in found.items()}, repeats, case.device)
    both = measure_milliseconds({name: run_both(it, inputs) for name, it in found.items()}, repeats, case.device)
    memory = {name: measure_memory(case, name, threads) for name in found}
    bound = {
        "forward ms": 1e3 * inputs.forward_bytes() / bytes_a_second,
        "both ms": 1e3 * (inputs.forward_bytes() + inputs.backward_bytes()) / bytes_a_second,
    }
    rows = {
        name: {
            "forward ms": forward[name],
            "both ms": both[name],
            "MiB": memory[name],
            "forward, times faster than the reference": forward["reference"] / forward[name],
            "both, times faster than the reference": both["reference"] / both[name],
            "memory, share of the reference's": memory[name] / memory["reference"],
        }
        for name in found
    }
    return {"image": case.image, "dtype": case.dtype, "batch": case.batch_size, "bound": bound, "backends": rows}


def format_case(result: dict) -> str:
    """A small table."""
    lines = [f"{result['image']}, {result['dtype']}, batch {result['batch']}"]
    lines.append(f"  {'':<14}{'forward':>12}{'with backward':>16}{'memory':>12}")
    bound = result["bound"]
    lines.append(f"  {'bound':<14}{bound['forward ms']:>9.2f} ms{bound['both ms']:>13.2f} ms")
    for name, row in result["backends"].items():
        times = f"{row['forward ms']:>9.2f} ms{row['both ms']:>13.2f} ms"
        lines.append(f"  {name:<14}{times}{row['MiB']:>8.0f} MiB")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", nargs="+", choices=IMAGES, default=list(IMAGES)[1:])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        run_child(Case(**json.loads(arguments.child[0])), arguments.child[1])
        return
    bytes_a_second = measure_copy(arguments.device, arguments.repeats)
    print(f"Copying: {bytes_a_second / 1e9:.1f} GB/s")
    cases = [
        Case(image, name, arguments.device, arguments.batch) for image in arguments.images for name in arguments.types
    ]
    results = []
    for case in tqdm(cases):
        results.append(measure_case(case, arguments.repeats, bytes_a_second, arguments.threads))
        tqdm.write(format_case(results[-1]))
    report = {
        "threads": arguments.threads,
        "GPU": torch.cuda.get_device_name() if arguments.device != "cpu" else None,
        "copy GB/s": bytes_a_second / 1e9,
        "cases": results,
    }
    write_report(arguments.output, "deformable_attention", report)


if __name__ == "__main__":
    main()
