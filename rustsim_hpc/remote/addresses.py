"""Endpoints of remote workers: ``tcp://HOST:PORT``, and whether they can be reached from other machines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

from rustsim_hpc.errors import RemoteError

_ENDPOINT = re.compile(
    r"tcp://(\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+|\*)):(?P<port>\d{1,5}|\*)"
)
_LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """Where a worker is.

    Attributes:
        host: a name or number, IPv6 without brackets; ``localhost`` is 127.0.0.1; ``*`` for every interface.
        port: a number, or None for any that is free (to bind to).
        loopback: whether only processes of this machine can reach it.
    """

    host: str
    port: int | None
    loopback: bool

    @property
    def endpoint(self) -> str:
        """The address as ZeroMQ takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{'*' if self.port is None else self.port}"


def parse_endpoint(endpoint: str, *, to_bind: bool = False) -> Address:
    """Return the address that an endpoint names.

    Args:
        endpoint: ``tcp://HOST:PORT``; IPv6 addresses are in brackets.
        to_bind: ``*`` may stand for the host (all interfaces) and for the port (any that is free).

    Raises:
        RemoteError: it is not an endpoint.
    """
    match = _ENDPOINT.fullmatch(endpoint)
    hint = "write tcp://HOST:PORT, as in tcp://127.0.0.1:5555 or tcp://[::1]:5555"
    if match is None:
        raise RemoteError(f'"{endpoint}" is not an endpoint of a remote worker', hint=hint)
    host = match["six"] or match["name"]
    port = None if match["port"] == "*" else int(match["port"])
    if not to_bind and (host == "*" or port is None):
        raise RemoteError(f'"{endpoint}" names no single worker to connect to', hint=hint)
    if port is not None and not 0 < port < 2**16:
        raise RemoteError(f'"{endpoint}": a port lies in 1..65535', hint=hint)
    if host == "localhost":  # never resolved by a name server, which might answer differently
        host = _LOCAL
    return Address(host, port, _is_loopback(host))


def _is_loopback(host: str) -> bool:
    """Return whether a host is certainly this machine, which is unknown for names."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
