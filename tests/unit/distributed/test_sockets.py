"""The network interface and the open files for gloo's connections."""

import os
import resource
import socket
from types import SimpleNamespace

import psutil
import pytest

from mtp_dist.distributed import sockets
from mtp_dist.errors import LaunchError

INTERFACES = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "eth1": "192.168.0.7", "ib0": "10.1.0.7", "docker0": "172.17.0.1"}
INTERFACES |= {"link0": "169.254.3.7", "link1": "fe80::7%link1"}


@pytest.fixture
def routes(monkeypatch):
    """By address, this machine's address on the route to it."""
    monkeypatch.setattr(os, "environ", {})
    link = SimpleNamespace(family=psutil.AF_LINK, address="00:00:00:00:00:00")
    found = {name: [link, SimpleNamespace(family=socket.AF_INET, address=text)] for name, text in INTERFACES.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found | {"down0": [link]})
    routes = {"node-0": "10.0.0.7", "127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "192.0.2.1": "192.168.0.7"}
    monkeypatch.setattr(sockets, "_route", routes.get)
    return routes


def chosen_interface(master, **variables):
    os.environ.clear()
    os.environ.update({name: value for name, value in variables.items() if value})
    sockets.choose_gloo_interface(master)
    return os.environ.get("GLOO_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("master", "nccl", "interface"),
    [
        ("node-0", None, "eth0"),
        ("127.0.0.1", None, "lo"),
        ("localhost", None, "lo"),
        ("node-0", "ib", "ib0"),
        ("node-0", "eth", "eth0"),
        ("node-0", "=eth1", "eth1"),
        ("node-0", "^docker,lo", "eth0"),
        ("node-0", "^eth,lo", "ib0"),
        ("node-0", "ib,down", "ib0"),
        ("no-such-host", None, None),
        ("no-such-host", "ib0", "ib0"),
        ("node-0", "wlan0", None),
    ],
)
def test_gloo_uses_an_interface_towards_rank_0(routes, master, nccl, interface):
    assert chosen_interface(master, NCCL_SOCKET_IFNAME=nccl) == interface
    assert chosen_interface(master, NCCL_SOCKET_IFNAME=nccl, GLOO_SOCKET_IFNAME="eth1") == "eth1", "the user's stays"


@pytest.mark.parametrize(
    ("interfaces", "nccl", "interface"),
    [
        ("lo eth0 eth1 docker0", None, "eth0"),
        ("lo eth0 eth1 docker0", "^docker,eth0", "eth1"),
        ("lo link0 link1 eth1 eth0", None, "eth1"),
        ("lo link0 link1", None, "lo"),
        ("lo", None, "lo"),
    ],
)
def test_rank_0_whose_name_resolves_to_the_loopback(routes, monkeypatch, interfaces, nccl, interface):
    """Other nodes cannot reach the loopback: it is used only if there is no other address."""
    routes["node-0"] = "127.0.1.1"
    assert chosen_interface("node-0") == "eth1", "the default route"
    del routes["192.0.2.1"]
    addresses = psutil.net_if_addrs()
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {name: addresses[name] for name in interfaces.split()})
    assert chosen_interface("node-0", NCCL_SOCKET_IFNAME=nccl) == interface
    assert chosen_interface("localhost", NCCL_SOCKET_IFNAME=nccl) == "lo"


def test_unknown_host_has_no_route():
    assert sockets._route("no-such-host.invalid") is None


@pytest.mark.parametrize(
    ("limits", "raised"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, 1_000_000), (65_536, 1_000_000)),
        ((1024, resource.RLIM_INFINITY), (65_536, resource.RLIM_INFINITY)),
        ((100_000, 1_000_000), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_open_files(monkeypatch, limits, raised):
    calls = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: calls.append(new))
    sockets.raise_open_files_limit(1024)
    assert calls == ([raised] if raised else [])


def test_too_few_open_files_for_all_ranks(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    sockets.raise_open_files_limit(512)
    with pytest.raises(LaunchError, match=r"allows 1024 open files per process \(ulimit -Hn\), and each of 1000 ranks"):
        sockets.raise_open_files_limit(1000)
