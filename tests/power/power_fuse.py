"""The power-cut file system as a program: `power_fuse.py FOLDER` mounts a `Tree` there and obeys its standard input.

One JSON request a line, one JSON answer a line:

    {"mount": true}         mount (again); answered when the kernel asked for the first time
    {"power_off": SEED, "everything": BOOL}
                            lose a part of what is not synced, or all; every call fails with EIO until the next mount
    {"off_after": COUNT}    let so many more changes and syncs pass, then fail every call: a cut at that very point
    {"ignore_sync": BOOL}   answer syncs without doing them: the fault that the tests must notice
    {"syncs": true}         how many syncs there were

Whoever asks unmounts between `power_off` and `mount`, so the kernel's page cache goes as well. Writes come at once (no
write-back cache), so what a killed daemon had written is here, and what it had not is nowhere. The page cache is on
for reading: LMDB reads by mmap. O_DIRECT works, and comes here like any other access. Locks are the kernel's.
Standard input ends with the test run: then the folder is unmounted and the program ends.
"""

import ctypes
import errno
import json
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Callable

from mfusepy import FUSE, FuseOSError, Operations, fuse_file_info
from power_tree import File, Folder, Node, Resize, Tree, Write, Zero

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
ALLOWED_WHEN_OFF = frozenset(("init_fuse_3", "destroy", "release", "releasedir"))
COUNTED = frozenset(
    ("create", "mkdir", "unlink", "rmdir", "link", "rename_fuse_3", "write", "truncate_fuse_3", "fallocate")
) | {"fsync", "fsyncdir"}
BLOCKS = 1 << 21  # 8 GiB, as far as statvfs goes


class PowerOperations(Operations):
    """What the kernel asks for, done to a tree. Handles are numbers of nodes, so that unlinked files stay open."""

    use_ns = True
    flag_nopath = True
    flag_nullpath_ok = True

    def __init__(self) -> None:
        self.tree = Tree()
        self.off = False
        self.left = -1  # changes and syncs until the power goes; negative: it stays
        self.ignore_sync = False
        self.syncs = 0
        self.mounted = threading.Event()
        self._handles: dict[int, tuple[Node, int]] = {}
        self._handle = 0

    def init(self, path: str) -> None:
        self._handles.clear()
        self.off = False
        self.left = -1
        self.mounted.set()

    def count(self) -> None:
        """Count a change or sync that comes."""
        self.off = self.off or self.left == 0
        self.left -= self.left > 0

    # --- names ------------------------------------------------------------------------------------------------

    def getattr(self, path: str | None, fh: int | None = None) -> dict[str, int]:
        return self._attributes(self._node(path, fh))

    def create(self, path: str, mode: int, flags: int) -> int:
        folder, name = self._parent(path)
        file = self.tree.new_file(mode & 0o7777)
        self.tree.set_names((folder, name, file))
        return self._opened(file, flags)

    def mkdir(self, path: str, mode: int) -> int:
        folder, name = self._parent(path)
        self._refuse(name in folder.live, errno.EEXIST)
        self.tree.set_names((folder, name, self.tree.new_folder(mode & 0o7777)))
        return 0

    def unlink(self, path: str) -> int:
        folder, name = self._parent(path)
        self._refuse(name not in folder.live, errno.ENOENT)
        self.tree.set_names((folder, name, None))
        return 0

    def rmdir(self, path: str) -> int:
        node = self._node(path)
        assert isinstance(node, Folder)
        self._refuse(bool(node.live), errno.ENOTEMPTY)
        return self.unlink(path)

    def link(self, target: str, source: str) -> int:
        folder, name = self._parent(target)
        self._refuse(name in folder.live, errno.EEXIST)
        self.tree.set_names((folder, name, self._node(source)))
        return 0

    def rename(self, old: str, new: str) -> int:
        """Move a name; what the new name stood for is gone with the same step."""
        node = self._node(old)
        source, destination = self._parent(old), self._parent(new)
        taken = destination[0].live.get(destination[1])
        self._refuse(isinstance(taken, Folder) and bool(taken.live), errno.ENOTEMPTY)
        if taken is not node:
            self.tree.set_names((*source, None), (*destination, node))
        return 0

    def chmod(self, path: str | None, mode: int, fh: int | None = None) -> int:
        self._node(path, fh).mode = mode & 0o7777
        return 0

    def chown(self, path: str | None, uid: int, gid: int, fh: int | None = None) -> int:
        return 0

    def utimens(self, path: str | None, times: tuple[int, int] | None = None) -> int:
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": BLOCKS, "f_bfree": BLOCKS, "f_bavail": BLOCKS}

    # --- folders ----------------------------------------------------------------------------------------------

    def opendir(self, path: str) -> int:
        return self._opened(self._node(path), 0)

    def readdir(self, path: str | None, fh: int) -> list[tuple[str, dict[str, int], int]]:
        folder = self._handles[fh][0]
        assert isinstance(folder, Folder)
        names = {".": folder, "..": folder, **folder.live}
        return [(name, self._attributes(node), 0) for name, node in names.items()]

    def releasedir(self, path: str | None, fh: int) -> int:
        return self.release(path, fh)

    def fsyncdir(self, path: str | None, datasync: int, fh: int) -> int:
        folder = self._handles[fh][0]
        assert isinstance(folder, Folder)
        self.syncs += 1
        if not self.ignore_sync:
            self.tree.sync_folder(folder)
        return 0

    # --- files ------------------------------------------------------------------------------------------------

    def open(self, path: str, flags: int) -> int:
        node = self._node(path)
        if flags & os.O_TRUNC and isinstance(node, File) and node.live:
            node.change(Resize(0))
        return self._opened(node, flags)

    def read(self, path: str | None, size: int, offset: int, fh: int) -> bytes:
        return bytes(memoryview(self._file(fh).live)[offset : offset + size])

    def write(self, path: str | None, content: bytes, offset: int, fh: int) -> int:
        file = self._file(fh)
        file.change(Write(offset, content))
        if self._handles[fh][1] & (os.O_DSYNC | os.O_SYNC):
            self._sync(file)
        return len(content)

    def truncate(self, path: str | None, length: int, fh: int | None = None) -> int:
        node = self._node(path, fh)
        assert isinstance(node, File)
        node.change(Resize(length))
        return 0

    def fallocate(self, path: str | None, mode: int, offset: int, size: int, fh: int) -> int:
        self._refuse(bool(mode & ~(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE)), errno.EOPNOTSUPP)
        file = self._file(fh)
        if not mode & KEEP_SIZE and offset + size > len(file.live):
            file.change(Resize(offset + size))
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            file.change(Zero(offset, size))
        return 0

    def fsync(self, path: str | None, datasync: int, fh: int) -> int:
        self._sync(self._file(fh))
        return 0

    def flush(self, path: str | None, fh: int) -> int:
        return 0

    def release(self, path: str | None, fh: int) -> int:
        self._handles.pop(fh, None)
        return 0

    # --- below ------------------------------------------------------------------------------------------------

    def _sync(self, file: File) -> None:
        self.syncs += 1
        if not self.ignore_sync:
            self.tree.sync_file(file)

    def _opened(self, node: Node, flags: int) -> int:
        self._handle += 1
        self._handles[self._handle] = (node, flags)
        return self._handle

    def _file(self, fh: int) -> File:
        node = self._handles[fh][0]
        assert isinstance(node, File)
        return node

    def _node(self, path: str | None, fh: int | None = None) -> Node:
        if fh is not None:
            return self._handles[fh][0]
        assert path is not None
        node: Node = self.tree.root
        for name in path.strip("/").split("/"):
            if name:
                self._refuse(isinstance(node, File), errno.ENOTDIR)
                assert isinstance(node, Folder)
                self._refuse(name not in node.live, errno.ENOENT)
                node = node.live[name]
        return node

    def _parent(self, path: str) -> tuple[Folder, str]:
        above, _, name = path.rpartition("/")
        folder = self._node(above)
        assert isinstance(folder, Folder)
        return folder, name

    def _attributes(self, node: Node) -> dict[str, int]:
        if isinstance(node, File):
            mode, size, links = stat.S_IFREG | node.mode, len(node.live), node.links
        else:
            mode, size, links = stat.S_IFDIR | node.mode, 4096, 2
        return {
            "st_ino": node.number,
            "st_mode": mode,
            "st_size": size,
            "st_nlink": links,
            "st_blksize": 4096,
            "st_blocks": -(-size // 512),
        }

    def _refuse(self, wrong: bool, number: int) -> None:
        if wrong:
            raise FuseOSError(number)


class Mount(FUSE):  # type: ignore[misc]
    """One mount; one call at a time, so a power cut lies between two calls."""

    def __init__(self, operations: PowerOperations, folder: str, lock: threading.Lock) -> None:
        self._lock = lock
        super().__init__(
            operations, folder, foreground=True, nothreads=True, hard_remove=True, use_ino=True, fsname="power"
        )

    def _wrapper(self, func: Callable[..., int], *args: object) -> int:
        with self._lock:
            if func.__name__ in COUNTED:
                self.operations.count()
            if self.operations.off and func.__name__ not in ALLOWED_WHEN_OFF:
                return -errno.EIO
            return int(super()._wrapper(func, *args))

    def truncate_fuse_3(self, path: bytes | None, length: int, fip: "ctypes._Pointer[fuse_file_info]") -> int:
        """With the handle, which the library leaves out: the path of an open file is not given."""
        return int(self.ftruncate(path, length, fip))

    def chmod_fuse_3(self, path: bytes | None, mode: int, fip: "ctypes._Pointer[fuse_file_info]") -> int:
        """Likewise."""
        return self.operations.chmod(None if path is None else path.decode(), mode, fip.contents.fh if fip else None)

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
        return -errno.EINVAL if flags else self.rename_fuse_2(old, new)


def main(folder: str) -> None:
    operations = PowerOperations()
    lock = threading.Lock()
    wanted = threading.Semaphore(0)
    threading.Thread(target=_obey, args=(operations, lock, wanted, folder), daemon=True).start()
    while True:
        wanted.acquire()
        Mount(operations, folder, lock)


def _obey(operations: PowerOperations, lock: threading.Lock, wanted: threading.Semaphore, folder: str) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        answer: object = None
        with lock:
            if "power_off" in request:
                operations.off = True
                dice = random.Random(request["power_off"])
                answer = operations.tree.power_off(dice, everything=request["everything"])._asdict()
            elif "off_after" in request:
                operations.left = request["off_after"]
            elif "ignore_sync" in request:
                operations.ignore_sync = request["ignore_sync"]
            elif "syncs" in request:
                answer = operations.syncs
        if "mount" in request:
            operations.mounted.clear()
            wanted.release()
            answer = operations.mounted.wait(10)
        print(json.dumps(answer), flush=True)
    subprocess.run(["umount", "--lazy", folder], check=False, stderr=subprocess.DEVNULL)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
