"""Settings: what a file and flags may say, and what the user is told otherwise."""

from pathlib import Path

import pytest

from forebay_core.config import CacheSettings, StoreSettings, check_file, load_settings
from forebay_core.errors import WrongUsageError
from forebay_core.units import GIB, MIB

WHOLE = """
[store]
data = "/srv/store"
listen = "[::1]:7300"
key_file = "key"
log_level = "DEBUG"

[cache]
device = "/dev/sdx"
run_dir = "/run/forebay"
store = ["a:1"]
size = "10GiB"
format = true
nbd = "127.0.0.1:10809"
nbd_allow_remote = true
nbd_group = "kvm"
control = ":7400"
key_file = "key"
cut_size_max = "16MiB"
cut_age_s_max = 1
dirty_share_max = 0.5
zone_size = 1048576
fill_blocks = 16
compression_level = 3
log_level = "error"
"""
SMALLEST = '[cache]\ndevice = "d"\nrun_dir = "r"\nstore = "a:1"\n'


def write(path: Path, text: str) -> Path:
    file = path / "forebay.toml"
    file.write_text(text)
    return file


def refusal(path: Path, text: str) -> str:
    with pytest.raises(WrongUsageError) as caught:
        check_file(write(path, text))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    store, cache = check_file(write(tmp_path, WHOLE))
    assert store == StoreSettings(data=Path("/srv/store"), listen="[::1]:7300", key_file=Path("key"), log_level="debug")
    assert isinstance(cache, CacheSettings)
    assert (cache.size, cache.cut_size_max, cache.store) == (10 * GIB, 16 * MIB, ("a:1",))
    assert (cache.cut_age_s_max, cache.dirty_share_max, cache.fill_blocks) == (1.0, 0.5, 16)


def test_defaults_fill_what_the_file_leaves_out(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, SMALLEST), CacheSettings)
    assert settings == CacheSettings(device=Path("d"), run_dir=Path("r"), store=("a:1",))
    assert settings.cut_size_max == 256 * MIB


def test_flags_override_the_file_and_are_read_the_same_way(tmp_path: Path) -> None:
    flags = {"size": "1GiB", "store": " x:1", "format": True, "nbd": None, "fill_blocks": "8"}
    settings = load_settings(write(tmp_path, SMALLEST), CacheSettings, flags)
    assert (settings.size, settings.store, settings.format, settings.nbd) == (GIB, ("x:1",), True, None)
    assert settings.fill_blocks == 8


def test_flags_alone_are_enough() -> None:
    assert load_settings(None, StoreSettings, {"data": "d"}) == StoreSettings(data=Path("d"))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongUsageError, match=r"store\.data is missing; give a path"):
        load_settings(None, StoreSettings, {})
    assert "cache.device is missing" in refusal(tmp_path, "[cache]\n")


def test_unknown_keys_and_tables_are_named_with_what_is_allowed(tmp_path: Path) -> None:
    text = refusal(tmp_path, SMALLEST + "sise = 1\n")
    assert "forebay.toml" in text
    assert '"cache.sise"' in text
    assert "compression_level" in text
    assert "allowed are the tables [store] and [cache]" in refusal(tmp_path, "[stroe]\n")
    assert "allowed are the tables" in refusal(tmp_path, "store = 3\n")
    assert "holds no settings" in refusal(tmp_path, "")


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ('size = "ten"', "a size from 4 MiB"),
        ("size = 4097", "multiple of 4096"),
        ("size = true", "a size"),
        ("size = -4096", "a size"),
        ("format = 1", "true or false"),
        ('nbd = "localhost"', "HOST:PORT"),
        ('nbd = "localhost:70000"', "0 to 65535"),
        ('nbd = "a b:1"', "HOST:PORT"),
        ("nbd = 7", "HOST:PORT"),
        ("nbd_group = 107", "the name of a group"),
        ('nbd_group = "a b"', "the name of a group"),
        ("cut_age_s_max = 0", "0.1 to 3600 seconds"),
        ("cut_age_s_max = nan", "0.1 to 3600 seconds"),
        ("dirty_share_max = 1.0", "0.05 to 0.9"),
        ('destage_average = "1KiB/s"', "512 KiB/s to 1 TiB/s"),
        ("destage_total_peak = true", "512 KiB/s to 1 TiB/s"),
        ('destage_average = "3MiB/s"\ndestage_peak = "2MiB/s"', "up to cache.destage_peak, 2 MiB/s"),
        ("zone_size = 12288", "from 256 KiB to 16 MiB"),
        ("fill_blocks = 3", "1, 2, 4, 8 or 16"),
        ("write_price = -0.1", "a number from 0 to 1 hits"),
        ("window_max = 0.9", "a number from 0 to 0.8"),
        ('volume_floor = "half"', "a number from 0 to 1"),
        ("compression_level = 1.0", "whole number from 1 to 19"),
        ('log_level = "loud"', "debug or info"),
        ('key_file = ""', "a path"),
        ('key_file = "a\\u0000b"', "a path"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_what_is_allowed(tmp_path: Path, line: str, allowed: str) -> None:
    text = refusal(tmp_path, SMALLEST + line + "\n")
    assert f"cache.{line.split()[0]} = " in text
    assert allowed in text


@pytest.mark.parametrize("stores", ["[]", '["a:1", 2]', '""', '"a:1,b:2"', "3"])
def test_store_addresses_are_checked_each(tmp_path: Path, stores: str) -> None:
    assert "one address HOST:PORT" in refusal(tmp_path, f'[cache]\ndevice = "d"\nrun_dir = "r"\nstore = {stores}\n')


def test_files_that_are_no_toml_are_refused(tmp_path: Path) -> None:
    assert "not valid TOML" in refusal(tmp_path, "[cache\n")
    assert "not valid TOML" in refusal(tmp_path, "a = " + "[" * 100_000)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\n")
    with pytest.raises(WrongUsageError, match="not valid TOML"):
        check_file(tmp_path / "bytes.toml")
    with pytest.raises(WrongUsageError, match="can't be read"):
        check_file(tmp_path / "absent.toml")
    with pytest.raises(WrongUsageError, match="can't be read"):
        check_file(tmp_path)
    with pytest.raises(WrongUsageError, match="longer than 1 MiB"):
        check_file(write(tmp_path, "#" * (MIB + 1)))
