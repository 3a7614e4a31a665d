"""The files that a power loss leaves, worked out from one recorded run.

`shim.c` records a run's changes of folders, and a copy of each file at each fsync. From these
`Disk` makes the state after a power loss before change N, for every N, without another run.

The model is the least that POSIX promises, in two variants, because file systems differ:

- "named": every change of a folder is on the disk; of a file, only its bytes at its last fsync.
  A file that was shortened since is short. A file without an fsync is empty. ext4 with
  `noauto_da_alloc` and XFS may leave this after a write and a rename without fsync between.
- "unnamed": a change of a folder also is on the disk only after an fsync of that folder. A
  rename is whole or not done: with one of its two folders the other changes too.

ext4 and XFS promise more. Each writes changes of folders in the order in which they were made, and
an fsync of any file writes those before it. ext4 also writes a file's bytes before a rename that
replaces another file. Work that survives both variants survives these.

The model leaves out: mixtures, where some bytes written since the last fsync are on the disk and
others are not; disks that confirm an fsync and forget it; changes of files through `mmap`, which
count as not written (SQLite's -shm, which SQLite makes anew); `sync_file_range`; and changes by
C's `fopen`, which the shim does not see. A file opened with O_TMPFILE appears with its first name.
"""

import dataclasses
import pathlib

VARIANTS = ("named", "unnamed")


@dataclasses.dataclass(eq=False)
class Node:
    """A file, with the copy of its last fsync; or a folder, with entries now and on the disk."""

    is_folder: bool
    copy: pathlib.Path | None = None
    length: int | None = None  # the least to which it was cut since its last fsync
    now: dict[str, "Node"] = dataclasses.field(default_factory=dict)
    kept: dict[str, "Node"] = dataclasses.field(default_factory=dict)


# One change: (folder, name, what the name stands for now or None) each.
Change = list[tuple[Node, str, Node | None]]


class Disk:
    """The state of the disk, brought forward line by line of a trace. `root` must be there."""

    def __init__(self, root: pathlib.Path, trace: pathlib.Path):
        self.trace = trace
        lines = (line.split("\t") for line in (trace / "log").read_text().splitlines())
        self.events = [(int(number), kind, rest) for number, kind, *rest in lines]
        self.root = Node(is_folder=True)
        self.nodes = {root.stat().st_ino: self.root}
        self.pending: list[Change] = []
        self.marks = self.done = 0

    def forward(self, number: int) -> None:
        """Go on to the moment before change `number`."""
        while self.done < len(self.events) and self.events[self.done][0] < number:
            at, kind, rest = self.events[self.done]
            getattr(self, "_" + kind.replace(" ", "_"))(at, *rest)
            self.done += 1

    def _change(self, *entries: tuple[Node, str, Node | None]) -> None:
        for folder, name, node in entries:
            _put(folder.now, name, node)
        self.pending.append(list(entries))

    def _made(self, folder: str, name: str, inode: str, *, is_folder: bool) -> None:
        above = self.nodes[int(folder)]
        there = above.now.get(name)
        if there is not None and there is self.nodes.get(int(inode)):
            return  # two threads opened it at once
        # A new node always: an inode's number is used again after the file is gone.
        node = self.nodes[int(inode)] = Node(is_folder)
        self._change((above, name, node))

    def _file(self, at: int, folder: str, name: str, inode: str) -> None:
        self._made(folder, name, inode, is_folder=False)

    def _folder(self, at: int, folder: str, name: str, inode: str) -> None:
        self._made(folder, name, inode, is_folder=True)

    def _link(self, at: int, folder: str, name: str, inode: str) -> None:
        node = self.nodes.setdefault(int(inode), Node(is_folder=False))
        self._change((self.nodes[int(folder)], name, node))

    def _gone(self, at: int, folder: str, name: str) -> None:
        self._change((self.nodes[int(folder)], name, None))

    def _rename(self, at: int, folder: str, name: str, other: str, new: str) -> None:
        before, after = self.nodes[int(folder)], self.nodes[int(other)]
        self._change((before, name, None), (after, new, before.now[name]))

    def _cut(self, at: int, inode: str, length: str) -> None:
        node = self.nodes.setdefault(int(inode), Node(is_folder=False))
        node.length = min(int(length), int(length) if node.length is None else node.length)

    def _synced(self, at: int, inode: str) -> None:
        node = self.nodes.setdefault(int(inode), Node(is_folder=False))
        node.copy, node.length = self.trace / str(at), None

    def _folder_synced(self, at: int, inode: str) -> None:
        synced = {id(self.nodes[int(inode)])}
        done: list[Change] = []
        for change in reversed(self.pending):
            folders = {id(folder) for folder, _, _ in change}
            if folders & synced:
                synced |= folders  # earlier changes of these go to the disk too
                done.append(change)
        for change in reversed(done):
            self.pending.remove(change)
            for folder, name, node in change:
                _put(folder.kept, name, node)

    def _mark(self, at: int) -> None:
        self.marks += 1

    def state(self, variant: str) -> dict[str, bytes | None]:
        """Return {path below the root: a file's bytes, None for a folder}."""
        found: dict[str, bytes | None] = {}

        def add(node: Node, path: str) -> None:
            for name, inner in (node.now if variant == "named" else node.kept).items():
                place = f"{path}{name}"
                if inner.is_folder:
                    found[place] = None
                    add(inner, f"{place}/")
                else:
                    data = b"" if inner.copy is None else inner.copy.read_bytes()
                    found[place] = data[: inner.length] if variant == "named" else data

        add(self.root, "")
        return found


def _put(entries: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def write(state: dict[str, bytes | None], root: pathlib.Path) -> None:
    """Write a state into the empty folder `root`."""
    for name, data in state.items():
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
