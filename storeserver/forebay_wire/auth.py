"""Proof that a peer holds the same key, and the file the key comes from.

A proof is HMAC-SHA256 with the pre-shared key over a label of its direction and both greetings as they were sent. So
it can't be replayed (the nonces are new), not reflected (the label differs), and nobody between the two can change a
version or feature bit. The client proves itself first: a server gives its proof to nobody who has no key.
"""

import hmac
import os
import stat
from pathlib import Path
from typing import Final

from forebay_core.errors import WrongUsageError
from forebay_wire.greeting import PROOF_SIZE, Role
from forebay_wire.limits import KEY_SIZE_MAX, KEY_SIZE_MIN

_LABELS: Final = {
    Role.CLIENT: b"forebay wire 1: client proves to server\n",
    Role.SERVER: b"forebay wire 1: server proves to client\n",
}


def make_proof(key: bytes, prover: Role, *, client_greeting: bytes, server_greeting: bytes) -> bytes:
    """Return the 32 bytes with which `prover` shows that it holds the key."""
    proof = hmac.digest(key, _LABELS[prover] + client_greeting + server_greeting, "sha256")
    assert len(proof) == PROOF_SIZE
    return proof


def is_proof(proof: bytes, key: bytes, prover: Role, *, client_greeting: bytes, server_greeting: bytes) -> bool:
    """Tell whether a proof is right, in a time that does not depend on where it is wrong."""
    expected = make_proof(key, prover, client_greeting=client_greeting, server_greeting=server_greeting)
    return hmac.compare_digest(expected, proof)


def read_key_file(path: str | Path) -> bytes:
    """Return the key in a file: its bytes without one newline at the end.

    Raises:
        WrongUsageError: the file can't be read, others may read it, or its size is out of bounds.
    """
    try:
        # O_NONBLOCK: a FIFO given by mistake must not hang the daemon.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise WrongUsageError(f"key file {path}: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise WrongUsageError(f"key file {path}: not a regular file")
        if status.st_mode & 0o077:
            raise WrongUsageError(f"key file {path}: others may read or change it; run chmod 600 {path}")
        key = os.read(descriptor, KEY_SIZE_MAX + 2)
    except OSError as error:
        raise WrongUsageError(f"key file {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    key = key.removesuffix(b"\n")
    if not KEY_SIZE_MIN <= len(key) <= KEY_SIZE_MAX:
        found = f"{len(key)}" if len(key) <= KEY_SIZE_MAX else f"more than {KEY_SIZE_MAX}"
        raise WrongUsageError(
            f"key file {path}: {found} bytes; a key has {KEY_SIZE_MIN} to {KEY_SIZE_MAX}, "
            f"for example: head -c 32 /dev/urandom | base64 > {path}"
        )
    return key
