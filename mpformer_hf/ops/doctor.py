"""Look at every backend of the deformable attention on this machine: is it there, is it right, how fast is it."""

import importlib.metadata
import math
import platform
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import transformers
from torch import Tensor

from ..deformable_attention import cell_centres, ms_deform_attn_reference
from . import build, register
from .backends import Backend, backends, choose_backend, load_library

SHAPES = ((16, 16), (32, 32), (64, 64))  # the pixel decoder's levels of an image of 512x512
NUM_HEADS, HEAD_DIM, NUM_POINTS = 8, 32, 4
MIN_SECONDS, MIN_RUNS, MAX_RUNS = 0.4, 3, 20


@dataclass(frozen=True)
class Finding:
    """One backend. Errors are relative to the largest number of the exact result, times in milliseconds."""

    name: str
    absence: str | None
    error: float = math.nan
    forward_ms: float = math.nan
    both_ms: float = math.nan


@dataclass(frozen=True)
class Report:
    """Everything that `doctor` says.

    Attributes:
        facts: versions, compiler, library.
        findings: one for each backend, in order of preference.
        chosen: the backend in use, or None if the choice fails.
        reason: why this one, or the error that the choice gives.
    """

    facts: dict[str, str]
    findings: list[Finding]
    chosen: str | None
    reason: str
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; what was not measured is None."""
        report = asdict(self)
        for finding in report["findings"]:
            finding |= {key: None for key, number in finding.items() if number != number}  # noqa: PLR0124 - NaN
        return report


@dataclass(frozen=True)
class Sample:
    """Arguments of the operator, and its exact result."""

    value: Tensor
    locations: Tensor
    weights: Tensor
    exact: Tensor


def examine(device: torch.device) -> Report:
    """Run every backend that can be used on the device."""
    sample = draw_sample(device)
    findings = [look_at(backend, device, sample) for backend in backends()]
    problem = register()
    try:
        choice = choose_backend(device)
        chosen, reason = choice.backend.name, choice.reason
    except (RuntimeError, ValueError) as error:
        chosen, reason = None, str(error)
    return Report(collect_facts(device), findings, chosen, reason, [problem] if problem else [])


def look_at(backend: Backend, device: torch.device, sample: Sample) -> Finding:
    """Check and time one backend; whatever goes wrong becomes its line in the table."""
    try:
        absence = backend.explain_absence(device)
        if absence is not None:
            return Finding(backend.name, absence)
        output = backend.run(sample.value.detach(), SHAPES, sample.locations.detach(), sample.weights.detach())
        difference = ((output.double() - sample.exact).abs().max() / sample.exact.abs().max()).item()
        forward = measure(lambda: _run(backend, sample), device)
        leaves = (sample.value, sample.locations, sample.weights)
        both = measure(lambda: torch.autograd.grad(_run(backend, sample).sum(), leaves), device)
    except Exception as error:  # a broken backend must not hide the others
        return Finding(
            backend.name, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return Finding(backend.name, None, difference, 1e3 * forward, 1e3 * both)


def _run(backend: Backend, sample: Sample) -> Tensor:
    return backend.run(sample.value, SHAPES, sample.locations, sample.weights)


def draw_sample(device: torch.device) -> Sample:
    """Queries of the pixel decoder that look around themselves, as in a trained model."""
    generator = torch.Generator().manual_seed(0)
    num_cells = sum(height * width for height, width in SHAPES)
    size = (1, num_cells, NUM_HEADS, len(SHAPES), NUM_POINTS)
    value = torch.randn(1, num_cells, NUM_HEADS, HEAD_DIM, generator=generator)
    cells = torch.tensor([(width, height) for height, width in SHAPES], dtype=torch.float32)[:, None]
    offsets = 2 * torch.randn(*size, 2, generator=generator) / cells
    locations = cell_centres(SHAPES, torch.device("cpu"))[None, :, None, None, None] + offsets
    weights = torch.rand(size, generator=generator).flatten(3).softmax(-1).view(size)
    exact = ms_deform_attn_reference(value.double(), SHAPES, locations.double(), weights.double())
    value, locations, weights = (tensor.to(device).requires_grad_() for tensor in (value, locations, weights))
    return Sample(value, locations, weights, exact.to(device))


def measure(run: Callable[[], object], device: torch.device) -> float:
    """Least seconds of several runs: other work on the machine can only make one slower."""
    run()
    best, runs, start = math.inf, 0, time.perf_counter()
    while runs < MIN_RUNS or (runs < MAX_RUNS and time.perf_counter() - start < MIN_SECONDS):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, runs = min(best, time.perf_counter() - began), runs + 1
    return best


def collect_facts(device: torch.device) -> dict[str, str]:
    """What a bug report needs."""
    kind = device.type if device.type in build.KINDS else "cpu"
    compiler, library = build.find_compiler(kind), load_library(kind).library
    facts = {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "transformers": transformers.__version__,
        "kernels": _version("kernels"),
        "deformops": _version("deformops"),
        "compiler": shlex.join(compiler) if compiler else "none",
        "library": f"{library.path} ({library.description})" if library else "none",
    }
    if device.type == "cuda" and torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name(device)
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --------------------------------------------------------------------------------------------------------------- as a table


def format_report(report: Report, device: torch.device) -> str:
    """Text for a terminal."""
    width = max(map(len, report.facts))
    lines = [f"{name:<{width}}  {text}" for name, text in report.facts.items()]
    lines += [
        "",
        f"Deformable attention on {device}: forward, and forward with backward, of the shapes of a 512x512 image",
    ]
    lines += ["", f"  {'backend':<14}{'error':>9}{'forward':>12}{'with backward':>16}"]
    for finding in report.findings:
        mark = "*" if finding.name == report.chosen else " "
        if finding.absence is not None:
            lines.append(f"{mark} {finding.name:<14}{finding.absence}")
        else:
            times = f"{finding.forward_ms:>9.2f} ms{finding.both_ms:>13.2f} ms"
            lines.append(f"{mark} {finding.name:<14}{finding.error:>9.1e}{times}")
    conclusion = (
        f"In use: {report.chosen} ({report.reason})." if report.chosen else f"None can be used: {report.reason}"
    )
    lines += ["", conclusion, *report.problems]
    return "\n".join(lines)
