"""Repositories are bare git repositories, so commits, trees, branches and tags are real.

Large files lie beside them, named by their SHA-256.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tests.hubserver.messages import RefusedError

LARGE = ("safetensors", "bin", "gguf", "nest", "npz", "pt", "onnx", "zip")
"""Extensions that the Hub keeps as large files, as its default .gitattributes has it."""
ATTRIBUTES = "".join(f"*.{extension} filter=lfs diff=lfs merge=lfs -text\n" for extension in LARGE)
POINTER = re.compile(rb"version https://git-lfs.github.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
DATE = "--date=format-local:%Y-%m-%dT%H:%M:%S.000Z"
STALE = "A commit has happened since. Please refresh and try again."


def environment(**more: str) -> dict[str, str]:
    """git without anybody's configuration."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    names = {f"GIT_{role}_{what}": "hub" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return kept | names | {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "TZ": "UTC"} | more


@dataclass(frozen=True)
class Entry:
    """A file or directory of a tree. `oid` is git's; `lfs` the SHA-256 of a large file, and `size` then its size."""

    path: str
    oid: str
    size: int
    lfs: str | None = None
    pointer_size: int = 0
    directory: bool = False


@dataclass(frozen=True)
class Change:
    """One path of a commit: new bytes, a large file (oid), or neither to delete it."""

    path: str
    data: bytes | None = None
    lfs: str | None = None


class Repo:
    """One repository."""

    def __init__(self, folder: Path, large: Path) -> None:
        self.folder, self.large = folder, large

    def git(self, *arguments: str, data: bytes = b"", **env: str) -> bytes:
        """Runs git, returns its output. Raises CalledProcessError."""
        command = ["git", "--git-dir", str(self.folder), *arguments]
        return subprocess.run(command, input=data, capture_output=True, env=environment(**env), check=True).stdout

    def create(self) -> None:
        """Makes the repository with its first commit."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(self.folder)], env=environment(), check=True)
        tree = self.git("mktree", data=f"100644 blob {self.blob(ATTRIBUTES.encode())}\t.gitattributes\n".encode())
        self.set_ref("refs/heads/main", self.git("commit-tree", tree.decode().strip(), data=b"initial commit").decode().strip())

    def blob(self, data: bytes) -> str:
        """Stores bytes as a git object, returns its id."""
        return self.git("hash-object", "-w", "--stdin", data=data).decode().strip()

    def read(self, entry: Entry, start: int, stop: int) -> bytes:
        """Bytes of a file's content."""
        if entry.lfs is None:
            return self.git("cat-file", "blob", entry.oid)[start:stop]
        with open(self.large / entry.lfs, "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag, a full reference or a commit id names."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            try:
                return self.git("rev-parse", "--verify", "-q", "--end-of-options", f"{name}^{{commit}}").decode().strip()
            except subprocess.CalledProcessError:
                continue
        return None

    def resolve(self, revision: str) -> str:
        """The same; refused with the Hub's code when there is none."""
        commit = self.find(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def set_ref(self, name: str, commit: str) -> None:
        """Moves or makes a branch or tag, without asking whether that goes forward."""
        self.git("update-ref", name, commit)

    def tree(self, commit: str, path: str = "", *, recursive: bool = True) -> list[Entry]:
        """What a commit holds."""
        flags = ["-r", "-t"] if recursive else []
        listing = self.git("ls-tree", "-z", "-l", *flags, commit, *(["--", f"{path}/"] if path else []))
        return [self._entry(record) for record in listing.split(b"\0") if record]

    def entry(self, commit: str, path: str) -> Entry:
        """One file of a commit."""
        listing = self.git("ls-tree", "-z", "-l", commit, "--", path) if path else b""
        found = self._entry(listing.rstrip(b"\0")) if listing else None
        if found is None or found.directory:
            raise RefusedError(404, "EntryNotFound", f"{path} does not exist on {commit}", X_Repo_Commit=commit)
        return found

    def _entry(self, record: bytes) -> Entry:
        facts, name = record.split(b"\t", 1)
        _, kind, oid, size = facts.decode().split()
        if kind == "tree":
            return Entry(name.decode(), oid, 0, directory=True)
        pointer = POINTER.fullmatch(self.git("cat-file", "blob", oid)) if int(size) < 200 else None
        if pointer is None:
            return Entry(name.decode(), oid, int(size))
        return Entry(name.decode(), oid, int(pointer[2]), pointer[1].decode(), int(size))

    def commit(self, branch: str, changes: Iterable[Change], message: str, parent: str | None = None) -> str:
        """Adds a commit to a branch. With `parent`, only when the branch still ends there: 412 otherwise."""
        head = self.resolve(f"refs/heads/{branch}")
        if parent is not None and not head.startswith(parent):
            raise RefusedError(412, message=STALE)
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": f"{folder}/index", "GIT_WORK_TREE": folder}
            self.git("read-tree", head, **index)
            for change in changes:
                self._stage(change, index)
            tree = self.git("write-tree", **index).decode().strip()
        new = self.git("commit-tree", tree, "-p", head, data=message.encode()).decode().strip()
        self.git("update-ref", f"refs/heads/{branch}", new, head)
        return new

    def _stage(self, change: Change, index: Mapping[str, str]) -> None:
        if change.data is None and change.lfs is None:
            self.git("rm", "-r", "-q", "--cached", "--", change.path.rstrip("/"), **index)
            return
        data = change.data if change.data is not None else self._pointer(change.lfs or "")
        try:
            self.git("update-index", "--add", "--cacheinfo", f"100644,{self.blob(data)},{change.path}", **index)
        except subprocess.CalledProcessError:
            raise RefusedError(400, message=f"{change.path} is no path") from None

    def _pointer(self, oid: str) -> bytes:
        file = self.large / oid
        if not file.is_file():
            raise RefusedError(400, message=f"the large file {oid} was not uploaded")
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {file.stat().st_size}\n".encode()


class Store:
    """All repositories of a Hub, and the large files that they share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.large = root / "large"
        self.large.mkdir(parents=True)
        self.lock = threading.Lock()
        """Held while a commit is made: compare-and-swap is then true for everybody."""

    def repo(self, kind: str, repo_id: str) -> Repo:
        """A repository, whether or not it exists."""
        return Repo(self.root / "git" / kind / f"{repo_id}.git", self.large)

    def has_large(self, oid: str) -> bool:
        """Whether a large file has been uploaded."""
        return (self.large / oid).is_file()

    def add_large(self, data: bytes) -> str:
        """Keeps a large file, returns its SHA-256."""
        oid = sha256(data).hexdigest()
        sibling = self.large / f".{oid}.{threading.get_ident()}"
        sibling.write_bytes(data)
        sibling.replace(self.large / oid)
        return oid

    def seed(self, repo_id: str, files: Mapping[str, bytes], *, message: str = "seed", kind: str = "model") -> str:
        """Commits files to main without HTTP, making the repository when it is new; returns the commit."""
        repo = self.repo(kind, repo_id)
        with self.lock:
            if not repo.folder.exists():
                repo.create()
            changes = [
                Change(path, lfs=self.add_large(data)) if is_large(path, data) else Change(path, data)
                for path, data in files.items()
            ]
            return repo.commit("main", changes, message)


def is_large(path: str, data: bytes) -> bool:
    """Whether the Hub keeps such a file as a large one. `data` may be its first bytes."""
    return path.rsplit(".", 1)[-1] in LARGE or b"\0" in data
