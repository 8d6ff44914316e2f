"""The kernel's block devices, decided without a kernel: what is asked of it, and what its answers mean."""

import errno

import pytest

from forebay_cache.engine.kernel_device import (
    TRANSITIONS,
    Connect,
    Event,
    Found,
    KernelDevice,
    Mend,
    Resize,
    State,
)
from forebay_core.errors import ForebayError

ME = "forebay/cafe/vm1"
SIZE = 1 << 30


def device(number: int | None = None) -> KernelDevice:
    return KernelDevice(ME, size=SIZE, block_size=512, flags=13, number=number)


def free(number: int) -> Found:
    return Found(number, False, "", 0)


def live(number: int, identifier: str = ME, size: int = SIZE) -> Found:
    return Found(number, True, identifier, size)


def attached(number: int = 3) -> KernelDevice:
    made = device()
    made.begin([])
    assert not made.done(number)
    return made


def test_a_new_device_gets_the_number_that_the_kernel_likes() -> None:
    made = device()
    assert made.begin([free(0), live(1, "somebody else")]) == Connect(None, SIZE, 512, 13, ME)
    assert not made.done(0)
    assert (made.state, made.number) == (State.LIVE, 0)


def test_after_a_reboot_a_device_gets_its_old_number_again_if_that_is_free() -> None:
    assert device(4).begin([free(3), free(4)]) == Connect(4, SIZE, 512, 13, ME)
    assert device(4).begin([free(3), live(4, "somebody else")]) == Connect(None, SIZE, 512, 13, ME)


def test_a_number_that_was_taken_meanwhile_is_given_up() -> None:
    made = device(4)
    made.begin([free(4)])
    assert made.refused(errno.EBUSY) == Connect(None, SIZE, 512, 13, ME)
    with pytest.raises(ForebayError, match="no nbd device is free"):
        made.refused(errno.EBUSY)
    assert made.state is State.ABSENT


def test_a_device_that_outlived_the_daemon_is_given_a_socket_whatever_its_number_is() -> None:
    made = device(4)
    assert made.begin([live(4, "somebody else"), live(7)]) == Mend(7, ME)
    assert not made.done(7)
    assert (made.state, made.number) == (State.LIVE, 7)


def test_without_identifiers_a_device_is_known_by_number_and_size() -> None:
    assert device(4).begin([live(4, "")]) == Mend(4, ME)
    assert device(4).begin([live(4, "", SIZE // 2)]) == Connect(None, SIZE, 512, 13, ME)
    assert device().begin([live(4, "")]) == Connect(None, SIZE, 512, 13, ME)


def test_a_lost_socket_is_replaced_at_once_and_then_ever_more_slowly() -> None:
    made = attached(3)
    assert made.lost() and made.delay_s == 0
    delays = []
    for _ in range(9):
        assert made.mend([live(3)]) == Mend(3, ME)
        assert made.refused(errno.EAGAIN) is None
        delays.append(made.delay_s)
    assert delays == sorted(delays) and delays[0] > 0 and delays[-1] == 1.0
    made.mend([live(3)])
    assert not made.done(3) and made.delay_s == 0


def test_a_socket_that_is_lost_while_it_is_handed_over_is_replaced_after_that() -> None:
    made = attached(3)
    made.lost()
    made.mend([live(3)])
    assert not made.lost()
    assert made.done(3) and made.state is State.SEVERED
    assert made.delay_s > 0  # the kernel did not want that one; not again and again without a pause


def test_a_size_is_told_where_the_device_has_another() -> None:
    made = attached(3)
    assert made.resize([live(3), live(4, "somebody else", 2 * SIZE)]) is None
    made.size = 2 * SIZE
    assert made.resize([live(3)]) == Resize(3, 2 * SIZE, ME)
    made.lost()
    assert made.resize([live(3)]) is None


def test_a_device_that_somebody_disconnected_is_not_made_anew_unasked() -> None:
    made = attached(3)
    made.lost()
    assert made.mend([free(3), live(4, "somebody else")]) is None
    assert made.state is State.ABSENT and made.leave() is None


def test_a_device_is_let_go_severed_or_not_and_its_last_sign_of_life_means_nothing() -> None:
    for severed in (False, True):
        made = attached(3)
        if severed:
            made.lost()
        assert made.leave() == 3
        assert not made.lost()
        made.left()
        assert made.state is State.ABSENT


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.EPERM, "run the cache daemon as root"),
        (errno.ENOSPC, "nbds_max"),
        (errno.ENOENT, "modprobe nbd"),
        (errno.EIO, "EIO"),
        (9999, "9999"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(code: int, text: str) -> None:
    made = device()
    made.begin([])
    with pytest.raises(ForebayError, match=text) as caught:
        made.refused(code)
    assert "\n" not in str(caught.value) and made.state is State.ABSENT


def test_every_state_can_be_left_and_reached() -> None:
    assert {state for state, _ in TRANSITIONS} == set(State) == set(TRANSITIONS.values())
    assert {event for _, event in TRANSITIONS} == set(Event)
