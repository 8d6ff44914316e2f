"""The disks of docs/guests.md, as a real libvirt takes them: validated, booted, and alive after a crash of the daemon.

One guest has all three, its own disk by the form that every libvirt knows. Its qemu is not root. The block device is
`--front loop`, because this host's kernel may have no nbd; to libvirt it is one like /dev/forebay/VOLUME.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import vm_debian
import vm_libvirt
from vm_agent import Agent
from vm_host import HostCache, HostStore
from vm_image import CannotError
from vm_libvirt import GROUP, Libvirt
from vm_machine import MEMORY_MIB

DOCUMENT = Path(__file__).parents[2] / "docs" / "guests.md"
RECONNECT = "<reconnect delay='3600'/>"
REFUSED_BY = (9, 0)  # and what is older
DISKS = ("vda", "vdb")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@dataclass
class Seen:
    """What was seen."""

    version: tuple[int, int] = (0, 0)
    complaints: dict[str, str] = field(default_factory=dict)
    root: str = ""
    written: dict[str, tuple[str, str]] = field(default_factory=dict)
    after: dict[str, tuple[str, str]] = field(default_factory=dict)
    errors: str = ""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that others than root may pass, with a name that is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="fb-", dir="/var/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def seen(folder: Path) -> Seen:
    """Boot a guest with all disks, kill the cache daemon under it, write again."""
    try:
        vm_libvirt.check()
        return _look(folder)
    except CannotError as error:
        pytest.skip(f"no libvirt can run here: {error}")


def blocks() -> tuple[str, str, str]:
    """Return the XML of the document: block device, NBD, and NBD by qemu's own options."""
    block, network, options = re.findall(r"```xml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    found = re.search(r"<qemu:commandline>.*</qemu:commandline>", options, re.DOTALL)
    assert found is not None and RECONNECT in network
    return block, network, found[0]


def domain(block: str, network: str, options: str, folder: Path) -> str:
    """Return a guest with these disks; kernel, console and agent as vm_machine has them."""
    return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm1</name>
  <memory unit='MiB'>{MEMORY_MIB}</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{folder}/kernel</kernel>
    <initrd>{folder}/first</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 mitigations=off nokaslr</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>{shutil.which("qemu-system-x86_64")}</emulator>
    {block}
    {network}
    <serial type='file'><source path='{folder}/guest/console.log'/></serial>
    <channel type='unix'>
      <source mode='bind' path='{folder}/guest/agent.sock'/>
      <target type='virtio' name='{vm_debian.PORT}'/>
    </channel>
  </devices>
  {options}
</domain>"""


def _look(folder: Path) -> Seen:
    seen = Seen()
    image = vm_debian.disk()
    for path, name in zip(vm_debian.boot_files(), ("kernel", "first"), strict=True):
        shutil.copy(path, folder / name)
    with HostStore(folder / "store") as store, HostCache(folder / "c", store, flags=("--nbd-group", GROUP)) as cache:
        (folder / "c").chmod(0o711)
        store.forebay("volume", "import", "vm1", str(image))
        for name in ("block", "network"):
            store.forebay("volume", "create", name, "--size", "64MiB")
        for name in ("vm1", "network"):
            cache.forebay("attach", name)
        device = cache.attach_device("block", "loop")
        with Libvirt(folder / "libvirt") as libvirt:
            try:
                libvirt.own(device)
                _use(seen, folder, cache, libvirt, device)
            finally:
                libvirt.destroy_all()
                cache.forebay("detach", "block", "--timeout", "20")
    return seen


def _use(seen: Seen, folder: Path, cache: HostCache, libvirt: Libvirt, device: Path) -> None:
    block, network, options = blocks()
    seen.version = libvirt.version
    block = block.replace("/dev/forebay/vm1", str(device)).replace("'vda'", "'vdb'")
    network = network.replace("name='vm1'", "name='network'").replace("/run/forebay/nbd.sock", str(cache.socket))
    options = options.replace("/run/forebay/nbd.sock", str(cache.socket))
    for name, disk in (("as it is", network), ("without reconnect", network.replace(RECONNECT, ""))):
        seen.complaints[name] = vm_libvirt.complaint(domain(block, disk, options, folder))
    if seen.complaints["as it is"]:
        network = network.replace(RECONNECT, "")
    guest = folder / "guest"
    guest.mkdir()
    libvirt.own(guest)
    libvirt.start("vm1", domain(block, network, options, folder))

    def trouble() -> str:
        state = libvirt.state("vm1")
        return "" if state == "running" else state

    with Agent(guest / "agent.sock", trouble, lambda: (guest / "console.log").read_text(errors="replace")) as agent:
        agent.booted()
        seen.root = agent.run("grep ' / ' /proc/self/mounts")
        seen.written = {name: _write(agent, name) for name in DISKS}
        agent.run("head -c 5000000 /dev/urandom >/srv/file && sync")
        cache.kill()
        cache.start()
        alive = ("vdb",) if seen.complaints["as it is"] else DISKS
        seen.after = {name: _write(agent, name) for name in alive}
        agent.run("head -c 5000000 /dev/urandom >/srv/file && sync")
        seen.errors = agent.ask("dmesg | grep -i -E 'I.O error|ext4-fs (error|warning)|remounted'").text.strip()


def _write(agent: Agent, name: str) -> tuple[str, str]:
    """Write to a disk in the guest; return the sums of what was written and what is read."""
    agent.run(f"head -c 4194304 /dev/urandom >/run/x && dd if=/run/x of=/dev/{name} bs=1M oflag=direct conv=fsync")
    read = agent.run(f"dd if=/dev/{name} bs=1M count=4 iflag=direct status=none | sha256sum")
    return agent.run("sha256sum </run/x"), read


def test_libvirt_takes_the_disks_as_the_document_says(seen: Seen) -> None:
    assert seen.complaints["without reconnect"] == ""
    assert seen.complaints["as it is"] == "" or seen.version <= REFUSED_BY


def test_a_guest_of_libvirt_boots_from_a_volume_and_uses_all_forms_of_disk(seen: Seen) -> None:
    assert re.match(r"/dev/vdc / ext4 rw", seen.root)
    assert seen.written.keys() == set(DISKS)
    assert all(written == read for written, read in seen.written.values())


def test_a_killed_cache_daemon_is_a_pause_of_a_guest_of_libvirt(seen: Seen) -> None:
    assert seen.after and all(written == read for written, read in seen.after.values())
    assert seen.errors == ""
