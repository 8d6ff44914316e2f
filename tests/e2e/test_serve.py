"""A volume from creation to export, through real daemons and real clients."""

import json
import os

from e2e_rig import Rig

from forebay_core.units import MIB


def test_a_volume_is_created_attached_written_read_and_exported(rig: Rig) -> None:
    rig.start()
    rig.run("volume", "create", "disk", "--size", "16MiB")
    uri = json.loads(rig.run("attach", "disk"))["uri"]
    assert uri == f"nbd+unix:///disk?socket={rig.run_dir}/nbd.sock"
    content = os.urandom(3 * MIB)
    with rig.nbd("disk") as client:
        assert client.size == 16 * MIB
        assert client.read(0, 8192) == bytes(8192)
        client.write(1 * MIB, content)
        client.write(512, b"x" * 512)
        client.flush()
        assert client.read(1 * MIB, len(content)) == content
        assert client.read(0, 2048) == bytes(512) + b"x" * 512 + bytes(1024)
    rig.run("drain", "disk")
    rig.run("detach", "disk")
    expected = bytearray(16 * MIB)
    expected[512:1024] = b"x" * 512
    expected[1 * MIB : 4 * MIB] = content
    assert rig.exported("disk") == expected
