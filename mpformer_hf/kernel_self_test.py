"""Try a kernel that others wrote in a child process, once: a bad one gives wrong numbers, hangs, or ends its process.

`examine` is the door. The verdict is kept in $XDG_CACHE_HOME/mpformer_hf/self_tests and asked for again when the kernel, torch,
the device or Python is another. Runs from a package and from files that were copied flat into one folder.

Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points.
"""

import contextlib
import hashlib
import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]
Attention = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]

IN_CHILD = "MPFORMER_SELF_TEST"  # set in the child's environment, which must not start another one
TIMEOUT = 300.0  # seconds; importing torch takes most of it on a busy machine, downloading or compiling elsewhere
TEST_VERSION = 1  # to be raised when the test becomes stricter: older verdicts are then not believed


@dataclass(frozen=True)
class Candidate:
    """A kernel to be tried.

    Attributes:
        name: of the backend; the first word of the name of the file with the verdict.
        version: whatever changes when the kernel does; None if that is not known, and the verdict is not kept.
        opener: "module:function" relative to the folder of this file. Called in the child with `arguments` and the device, it returns a
            `Trial`.
        arguments: for the opener; anything that JSON holds.
        environment: variables for the child, on top of those of this process.
    """

    name: str
    version: str | None
    opener: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """What an opener returns, in the child.

    Attributes:
        run: the kernel, differentiable; arguments as `deformable_attention.ms_deform_attn`, result (B, Q, N, D).
        rival: what would run without it, to compare times with; None if times do not matter.
        notes: for the verdict; anything that JSON holds.
    """

    run: Attention
    rival: Attention | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What is known about a candidate on a device.

    Attributes:
        is_good: True if it loads, gives right numbers and survives locations that are not finite.
        reason: one line why it is not good; empty if it is.
        milliseconds: of forward and backward of a standard shape, float32 and bfloat16 together; None if it has no rival.
        rival_milliseconds: the same of the rival.
        notes: of the trial.
    """

    is_good: bool
    reason: str = ""
    milliseconds: float | None = None
    rival_milliseconds: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def examine(candidate: Candidate, device: torch.device, timeout: float = TIMEOUT) -> Verdict:
    """The verdict on a candidate: from memory, from the cache on disk, or from a child process.

    Failures that may pass (a kernel that cannot be loaded, memory that ran out) are remembered by this process alone. An unwritable
    cache does no harm.
    """
    if os.environ.get(IN_CHILD):
        return Verdict(is_good=False, reason="this process is itself a self-test")
    identity = identify(candidate, device)
    key = hashlib.sha256(json.dumps([identity, candidate.environment], sort_keys=True).encode()).hexdigest()
    if key not in _remembered:
        _remembered[key] = read_verdict(identity) or _try_and_keep(candidate, device, identity, timeout)
    return _remembered[key]


_remembered: dict[str, Verdict] = {}


def _try_and_keep(candidate: Candidate, device: torch.device, identity: dict[str, Any], timeout: float) -> Verdict:
    verdict, is_final = try_in_child(candidate, device, timeout)
    if is_final and candidate.version is not None:
        keep_verdict(identity, verdict)
    return verdict


# ------------------------------------------------------------------------------------------------------------- the cache


def identify(candidate: Candidate, device: torch.device) -> dict[str, Any]:
    """All that the verdict depends on."""
    is_gpu = device.type == "cuda" and torch.cuda.is_available()
    return {
        "candidate": candidate.name,
        "version": candidate.version,
        "opener": candidate.opener,
        "arguments": candidate.arguments,
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{device.type} {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "test": TEST_VERSION,
    }


def verdict_file(identity: dict[str, Any]) -> Path:
    """Where the verdict is kept.

    Raises:
        RuntimeError: there is no home folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache / "mpformer_hf" / "self_tests" / f"{identity['candidate']}-{digest[:16]}.json"


def read_verdict(identity: dict[str, Any]) -> Verdict | None:
    """The verdict that is kept, None if there is none that can be read."""
    try:
        content = json.loads(verdict_file(identity).read_text())
        return Verdict(**content["verdict"]) if content["identity"] == identity else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def keep_verdict(identity: dict[str, Any], verdict: Verdict) -> None:
    """Write the verdict in one step, so that no other process ever reads half of it; do nothing where that is impossible."""
    content = json.dumps({"identity": identity, "verdict": asdict(verdict)}, indent=2)
    with contextlib.suppress(OSError, RuntimeError):
        path = verdict_file(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)


# ------------------------------------------------------------------------------------------------------------- the child

# A script cannot import its siblings, and importing the package would do more than is wanted: a nameless package of this
# folder can. The path is that of the parent: what it found, the child finds.
SCRIPT = """
import importlib, json, sys, types
with open(sys.argv[1]) as file:
    request = json.load(file)
sys.path[:] = request["path"]
package = types.ModuleType("kernel_on_trial")
package.__path__ = [request["folder"]]
sys.modules[package.__name__] = package
importlib.import_module("kernel_on_trial.kernel_self_test").answer(request)
"""


def try_in_child(candidate: Candidate, device: torch.device, timeout: float) -> tuple[Verdict, bool]:
    """Run the test in a new process; whether the verdict is final comes with it."""
    try:
        with tempfile.TemporaryDirectory(prefix="mpformer_hf_self_test_", ignore_cleanup_errors=True) as folder:
            return _try_in_folder(candidate, device, timeout, Path(folder))
    except OSError as error:
        return Verdict(is_good=False, reason=f"the self-test could not be started: {describe(error)}"), False


def _try_in_folder(candidate: Candidate, device: torch.device, timeout: float, folder: Path) -> tuple[Verdict, bool]:
    request = {
        "opener": candidate.opener,
        "arguments": candidate.arguments,
        "device": str(device),
        "folder": str(Path(__file__).resolve().parent),
        "path": sys.path,
        "answer": str(folder / "answer.json"),
    }
    request_file = folder / "request.json"
    request_file.write_text(json.dumps(request))
    environment = {**os.environ, **candidate.environment, IN_CHILD: "1"}
    environment.pop("MPFORMER_MSDA_BACKEND", None)
    with (folder / "noise.txt").open("w") as noise:
        status = _run([sys.executable, "-c", SCRIPT, str(request_file)], environment, noise, timeout)
    answer = _read_answer(folder / "answer.json")
    if answer is None:
        return Verdict(is_good=False, reason=f"the self-test itself did not start: {_describe_end(status)}"), False
    return judge(status, answer, timeout)


def _run(command: list[str], environment: dict[str, str], noise: IO[str], timeout: float) -> int | None:
    """The exit status of the command, None if it had to be stopped, together with what it had started."""
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=noise, stderr=noise, start_new_session=True
    ) as process:
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, AttributeError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()


def _read_answer(path: Path) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return answer


def judge(status: int | None, answer: dict[str, Any], timeout: float) -> tuple[Verdict, bool]:
    """The verdict, and whether another attempt would end the same way.

    Args:
        status: of the child; None if it was stopped.
        answer: the last that the child wrote; its stage is "start", "run" or "done".
        timeout: in seconds, for the message.
    """
    if answer["stage"] == "done":
        return Verdict(**answer["verdict"]), answer["is_final"]
    doing = {"start": "while it was loaded", "run": "while it ran"}[answer["stage"]]
    if status is None:
        return Verdict(is_good=False, reason=f"it did not finish within {timeout:g} s, stopped {doing}"), True
    reason = f"it ended its process with {_describe_end(status)} {doing}"
    return Verdict(is_good=False, reason=reason), status != -_SIGKILL


_SIGKILL = 9  # also sent when memory runs out, which may pass


def _describe_end(status: int | None) -> str:
    if status is None:
        return "stopped after the time limit"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def describe(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------------- inside of the child


def answer(request: dict[str, Any]) -> None:
    """Try the candidate and write down what came of it, step by step: it may end this process at any time."""
    path = Path(request["answer"])

    def write(stage: str, **content: Any) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"stage": stage, **content}))
        part.replace(path)

    def refuse(reason: str, *, is_final: bool) -> None:
        write("done", verdict=asdict(Verdict(is_good=False, reason=reason)), is_final=is_final)

    write("start")
    device = torch.device(request["device"])
    try:
        torch.zeros(1, device=device)
        module, _, function = request["opener"].partition(":")
        opener = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        trial: Trial = opener(request["arguments"], device)
    except Exception as error:  # whatever it is, it is the answer
        refuse(f"it cannot be loaded: {describe(error)}", is_final=False)
        return
    write("run")
    try:
        fault = find_fault(trial.run, device)
        times = None if fault or trial.rival is None else [measure(run, device) for run in (trial.run, trial.rival)]
    except Exception as error:
        refuse(f"it failed: {describe(error)}", is_final=not isinstance(error, MemoryError | torch.OutOfMemoryError))
        return
    milliseconds, rival_milliseconds = times or (None, None)
    verdict = Verdict(not fault, fault or "", milliseconds, rival_milliseconds, trial.notes)
    write("done", verdict=asdict(verdict), is_final=True)


SMALL: Shapes = ((4, 6), (8, 12), (16, 24))
ENCODER: Shapes = ((16, 16), (32, 32), (64, 64))  # of an image of 512 x 512
NUM_HEADS, HEAD_DIM, NUM_POINTS = 8, 32, 4
NAMES = ("output", "gradient of the value", "gradient of the locations", "gradient of the weights")
# Largest error of the output and of gradients, relative to the largest element.
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 4e-2)}


@dataclass(frozen=True)
class Inputs:
    """Arguments of the operator, and a gradient of its output, on the device."""

    value: Tensor
    shapes: Shapes
    locations: Tensor
    weights: Tensor
    direction: Tensor


def draw_inputs(shapes: Shapes, batch_size: int, num_queries: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Seeded inputs; samples keep away from the lines between centres, where the derivative jumps, and some lie outside."""
    generator = torch.Generator().manual_seed(0)
    per_point = (batch_size, num_queries, NUM_HEADS, len(shapes), NUM_POINTS)
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)[:, None]  # (L, 1, 2)
    cells = (torch.rand(*per_point, 2, generator=generator, dtype=torch.float64) * (sizes + 2)).floor() - 1.5
    inside = 0.1 + 0.8 * torch.rand(*per_point, 2, generator=generator, dtype=torch.float64)
    num_cells = sum(height * width for height, width in shapes)
    return Inputs(
        value=torch.randn(batch_size, num_cells, NUM_HEADS, HEAD_DIM, generator=generator).to(device, dtype),
        shapes=shapes,
        locations=((cells + inside) / sizes).float().to(device),
        weights=torch.rand(per_point, generator=generator).to(device),
        direction=torch.randn(batch_size, num_queries, NUM_HEADS, HEAD_DIM, generator=generator).to(device, dtype),
    )


def run_with_gradients(run: Attention, inputs: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients of value, locations and weights; everything in `dtype` if that is given."""
    tensors = (inputs.value, inputs.locations, inputs.weights)
    value, locations, weights = (tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors)
    output = run(value, inputs.shapes, locations, weights)
    direction = inputs.direction.to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, (value, locations, weights), direction)]


def find_fault(run: Attention, device: torch.device) -> str | None:
    """One line about what is wrong with the numbers; None if they are right."""
    from .deformable_attention import ms_deform_attn_reference  # noqa: PLC0415 - that file imports this one

    for dtype, tolerances in TOLERANCES.items():
        inputs = draw_inputs(SMALL, batch_size=3, num_queries=100, dtype=dtype, device=device)
        expected = run_with_gradients(ms_deform_attn_reference, inputs, torch.float64)
        results = run_with_gradients(run, inputs)
        limits = [tolerances[0]] + [tolerances[1]] * 3
        for name, result, wanted, limit in zip(NAMES, results, expected, limits, strict=True):
            if result.shape != wanted.shape:
                return f"wrong shape: the {name} is {tuple(result.shape)}, expected {tuple(wanted.shape)}"
            error = ((result.double() - wanted).abs().max() / wanted.abs().max()).item()
            if not error <= limit:  # NaN must not pass
                return f"wrong numbers: the {name} of a value of {dtype} is off by {error:.1e}, allowed is {limit:.0e}"
    return _find_spill(run, device)


def _find_spill(run: Attention, device: torch.device) -> str | None:
    """Locations of a training that diverges must neither end the process nor spoil other queries."""
    inputs = draw_inputs(SMALL, batch_size=1, num_queries=20, dtype=torch.float32, device=device)
    clean = run_with_gradients(run, inputs)
    extremes = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30)
    for query, extreme in enumerate(extremes):
        inputs.locations[0, query] = extreme
    output, _, *gradients = run_with_gradients(run, inputs)
    pairs = zip((output, *gradients), (clean[0], *clean[2:]), strict=True)
    first = len(extremes)
    if all(torch.allclose(one[0, first:], other[0, first:], rtol=1e-3, atol=1e-4) for one, other in pairs):
        return None
    return "locations that are not finite spoil other queries"


def measure(run: Attention, device: torch.device, num_runs: int = 7) -> float:
    """Milliseconds of forward and backward at the encoder's shape, medians of float32 and bfloat16 added up."""
    total = 0.0
    for dtype in TOLERANCES:
        inputs = draw_inputs(ENCODER, batch_size=2, num_queries=5376, dtype=dtype, device=device)
        seconds = []
        for _ in range(num_runs):
            _synchronize(device)
            start = time.perf_counter()
            run_with_gradients(run, inputs)
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
        total += 1e3 * statistics.median(seconds[2:])  # the first ones compile and warm up
    return total


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
