"""The NBD handshake without I/O: every option, every refusal, every way to cut the bytes."""

import struct

import pytest
from nbd_client import OptionReply, context_query, export_query, option_bytes
from ram_volume import RamExports, RamVolume

from forebay_cache.engine import nbd_limits
from forebay_cache.engine.nbd_negotiation import TRANSITIONS, Context, Event, Negotiation, ReplyStyle, State
from forebay_cache.format import nbd_options as o
from forebay_core.errors import ProtocolError

FLAGS = struct.pack(">I", 3)
MANDATORY = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10 | 1 << 11


def begin(*names: str, read_only: bool = False) -> Negotiation:
    volumes = [RamVolume(name, 1 << 20, read_only=read_only) for name in names or ("vol",)]
    negotiation = Negotiation(RamExports(*volumes))
    assert negotiation.take_output() == b"NBDMAGICIHAVEOPT\0\3"
    assert feed(negotiation, FLAGS) == 4
    return negotiation


def feed(negotiation: Negotiation, raw: bytes) -> int:
    return negotiation.receive(memoryview(raw))


def replies(raw: bytes) -> list[OptionReply]:
    found = []
    while raw:
        magic, option, kind, size = o.OPTION_REPLY.unpack_from(raw)
        assert magic == o.OPTION_REPLY_MAGIC
        found.append(OptionReply(option, kind, raw[20 : 20 + size]))
        raw = raw[20 + size :]
    return found


def ask(negotiation: Negotiation, option: int, payload: bytes = b"") -> list[OptionReply]:
    raw = option_bytes(option, payload)
    assert feed(negotiation, raw) == len(raw)
    found = replies(negotiation.take_output())
    assert {reply.option for reply in found} == {option}
    return found


def kinds(found: list[OptionReply]) -> list[int]:
    return [reply.type for reply in found]


def test_go_answers_with_export_and_block_sizes() -> None:
    negotiation = begin()
    found = ask(negotiation, o.OPT_GO, export_query("vol"))
    assert kinds(found) == [o.REP_INFO, o.REP_INFO, o.REP_ACK]
    assert o.EXPORT_INFORMATION.unpack(found[0].data) == (o.INFO_EXPORT, 1 << 20, MANDATORY)
    assert o.BLOCK_SIZE_INFORMATION.unpack(found[1].data) == (o.INFO_BLOCK_SIZE, 1, 4096, 32 << 20)
    assert negotiation.over
    assert negotiation.session is not None
    assert negotiation.session.volume.name == "vol"
    assert negotiation.session.style is ReplyStyle.SIMPLE


def test_info_answers_with_name_and_description_when_asked_and_goes_on() -> None:
    negotiation = begin()
    found = ask(negotiation, o.OPT_INFO, export_query("", o.INFO_NAME, o.INFO_DESCRIPTION, o.INFO_BLOCK_SIZE, 99))
    texts = {reply.data[:2]: reply.data[2:] for reply in found}
    assert texts[b"\0\1"] == b"vol"
    assert b"vol" in texts[b"\0\2"]
    assert not negotiation.over


def test_structured_replies_offer_df_and_read_only_volumes_say_so() -> None:
    negotiation = begin(read_only=True)
    assert kinds(ask(negotiation, o.OPT_STRUCTURED_REPLY)) == [o.REP_ACK]
    found = ask(negotiation, o.OPT_INFO, export_query("vol"))
    assert o.EXPORT_INFORMATION.unpack(found[0].data)[2] == MANDATORY | o.FLAG_READ_ONLY | o.FLAG_SEND_DF


def test_export_name_answers_without_zeroes_only_if_that_was_agreed() -> None:
    for flags, size in ((1, 134), (3, 10)):
        negotiation = Negotiation(RamExports(RamVolume("vol", 1 << 20)))
        negotiation.take_output()
        feed(negotiation, struct.pack(">I", flags) + option_bytes(o.OPT_EXPORT_NAME, b"vol"))
        answer = negotiation.take_output()
        assert len(answer) == size
        assert o.EXPORT_NAME_REPLY.unpack_from(answer) == (1 << 20, MANDATORY)
        assert negotiation.session is not None


def test_the_default_export_is_an_error_unless_one_volume_is_attached() -> None:
    assert kinds(ask(begin("a", "b"), o.OPT_GO, export_query(""))) == [o.REP_ERR_UNKNOWN]
    assert kinds(ask(begin("a"), o.OPT_GO, export_query("")))[-1] == o.REP_ACK
    with pytest.raises(ProtocolError):
        feed(begin("a", "b"), option_bytes(o.OPT_EXPORT_NAME))


def test_an_unknown_export_is_refused_and_negotiation_goes_on() -> None:
    negotiation = begin()
    for option in (o.OPT_GO, o.OPT_INFO):
        assert kinds(ask(negotiation, option, export_query("other"))) == [o.REP_ERR_UNKNOWN]
    assert kinds(ask(negotiation, o.OPT_GO, export_query("vol")))[-1] == o.REP_ACK


def test_list_names_every_export() -> None:
    found = ask(begin("b", "a", "c@daily"), o.OPT_LIST)
    assert [reply.data[4:] for reply in found[:-1]] == [b"a", b"b", b"c@daily"]
    assert kinds(found) == [o.REP_SERVER] * 3 + [o.REP_ACK]


@pytest.mark.parametrize("option", [4, 12, 99, 0xFFFFFFFF, o.OPT_STARTTLS, 0])
def test_other_options_are_unsupported_and_negotiation_goes_on(option: int) -> None:
    negotiation = begin()
    assert kinds(ask(negotiation, option, b"payload")) == [o.REP_ERR_UNSUP]
    assert kinds(ask(negotiation, o.OPT_LIST)) == [o.REP_SERVER, o.REP_ACK]


@pytest.mark.parametrize("option", [o.OPT_LIST, o.OPT_STRUCTURED_REPLY, o.OPT_EXTENDED_HEADERS])
def test_options_without_data_refuse_data(option: int) -> None:
    assert kinds(ask(begin(), option, b"x")) == [o.REP_ERR_INVALID]


def test_abort_is_acknowledged_and_ends_without_a_session() -> None:
    negotiation = begin()
    assert kinds(ask(negotiation, o.OPT_ABORT)) == [o.REP_ACK]
    assert negotiation.over
    assert negotiation.session is None


def test_extended_headers_take_precedence_over_structured_replies() -> None:
    negotiation = begin()
    assert kinds(ask(negotiation, o.OPT_STRUCTURED_REPLY)) == [o.REP_ACK]
    assert kinds(ask(negotiation, o.OPT_STRUCTURED_REPLY)) == [o.REP_ERR_INVALID]
    assert kinds(ask(negotiation, o.OPT_EXTENDED_HEADERS)) == [o.REP_ACK]
    assert kinds(ask(negotiation, o.OPT_EXTENDED_HEADERS)) == [o.REP_ERR_INVALID]
    assert kinds(ask(negotiation, o.OPT_STRUCTURED_REPLY)) == [o.REP_ERR_EXT_HEADER_REQD]
    with pytest.raises(ProtocolError):
        feed(negotiation, option_bytes(o.OPT_EXPORT_NAME, b"vol"))


def test_meta_contexts_need_structured_replies() -> None:
    negotiation = begin()
    for option in (o.OPT_LIST_META_CONTEXT, o.OPT_SET_META_CONTEXT):
        assert kinds(ask(negotiation, option, context_query("vol", "base:allocation"))) == [o.REP_ERR_INVALID]


def test_meta_contexts_are_listed_and_selected() -> None:
    negotiation = begin()
    ask(negotiation, o.OPT_STRUCTURED_REPLY)
    for queries, count in (((), 1), (("base:",), 1), (("base:allocation",), 1), (("base:other", "x-y:z"), 0)):
        found = ask(negotiation, o.OPT_LIST_META_CONTEXT, context_query("vol", *queries))
        assert kinds(found) == [o.REP_META_CONTEXT] * count + [o.REP_ACK]
        assert all(reply.data == b"\0\0\0\0base:allocation" for reply in found[:-1])
    found = ask(negotiation, o.OPT_SET_META_CONTEXT, context_query("vol", "base:", "base:allocation"))
    assert found[0].data == b"\0\0\0\1base:allocation"
    ask(negotiation, o.OPT_GO, export_query("vol"))
    assert negotiation.session is not None
    assert negotiation.session.contexts == (Context(1, ""),)


def test_a_selection_counts_for_its_export_and_until_the_next_selection() -> None:
    def session(*selections: tuple[str, ...]) -> bool:
        negotiation = begin("a", "b")
        ask(negotiation, o.OPT_STRUCTURED_REPLY)
        for name, *queries in selections:
            ask(negotiation, o.OPT_SET_META_CONTEXT, context_query(name, *queries))
        ask(negotiation, o.OPT_GO, export_query("a"))
        assert negotiation.session is not None
        return negotiation.session.contexts != ()

    assert session(("a", "base:allocation"))
    assert not session(("b", "base:allocation"))
    assert not session(("a", "base:allocation"), ("a",))
    assert not session(("a", "base:allocation"), ("other", "base:allocation"))
    assert not session(("a", "base:allocation"), ("a", "no namespace"))
    assert not session(("a", "base:"))


@pytest.mark.parametrize("name", [b"v\0l", b"\xff\xfe", b"\xed\xa0\x80"])
def test_names_with_nul_or_without_utf8_are_refused(name: bytes) -> None:
    raw = struct.pack(">I", len(name)) + name
    negotiation = begin()
    assert kinds(ask(negotiation, o.OPT_GO, raw + b"\0\0")) == [o.REP_ERR_INVALID]
    ask(negotiation, o.OPT_STRUCTURED_REPLY)
    assert kinds(ask(negotiation, o.OPT_SET_META_CONTEXT, raw + b"\0\0\0\0")) == [o.REP_ERR_INVALID]
    with pytest.raises(ProtocolError):
        feed(negotiation, option_bytes(o.OPT_EXPORT_NAME, name))


def test_strings_above_4096_bytes_are_refused() -> None:
    negotiation = begin()
    assert kinds(ask(negotiation, o.OPT_GO, export_query("v" * 4097))) == [o.REP_ERR_TOO_BIG]
    assert kinds(ask(negotiation, o.OPT_GO, export_query("v" * 4096))) == [o.REP_ERR_UNKNOWN]
    with pytest.raises(ProtocolError):
        feed(negotiation, o.OPTION.pack(o.OPTION_MAGIC, o.OPT_EXPORT_NAME, 4097))


def test_long_options_are_skipped_and_refused_and_longer_ones_end_the_connection() -> None:
    negotiation = begin()
    payload = bytes(nbd_limits.OPTION_SIZE_MAX + 1)
    assert kinds(ask(negotiation, o.OPT_GO, payload)) == [o.REP_ERR_TOO_BIG]
    assert kinds(ask(negotiation, 77, payload)) == [o.REP_ERR_UNSUP]
    assert kinds(ask(negotiation, o.OPT_LIST)) == [o.REP_SERVER, o.REP_ACK]
    for size in (nbd_limits.OPTION_SKIP_MAX + 1, 0xFFFFFFFF):
        with pytest.raises(ProtocolError):
            feed(begin(), o.OPTION.pack(o.OPTION_MAGIC, o.OPT_GO, size))


def test_unknown_client_flags_and_bad_magics_end_the_connection() -> None:
    for flags in (4, 0x80000003):
        with pytest.raises(ProtocolError):
            feed(Negotiation(RamExports()), struct.pack(">I", flags))
    with pytest.raises(ProtocolError):
        feed(begin(), b"IHAVEOPS" + bytes(8))


def test_the_number_of_options_is_bounded() -> None:
    negotiation = begin()
    for _ in range(nbd_limits.OPTIONS_MAX):
        ask(negotiation, 99)
    with pytest.raises(ProtocolError):
        feed(negotiation, option_bytes(99))


def test_the_bytes_of_a_negotiation_are_bounded() -> None:
    negotiation = begin()
    raw = option_bytes(99, bytes(nbd_limits.OPTION_SIZE_MAX))
    with pytest.raises(ProtocolError):
        for _ in range(nbd_limits.NEGOTIATION_SIZE_MAX // len(raw) + 1):
            feed(negotiation, raw)
            negotiation.take_output()


def test_answers_that_nobody_takes_stop_the_intake() -> None:
    negotiation = begin(*(f"volume-{index}" for index in range(1000)))
    raw = option_bytes(o.OPT_LIST) * 1000
    taken = feed(negotiation, raw)
    assert 0 < taken < len(raw)
    assert len(negotiation.take_output()) < 2 * nbd_limits.NEGOTIATION_OUTPUT_MAX
    assert feed(negotiation, raw[taken:]) > 0


CONVERSATION = b"".join(
    (
        FLAGS,
        option_bytes(o.OPT_LIST),
        option_bytes(99, b"abc"),
        option_bytes(o.OPT_STRUCTURED_REPLY),
        option_bytes(o.OPT_SET_META_CONTEXT, context_query("vol", "base:allocation")),
        option_bytes(o.OPT_INFO, export_query("nowhere")),
        option_bytes(o.OPT_GO, export_query("vol", o.INFO_NAME)),
    )
)


def converse(raw: bytes, step: int) -> tuple[bytes, int]:
    """Feed in steps as a socket would: what is not taken comes again with more behind it."""
    negotiation = Negotiation(RamExports(RamVolume("vol", 1 << 20)))
    output = b""
    at = 0
    for end in range(step, len(raw) + step, step):
        at += feed(negotiation, raw[at:end])
        output += negotiation.take_output()
        assert not negotiation.over or at == len(CONVERSATION)
    assert negotiation.session is not None
    return output, at


def test_the_handshake_is_the_same_whole_byte_by_byte_and_with_trailing_bytes() -> None:
    whole = converse(CONVERSATION, len(CONVERSATION))
    assert converse(CONVERSATION, 1) == whole
    assert converse(CONVERSATION, 7) == whole
    assert converse(CONVERSATION + b"first request", 1 << 20) == whole
    assert whole[1] == len(CONVERSATION)


def test_every_state_but_the_last_has_a_way_on() -> None:
    assert {state for state, _event in TRANSITIONS} == set(State) - {State.OVER}
    assert {event for _state, event in TRANSITIONS} == set(Event)
