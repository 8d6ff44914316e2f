"""The newest connection of each device that opens volumes.

A cache daemon has one connection at a time. When the network was away, what it had sent on the one before may arrive
long after the next is in use: TCP sends it again for minutes, whether or not the daemon that wrote it still listens.
An open that came so late would end the session that the daemon works in, and stop its volumes for good.

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

    def expect_newest(self, peer: Peer) -> None:
        """Take note that a device opens a volume on this connection.

        Raises:
            RefusedError: FENCED: it did so on a newer one.
        """
        newest = self._newest.get(peer.node, peer.id)
        if newest > peer.id:
            text = f"device {peer.node.hex()} opened volumes on a newer connection; what comes on this one is too late"
            raise RefusedError(messages.FENCED, text)
        self._newest[peer.node] = peer.id

    def gone(self, peer: Peer) -> None:
        """A connection ended."""
        if self._newest.get(peer.node) == peer.id:
            del self._newest[peer.node]
