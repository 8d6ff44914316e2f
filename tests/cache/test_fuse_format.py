"""The tables of the FUSE format say what the structs do."""

import struct

import pytest

from forebay_cache.format import fuse
from layout_tables import assert_matches

STRUCTS = {
    "Request header": fuse.REQUEST_HEADER,
    "Reply header": fuse.REPLY_HEADER,
    "Init request": fuse.INIT_REQUEST,
    "Init reply": fuse.INIT_REPLY,
    "Read or write request": fuse.IO_REQUEST,
    "Attributes": fuse.ATTRIBUTES,
    "Set-attributes request": fuse.SET_ATTRIBUTES,
    "Entry prefix": fuse.ENTRY_PREFIX,
    "Fallocate request": fuse.FALLOCATE_REQUEST,
    "Seek request": fuse.SEEK_REQUEST,
    "Open reply": fuse.OPEN_REPLY,
    "Directory entry": fuse.DIRECTORY_ENTRY,
}


@pytest.mark.parametrize("title", STRUCTS)
def test_a_table_is_its_struct(title: str) -> None:
    assert_matches(fuse, title, STRUCTS[title])


def test_an_error_is_the_negative_of_its_number() -> None:
    assert struct.unpack("<IiQ", fuse.encode_error(77, 28)) == (16, -28, 77)
    assert struct.unpack("<IiQ", fuse.encode_error(78, 0)) == (16, 0, 78)


def test_directory_entries_are_whole_multiples_of_eight_bytes() -> None:
    for name in ("a", "abcdefg", "abcdefgh", "disk@monday"):
        entry = fuse.encode_directory_entry(5, 1, name, fuse.S_IFREG)
        assert len(entry) % 8 == 0
        assert entry[24 : 24 + len(name)] == name.encode()
