"""Stopping several processes after the same step, although each hears of it at a moment of its own."""

import torch
from accelerate import Accelerator
from torch import distributed


class StopVote:
    """What one process was asked to do, all do, in the same call.

    The answer to a call is the result of the call before it. So no step waits for other processes, and no GPU for its CPU;
    the stop comes one step later. With a single process the answer is immediate.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        """Begin without any request."""
        self._accelerator = accelerator
        self._pending: tuple[torch.Tensor, distributed.Work] | None = None

    def __call__(self, requested: int) -> int:
        """Return the signal that any process was asked to stop with, 0 for none; all processes call it equally often."""
        if self._accelerator.num_processes == 1:
            return requested
        pending = self._pending
        signals = torch.full((1,), requested, device=self._accelerator.device)
        work = distributed.all_reduce(signals, distributed.ReduceOp.MAX, async_op=True)
        self._pending = (signals, work)
        if pending is None:
            return 0
        pending[1].wait()
        return int(pending[0].item())
