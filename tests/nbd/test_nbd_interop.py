"""Real clients against the server: libnbd's tools, qemu's tools, python3-libnbd, fio."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SIZE = 24 << 20
SYSTEM_PYTHON = "/usr/bin/python3"  # Debian's python3-libnbd is built for this one


@contextlib.contextmanager
def serving(path: Path, *arguments: str) -> Iterator[None]:
    serve = str(Path(__file__).with_name("serve_ram.py"))
    server = subprocess.Popen([sys.executable, serve, str(path), *arguments], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield
    finally:
        server.terminate()
        assert server.wait(30) == 0
        server.communicate()


@pytest.fixture
def uri(tmp_path: Path) -> Iterator[str]:
    with serving(tmp_path / "s", f"vol={SIZE}"):
        yield f"nbd+unix:///vol?socket={tmp_path / 's'}"


@pytest.fixture
def late_uri(tmp_path: Path) -> Iterator[str]:
    with serving(tmp_path / "s", f"vol={SIZE}", "--late", "0.002"):
        yield f"nbd+unix:///vol?socket={tmp_path / 's'}"


def run(*command: str, status: int = 0, **options: object) -> str:
    """Run a client and return its output; a tool that is not there is a visible skip."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]
    assert done.returncode == status, f"{command}: {done.stdout}{done.stderr}"
    return str(done.stdout)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A sparse file: data at 1 MiB, at 9 MiB and in the last 64 KiB."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        for offset, size in ((1 << 20, 300_000), (9 << 20, 4096), (SIZE - 65536, 65536)):
            file.seek(offset)
            file.write(bytes((offset >> 16) + index * 7 + (index >> 8) & 0xFF | 1 for index in range(size)))
    return path


def python(script: str, *arguments: str) -> str:
    probe = subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("python3-libnbd is not installed")
    return run(SYSTEM_PYTHON, "-c", script, *arguments)


def test_nbdinfo_shows_the_export(uri: str) -> None:
    [export] = json.loads(run("nbdinfo", "--json", uri))["exports"]
    assert export["export-name"] == "vol"
    assert export["export-size"] == SIZE
    assert export["contexts"] == ["base:allocation"]
    sizes = [export[f"block_size_{what}"] for what in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 << 20]
    can = {key for key, value in export.items() if key.startswith("can_") and value}
    assert can >= {f"can_{what}" for what in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")}
    assert not export["is_rotational"]
    assert not export["is_read_only"]


def test_nbdinfo_lists_all_exports(tmp_path: Path) -> None:
    names = [f"vol-{index:02}" for index in range(30)]
    with serving(tmp_path / "s", *(f"{name}=1048576" for name in names)):
        listed = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix://?socket={tmp_path / 's'}"))["exports"]
    assert [export["export-name"] for export in listed] == names


def test_nbdinfo_maps_holes(uri: str) -> None:
    run("qemu-io", "-f", "raw", "-c", "write -P 5 1M 64k", uri)
    extents = json.loads(run("nbdinfo", "--json", "--map", uri))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in extents] == [
        (0, 1 << 20, 3),
        (1 << 20, 65536, 0),
        ((1 << 20) + 65536, SIZE - (1 << 20) - 65536, 3),
    ]


@pytest.mark.parametrize("slow", [False, True])
def test_nbdcopy_copies_in_and_out_and_keeps_holes(
    request: pytest.FixtureRequest, slow: bool, image: Path, tmp_path: Path
) -> None:
    uri = request.getfixturevalue("late_uri" if slow else "uri")
    run("nbdcopy", "--connections=4", "--flush", str(image), uri)
    run("nbdcopy", "--connections=4", "--requests=32", uri, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == image.read_bytes()
    zeros = sum(
        extent["length"] for extent in json.loads(run("nbdinfo", "--json", "--map", uri)) if extent["type"] == 3
    )
    assert zeros > SIZE - (1 << 20)


def test_qemu_img_sees_copies_and_compares(uri: str, image: Path, tmp_path: Path) -> None:
    assert json.loads(run("qemu-img", "info", "--output=json", uri))["virtual-size"] == SIZE
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", str(image), uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), uri)
    extents = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", uri))
    assert [extent["start"] for extent in extents if extent["data"]] == [1 << 20, 9 << 20, SIZE - 65536]
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, str(tmp_path / "back.qcow2"))
    assert "identical" in run("qemu-img", "compare", str(tmp_path / "back.qcow2"), "-F", "raw", uri)
    run("qemu-io", "-f", "raw", "-c", "write -P 9 5M 512", uri)
    assert "mismatch" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), uri, status=1)


def test_qemu_io_speaks_every_command(uri: str) -> None:
    commands = (
        "write -P 1 0 1M",
        "write -f -P 2 513 1025",
        "read -P 2 513 1025",
        "read -P 1 0 513",
        "discard 64k 64k",
        "read -P 0 64k 64k",
        "write -z -u 4k 8k",
        "read -P 0 4k 8k",
        "write -z -n 12k 4k",
        "read -P 0 12k 4k",
        "flush",
        "aio_write -P 7 2M 256k",
        "aio_write -P 8 3M 256k",
        "aio_flush",
        "read -P 7 2M 256k",
        "read -P 8 3M 256k",
        f"read -P 0 {SIZE - 512} 512",
    )
    arguments = [argument for command in commands for argument in ("-c", command)]
    output = run("qemu-io", "-f", "raw", "-d", "unmap", *arguments, uri)
    assert "failed" not in output
    assert "error" not in output.lower()


LIBNBD = """
import nbd, sys
uri, structured = sys.argv[1], sys.argv[2] == "1"
h = nbd.NBD()
h.set_request_structured_replies(structured)
if structured:
    h.add_meta_context("base:allocation")
h.set_strict_mode(0)
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() == structured
assert h.can_multi_conn() and h.can_fua() and h.can_fast_zero() and h.can_cache() and not h.is_read_only()
h.pwrite(b"x" * 5000, 777, nbd.CMD_FLAG_FUA)
assert bytes(h.pread(5002, 776)) == b"\\0" + b"x" * 5000 + b"\\0"
h.trim(8192, 0, nbd.CMD_FLAG_FUA)
h.zero(8192, 4096, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
h.zero(8192, 4096, nbd.CMD_FLAG_FAST_ZERO)
h.cache(8192, 0)
h.flush()
def fails(function, *arguments):
    try:
        function(*arguments)
    except nbd.Error as error:
        return error.errno
fast = fails(h.zero, 10, 10, nbd.CMD_FLAG_FAST_ZERO)
assert fast in ("ENOTSUP", "EOPNOTSUPP"), fast
assert fails(h.pwrite, b"y" * 600, h.get_size()) == "ENOSPC"
assert fails(h.pread, 600, h.get_size()) == "EINVAL"
assert fails(h.trim, 600, h.get_size()) == "EINVAL"
assert fails(h.zero, 600, h.get_size()) == "ENOSPC"
if structured:
    h.pwrite(b"z" * 4096, 65536)
    pieces = []
    h.pread_structured(131072, 0, lambda data, offset, kind, error: pieces.append((offset, kind)))
    assert nbd.READ_HOLE in [kind for _offset, kind in pieces] and len(pieces) == 3, pieces
    whole = []
    h.pread_structured(131072, 0, lambda data, offset, kind, error: whole.append(kind), nbd.CMD_FLAG_DF)
    assert whole == [nbd.READ_DATA]
    seen = []
    h.block_status(h.get_size(), 0, lambda context, offset, entries, error: seen.append((context, entries)))
    assert seen == [("base:allocation", [65536, 3, 4096, 0, h.get_size() - 69632, 3])], seen
    h.block_status(h.get_size() - 4097, 4097, lambda c, o, entries, e: seen.append(entries), nbd.CMD_FLAG_REQ_ONE)
    assert seen[-1] == [65536 - 4097, 3], seen
other = nbd.NBD()
other.connect_uri(uri)
h.pwrite(b"multi", 40960)
other.flush()
assert bytes(other.pread(5, 40960)) == b"multi"
other.shutdown()
cookies = [h.aio_pread(nbd.Buffer(4096), n * 4096) for n in range(200)]
while h.aio_in_flight():
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in cookies)
assert h.pread(5, 40960) == b"multi"
h.shutdown()
print("fine")
"""


@pytest.mark.parametrize("structured", ["0", "1"])
@pytest.mark.parametrize("slow", [False, True])
def test_python_libnbd_speaks_every_command(request: pytest.FixtureRequest, slow: bool, structured: str) -> None:
    uri = request.getfixturevalue("late_uri" if slow else "uri")
    assert python(LIBNBD, uri, structured) == "fine\n"


def test_nbdsh_opens_the_default_export(tmp_path: Path) -> None:
    with serving(tmp_path / "s", f"only={SIZE}"):
        command = ("nbdsh", "-u", f"nbd+unix://?socket={tmp_path / 's'}", "-c", "print(h.get_size())")
        assert run(*command, env={"PATH": "/usr/bin:/bin"}) == f"{SIZE}\n"


def test_qemu_nbd_lists_every_export(tmp_path: Path) -> None:
    with serving(tmp_path / "s", f"a={SIZE}", "b=4096"):
        listed = run("qemu-nbd", "--list", "--socket", str(tmp_path / "s"))
    assert "exports available: 2" in listed
    assert "base:allocation" in listed


@pytest.mark.parametrize("slow", [False, True])
def test_fio_verifies_what_it_wrote(request: pytest.FixtureRequest, slow: bool, tmp_path: Path) -> None:
    uri = request.getfixturevalue("late_uri" if slow else "uri")
    common = ("fio", "--ioengine=nbd", f"--uri={uri}", "--size=12M", "--verify=crc32c", "--verify_fatal=1")
    run(
        *common, "--name=small", "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--iodepth=32", cwd=tmp_path
    )
    run(*common, "--name=large", "--rw=write", "--bs=1M", "--iodepth=8", cwd=tmp_path)
