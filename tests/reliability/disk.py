"""A log of what a writer does to the disk, and what a crash or a loss of power at any moment of it may leave.

A killed process leaves what it has done so far; the last file may be half written. A loss of power leaves of each file
what was flushed, and of each directory the entries that were flushed; any of the others may be there or not, whatever
their order. A rename is in effect or not, never half of it.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

WRITERS = ("mkdir", "rmdir", "unlink", "replace", "fsync")


@contextmanager
def recorded(root):
    """The operations that the block does below a directory, as a list that fills: (name, path, …)."""
    log, handles, known = [], {}, dict(contents_of(root))
    real = {name: getattr(os, name) for name in (*WRITERS, "open")}

    def name_of(path):
        path = Path(os.path.abspath(path))
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else None

    def note_writes():
        for name, content in contents_of(root):
            if known.get(name) != content:
                log.append(("write", name, content))
                known[name] = content

    def tell(operation):
        def call(path, *more, **options):
            note_writes()
            name = name_of(handles[path] if operation == "fsync" else path)
            found = real[operation](path, *more, **options)
            if name is None:
                return found
            log.append((operation, name, *([name_of(more[0])] if operation == "replace" else [])))
            known.clear()
            known.update(contents_of(root))
            return found

        return call

    def open_file(path, *more, **options):
        handle = real["open"](path, *more, **options)
        handles[handle] = path
        return handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "_use_fd_functions", False)  # `rmtree` then names the paths
        patch.setattr(os, "open", open_file)
        for name in WRITERS:
            patch.setattr(os, name, tell(name))
        yield log
        note_writes()


def contents_of(root):
    """(name, content) of each file below a directory."""
    return [
        (path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(root.rglob("*")) if path.is_file()
    ]


class Disk:
    """Inodes: a directory is {name: inode}, a file its bytes; as processes see them, and as they were flushed."""

    def __init__(self, root):
        self.seen = {0: {}}
        for path in sorted(root.rglob("*")):
            parent, name = self._at(path.relative_to(root).as_posix())
            inode = parent[name] = len(self.seen)
            self.seen[inode] = path.read_bytes() if path.is_file() else {}
        self.flushed = {inode: _copy(node) for inode, node in self.seen.items()}
        self.pending = []  # changes of directories that are not flushed: lists of (directory, name, inode or None)

    def apply(self, operation, name, *more):
        """Do one operation of a log."""
        if operation == "fsync":
            self._flush(self._inode(name))
            return
        parent, last = self._at(name)
        where = self._inode(os.path.dirname(name))
        if operation == "write" and last in parent:
            self.seen[parent[last]] = more[0]
            return
        if operation in ("write", "mkdir"):
            inode = len(self.seen)
            self.seen[inode] = more[0] if operation == "write" else {}
            self.flushed[inode] = b"" if operation == "write" else {}
            changes = [(where, last, inode)]
        elif operation == "replace":
            to, name = os.path.split(more[0])
            changes = [(where, last, None), (self._inode(to), name, parent[last])]
        else:
            changes = [(where, last, None)]
        _change(self.seen, changes)
        self.pending.append(changes)

    def _flush(self, inode):
        if isinstance(self.seen[inode], bytes):
            self.flushed[inode] = self.seen[inode]
            return
        for changes in [each for each in self.pending if each[-1][0] == inode]:  # of a rename, where it leads
            _change(self.flushed, changes)
            self.pending.remove(changes)

    def after_power_loss(self):
        """What may be on the disk, as pairs of directories and files."""
        lasting = {inode: node for inode, node in self.flushed.items() if isinstance(node, bytes)}
        half = lasting | {
            inode: node[: len(node) // 2]
            for inode, node in self.seen.items()
            if isinstance(node, bytes) and node != self.flushed[inode]
        }
        n = range(len(self.pending))
        chosen = [set(), set(n), *({i} for i in n), *(set(n) - {i} for i in n), *(set(range(i)) for i in n)]
        for which in chosen:
            directories = {inode: dict(node) for inode, node in self.flushed.items() if isinstance(node, dict)}
            for i in sorted(which):
                _change(directories, self.pending[i])
            yield directories, lasting
        directories = {inode: node for inode, node in self.seen.items() if isinstance(node, dict)}
        yield directories, half

    def _inode(self, name):
        inode = 0
        for part in [part for part in name.split("/") if part not in ("", ".")]:
            inode = self.seen[inode][part]
        return inode

    def _at(self, name):
        return self.seen[self._inode(os.path.dirname(name))], os.path.basename(name)


def _copy(node):
    return dict(node) if isinstance(node, dict) else node


def _change(directories, changes):
    for where, name, inode in changes:
        entries = directories.setdefault(where, {})
        if inode is None:
            entries.pop(name, None)
        else:
            entries[name] = inode


def crashes(before, log, is_power_lost):
    """Yield (label, names and contents) of each different state that a crash during the log may leave.

    Args:
        before: a copy of the directory as it was before the log.
        log: of `recorded`.
        is_power_lost: whether the machine stops, and not the process alone.
    """
    disk, seen, known = Disk(before), set(), {}  # known: numbers of contents, so that none is hashed twice
    for i in range(len(log) + 1):
        states = []
        if is_power_lost:
            states += [_tree(directories, files) for directories, files in disk.after_power_loss()]
        else:
            states.append(_tree(disk.seen, disk.seen))
            if i and log[i - 1][0] == "write":
                name, content = log[i - 1][1:]
                states.append({**states[0], name: content[: len(content) // 2]})
        for state in states:
            key = tuple(sorted((name, known.setdefault(content, len(known))) for name, content in state.items()))
            if key not in seen:
                seen.add(key)
                yield f"{i} of {len(log)}: after {log[i - 1][:2] if i else 'nothing'}", state
        if i < len(log):
            disk.apply(*log[i])


def _tree(directories, files, inode=0, prefix=""):
    """{path: bytes, or None of a directory}."""
    found = {}
    for name, child in directories.get(inode, {}).items():
        if child in files and isinstance(files[child], bytes):
            found[prefix + name] = files[child]
        else:
            found[prefix + name] = None
            found |= _tree(directories, files, child, f"{prefix}{name}/")
    return found


def put(state, directory):
    """Write a state of `crashes` into a new directory; the directory."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, content in state.items():
        if content is None:
            (directory / name).mkdir(exist_ok=True)
        else:
            (directory / name).write_bytes(content)
    return directory
