"""Names of volumes: what users may type."""

import pytest

from forebay_core.errors import WrongUsageError
from forebay_core.names import check_name, is_name


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
