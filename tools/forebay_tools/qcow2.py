"""qcow2 images: refuse what names other files, then let qemu-img make a raw file of the rest.

An image is untrusted: its header may name a backing file or an external data file, such as /etc/shadow, and a naive
conversion would copy that into the volume. So the header is read here before qemu-img sees the image, and qemu-img is
told format, protocol and "no backing file" explicitly, so that nothing inside the image decides what is opened.
qemu-img gets the descriptor that was checked: under the name there may be another image by now. Whoever may write the
image can change it in place as well, so it is checked again before anybody sees what became of it.

Header, big-endian, the fields that are looked at:

    offset  size  type  field                 meaning
    ------  ----  ----  --------------------  -----------------------------------------------
         0     4  u32   magic                 "QFI" 0xfb
         4     4  u32   version               2 or 3
         8     8  u64   backing_offset        0: no backing file
        16     4  u32   backing_size          0: no backing file
        20     4  u32   cluster_bits          9 to 21
        24     8  u64   size                  bytes of the disk
        32     4  u32   crypt_method          0: none
        36    36  36s   tables                left to qemu-img
        72     8  u64   incompatible          version 3: feature bits that a reader must know
        80    20  20s   features              left to qemu-img
       100     4  u32   header_size           version 3: where the extensions begin
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from forebay_core.errors import ForebayError
from forebay_core.units import VOLUME_SIZE_MAX, format_size
from forebay_tools.qcow2_tables import check_length
from forebay_tools.source import check_unchanged, open_image

QCOW2_MAGIC: Final = 0x514649FB
QCOW2_HEADER: Final = struct.Struct(">IIQIIQI36sQ20sI")
assert QCOW2_HEADER.size == 104

EXTENSION_INCREMENT: Final = 0x46424943
"""Header extension of an image that was exported as an increment; other programs skip it, and qemu keeps it."""

_SIZE_V2: Final = 72
_KNOWN_FEATURES: Final = 0b11011  # dirty, corrupt, compression type, extended L2
_DATA_FILE_FEATURE: Final = 0b00100
_EXTENSION: Final = struct.Struct(">II")
_EXTENSION_END: Final = 0
_EXTENSION_DATA_FILE: Final = 0x44415441
_EXTENSION_LUKS: Final = 0x0537BE77
_EXTENSIONS_MAX: Final = 64
_STDERR_MAX: Final = 4096
_PROGRESS_READ_SIZE: Final = 4096
_PERCENT: Final = re.compile(rb"\(\s*([0-9.]+)/100%\)")


ReportShare: TypeAlias = Callable[[float], None]
"""Told the share that is converted, from 0 to 1."""


class Qcow2Header(NamedTuple):
    """What we need of a header that was found harmless. `increment`: we wrote it to be laid over an older state."""

    version: int
    size: int
    increment: bool = False


class Qcow2Image(NamedTuple):
    """An open image that was found harmless, and its state when it was."""

    path: Path
    descriptor: int
    header: Qcow2Header
    status: os.stat_result


@contextlib.contextmanager
def open_qcow2(path: Path) -> Iterator[Qcow2Image]:
    """Open an image that is self-contained.

    Raises:
        ForebayError: it is damaged, cut short, encrypted, or names another file.
    """
    descriptor = open_image(path)
    try:
        status = os.fstat(descriptor)
        header = _read_header(path, descriptor)
        check_length(descriptor, str(path))
        yield Qcow2Image(path, descriptor, header, status)
    finally:
        os.close(descriptor)


def _read_header(path: Path, descriptor: int) -> Qcow2Header:
    return parse_header(os.pread(descriptor, 1 << 16, 0), str(path))


def parse_header(first: bytes, place: str) -> Qcow2Header:
    """Return the header in the first 64 KiB of an image; raises as `open_qcow2`."""
    fields = QCOW2_HEADER.unpack(first[: QCOW2_HEADER.size].ljust(QCOW2_HEADER.size, b"\0"))
    magic, version, backing_offset, backing_size, cluster_bits, size, crypt, _, incompatible, _, header_size = fields
    if len(first) < _SIZE_V2 or magic != QCOW2_MAGIC or version not in (2, 3) or not 9 <= cluster_bits <= 21:
        raise ForebayError(f"{place}: the qcow2 header is damaged or of an unknown version")
    if backing_offset or backing_size:
        raise ForebayError(
            f"{place}: names a backing file, which an import never follows; flatten it first: "
            f"qemu-img convert -O raw {place} NEW, or lay it alone over a volume with --onto after "
            f"qemu-img rebase -u -b '' {place}"
        )
    if crypt:
        raise ForebayError(f"{place}: is encrypted; decrypt it first with qemu-img convert")
    if version == 2:
        incompatible, header_size = 0, _SIZE_V2
    if incompatible & _DATA_FILE_FEATURE:
        raise _data_file_error(place)
    if incompatible & ~_KNOWN_FEATURES or not _SIZE_V2 <= header_size <= 1 << cluster_bits:
        raise ForebayError(f"{place}: the qcow2 header has unknown features ({incompatible:#x}) or is damaged")
    if not 0 < size <= VOLUME_SIZE_MAX:
        raise ForebayError(
            f"{place}: has {size} bytes; an image has at least one, at most {format_size(VOLUME_SIZE_MAX)}"
        )
    kinds = _check_extensions(first[: 1 << cluster_bits], header_size, place)
    return Qcow2Header(version, size, EXTENSION_INCREMENT in kinds)


@contextlib.asynccontextmanager
async def converted(image: Qcow2Image, report: ReportShare) -> AsyncIterator[Path]:
    """Make a sparse raw file of a checked image in $TMPDIR (else /var/tmp), deleted at the end.

    Raises:
        ForebayError: qemu-img is missing or fails, or the image changed meanwhile.
    """
    tool = shutil.which("qemu-img")
    if tool is None:
        raise ForebayError("importing qcow2 needs qemu-img; install qemu-utils, or give a raw image")
    folder = Path(tempfile.mkdtemp(prefix="forebay-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        target = folder / "image.raw"
        await _convert(tool, image, target, report)
        _read_header(image.path, image.descriptor)
        check_unchanged(image.path, image.descriptor, image.status)
        yield target
    finally:
        shutil.rmtree(folder)


async def _convert(tool: str, image: Qcow2Image, target: Path, report: ReportShare) -> None:
    protocol = "host_device" if stat.S_ISBLK(image.status.st_mode) else "file"
    name = f"/proc/self/fd/{image.descriptor}"
    options = {"driver": "qcow2", "backing": None, "file": {"driver": protocol, "filename": name}}
    words = [tool, "convert", "-p", "-O", "raw", "json:" + json.dumps(options), str(target)]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, pass_fds=[image.descriptor]
    )
    assert child.stdout is not None and child.stderr is not None
    try:
        complaint, _ = await asyncio.gather(_last_words(child.stderr), _follow(child.stdout, report))
        code = await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if code != 0:
        raise ForebayError(f"{image.path}: qemu-img can't convert it: {complaint or f'exit code {code}'}")


async def _follow(stream: asyncio.StreamReader, report: ReportShare) -> None:
    while text := await stream.read(_PROGRESS_READ_SIZE):
        if found := _PERCENT.findall(text):
            with contextlib.suppress(ValueError):
                report(float(found[-1]) / 100)


async def _last_words(stream: asyncio.StreamReader) -> str:
    kept = b""
    while text := await stream.read(_STDERR_MAX):
        kept = (kept + text)[-_STDERR_MAX:]
    lines = kept.decode(errors="replace").strip().splitlines()
    return "".join(letter if letter.isprintable() else " " for letter in lines[-1]) if lines else ""


def _check_extensions(first: bytes, at: int, place: str) -> list[int]:
    """Return the kinds of the extensions; raises as `open_qcow2`."""
    kinds: list[int] = []
    for _ in range(_EXTENSIONS_MAX):
        if at + _EXTENSION.size > len(first):
            break
        kind, size = _EXTENSION.unpack_from(first, at)
        if kind == _EXTENSION_END:
            return kinds
        kinds.append(kind)
        if kind == _EXTENSION_DATA_FILE:
            raise _data_file_error(place)
        if kind == _EXTENSION_LUKS:
            raise ForebayError(f"{place}: is encrypted; decrypt it first with qemu-img convert")
        at += _EXTENSION.size + -(-size // 8) * 8
    raise ForebayError(f"{place}: the extensions of the qcow2 header do not end; the image is damaged")


def _data_file_error(place: str) -> ForebayError:
    return ForebayError(
        f"{place}: names an external data file, which an import never follows; flatten it first: "
        f"qemu-img convert -O raw {place} NEW"
    )
