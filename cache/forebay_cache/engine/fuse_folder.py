"""The folder that the FUSE front shows: a file for each volume and snapshot that it serves. Names and attributes only.

Invariants:
    A node number is given once, so the kernel never takes one volume for another.
    A file is in `names` exactly while it is served; in the folder's nodes until nobody has it open either.
Crash: the daemon tells the next front what it serves.
"""

from typing import Final, NamedTuple

from forebay_cache.engine.nbd_client import NbdClient, State
from forebay_cache.format import fuse

ENOENT: Final = 2
EPERM: Final = 1
EROFS: Final = 30
NAME_BYTES_MAX: Final = 255
FOLDER_MODE: Final = fuse.S_IFDIR | 0o500


class VolumeFile:
    """One volume: its attributes, who has it open, and the connection that serves it while somebody has."""

    def __init__(self, node: int, name: str, *, read_only: bool, owner: tuple[int, int]) -> None:
        self.node = node
        self.name = name
        self.size = 0
        self.read_only = read_only
        self.mode = 0o400 if read_only else 0o600
        self.uid, self.gid = owner
        self.openings = 0
        self.client: NbdClient | None = None
        self.statuses: NbdClient | None = None

    def attributes(self) -> bytes:
        """Return what GETATTR tells."""
        mode = fuse.S_IFREG | self.mode
        return fuse.encode_attributes(self.node, size=self.size, mode=mode, uid=self.uid, gid=self.gid)


class Served(NamedTuple):
    """What the daemon says of one volume."""

    size: int
    read_only: bool


class FuseFolder:
    """The files, by name and by node."""

    def __init__(self, *, uid: int, gid: int) -> None:
        self.names: dict[str, VolumeFile] = {}
        self._owner = (uid, gid)
        self.nodes: dict[int, VolumeFile] = {}
        self.deserted = False  # the last file that somebody had open was shown no more, and is closed
        self._node = fuse.ROOT_NODE

    def serve(self, name: str, served: Served) -> VolumeFile:
        """Show a volume, or tell that it became larger."""
        file = self.names.get(name)
        if file is None:
            self._node += 1
            file = VolumeFile(self._node, name, read_only=served.read_only, owner=self._owner)
            self.names[name] = self.nodes[file.node] = file
        file.size = served.size
        for client in (file.client, file.statuses):
            if client is not None and client.state is State.GONE:
                client.begin()
        return file

    def release(self, name: str) -> None:
        """Show a volume no longer; who has it open keeps it."""
        file = self.names.pop(name, None)
        if file is not None and not file.openings:
            del self.nodes[file.node]

    def closed(self, file: VolumeFile) -> None:
        """Somebody closed a file."""
        file.openings -= 1
        if not file.openings and self.names.get(file.name) is not file:
            self.nodes.pop(file.node, None)
            self.deserted = not self.nodes

    def find(self, node: int) -> VolumeFile | None:
        """Return the file of a node."""
        return self.nodes.get(node)

    def answer(self, opcode: int, unique: int, node: int, body: memoryview) -> bytes | None:
        """Return the reply to a request about names and attributes; None if it is about something else."""
        match opcode:
            case fuse.OP_LOOKUP:
                return self._lookup(unique, bytes(body))
            case fuse.OP_GETATTR:
                return self._attributes(unique, node)
            case fuse.OP_SETATTR:
                return self._set_attributes(unique, node, body)
            case fuse.OP_STATFS:
                return fuse.encode_reply(unique, fuse.STATFS.pack(0, 0, 0, 0, 0, 4096, NAME_BYTES_MAX, 4096))
            case fuse.OP_OPENDIR:
                return fuse.encode_reply(unique, fuse.OPEN_REPLY.pack(0, 0))
            case fuse.OP_READDIR:
                _, offset, length, *_ = fuse.IO_REQUEST.unpack_from(body)
                return fuse.encode_reply(unique, self._entries(offset, length))
            case fuse.OP_RELEASEDIR:
                return fuse.encode_error(unique, 0)
        return None

    def _lookup(self, unique: int, name: bytes) -> bytes:
        file = self.names.get(name.rstrip(b"\0").decode(errors="replace"))
        if file is None:
            return fuse.encode_error(unique, ENOENT)
        return fuse.encode_reply(unique, fuse.ENTRY_PREFIX.pack(file.node, 0, 0, 0) + file.attributes())

    def _attributes(self, unique: int, node: int) -> bytes:
        if node == fuse.ROOT_NODE:
            uid, gid = self._owner
            attributes = fuse.encode_attributes(node, size=0, mode=FOLDER_MODE, uid=uid, gid=gid)
        elif (file := self.nodes.get(node)) is not None:
            attributes = file.attributes()
        else:
            return fuse.encode_error(unique, ENOENT)
        return fuse.encode_reply(unique, fuse.ATTRIBUTES_PREFIX + attributes)

    def _set_attributes(self, unique: int, node: int, body: memoryview) -> bytes:
        """Owner and permissions may change, for as long as the front lives; the size never by truncating."""
        file = self.nodes.get(node)
        valid, _opened, size, mode, uid, gid = fuse.SET_ATTRIBUTES.unpack_from(body)
        if file is None or (valid & fuse.SET_SIZE and size != file.size):
            return fuse.encode_error(unique, EPERM)
        if valid & fuse.SET_MODE:
            file.mode = mode & (0o444 if file.read_only else 0o666)
        if valid & fuse.SET_UID:
            file.uid = uid
        if valid & fuse.SET_GID:
            file.gid = gid
        return self._attributes(unique, node)

    def _entries(self, offset: int, length: int) -> bytes:
        listed = [(fuse.ROOT_NODE, ".", FOLDER_MODE), (fuse.ROOT_NODE, "..", FOLDER_MODE)]
        listed += [(file.node, name, fuse.S_IFREG) for name, file in sorted(self.names.items())]
        found = b""
        for index, (node, name, mode) in enumerate(listed[offset:], offset + 1):
            entry = fuse.encode_directory_entry(node, index, name, mode)
            if len(found) + len(entry) > length:
                break
            found += entry
        return found
