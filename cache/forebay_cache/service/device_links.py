"""The names `/dev/forebay/VOLUME` of block devices, which stay over restarts while numbers may change.

udev makes them where it runs and has our rule (tools/system/90-forebay.rules); else the daemon does.

Invariant: a link that leads to another device that serves a volume of this name, or to what is no device of such
volumes, is never replaced.
Crash: a link that was left is replaced by the next device of that name.
"""

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Final

FOLDER: Final = Path("/dev/forebay")
RULES: Final = "90-forebay.rules"
_SYS_BLOCK: Final = Path("/sys/block")
_UDEV: Final = Path("/run/udev/control")
_RULE_FOLDERS: Final = ("/etc/udev/rules.d", "/run/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d")
_UDEV_WAIT_S: Final = 3.0
_POLL_S: Final = 0.02
_LOG = logging.getLogger(__name__)


def links_by_udev() -> bool:
    """Tell whether udev runs and has our rule."""
    return _UDEV.exists() and any(Path(rules, RULES).exists() for rules in _RULE_FOLDERS)


def make_link(name: str, device: str, folder: Path = FOLDER) -> str:
    """Let a name lead to a device that has just come, and return its path; empty if it can't be made. Blocks."""
    link = folder / name
    if links_by_udev():
        with contextlib.suppress(OSError):  # what names the device came behind the event of its size
            Path("/sys/class/block", Path(device).name, "uevent").write_text("change\n")
        until = time.monotonic() + _UDEV_WAIT_S
        while time.monotonic() < until and _target(link) != device:
            time.sleep(_POLL_S)
    if _target(link) == device:
        return str(link)
    if link.exists() and not _is_left(link):
        _LOG.warning("%s leads to %s already, not to %s: it is left alone", link, _target(link), device)
        return ""
    fresh = folder / f".{name}.{os.getpid()}"
    try:
        folder.mkdir(mode=0o755, exist_ok=True)
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(device)
        fresh.rename(link)
    except OSError as error:
        _LOG.warning("%s can't be made (%s); use %s", link, error.strerror, device)
        return ""
    return str(link)


def remove_link(name: str, device: str, folder: Path = FOLDER) -> None:
    """Take the name of a device away that has gone."""
    link = folder / name
    if _target(link) == device:
        try:
            link.unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("%s can't be removed (%s)", link, error.strerror)


def _is_left(link: Path) -> bool:
    """Tell whether a link leads to a device of the kind that volumes have, which has nothing to do with its name now.

    Their nodes exist always, whether there is a device behind them or not.
    """
    device = Path(_target(link)).name
    if not device.startswith(("nbd", "loop")):
        return False
    folder = _SYS_BLOCK / device
    return all(Path(_read(folder / name)).name != link.name for name in ("backend", "loop/backing_file"))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _target(link: Path) -> str:
    try:
        return str(Path(os.path.normpath(link.parent / os.readlink(link))))
    except OSError:
        return ""
