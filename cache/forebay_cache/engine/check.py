"""Checking a whole cache device that nobody uses: every invariant of the format, and of what recovery makes of it.

The device is only read. A tail of the log that a power cut tore is no finding, because recovery ends the log before
it; a damaged record that was durable is one. Codes are in `findings.CODES`.
"""

from forebay_cache.engine.check_areas import ChosenCheckpoint, check_checkpoints, check_superblocks
from forebay_cache.engine.check_volumes import check_volumes
from forebay_cache.engine.check_zones import Reached, ZoneCheck
from forebay_cache.engine.device_reads import ReadDevice
from forebay_cache.engine.findings import Finding, Findings
from forebay_cache.engine.recovery import Recovered, recover
from forebay_cache.format.superblock import Superblock
from forebay_core.errors import CorruptionError, UnreadableError


def check_device(
    read: ReadDevice, device_size: int, *, with_blocks: bool = True, reached: Reached = lambda _done, _total: None
) -> list[Finding]:
    """Return what is wrong with a device of so many bytes; an empty list if nothing is.

    `read(offset, size)` may raise UnreadableError. Without `with_blocks` the bytes of cached blocks are not looked at.
    """
    findings = Findings()
    superblock = check_superblocks(read, device_size, findings)
    if superblock is None:
        findings.add("state-unchecked", "device", "expected a superblock that says where its parts lie, found none")
        return findings.rows
    checkpoints = check_checkpoints(read, superblock, findings)
    recovered = _recover(read, superblock, checkpoints, findings)
    if recovered is not None:
        check_volumes(recovered, findings)
        ZoneCheck(read, checkpoints, recovered, findings, with_blocks=with_blocks).run(reached)
    return findings.rows


def _recover(
    read: ReadDevice, superblock: Superblock, checkpoints: list[ChosenCheckpoint], findings: Findings
) -> Recovered | None:
    """Return what a start would recover, or None if it would refuse the device."""
    if checkpoints:
        try:
            return recover(read, superblock, whole=True)
        except UnreadableError as error:
            findings.add("read-error", error.place, str(error))
        except CorruptionError as error:
            findings.add("log-damaged", error.place, str(error))
    text = "expected a checkpoint and a log that can be replayed, found damage; forebay cache salvage saves the rest"
    findings.add("state-unchecked", "device", text)
    return None
