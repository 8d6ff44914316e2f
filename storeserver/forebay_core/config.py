"""Settings of the daemons: one TOML file with the tables [store] and [cache]; flags override what the file says.

Every value, from the file or from a flag, goes through the reader of its key below, so `forebay config check` and a
starting daemon agree. An unknown table or key, a value out of range or a missing key is a `WrongUsageError` of one
line that names file, key, value and what is allowed. Sizes are bytes or take units ("10GiB"); paths are relative to
the working directory.
"""

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from forebay_core.errors import WrongUsageError
from forebay_core.units import (
    BLOCK_SIZE,
    GIB,
    KIB,
    MIB,
    RATE_MAX,
    RATE_MIN,
    VOLUME_SIZE_MAX,
    format_rate,
    format_size,
    parse_rate,
    parse_size,
)

CONFIG_SIZE_MAX: Final = 1 * MIB
STORES_MAX: Final = 1
"""Addresses in `cache.store`; the syntax has room for replicas, the daemon does not know them yet."""

FILL_BLOCKS: Final = (1, 2, 4, 8, 16)
BOOL_ALLOWED: Final = "true or false"
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
PORT_MAX: Final = 65535

_ADDRESS: Final = re.compile(r"(?P<host>[A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]):(?P<port>[0-9]{1,5})\Z")
_GROUP: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\Z")


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Table [store]: what `forebay store serve` is told."""

    data: Path
    listen: str = "127.0.0.1:7300"
    key_file: Path | None = None
    clean_rate: int = 32 * MIB
    scrub_rate: int = 32 * MIB
    scrub_every_days: float = 7.0
    log_level: str = "info"


class CacheSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Table [cache]: what `forebay cache serve` is told. Sizes in bytes."""

    device: Path
    run_dir: Path
    store: tuple[str, ...]
    size: int | None = None
    format: bool = False
    nbd: str | None = None
    nbd_allow_remote: bool = False
    nbd_group: str | None = None
    control: str | None = None
    key_file: Path | None = None
    cut_size_max: int = 256 * MIB
    cut_age_s_max: float = 10.0
    dirty_share_max: float = 0.6
    destage_average: int | None = None
    destage_peak: int | None = None
    destage_total_average: int | None = None
    destage_total_peak: int | None = None
    zone_size: int = 4 * MIB
    fill_blocks: int = 4
    read_ahead_size: int = 4 * MIB
    bypass_size: int = 256 * KIB
    write_price: float = 0.01
    window_max: float = 0.8
    volume_floor: float = 0.5
    compression_level: int = 1
    log_level: str = "info"


Settings = StoreSettings | CacheSettings
SettingsType = TypeVar("SettingsType", StoreSettings, CacheSettings)


class Setting(NamedTuple):
    """How one key is read: `read` returns the value or raises ValueError; the texts are for people."""

    read: Callable[[object], object]
    allowed: str
    metavar: str
    meaning: str


def load_settings(
    path: Path | None, table: type[SettingsType], overrides: Mapping[str, object] | None = None
) -> SettingsType:
    """Return the settings of one table: the file's values, replaced by the overrides that are not None.

    Raises:
        WrongUsageError: the file can't be read or is no TOML, or a key or value is wrong or missing.
    """
    given = _read_tables(path).get(TABLE_NAMES[table], {}) if path is not None else {}
    flags = {key: value for key, value in (overrides or {}).items() if value is not None}
    place = str(path) if path is not None else "settings"
    values = _read_values(place, table, given) | _read_values("flags", table, flags)
    for field in msgspec.structs.fields(table):
        if field.required and field.name not in values:
            raise WrongUsageError(
                f"{place}: {TABLE_NAMES[table]}.{field.name} is missing; give {SETTINGS[table][field.name].allowed}"
            )
    settings = table(**values)
    if isinstance(settings, CacheSettings):
        for key in ("destage", "destage_total"):
            average, peak = getattr(settings, f"{key}_average"), getattr(settings, f"{key}_peak")
            if None not in (average, peak) and average > peak:
                raise WrongUsageError(
                    f"{place}: cache.{key}_average = {format_rate(average)}: allowed is a rate up to "
                    f"cache.{key}_peak, {format_rate(peak)}"
                )
    return settings


def check_file(path: Path) -> list[Settings]:
    """Return the settings of every table that the file holds, checked as a starting daemon checks them.

    Raises:
        WrongUsageError: as `load_settings`, or the file holds no table at all.
    """
    tables = _read_tables(path)
    if not tables:
        raise WrongUsageError(f"{path}: holds no settings; allowed are the tables [store] and [cache]")
    settings: list[Settings] = []
    if "store" in tables:
        settings.append(load_settings(path, StoreSettings))
    if "cache" in tables:
        settings.append(load_settings(path, CacheSettings))
    return settings


def _read_tables(path: Path) -> dict[str, dict[str, object]]:
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_SIZE_MAX + 1)
        if len(text) > CONFIG_SIZE_MAX:
            raise WrongUsageError(f"{path}: is longer than {format_size(CONFIG_SIZE_MAX)}; this is no configuration")
        tables = tomllib.loads(text.decode())
    except OSError as error:
        raise WrongUsageError(f"{path}: can't be read ({error.strerror}); give a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WrongUsageError(f"{path}: is not valid TOML: {str(error).splitlines()[0]}") from error
    for name, table in tables.items():
        if name not in TABLE_NAMES.values() or not isinstance(table, dict):
            raise WrongUsageError(f"{path}: unknown key {_shown(name)}; allowed are the tables [store] and [cache]")
    return tables


def _read_values(place: str, table: type[Settings], given: Mapping[str, object]) -> dict[str, Any]:
    known = SETTINGS[table]
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = f"{TABLE_NAMES[table]}.{key}"
        if key not in known:
            raise WrongUsageError(f"{place}: unknown key {_shown(name)}; allowed are {', '.join(known)}")
        try:
            values[key] = known[key].read(value)
        except ValueError as error:
            raise WrongUsageError(f"{place}: {name} = {_shown(value)}: allowed is {known[key].allowed}") from error
    return values


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    shown = text[:80].encode("unicode_escape").decode() + ("..." if len(text) > 80 else "")
    return f'"{shown}"' if isinstance(value, str) else shown


def _path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(value)
    return Path(value)


def _address(value: object) -> str:
    match = _ADDRESS.match(value) if isinstance(value, str) else None
    if match is None or int(match["port"]) > PORT_MAX:
        raise ValueError(value)
    return match.string


def _addresses(value: object) -> tuple[str, ...]:
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not 1 <= len(parts) <= STORES_MAX:
        raise ValueError(value)
    return tuple(_address(part) for part in parts)


def _group(value: object) -> str:
    match = _GROUP.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(value)
    return match.string


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _choice(allowed: tuple[str, ...]) -> Callable[[object], str]:
    def read(value: object) -> str:
        if not isinstance(value, str) or value.lower() not in allowed:
            raise ValueError(value)
        return value.lower()

    return read


def _path_setting(meaning: str) -> Setting:
    return Setting(_path, "a path", "PATH", meaning)


def _address_setting(meaning: str) -> Setting:
    return Setting(_address, f"HOST:PORT with a port from 0 to {PORT_MAX}", "HOST:PORT", meaning)


def _flag_setting(meaning: str) -> Setting:
    return Setting(_flag, BOOL_ALLOWED, "", meaning)


def _log_level(meaning: str) -> Setting:
    return Setting(_choice(LOG_LEVELS), " or ".join(LOG_LEVELS), "LEVEL", meaning)


def _size(low: int, high: int, meaning: str) -> Setting:
    def read(value: object) -> int:
        size = parse_size(value) if isinstance(value, str) else value
        if not isinstance(size, int) or isinstance(size, bool) or not low <= size <= high or size % BLOCK_SIZE:
            raise ValueError(value)
        return size

    allowed = f"a size from {format_size(low)} to {format_size(high)} that is a multiple of {BLOCK_SIZE}"
    return Setting(read, allowed, "SIZE", meaning)


def _rate(meaning: str) -> Setting:
    def read(value: object) -> int:
        rate = parse_rate(value) if isinstance(value, str) else value
        if not isinstance(rate, int) or isinstance(rate, bool) or not RATE_MIN <= rate <= RATE_MAX:
            raise ValueError(value)
        return rate

    return Setting(read, f"a rate from {format_rate(RATE_MIN)} to {format_rate(RATE_MAX)}", "RATE", meaning)


def _number(low: float, high: float, unit: str, meaning: str) -> Setting:
    def read(value: object) -> float:
        number = float(value) if isinstance(value, str) else value
        if not isinstance(number, int | float) or isinstance(number, bool) or not low <= number <= high:
            raise ValueError(value)
        return float(number)

    return Setting(read, f"a number from {low:g} to {high:g}{unit}", "NUMBER", meaning)


def _whole(allowed: range | tuple[int, ...], text: str, meaning: str) -> Setting:
    def read(value: object) -> int:
        number = int(value) if isinstance(value, str) else value
        if not isinstance(number, int) or isinstance(number, bool) or number not in allowed:
            raise ValueError(value)
        return number

    return Setting(read, text, "NUMBER", meaning)


TABLE_NAMES: Final[dict[type[Settings], str]] = {StoreSettings: "store", CacheSettings: "cache"}
SETTINGS: Final[dict[type[Settings], dict[str, Setting]]] = {
    StoreSettings: {
        "data": _path_setting("folder for segments and index"),
        "listen": _address_setting("where caches and commands reach the store"),
        "key_file": _path_setting("file with the key that peers must have; needed beyond loopback"),
        "clean_rate": _rate(
            "bytes a second that the cleaner copies: an eighth while clients work, more when space runs out"
        ),
        "scrub_rate": _rate("bytes a second that the scrub reads"),
        "scrub_every_days": _number(
            0, 365, " days", "a scrub begins so long after the last one; 0: only when asked for"
        ),
        "log_level": _log_level("least urgent messages to log"),
    },
    CacheSettings: {
        "device": _path_setting("cache file or block device"),
        "run_dir": _path_setting("folder for the sockets nbd.sock and control.sock"),
        "store": Setting(_addresses, "one address HOST:PORT", "HOST:PORT", "where the store listens"),
        "size": _size(4 * MIB, VOLUME_SIZE_MAX, "size of the cache file to make"),
        "format": _flag_setting("make the device a new, empty cache, whatever it holds"),
        "nbd": _address_setting("serve NBD over TCP here as well"),
        "nbd_allow_remote": _flag_setting("let NBD listen beyond loopback, where nothing protects it"),
        "nbd_group": Setting(
            _group, "the name of a group", "GROUP", "whose members may open nbd.sock too, and so every attached volume"
        ),
        "control": _address_setting("answer commands over TCP here as well"),
        "key_file": _path_setting("file with the key of the store"),
        "cut_size_max": _size(1 * MIB, 1 * GIB, "a cut closes when it holds so much"),
        "cut_age_s_max": _number(0.1, 3600, " seconds", "a cut closes when it is so old"),
        "dirty_share_max": _number(0.05, 0.9, "", "share of the cache that may wait to be destaged"),
        "destage_average": _rate("bytes a second that a volume is destaged with; without it, no limit or the peak"),
        "destage_peak": _rate("what that rises to as the buffer fills; without it, the average"),
        "destage_total_average": _rate("the same for all volumes together"),
        "destage_total_peak": _rate("the same for all volumes together"),
        "zone_size": _size(256 * KIB, 16 * MIB, "size of a zone, chosen when the device is made"),
        "fill_blocks": _whole(FILL_BLOCKS, "1, 2, 4, 8 or 16", "blocks to fetch around a missing one"),
        "read_ahead_size": _size(0, 16 * MIB, "how far sequential reads of a volume are fetched ahead; 0: not at all"),
        "bypass_size": _size(
            0,
            1 * GIB,
            "a sequential read of a full cache that missed so much keeps only blocks that are used often; 0: never",
        ),
        "write_price": _number(
            0, 1, " hits", "hits that a block written to the SSD must bring: more saves the SSD, less serves reads"
        ),
        "window_max": _number(
            0, 0.8, "", "largest share for new blocks; the policy chooses 0, 0.03, 0.1, 0.2, 0.4 or 0.8 up to it"
        ),
        "volume_floor": _number(
            0, 1, "", "each volume in use keeps so much of an equal share of the cache if it can fill it"
        ),
        "compression_level": _whole(range(1, 20), "a whole number from 1 to 19", "zstd level of destaged frames"),
        "log_level": _log_level("least urgent messages to log"),
    },
}
for _table, _keys in SETTINGS.items():
    assert {field.name for field in msgspec.structs.fields(_table)} == set(_keys)
