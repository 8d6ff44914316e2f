"""Keys: what a key file may be, and what a proof is worth."""

import os
from pathlib import Path

import pytest

from forebay_core.errors import WrongUsageError
from forebay_wire.auth import is_proof, make_proof, read_key_file
from forebay_wire.greeting import Role
from forebay_wire.limits import KEY_SIZE_MAX, KEY_SIZE_MIN

KEY = b"a key of sufficient length"
CLIENT_GREETING = bytes(80)
SERVER_GREETING = bytes(range(80))


def proof(key: bytes = KEY, prover: Role = Role.CLIENT, client: bytes = CLIENT_GREETING) -> bytes:
    return make_proof(key, prover, client_greeting=client, server_greeting=SERVER_GREETING)


def accepted(candidate: bytes) -> bool:
    return is_proof(candidate, KEY, Role.CLIENT, client_greeting=CLIENT_GREETING, server_greeting=SERVER_GREETING)


def test_a_proof_is_what_it_always_was() -> None:
    assert proof().hex() == "445c7dca812679d5a5ca145e85c142f9a83441a41393e7cfc64c9212b36dc80a"


def test_only_the_right_proof_is_accepted() -> None:
    assert accepted(proof())
    assert not accepted(bytes(32))
    assert not accepted(proof(key=KEY + b"!"))
    assert not accepted(proof(prover=Role.SERVER))


def test_a_changed_bit_of_a_greeting_spoils_the_proof() -> None:
    for bit in range(80 * 8):
        changed = bytearray(CLIENT_GREETING)
        changed[bit // 8] ^= 1 << bit % 8
        assert not accepted(proof(client=bytes(changed)))


def key_file(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (KEY, KEY),
        (KEY + b"\n", KEY),
        (KEY + b"\n\n", KEY + b"\n"),
        (bytes(KEY_SIZE_MIN), bytes(KEY_SIZE_MIN)),
        (bytes(KEY_SIZE_MAX) + b"\n", bytes(KEY_SIZE_MAX)),
    ],
)
def test_a_key_is_the_file_without_one_newline(tmp_path: Path, content: bytes, key: bytes) -> None:
    assert read_key_file(key_file(tmp_path / "key", content)) == key


@pytest.mark.parametrize(
    "content", [b"", b"\n", bytes(KEY_SIZE_MIN - 1), bytes(KEY_SIZE_MIN - 1) + b"\n", bytes(KEY_SIZE_MAX + 1)]
)
def test_a_key_of_a_wrong_size_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(WrongUsageError, match=f"{KEY_SIZE_MIN} to {KEY_SIZE_MAX}"):
        read_key_file(key_file(tmp_path / "key", content))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = key_file(tmp_path / "key", b"")
    os.truncate(path, 1 << 40)
    with pytest.raises(WrongUsageError, match=f"more than {KEY_SIZE_MAX}"):
        read_key_file(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o644])
def test_a_key_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(WrongUsageError, match="chmod 600"):
        read_key_file(key_file(tmp_path / "key", KEY, mode))


def test_what_is_no_readable_file_is_refused_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name, words in (("none", "No such file"), (".", "not a regular file"), ("fifo", "not a regular file")):
        with pytest.raises(WrongUsageError, match=words) as caught:
            read_key_file(tmp_path / name)
        assert "\n" not in str(caught.value)
