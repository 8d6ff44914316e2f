"""The newest connection of each device.

A cache daemon has one connection at a time. When the network was away, what it had sent on the one before may arrive
long after the next is in use: TCP sends it again for minutes, whether or not the daemon that wrote it still listens.
An open that came so late would end the session that the daemon works in, and stop its volumes for good; a take-over
that was given up would take the volume from whoever got it since.

Invariants:
    There is one entry at most for each connection that is alive, so clients can't make this grow.
    Connections are numbered in the order in which the store accepted them. Nothing can be asked on one before it was.
"""

from forebay_core.errors import RefusedError
from forebay_wire import messages
from forebay_wire.peer import Peer


class Openers:
    """Tells late opens from others."""

    def __init__(self) -> None:
        self._newest: dict[bytes, int] = {}  # by the device's UUID

    def came(self, peer: Peer) -> None:
        """A connection is authenticated, perhaps later than one that was accepted behind it."""
        self._newest[peer.node] = max(peer.id, self._newest.get(peer.node, 0))

    def expect_newest(self, peer: Peer) -> None:
        """Check that the device has no newer connection than this, on which it opens a volume.

        Raises:
            RefusedError: FENCED: it has one.
        """
        if self._newest.get(peer.node, peer.id) > peer.id:
            text = f"device {peer.node.hex()} has a newer connection; what comes on this one is too late"
            raise RefusedError(messages.FENCED, text)

    def gone(self, peer: Peer) -> None:
        """A connection ended."""
        if self._newest.get(peer.node) == peer.id:
            del self._newest[peer.node]
