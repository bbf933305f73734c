"""Checks of whether processes of this machine and of other machines can connect to each other."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

import psutil

from ..process.place import environ
from .finding import Finding, note, ok, problem


def check_network() -> Iterator[Finding]:
    """Check a rendezvous port on the loopback interface, the name of this host, and the network interfaces."""
    yield _rendezvous()
    outer = _outer_interfaces()
    yield name_finding(socket.gethostname(), _addresses(socket.gethostname()), outer)
    if outer:
        yield ok("interfaces", ", ".join(f"{name} {address}" for name, address in outer))
    else:
        yield note(
            "interfaces", "loopback only", "only runs on this machine are possible; other machines cannot reach it"
        )
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = environ(variable)
        names = set(psutil.net_if_addrs())
        if (
            value
            and not value.startswith("^")
            and not any(name.startswith(part.lstrip("=")) for part in value.split(",") for name in names)
        ):
            yield problem(
                variable, f"{value} matches no interface", f"unset it, or set it to one of {', '.join(sorted(names))}"
            )


def name_finding(host: str, addresses: list[str], outer: list[tuple[str, str]]) -> Finding:
    """Return whether other hosts can reach this host at the address to which its name resolves.

    Debian and Ubuntu map a machine's own name to 127.0.1.1; gloo then listens where no other host can connect.

    Args:
        host: Name of this machine.
        addresses: Addresses to which the name resolves.
        outer: Names and addresses of the interfaces other than loopback.
    """
    if not addresses:
        way_out = "add it to /etc/hosts with this machine's address; until then: export GLOO_SOCKET_IFNAME="
        return problem(
            "host name", f"{host} does not resolve to an address", way_out + (outer[0][0] if outer else "lo")
        )
    shown = f"{host} → {', '.join(addresses)}"
    if all(ipaddress.ip_address(address).is_loopback for address in addresses):
        if not outer:
            return ok("host name", f"{shown} (no other interface)")
        way_out = f"for runs on several hosts: export GLOO_SOCKET_IFNAME={outer[0][0]}, or correct /etc/hosts"
        return note("host name", f"{shown}: other hosts cannot connect to it", way_out)
    return ok("host name", shown)


def _rendezvous() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                return ok("rendezvous", f"port {port} on the loopback interface is free and reachable")
    except OSError as error:
        return problem(
            "rendezvous", f"cannot use a port on 127.0.0.1: {error}", "check `ip addr show lo` and the firewall"
        )


def _addresses(host: str) -> list[str]:
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []


def _outer_interfaces() -> list[tuple[str, str]]:
    """Return the interfaces that are up and have an IPv4 address other than loopback; container bridges come last."""
    states = psutil.net_if_stats()
    found = [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and states[name].isup and not ipaddress.ip_address(entry.address).is_loopback
    ]
    return sorted(found, key=lambda pair: pair[0].startswith(("docker", "br-", "veth", "virbr", "cni")))
