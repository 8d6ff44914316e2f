"""Names of volumes and snapshots: what users may type."""

import pytest

from forebay_core.errors import WrongUsageError
from forebay_core.names import SnapshotName, check_name, is_name, parse_snapshot_name


@pytest.mark.parametrize("name", ["a", "0", "vm-1.disk_0+x:y", "A" * 128])
def test_an_ordinary_name_is_taken(name: str) -> None:
    assert check_name(name) == name
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "-x",
        "_x",
        "a/b",
        "a b",
        "a@b",
        "a\n",
        "a\x00",
        "ä",
        "A" * 129,
        "a\\b",
        "../etc/passwd",
        "a%",
        "٣",
    ],
)
def test_any_other_is_refused_in_one_line(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(WrongUsageError, match=r"snapshot name .*use 1 to 128") as caught:
        check_name(name, "snapshot")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_snapshot_has_the_name_of_its_volume_too() -> None:
    name = parse_snapshot_name("vm-1@monday")
    assert name == SnapshotName("vm-1", "monday")
    assert str(name) == "vm-1@monday"


@pytest.mark.parametrize("text", ["", "@", "v", "v@", "@s", "a@b@c", "v@@s", "v@s@", "x" * 500])
def test_at_in_odd_places_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(WrongUsageError, match="write VOLUME@SNAPSHOT, for example vm1@monday") as caught:
        parse_snapshot_name(text)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(("text", "kind"), [("../v@s", "volume"), ("v@../s", "snapshot"), ("v@s\n", "snapshot")])
def test_both_names_of_a_snapshot_are_checked(text: str, kind: str) -> None:
    with pytest.raises(WrongUsageError, match=f"{kind} name"):
        parse_snapshot_name(text)
