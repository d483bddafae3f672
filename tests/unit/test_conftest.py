"""The promises of tests/conftest.py, on which all other tests rely."""

import os
import random
import socket
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch

from tests.conftest import NetworkBlockedError, reasons_to_skip


def test_the_hub_is_offline_and_its_caches_are_temporary():
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    for folder in (huggingface_hub.constants.HF_HOME, huggingface_hub.constants.HF_HUB_CACHE):
        assert "mpformer_hf_tests_" in folder
        assert Path.home() not in Path(folder).parents


def test_no_setting_of_the_user_survives():
    settings = {name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))}
    assert settings == {"HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HOME"}


@pytest.mark.parametrize("repetition", [1, 2])
def test_every_test_starts_from_the_same_random_state(repetition):
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))
    assert random.random() == random.Random(0).random()
    assert np.random.random() == np.random.RandomState(0).random_sample()  # noqa: NPY002 - it is what is promised


@pytest.fixture
def guarded(request):
    if request.config.getoption("--network"):
        pytest.skip("--network lifts the guard")


@pytest.mark.usefixtures("guarded")
def test_name_lookups_are_refused_with_the_way_out():
    with pytest.raises(NetworkBlockedError, match=r"reach 'host\.invalid'.*--network"):
        socket.create_connection(("host.invalid", 80))


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("address", [("192.0.2.1", 9), ("2001:db8::1", 9)], ids=["ipv4", "ipv6"])
def test_connections_to_other_machines_are_refused(address):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    # "Connecting" a datagram socket sends nothing, should the guard ever fail.
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        with pytest.raises(NetworkBlockedError):
            client.connect(address)
        with pytest.raises(NetworkBlockedError):
            client.connect_ex(address)


def test_loopback_connections_work():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"hello")
            assert accepted.recv(5) == b"hello"


def test_each_missing_need_has_a_reason_and_allowing_the_network_removes_its_own():
    offline, online = reasons_to_skip(network_allowed=False), reasons_to_skip(network_allowed=True)
    assert "--network" in offline["network"]
    assert offline.keys() - online.keys() == {"network"}
    assert ("gpu" in offline) != torch.cuda.is_available()
    assert ("multi_gpu" in offline) == (torch.cuda.device_count() < 2)


def test_the_device_fixture_names_a_device_that_computes(device):
    assert torch.ones(2, device=device).sum().item() == 2
