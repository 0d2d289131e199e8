"""What gloo needs of a machine, on GPU runs too: it connects every rank with all others."""

import os
import resource
import socket
from collections.abc import Iterable
from ipaddress import ip_address
from itertools import chain

import psutil

from mtp_dist.errors import ConfigError

MAX_OPEN_FILES = 65_536
"""The soft limit that a rank asks for; some programs walk through all numbers up to it, so not the hard limit."""
OTHER_FILES = 512
"""What a rank has open besides its connections to the other ranks, at least."""


def raise_open_files_limit(world_size: int) -> None:
    """Raise this process's limit of open files, 1,024 on most systems. Raise ConfigError if it cannot be enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if max(soft, limit) < world_size + OTHER_FILES:
        raise ConfigError(
            f"{socket.gethostname()} allows {limit} open files per process (ulimit -Hn), and each of {world_size} "
            f"ranks connects to all others: raise the hard limit to {MAX_OPEN_FILES}"
        )


def choose_gloo_interface(master_address: str) -> None:
    """Set GLOO_SOCKET_IFNAME, unless it is set, to an interface that NCCL_SOCKET_IFNAME allows and rank 0 is behind.

    gloo itself takes the address that the host's name stands for, which is 127.0.1.1 on many systems.
    """
    interfaces = {
        name: {address.address.partition("%")[0] for address in addresses if address.family != psutil.AF_LINK}
        for name, addresses in psutil.net_if_addrs().items()
    }
    allowed = {name: addresses for name, addresses in interfaces.items() if addresses and _nccl_allows(name)}
    address = _source_address(master_address, chain.from_iterable(allowed.values()))
    leading = [name for name, addresses in allowed.items() if address in addresses]
    if name := next(iter(leading or allowed if os.environ.get("NCCL_SOCKET_IFNAME") else leading), None):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _nccl_allows(interface: str) -> bool:
    """Read NCCL_SOCKET_IFNAME as NCCL does: prefixes with commas between, `=` for whole names, `^` for all others."""
    names = os.environ.get("NCCL_SOCKET_IFNAME", "")
    excludes, names = names.startswith("^"), names.removeprefix("^")
    is_exact, names = names.startswith("="), names.removeprefix("=")
    matches = any(interface == name if is_exact else interface.startswith(name) for name in names.split(","))
    return not names or matches != excludes


def _source_address(master_address: str, allowed: Iterable[str]) -> str | None:
    """Return the address from which this machine talks to rank 0's; on that one, from which to the other nodes."""
    source = _route(master_address)
    if not source or not _is_loopback(source):
        return source
    if master_address != "localhost" and not _is_loopback(master_address):
        # Rank 0's own machine, whose name stands for itself here only. A documentation address: any beyond a router.
        # Without a router any network, as no other node reaches the loopback; a machine that has none is alone.
        networks = (
            address for address in allowed if not ip_address(address).is_link_local and not _is_loopback(address)
        )
        source = _route("192.0.2.1") or next(networks, source)
    return "127.0.0.1" if _is_loopback(source) else source


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:  # a name
        return False


def _route(address: str) -> str | None:
    """Return the address of the interface that packets for another one leave by; nothing is sent."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None
