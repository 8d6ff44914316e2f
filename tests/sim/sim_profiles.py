"""What goes wrong in the runs of the simulator, and how often."""

from typing import NamedTuple


class Profile(NamedTuple):
    """How often what goes wrong, as weights."""

    weights: dict[str, int]
    rounds: int = 6
    device_size: int = 10 << 20
    blocks: int = 120
    family: bool = False  # the second volume is a clone of a snapshot of the first


BASE = {
    "crash_cache": 6,
    "crash_store": 4,
    "cut_network": 4,
    "partition": 3,
    "slow_network": 2,
    "full_store": 2,
    "break_store": 1,
    "break_device": 1,
    "jump_clock": 2,
    "take_over": 2,
    "move": 2,
    "leave_dirty": 1,
    "drain": 2,
    "slow_disk": 1,
    "snapshot": 6,
    "grow": 1,
}
PROFILES = {
    "all": Profile(BASE),
    "power": Profile({"power_cache": 6, "power_store": 2, "cut_network": 1, "drain": 1}),
    "snapshots": Profile(
        {"snapshot": 12, "grow": 2, "crash_cache": 3, "power_cache": 2, "crash_store": 1, "partition": 2, "drain": 1},
        rounds=14,
        device_size=8 << 20,
        blocks=180,
    ),
    "fencing": Profile(
        {
            "leave_behind": 5,
            "take_over": 3,
            "move": 2,
            "cut_network": 2,
            "crash_cache": 1,
            "partition": 1,
            "lose_opens": 3,
        }
    ),
    "full": Profile({**BASE, "take_over": 0}, device_size=8 << 20, blocks=230),
    "full_power": Profile({"power_cache": 1}, rounds=8, device_size=8 << 20, blocks=230),
    "ssd": Profile({"lose_ssd": 2, "power_cache": 2, "drain": 1, "take_over": 1, "crash_store": 1}),
    "media": Profile({"damage_cache": 4, "power_cache": 2, "crash_cache": 2, "drain": 1}),
    "limits": Profile({**BASE, "limit": 8}),
    "unreadable": Profile({"unreadable": 3, "crash_cache": 2, "power_cache": 1, "drain": 1, "limit": 1}),
    "family": Profile(
        {**BASE, "read_snapshot": 8, "power_cache": 3, "leave_snapshot": 2, "roll_back": 6, "flatten": 4},
        device_size=8 << 20,
        blocks=420,
        family=True,
    ),
    "cleaning": Profile(
        {"clean": 10, "snapshot": 5, "crash_store": 4, "power_store": 4, "drain": 5, "crash_cache": 2, "full_store": 1},
        rounds=14,
    ),
    "pasts": Profile(
        {
            "snapshot": 8,
            "roll_back": 8,
            "delete_snapshot": 4,
            "clean": 3,
            "crash_store": 4,
            "power_store": 4,
            "drain": 3,
        }
        | {"crash_cache": 2, "power_cache": 2, "cut_network": 1, "grow": 1},
        rounds=14,
        device_size=8 << 20,
    ),
    "store_media": Profile({"damage_store": 3, "crash_store": 2, "crash_cache": 1, "drain": 1}, rounds=4),
}
TURNS = (
    *("all", "power", "limits", "fencing", "all", "full", "power", "ssd", "all", "media", "full", "store_media"),
    *("unreadable", "all", "family", "snapshots", "snapshots", "cleaning", "pasts"),
)


def choose_profile(seed: int) -> str:
    """Return the profile that a seed runs without being told one."""
    return TURNS[seed % len(TURNS)]
