"""A Debian with our units under its own systemd: a storage server and a hypervisor in one, whose guests are a unit too.

A second disk holds this host's Python and our sources, mounted at /own. What stands for libvirt notes what it finds of
the volume's device when it is started and when it is stopped.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import vm_debian
from vm_image import SITE, found, programs, run
from vm_machine import Machine, file_drive

OWN_SIZE: Final = "400M"
CONTENT: Final = "what a guest wrote"
NOTES: Final = "/var/log/guests"
READ: Final = f"head -c {len(CONTENT)} /dev/forebay/vm1"
CONNECT: Final = (
    "import os, signal, socket, sys; os.kill(int(sys.argv[1]), signal.SIGKILL); client = socket.socket(socket.AF_UNIX);"
    "client.connect('/run/forebay/nbd.sock'); print(client.recv(8).decode())"
)

SET_UP: Final = """set -e
mkdir /own
echo '/dev/vdb /own ext4 ro 0 2' >>/etc/fstab
mount /own
cp -an /own/lib/x86_64-linux-gnu/. /usr/lib/x86_64-linux-gnu/
ldconfig
mkdir -p {pyenv}
rmdir {pyenv}
chmod 755 /root  # the store's user has to get to its Python
ln -s /own{pyenv} {pyenv}
ln -s /own{site} {site}
for name in forebay python; do
    printf '#!/bin/sh\nPYTHONPATH={site} PYTHONDONTWRITEBYTECODE=1 exec {python} %s "$@"\n' \
        "$([ $name = python ] || echo -m forebay_tools.main)" >/usr/local/bin/$name
    chmod 755 /usr/local/bin/$name
done
cat >/etc/systemd/system/modules.service <<END
[Unit]
RequiresMountsFor=/own
Before=forebay-cache.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/own/bin/busybox insmod /own/modules/nbd.ko nbds_max=4
[Install]
WantedBy=multi-user.target
END
cat >/etc/systemd/system/libvirtd.service <<END
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/guests start
ExecStop=/usr/local/sbin/guests stop
[Install]
WantedBy=multi-user.target
END
cat >/usr/local/sbin/guests <<'END'
#!/bin/sh
echo "$1 $(systemctl is-active forebay-cache) $(head -c {size} /dev/forebay/vm1)" >>{notes}
sync
END
chmod 755 /usr/local/sbin/guests
bash /own/system/install /usr/local/bin/forebay
sed -i 's/10GiB/128MiB/' /etc/forebay/cache.toml
systemctl enable --now modules
systemctl enable --now forebay-store forebay-cache libvirtd || {{ journalctl -n 60 --no-pager; exit 1; }}
"""


@dataclass
class Story:
    """What was seen."""

    states: list[str]
    kept: str
    greeted: str
    after_kill: list[str]
    restarted: list[str]
    notes: list[str]
    failed: str
    device: str


def tell(folder: Path) -> Story:
    """Install, attach, kill, shut down and boot again."""
    disk, own = folder / "disk.raw", folder / "own.raw"
    shutil.copy(vm_debian.disk(), disk)
    _make_own(own, folder / "own")
    with Machine(folder / "first", file_drive(disk), second=own) as machine:
        machine.booted()
        machine.run(_set_up(), timeout_s=240)
        states = [
            machine.run(f"systemctl show -P {name} forebay-cache forebay-store").split()
            for name in ("ActiveState", "SubState")
        ]
        machine.run("FOREBAY_STORE=127.0.0.1:7300 forebay volume create vm1 --size 32MiB")
        machine.run("FOREBAY_RUN_DIR=/run/forebay forebay attach vm1 --front kernel")
        machine.run(f"printf %s '{CONTENT}' | dd of=/dev/forebay/vm1 conv=fsync,notrunc")
        machine.run("systemctl restart libvirtd")
        kept = _show(machine, "NFileDescriptorStore")
        greeted = machine.run(
            f'/usr/local/bin/python -c "{CONNECT}" $(systemctl show -P MainPID forebay-cache)'
        ).strip()
        after_kill = [_show(machine, "NRestarts"), machine.run(READ).strip()]
        machine.run("systemctl restart forebay-cache")
        restarted = [_show(machine, "ActiveState"), machine.run(READ).strip()]
        machine.shut_down()
    with Machine(folder / "second", file_drive(disk), second=own) as machine:
        machine.booted()
        failed = machine.run("systemctl --failed --no-legend --plain").strip()
        notes = machine.run(f"cat {NOTES}").splitlines()
        device = machine.run("readlink -f /dev/forebay/vm1").strip()
        machine.shut_down()
    return Story(
        [word for line in states for word in line], kept, greeted, after_kill, restarted, notes, failed, device
    )


def _show(machine: Machine, name: str) -> str:
    return machine.run(f"systemctl show -P {name} forebay-cache").strip()


def _set_up() -> str:
    python = os.path.realpath(sys._base_executable)
    pyenv = str(Path(python).parents[1])
    return SET_UP.format(pyenv=pyenv, site=SITE, python=python, size=len(CONTENT), notes=NOTES)


def _make_own(image: Path, stage: Path) -> None:
    """Make the second disk."""
    for path, place in programs():
        target = stage / place.removeprefix("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy2(path, target)
    run([str(found("mkfs.ext4")), "-q", "-F", "-d", str(stage), str(image), OWN_SIZE])
    shutil.rmtree(stage)
