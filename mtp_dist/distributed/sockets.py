"""The open-files limit and network interface for gloo, which connects every rank with all others, on GPU runs too."""

import os
import resource
import socket
from collections.abc import Iterable
from ipaddress import ip_address
from itertools import chain

import psutil

from mtp_dist.errors import LaunchError

MAX_OPEN_FILES = 65_536
"""Soft limit that a rank sets. Not the hard limit: some programs iterate over all numbers up to it."""
OTHER_FILES = 512
"""Files that a rank has open besides its connections to the other ranks, at least."""


def raise_open_files_limit(world_size: int) -> None:
    """Raise this process's limit of open files, usually 1,024. Raise LaunchError if the hard limit is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if max(soft, limit) < world_size + OTHER_FILES:
        raise LaunchError(
            f"{socket.gethostname()} allows {limit} open files per process (ulimit -Hn), and each of {world_size} "
            f"ranks connects to all others: raise the hard limit to {MAX_OPEN_FILES}"
        )


def choose_gloo_interface(master_address: str) -> None:
    """Set GLOO_SOCKET_IFNAME, unless it is set, to an interface towards rank 0 that NCCL_SOCKET_IFNAME allows.

    gloo itself uses the address to which the host's name resolves, which is 127.0.1.1 on many systems.
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
    """Apply NCCL_SOCKET_IFNAME as NCCL does: comma-separated prefixes, `=` for exact names, `^` for all others."""
    names = os.environ.get("NCCL_SOCKET_IFNAME", "")
    excludes, names = names.startswith("^"), names.removeprefix("^")
    is_exact, names = names.startswith("="), names.removeprefix("=")
    matches = any(interface == name if is_exact else interface.startswith(name) for name in names.split(","))
    return not names or matches != excludes


def _source_address(master_address: str, allowed: Iterable[str]) -> str | None:
    """Return the address from which this machine connects to rank 0's, or rank 0's machine to the other nodes."""
    source = _route(master_address)
    if not source or not _is_loopback(source):
        return source
    if master_address != "localhost" and not _is_loopback(master_address):
        # Rank 0's own machine, whose name resolves to the loopback. Use the route to a documentation address, which is
        # beyond any router; without a router any network, because other nodes cannot reach the loopback.
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
    """Return the local address of the route to another address; nothing is sent."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None
