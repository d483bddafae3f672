"""Several processes that train together on this machine, over gloo, for tests."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

SECONDS_TO_WAIT = 200

needs_gloo = pytest.mark.skipif(
    not distributed.is_gloo_available(), reason="needs the gloo backend of torch.distributed"
)


def run_processes(
    work: Callable[[int, Path], dict[str, Any]], folder: Path, num_processes: int = 2
) -> list[dict[str, Any]]:
    """Call `work(rank, folder)` in new processes that form a group; returns what each of them has returned.

    What a process raises is raised here, and none of them is left behind.
    """
    arguments = (work, folder, num_processes)
    processes = multiprocessing.spawn(_run_in_group, args=arguments, nprocs=num_processes, join=False)
    end = time.monotonic() + SECONDS_TO_WAIT
    try:
        while not processes.join(timeout=1.0):
            assert time.monotonic() < end, f"The processes did not finish within {SECONDS_TO_WAIT} seconds."
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_processes)]


def _run_in_group(rank: int, work: Callable[[int, Path], dict[str, Any]], folder: Path, num_processes: int) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of this machine need not resolve
    distributed.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=num_processes,
        timeout=timedelta(seconds=SECONDS_TO_WAIT // 2),
    )
    results = work(rank, folder)
    distributed.barrier()
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@contextmanager
def same_points_everywhere() -> Iterator[None]:
    """`torch.rand` gives every row the same points, whatever the number of rows: results do not depend on how images are shared."""
    draw = torch.rand

    def repeated(num_rows: int, num_points: int, two: int, **keywords: Any) -> Tensor:
        points = draw(1, num_points, two, generator=torch.Generator().manual_seed(num_points), **keywords)
        return points.expand(num_rows, -1, -1).clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", repeated)
        yield
