"""Who is at the other end of a Unix socket."""

import os
import socket

from forebay_core.peers import peer_of


def test_the_other_end_is_known_by_its_process_user_and_group() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(ours) == (os.getpid(), os.geteuid(), os.getegid())
