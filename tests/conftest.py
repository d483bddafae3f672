"""What holds for every test: seeded, offline, and nothing left behind outside a temporary folder.

Markers say what a test needs; where that is missing the test is skipped with the reason. Threads are left as torch finds
them: on a machine that is shared, `OMP_NUM_THREADS=1` in the environment keeps the tests from fighting over its cores.
"""

import importlib.util
import ipaddress
import os
import random
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# Read once, when transformers and its friends are imported, so this must stand before any import of them.
SCRATCH = tempfile.TemporaryDirectory(prefix="mpformer_hf_tests_", ignore_cleanup_errors=True)
for variable in list(os.environ):
    if variable.startswith(("HF_", "TRANSFORMERS_")):  # a user's own caches, tokens and mirrors
        del os.environ[variable]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HOME": str(Path(SCRATCH.name, "huggingface")),
    "XDG_CACHE_HOME": str(Path(SCRATCH.name, "cache")),
    "TORCH_HOME": str(Path(SCRATCH.name, "torch")),
    "TORCHINDUCTOR_CACHE_DIR": str(Path(SCRATCH.name, "inductor")),
    "MPLCONFIGDIR": str(Path(SCRATCH.name, "matplotlib")),
    "MPLBACKEND": "Agg",
}

# Not a test: a program for an environment that has what it imports.
collect_ignore = ["integration/on_lowest_versions.py"]


class NetworkBlockedError(RuntimeError):
    """Not an `OSError`: libraries answer those by falling back to a cache, which would hide the attempt."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--network", action="store_true", help="allow the network and run the tests marked `network`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = reasons_to_skip(network_allowed=config.getoption("--network"))
    for item in items:
        for marker in {mark.name for mark in item.iter_markers()} & reasons.keys():
            item.add_marker(pytest.mark.skip(reason=reasons[marker]))


def pytest_unconfigure() -> None:
    SCRATCH.cleanup()


def reasons_to_skip(*, network_allowed: bool) -> dict[str, str]:
    """Say of each marker whose need is not met here what is missing."""
    reasons = {
        "gpu": (torch.cuda.is_available(), "needs a CUDA device; torch sees none"),
        "multi_gpu": (torch.cuda.device_count() > 1, f"needs two CUDA devices; torch sees {torch.cuda.device_count()}"),
        "network": (network_allowed, "needs the Hugging Face Hub; run pytest with --network"),
        "reference": (importlib.util.find_spec("detectron2") is not None, "needs detectron2, which is not installed"),
    }
    return {marker: reason for marker, (is_met, reason) in reasons.items() if not is_met}


def is_on_this_machine(host: str | bytes | None) -> bool:
    """True for loopback addresses, the wildcard address and this machine's own names."""
    host = host.decode() if isinstance(host, bytes) else host
    if host in {None, "", "localhost", socket.gethostname()}:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse_other_machines(host: str | bytes | None) -> None:
    if not is_on_this_machine(host):
        raise NetworkBlockedError(
            f"A test tried to reach {host!r}. Tests run offline: use local files, or mark the test with "
            "`@pytest.mark.network` and run pytest with --network."
        )


@pytest.fixture(autouse=True, scope="session")
def _no_network(request: pytest.FixtureRequest) -> Iterator[None]:
    """Refuse name look-ups of, and connections to, other machines; child processes have HF_HUB_OFFLINE alone."""
    if request.config.getoption("--network"):
        yield
        return

    look_up, connect, connect_ex = socket.getaddrinfo, socket.socket.connect, socket.socket.connect_ex

    def guarded_look_up(host, *arguments, **keywords):
        refuse_other_machines(host)
        return look_up(host, *arguments, **keywords)

    def guarded_connect(self, address):
        if self.family in {socket.AF_INET, socket.AF_INET6}:
            refuse_other_machines(address[0])
        return connect(self, address)

    def guarded_connect_ex(self, address):
        if self.family in {socket.AF_INET, socket.AF_INET6}:
            refuse_other_machines(address[0])
        return connect_ex(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Start every test from the same random state, so that its result does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is the one that libraries draw from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    """Forget what a test's Accelerator or Trainer set for the whole process, such as the precision."""
    yield
    if "accelerate" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the package promises the same results on."""
    return torch.device(request.param)
