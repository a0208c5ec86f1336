"""Refuse every connection beyond this machine, in each Python process that has this folder on PYTHONPATH.

An audit hook cannot be removed once it is set, and child processes inherit PYTHONPATH, so kernels and what they start
are covered. Programs that are not Python are not: for those the tests add a network namespace where the system allows
one.
"""

import ipaddress
import socket
import sys

RESOLVERS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
SENDERS = {"socket.connect", "socket.sendto", "socket.sendmsg"}


class OfflineError(ConnectionRefusedError):
    """A connection that a test may not make."""


def is_local(host) -> bool:
    """True for loopback, this machine's own name, and the wildcard of a listening socket."""
    if isinstance(host, bytes):
        host = host.decode()
    if not host or host in ("localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse(event: str, arguments: tuple) -> None:
    """The audit hook: raises OfflineError for a name or an address that is not local."""
    if event in RESOLVERS:
        host = arguments[0]
    elif event in SENDERS:
        address = arguments[1]
        # Unix sockets have a path for an address; a connected socket sends without one.
        if not isinstance(address, tuple) or not isinstance(address[0], (str, bytes)):
            return
        host = address[0]
    else:
        return
    if not is_local(host):
        raise OfflineError(f"the tests run offline; {event} to {host!r} refused")


sys.addaudithook(refuse)
