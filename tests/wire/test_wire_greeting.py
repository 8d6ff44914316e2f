"""Greeting and verdict: layout, golden bytes, damage, and who may go on with whom."""

import pytest

import layout_tables
from forebay_core.errors import AuthenticationError, ProtocolError, StoreUnreachableError
from forebay_wire import greeting as module
from forebay_wire.greeting import (
    GREETING,
    NO_PROOF,
    VERDICT,
    Authentication,
    Greeting,
    Reason,
    Role,
    Verdict,
    decode_greeting,
    decode_verdict,
    encode_greeting,
    encode_verdict,
    judge_greeting,
    refusal,
)

CLIENT = Greeting(Role.CLIENT, Authentication.PRE_SHARED_KEY, bytes(range(16)), bytes(range(32)), 1, 3, 5)
SERVER = Greeting(Role.SERVER, Authentication.PRE_SHARED_KEY, bytes(16), bytes(32))


def test_the_tables_are_the_structs() -> None:
    layout_tables.assert_matches(module, "Greeting", GREETING)
    layout_tables.assert_matches(module, "Verdict", VERDICT)


def test_the_greeting_is_what_it_always_was() -> None:
    assert encode_greeting(CLIENT).hex() == (
        "464f52454241590a01000300010100000500000000000000000102030405060708090a0b0c0d0e0f"
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fb418901ef5529ab9"
    )
    assert decode_greeting(encode_greeting(CLIENT)) == CLIENT


def test_the_verdict_is_what_it_always_was() -> None:
    verdict = Verdict(Reason.KEY_DIFFERS, bytes(range(32)))
    assert encode_verdict(verdict).hex() == (
        "4642575604000000000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1ff157d26679670460"
    )
    assert decode_verdict(encode_verdict(verdict)) == verdict


@pytest.mark.parametrize(
    ("packed", "decode"),
    [(encode_greeting(CLIENT), decode_greeting), (encode_verdict(Verdict(Reason.BUSY, NO_PROOF)), decode_verdict)],
)
def test_every_flipped_bit_is_noticed(packed: bytes, decode) -> None:
    for bit in range(len(packed) * 8):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            decode(bytes(flipped))


def resealed(packed: bytes, offset: int, value: int) -> bytes:
    changed = bytearray(packed)
    changed[offset] = value
    return module._sealed(bytes(changed))


@pytest.mark.parametrize(("offset", "value"), [(12, 0), (12, 3), (13, 2), (8, 9)])
def test_a_greeting_that_makes_no_sense_is_refused(offset: int, value: int) -> None:
    with pytest.raises(ProtocolError):
        decode_greeting(resealed(encode_greeting(CLIENT), offset, value))


def test_a_reason_of_a_later_version_is_named() -> None:
    with pytest.raises(ProtocolError, match="reason 77"):
        decode_verdict(resealed(encode_verdict(Verdict(Reason.BUSY, NO_PROOF)), 4, 77))


def test_feature_bits_we_do_not_know_are_ignored() -> None:
    assert judge_greeting(SERVER, CLIENT._replace(features=2**64 - 1)) is Reason.ACCEPTED


@pytest.mark.parametrize(
    ("own", "peer", "reason"),
    [
        (SERVER, CLIENT, Reason.ACCEPTED),
        (SERVER, CLIENT._replace(version_min=4, version_max=5), Reason.VERSION),
        (SERVER._replace(version_min=4, version_max=5), CLIENT, Reason.VERSION),
        (SERVER._replace(version_min=3, version_max=5), CLIENT, Reason.ACCEPTED),
        (SERVER, SERVER, Reason.ROLE),
        (SERVER._replace(authentication=Authentication.NONE), CLIENT, Reason.SENDER_HAS_NO_KEY),
        (SERVER, CLIENT._replace(authentication=Authentication.NONE), Reason.RECEIVER_HAS_NO_KEY),
    ],
)
def test_who_may_go_on_with_whom(own: Greeting, peer: Greeting, reason: Reason) -> None:
    assert judge_greeting(own, peer) is reason


def test_both_sides_name_the_side_without_key() -> None:
    keyless = CLIENT._replace(authentication=Authentication.NONE)
    at_server = refusal(judge_greeting(SERVER, keyless), SERVER, keyless, by_peer=False)
    at_client = refusal(judge_greeting(keyless, SERVER), keyless, SERVER, by_peer=False)
    assert isinstance(at_server, AuthenticationError)
    assert isinstance(at_client, AuthenticationError)
    assert "we have a key and the peer has none" in str(at_server)
    assert "the peer has a key and we have none" in str(at_client)


def test_a_reason_the_peer_gave_is_told_from_our_side() -> None:
    told = refusal(Reason.SENDER_HAS_NO_KEY, CLIENT, SERVER, by_peer=True)
    assert "we have a key and the peer has none" in str(told)
    assert isinstance(refusal(Reason.BUSY, CLIENT, SERVER, by_peer=True), StoreUnreachableError)


def test_a_version_mismatch_names_both_versions() -> None:
    error = refusal(Reason.VERSION, SERVER, CLIENT._replace(version_min=4, version_max=4), by_peer=False)
    assert isinstance(error, ProtocolError)
    assert "versions 4 to 4, we speak 3 to 3" in str(error)
