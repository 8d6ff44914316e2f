"""What an operator does to snapshots at the store: rolling a volume back to one, deleting one.

Either may be lost with a store that dies before it has answered; what was answered stays so.
"""

import random

from sim_cache import CacheHost
from sim_guest import Guest
from sim_judges import Official
from sim_store import StoreHost
from sim_world import Violation

from forebay_store.engine.snapshots import snapshots_after
from forebay_store.engine.volumes import find_volume
from forebay_store.format.snapshot_rows import SnapshotState
from forebay_wire import messages


def roll_back(guest: Guest, host: CacheHost, store: StoreHost, official: Official, dice: random.Random) -> None:
    """Let the volume go, and make it what one of its snapshots shows; nobody serves it then."""
    host.command(lambda: host.shell.detach(guest.name, leave_dirty=False))
    state = _choose(store, official, dice)
    if state is None or not store.running:
        return
    official.ask(official.snapshots[state.id][1])
    answer = store.ask(messages.RollbackVolume(guest.name, state.name))
    if isinstance(answer, messages.Volume) and official.version not in official.own:
        raise Violation(f"{guest.name} was rolled back to {state.name}, and the store shows {official.version:#x}")


def delete_snapshot(guest: Guest, store: StoreHost, official: Official, dice: random.Random) -> None:
    """Delete one of a volume's snapshots while the guest works."""
    state = _choose(store, official, dice)
    if state is None:
        return
    official.deleting.add(state.id)
    if isinstance(store.ask(messages.DeleteSnapshot(guest.name, state.name)), messages.Done):
        official.deleted.add(state.id)


def _choose(store: StoreHost, official: Official, dice: random.Random) -> SnapshotState | None:
    """Return a snapshot that the store shows; None if it shows none, or is down."""
    if not store.running:
        return None
    with store.index.view() as reader:
        row = find_volume(reader, official.id)
        found = list(snapshots_after(reader, row.number, 0)) if row is not None else []
    return dice.choice(found) if found else None
