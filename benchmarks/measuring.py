"""Time of several runs side by side, peak memory that a run adds to a process, and the file with the result."""

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm


def measure_times(
    runs: dict[str, Callable[[], Any]], repeats: int, device: str, description: str | None = None
) -> dict[str, dict[str, float]]:
    """Seconds of each run, interleaved after one run of each to warm up: minimum and median."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc=description, leave=False, disable=description is None):
        for name, run in runs.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: {"min": min(times), "median": statistics.median(times)} for name, times in seconds.items()}


def synchronise(device: str) -> None:
    """Wait for the GPU, where there is one."""
    if device != "cpu":
        torch.cuda.synchronize()


def measure_added_memory(run: Callable[[], None], device: str) -> float:
    """MiB that a run adds at its peak: on a CPU of the resident set of this process (Linux), on a GPU of what torch allocates."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what was freed before could be used again and would not show
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = read_status("VmRSS")
    run()
    return (read_status("VmHWM") - before) / 2**20


def read_status(name: str) -> int:
    """Bytes of this process that Linux counts: `VmRSS`, the resident set, or `VmHWM`, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def write_report(output: Path | None, program: str, report: dict[str, Any]) -> None:
    """Write a result as JSON, with the command that made it and the version of torch; `None` writes nothing."""
    if output is None:
        return
    command = " ".join([f"python -m benchmarks.{program}", *sys.argv[1:]])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"command": command, "torch": torch.__version__, **report}, indent=2) + "\n")
