"""The interface and the open files of gloo's connections."""

import os
import resource
import socket
from types import SimpleNamespace

import psutil
import pytest

from mtp_dist.distributed import sockets
from mtp_dist.errors import ConfigError

INTERFACES = {
    "lo": "127.0.0.1",
    "eth0": "10.0.0.7",
    "eth1": "192.168.0.7",
    "ib0": "10.1.0.7",
    "docker0": "172.17.0.1",
    "link0": "169.254.3.7",
    "link1": "fe80::7%link1",
}


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """By address, from which of its own this machine sends to it."""
    monkeypatch.setattr(os, "environ", {})
    link = SimpleNamespace(family=psutil.AF_LINK, address="00:00:00:00:00:00")
    addresses = {
        name: [link, SimpleNamespace(family=socket.AF_INET, address=text)] for name, text in INTERFACES.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses | {"down0": [link]})
    routes = {"node-0": "10.0.0.7", "127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "192.0.2.1": "192.168.0.7"}
    monkeypatch.setattr(sockets, "_route", routes.get)
    return routes


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
def test_gloo_takes_an_interface_that_leads_to_rank_0(
    routes: dict[str, str], master: str, nccl: str | None, interface: str | None
) -> None:
    if nccl:
        os.environ["NCCL_SOCKET_IFNAME"] = nccl
    sockets.choose_gloo_interface(master)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface


def test_a_host_whose_name_stands_for_the_loopback(routes: dict[str, str]) -> None:
    routes["node-0"] = "127.0.1.1"
    sockets.choose_gloo_interface("node-0")
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "eth1"


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
def test_rank_0_without_a_default_route(
    routes: dict[str, str], monkeypatch: pytest.MonkeyPatch, interfaces: str, nccl: str | None, interface: str
) -> None:
    """Other nodes cannot reach the loopback: it is taken only if there is no other address."""
    routes["node-0"] = "127.0.1.1"
    del routes["192.0.2.1"]
    addresses = psutil.net_if_addrs()
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {name: addresses[name] for name in interfaces.split()})
    if nccl:
        os.environ["NCCL_SOCKET_IFNAME"] = nccl
    sockets.choose_gloo_interface("node-0")
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface
    del os.environ["GLOO_SOCKET_IFNAME"]
    sockets.choose_gloo_interface("localhost")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_the_user_s_interface_stays(routes: dict[str, str]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "eth1"
    sockets.choose_gloo_interface("node-0")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"


def test_the_route_of_this_machine() -> None:
    assert sockets._route("127.0.0.1") == "127.0.0.1"
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
def test_open_files(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], raised: tuple[int, int] | None) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: calls.append(new))
    sockets.raise_open_files_limit(1024)
    assert calls == ([raised] if raised else [])


def test_too_few_open_files_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    sockets.raise_open_files_limit(512)
    with pytest.raises(ConfigError, match=r"allows 1024 open files per process \(ulimit -Hn\), and each of 1000 ranks"):
        sockets.raise_open_files_limit(1000)
