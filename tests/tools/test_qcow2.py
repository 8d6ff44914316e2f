"""qcow2 images from strangers: nothing they name is ever opened."""

import asyncio
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay_core.errors import ForebayError
from forebay_core.units import MIB
from forebay_tools import qcow2
from forebay_tools.qcow2 import (
    QCOW2_HEADER,
    QCOW2_MAGIC,
    Qcow2Header,
    Qcow2Image,
    converted,
    open_qcow2,
    parse_header,
)

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def qemu_img(*words: object) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def header(
    *,
    magic: int = QCOW2_MAGIC,
    version: int = 3,
    backing: int = 0,
    bits: int = 16,
    size: int = MIB,
    crypt: int = 0,
    features: int = 0,
    length: int = 104,
    extensions: bytes = bytes(8),
) -> bytes:
    fixed = QCOW2_HEADER.pack(
        magic, version, backing, backing and 9, bits, size, crypt, bytes(36), features, bytes(20), length
    )
    return (fixed[: length if version == 3 else 72] + extensions).ljust(4096, b"\0")


def extension(kind: int, text: bytes) -> bytes:
    return struct.pack(">II", kind, len(text)) + text.ljust(-(-len(text) // 8) * 8, b"\0")


def check_qcow2(path: Path) -> Qcow2Header:
    with open_qcow2(path) as image:
        return image.header


def convert(path: Path, meanwhile: Callable[[], None] = lambda: None) -> bytes:
    async def run(image: Qcow2Image) -> bytes:
        async with converted(image, lambda share: None) as raw:
            return raw.read_bytes()

    with open_qcow2(path) as image:
        meanwhile()
        return asyncio.run(run(image))


def test_the_header_table_matches_the_struct() -> None:
    rows = [line.split() for line in (qcow2.__doc__ or "").splitlines() if line.strip()[:1].isdigit()]
    sizes = {"u32": 4, "u64": 8, "36s": 36, "20s": 20}
    offset = 0
    for row in rows:
        assert int(row[0]) == offset
        assert int(row[1]) == sizes[row[2]]
        offset += int(row[1])
    assert offset == QCOW2_HEADER.size


def test_harmless_headers_pass() -> None:
    assert parse_header(header(), "x").size == MIB
    assert parse_header(header(version=2), "x").version == 2
    assert parse_header(header(extensions=extension(0x6803F857, b"feature names") + bytes(8)), "x").size == MIB


@pytest.mark.parametrize(
    ("first", "part"),
    [
        (header(backing=512), "backing file"),
        (header(version=2, backing=512), "backing file"),
        (header(features=0b100), "external data file"),
        (header(extensions=extension(0x44415441, b"/etc/shadow") + bytes(8)), "external data file"),
        (header(version=2, extensions=extension(0x44415441, b"/etc/shadow") + bytes(8)), "external data file"),
        (header(crypt=1), "encrypted"),
        (header(extensions=extension(0x0537BE77, bytes(16)) + bytes(8)), "encrypted"),
        (header(features=1 << 40), "unknown features"),
        (header(version=4), "unknown version"),
        (header(magic=1), "damaged"),
        (header(bits=3), "damaged"),
        (header(bits=63), "damaged"),
        (header(size=0), "at least one"),
        (header(size=1 << 63), "at most"),
        (header(length=104)[:100] + struct.pack(">I", 1 << 31) + bytes(100), "damaged"),
        (header(extensions=extension(1, b"x" * 8) * 100), "do not end"),
        (header(extensions=struct.pack(">II", 1, 0xFFFFFFFF)), "do not end"),
        (b"QFI\xfb", "damaged"),
    ],
)
def test_other_headers_are_refused(first: bytes, part: str) -> None:
    with pytest.raises(ForebayError, match=part) as caught:
        parse_header(first, "image.qcow2")
    assert str(caught.value).startswith("image.qcow2: ")


def test_no_header_crashes_the_parser() -> None:
    chance = random.Random(7)
    for _ in range(2000):
        first = bytearray(header(extensions=extension(5, b"abc") + bytes(8)))
        for _ in range(chance.randint(1, 6)):
            first[chance.randrange(140)] = chance.randrange(256)
        try:
            parse_header(bytes(first[: chance.choice([20, 72, 104, 140, 4096])]), "x")
        except ForebayError:
            continue


@needs_qemu_img
def test_a_backing_file_is_refused_before_qemu_img_sees_it(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret".ljust(MIB, b"\0"))
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", tmp_path / "image")
    with pytest.raises(ForebayError, match="names a backing file"):
        check_qcow2(tmp_path / "image")


@needs_qemu_img
def test_a_json_backing_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(MIB))
    name = f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{tmp_path}/secret"}}}}'
    qemu_img("create", "-f", "qcow2", "-u", "-b", name, "-F", "raw", tmp_path / "image", "1M")
    with pytest.raises(ForebayError, match="names a backing file"):
        check_qcow2(tmp_path / "image")


@needs_qemu_img
def test_a_data_file_is_refused(tmp_path: Path) -> None:
    option = f"data_file={tmp_path}/secret,data_file_raw=on"
    qemu_img("create", "-f", "qcow2", "-o", option, tmp_path / "image", "1M")
    with pytest.raises(ForebayError, match="external data file"):
        check_qcow2(tmp_path / "image")


@needs_qemu_img
def test_even_past_the_check_a_backing_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", tmp_path / "image", "64k")
    descriptor = os.open(tmp_path / "image", os.O_RDONLY)
    unchecked = Qcow2Image(tmp_path / "image", descriptor, Qcow2Header(3, 64 * 1024), os.fstat(descriptor))
    asyncio.run(qcow2._convert(shutil.which("qemu-img") or "", unchecked, tmp_path / "raw", lambda share: None))
    os.close(descriptor)
    assert (tmp_path / "raw").read_bytes() == bytes(64 * 1024)


def image_of_a_secret(folder: Path) -> Path:
    """Make an image whose external data file is the secret: what qemu-img makes of it is the secret."""
    (folder / "secret").write_bytes(b"secret".ljust(64 * 1024, b"."))
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={folder}/other.,data_file_raw=on", folder / "evil", "64k")
    packed = (folder / "evil").read_bytes()
    (folder / "evil").write_bytes(packed.replace(f"{folder}/other.".encode(), f"{folder}/secret".encode()))
    qemu_img("convert", "-f", "qcow2", "-O", "raw", folder / "evil", folder / "seen")
    assert (folder / "seen").read_bytes() == (folder / "secret").read_bytes()
    return folder / "evil"


@needs_qemu_img
def test_another_image_under_the_name_of_the_checked_one_is_not_opened(tmp_path: Path) -> None:
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
    qemu_img("create", "-f", "qcow2", tmp_path / "good" / "image", "64k")
    image_of_a_secret(tmp_path / "bad").rename(tmp_path / "bad" / "image")
    (tmp_path / "now").symlink_to("good")

    def swap() -> None:
        (tmp_path / "now").unlink()
        (tmp_path / "now").symlink_to("bad")

    assert convert(tmp_path / "now" / "image", swap) == bytes(64 * 1024)


@needs_qemu_img
def test_an_image_that_turns_harmful_in_place_is_refused(tmp_path: Path) -> None:
    evil = image_of_a_secret(tmp_path)
    qemu_img("create", "-f", "qcow2", tmp_path / "image", "64k")
    harmless = (tmp_path / "image").read_bytes()

    def turn() -> None:
        (tmp_path / "image").write_bytes(evil.read_bytes())

    def turn_and_back() -> None:
        turn()
        (tmp_path / "image").write_bytes(harmless)

    with pytest.raises(ForebayError, match="names an external data file"):
        convert(tmp_path / "image", turn)
    (tmp_path / "image").write_bytes(harmless)
    with pytest.raises(ForebayError, match="was written while being imported"):
        convert(tmp_path / "image", turn_and_back)


@needs_qemu_img
@pytest.mark.parametrize("options", [["-c"], [], ["-o", "compat=0.10"], ["-o", "cluster_size=512"]])
def test_images_convert_to_the_same_bytes(tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    plain = bytes(MIB) + random.Random(1).randbytes(MIB) + b"abcd" * 300_000
    plain = plain.ljust(-(-len(plain) // 512) * 512, b"\0")
    (tmp_path / "raw").write_bytes(plain)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, tmp_path / "raw", tmp_path / "image, x:y")
    assert check_qcow2(tmp_path / "image, x:y").size == len(plain)
    assert convert(tmp_path / "image, x:y") == plain
    assert sorted(os.listdir(tmp_path)) == ["image, x:y", "raw"], "the temporary file is gone"


@needs_qemu_img
def test_a_damaged_image_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "image").write_bytes(header())
    with pytest.raises(ForebayError, match="qemu-img can't convert it: ") as caught:
        convert(tmp_path / "image")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["image"]


def test_without_qemu_img_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "image").write_bytes(header())
    with pytest.raises(ForebayError, match="install qemu-utils, or give a raw image"):
        convert(tmp_path / "image")


IMAGES = {
    "plain": ("-o", "cluster_size=4096"),
    "version 2": ("-o", "compat=0.10"),
    "compressed": ("-c",),
    "compressed by zstd": ("-c", "-o", "compression_type=zstd"),
    "extended L2": ("-o", "extended_l2=on,cluster_size=128k"),
}


@needs_qemu_img
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_was_cut_short_is_refused_wherever_it_was_cut(name: str, tmp_path: Path) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image.qcow2"
    content = random.Random(1).randbytes(MIB) + bytes(MIB) + random.Random(2).randbytes(MIB + 512)
    raw.write_bytes(content)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *IMAGES[name], raw, image)
    check_qcow2(image)
    assert convert(image)[: len(content)] == content
    whole = image.read_bytes()
    # Of a subcluster nobody can tell whether it was written to its end.
    least = 128 * 1024 if name == "extended L2" else 512
    for cut in (len(whole) - least, len(whole) * 9 // 10, len(whole) // 2, len(whole) // 4, 1000):
        image.write_bytes(whole[:cut])
        with pytest.raises(ForebayError, match=r"was cut short.*copy it again"):
            check_qcow2(image)


@needs_qemu_img
@pytest.mark.parametrize("options", ["preallocation=metadata", "preallocation=falloc", "preallocation=off"])
def test_an_image_without_content_is_long_enough(options: str, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", options, image, "8M")
    check_qcow2(image)
    subprocess.run(["qemu-io", "-c", "write -P 1 1m 1000", "-c", "write -z 3m 1m", image], check=True, timeout=60)
    qemu_img("snapshot", "-c", "before", image)
    subprocess.run(["qemu-io", "-c", "write -P 2 5m 70000", "-c", "discard 1m 64k", image], check=True, timeout=60)
    check_qcow2(image)
    qemu_img("resize", image, "64M")
    check_qcow2(image)


def test_a_table_of_no_sane_size_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    first = bytearray(header())
    struct.pack_into(">IQ", first, 36, 1 << 31, 1 << 62)
    image.write_bytes(first)
    with pytest.raises(ForebayError, match="L1 table has 2147483648 entries"):
        check_qcow2(image)
    struct.pack_into(">IQ", first, 36, 8, (1 << 64) - 8)
    image.write_bytes(first)
    with pytest.raises(ForebayError, match="was cut short"):
        check_qcow2(image)
