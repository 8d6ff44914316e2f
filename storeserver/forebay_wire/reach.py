"""Who can reach a daemon, and what it asks of them: the addresses of its settings, and its key.

The daemons check that before they touch anything, and `forebay config check` by the same function.
"""

from pathlib import Path

from forebay_core.config import CacheSettings, Settings, StoreSettings
from forebay_core.errors import WrongUsageError
from forebay_wire.address import is_loopback, parse_address
from forebay_wire.auth import read_key_file


def check_reach(settings: Settings, key: bytes | None) -> None:
    """See to it that nobody unknown reaches a daemon; `key` is that of its key file, if there is one.

    Raises:
        WrongUsageError: an address is none, or others could reach one that nothing protects.
    """
    match settings:
        case StoreSettings():
            _check_protected("store", "listen", settings.listen, key)
        case CacheSettings():
            for address in settings.store:
                parse_address(address)
            if settings.control is not None:
                _check_protected("cache", "control", settings.control, key)
            if settings.nbd is not None and not settings.nbd_allow_remote:
                _check_loopback(settings.nbd)


def read_key(key_file: Path | None) -> bytes | None:
    """Return the key, if the settings name a file; raises what `read_key_file` does."""
    return None if key_file is None else read_key_file(key_file)


def _check_protected(table: str, name: str, text: str, key: bytes | None) -> None:
    if key is None and not is_loopback(parse_address(text).host):
        raise WrongUsageError(
            f"{table}.{name} = {text}: others can reach it, so it needs a key file; give {table}.key_file, "
            "or use 127.0.0.1"
        )


def _check_loopback(text: str) -> None:
    if not is_loopback(parse_address(text).host):
        raise WrongUsageError(
            f"cache.nbd = {text}: others can reach it and write volumes; use 127.0.0.1, or give cache.nbd_allow_remote"
        )
