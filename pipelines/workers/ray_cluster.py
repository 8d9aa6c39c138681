"""The connection to a Ray cluster that runs already, and what its nodes are to see of this machine."""

import contextlib
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightopd.cache.buckets.places import place_of
from lightopd.errors import ConfigError
from lightopd.pipelines.workers.shared_shards import CLAIMS

ADDRESS = "RAY_ADDRESS"
CONNECT_S = 10.0
"""Seconds for the head of a cluster to take a connection."""
_START = "start one with `ray start --head`, and nodes with `ray start --address=HEAD:6379`"


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """The package `ray`, connected to the cluster at `RAY_ADDRESS`, or else to the one of this machine.

    Raises:
        ConfigError: the extra is not installed; no cluster is there, or one of another version.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--execution ray needs the package ray: pip install 'lightopd[ray]'") from error
    address = os.environ.get(ADDRESS) or "auto"
    _refuse_address(address)
    # Ray prints what it says of killed processes, and stdout is the report's.
    with contextlib.redirect_stdout(sys.stderr), _own_sigterm():
        _join(ray, address)
        try:
            yield ray
        finally:
            ray.shutdown()


def _join(ray: Any, address: str) -> None:
    try:
        with _own_sigterm():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        where = "on this machine" if address == "auto" else f"at {ADDRESS}={address}"
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ConfigError(f"no Ray cluster {where} can be used ({first}); {_START}") from error


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """What SIGTERM does is afterwards what it did before, whatever Ray sets."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # outside the main thread, where Ray sets none
            signal.signal(signal.SIGTERM, before)


def _refuse_address(address: str) -> None:
    """Refuse an address that is none of a head, or where nobody answers: Ray itself waits a minute."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdecimal():
        raise ConfigError(
            f"{ADDRESS} is {address}, and a head's address such as 10.0.0.1:6379 is wanted; "
            "give the command on a node of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster at {ADDRESS}={address} ({error}); {_START}") from error


@contextlib.contextmanager
def seen_by_all(cache: Path) -> Iterator[Path | None]:
    """A file in the cache folder, there within the block: a node that does not see it has another folder.

    None for a cache at a URL, which each node reaches by itself.
    """
    if place_of(cache) is not None:
        yield None
        return
    token = cache.absolute() / CLAIMS / f"ray-{uuid.uuid4().hex}"
    token.parent.mkdir(parents=True, exist_ok=True)
    token.write_bytes(b"")
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)
        for folder in (token.parent, cache):
            with contextlib.suppress(OSError):  # claims are in it, and the cache
                folder.rmdir()
