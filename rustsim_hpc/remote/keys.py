"""Keys of remote workers and of those who may use them: CURVE key pairs in small files.

A folder of keys::

    worker.key         secret of the workers        stays with the workers
    worker.pub         what clients know them by    goes to the clients
    client.key         secret of a client           stays with the client
    client.pub         what workers know it by
    allowed/*.pub      the clients that are let in  stays with the workers
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rustsim_hpc.errors import RemoteError, message_of
from rustsim_hpc.files import read_bytes

_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_SECRET = 0o600
_PUBLIC = 0o644


@dataclass(frozen=True)
class WorkerKeys:
    """A worker's keys: its own pair, and the public keys of the clients that it lets in."""

    public: str
    secret: str = field(repr=False)
    allowed: frozenset[str]


@dataclass(frozen=True)
class ClientKeys:
    """A client's keys: its own pair, and the workers' public key."""

    public: str
    secret: str = field(repr=False)
    worker: str


def make_keys(folder: Path) -> list[Path]:
    """Make a pair for workers and one for a client that they let in; return the files.

    Raises:
        RemoteError: one of the files is there already, or cannot be written; pyzmq is missing.
    """
    from rustsim_hpc.remote.sockets import new_key_pair

    files: list[tuple[Path, int, str]] = []
    for who, whose in (("worker", "the workers"), ("client", "a client of workers")):
        public, secret = new_key_pair()
        known = f'who = "{who}"\npublic = "{public}"\n'
        text = (
            f'# Secret key of {whose}: whoever reads it can pose as its owner.\n{known}secret = "{secret}"\n'
        )
        files.append((folder / f"{who}.key", _SECRET, text))
        files.append((folder / f"{who}.pub", _PUBLIC, f"# Public key of {whose}.\n{known}"))
    files.append((folder / "allowed" / "client.pub", _PUBLIC, files[-1][2]))
    there = [path for path, _, _ in files if path.exists()]
    if there:
        raise RemoteError(
            f"{there[0]} is there already", hint="keys are not overwritten: name another folder"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "allowed").mkdir(exist_ok=True)
        for path, mode, text in files:
            _write(path, mode, text)
    except OSError as error:
        raise RemoteError(f"cannot write keys into {folder}: {message_of(error)}") from error
    return [path for path, _, _ in files]


def read_worker_keys(folder: Path) -> WorkerKeys:
    """Return a worker's keys.

    Raises:
        RemoteError: a file is missing, unreadable, no key, or a secret that others can read.
    """
    public, secret = _pair(folder / "worker.key", "worker")
    allowed = frozenset(_public(path, "client") for path in sorted((folder / "allowed").glob("*.pub")))
    if not allowed:
        raise RemoteError(f"{folder / 'allowed'} holds no client's key: nobody could use the worker")
    return WorkerKeys(public, secret, allowed)


def read_client_keys(folder: Path) -> ClientKeys:
    """Return a client's keys.

    Raises:
        RemoteError: as for :func:`read_worker_keys`.
    """
    public, secret = _pair(folder / "client.key", "client")
    return ClientKeys(public, secret, _public(folder / "worker.pub", "worker"))


def _write(path: Path, mode: int, text: str) -> None:
    # Created with its mode, so that a secret is never readable by others, not even for a moment.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)


def _pair(path: Path, who: str) -> tuple[str, str]:
    values = _read(path, who)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise RemoteError(f"{path} is a secret that others can read", hint=f"chmod 600 {path}")
    return _key(path, values, "public"), _key(path, values, "secret")


def _public(path: Path, who: str) -> str:
    return _key(path, _read(path, who), "public")


def _read(path: Path, who: str) -> dict[str, Any]:
    try:
        values = tomllib.loads(read_bytes(path).decode())
    except (OSError, ValueError) as error:
        hint = "rustsim-hpc worker --make-keys DIR makes keys"
        raise RemoteError(f"cannot read the key {path}: {message_of(error)}", hint=hint) from error
    if values.get("who") != who:
        raise RemoteError(f"{path} is not the key of a {who}")
    return values


def _key(path: Path, values: dict[str, Any], name: str) -> str:
    text = values.get(name)
    if not isinstance(text, str) or not _Z85.fullmatch(text):
        raise RemoteError(f"{path} holds no {name} key of 40 characters")
    return text
