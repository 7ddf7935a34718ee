"""A publisher's channel, a model that follows it, and somebody who controls the server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nestpatch import errors
from nestpatch.channels import listing
from nestpatch.channels._memory import recall
from nestpatch.channels._release import issue
from nestpatch.channels.listing import CHANNEL_FILE, Channel
from nestpatch.channels.publish import Published, push, yank
from nestpatch.errors import NestpatchError
from nestpatch.formats import nest
from nestpatch.pack import utc_now
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.update import Updated, update
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.trust import Policy, TrustedKey
from tests.helpers import tiny_pack, tree_digest
from tests.hubserver.server import Hub
from tests.hubserver.store import Entry, Repo

REPO = "acme/no-harm"
PATCH = "packs/{0}/no-harm.nest"


@dataclass
class Scene:
    """Everything lies in a folder of the test's own."""

    hub: Hub
    folder: Path
    model: Path
    base: Path
    """The model as it was."""
    key: PrivateKey
    evil: PrivateKey

    @property
    def policy(self) -> Policy:
        return Policy((TrustedKey("acme", self.key.public),))

    def pack(self, version: str, seed: int = 0, **options: object) -> Path:
        """A pack file for the model."""
        file = self.folder / f"{version}-{seed}.nest"
        nest.write(tiny_pack(self.base, version=version, seed=seed, **options), file, overwrite=True)
        return file

    @contextmanager
    def as_publisher(self) -> Iterator[None]:
        """The publisher is another user than the fleet, and remembers other things."""
        fleet = os.environ["NESTPATCH_HOME"]
        os.environ["NESTPATCH_HOME"] = str(self.folder / "publisher")
        try:
            yield
        finally:
            os.environ["NESTPATCH_HOME"] = fleet

    def push(self, file: Path, place: str = REPO) -> Published:
        """A pack, by the publisher's own tool."""
        with self.as_publisher():
            return push(file, place, self.key)

    def publish(self, version: str, seed: int = 0, place: str = REPO) -> Published:
        """A new version for the model."""
        return self.push(self.pack(version, seed), place)

    def yank(self, version: str, reason: str, place: str = REPO) -> Published:
        """A version is withdrawn."""
        with self.as_publisher():
            return yank(place, version, reason, self.key)

    def update(self, **options: object) -> Updated:
        """What the fleet does every night."""
        (done,) = updated(self.model, self.policy, **options)
        return done

    @property
    def repo(self) -> Repo:
        return self.hub.store.repo("model", REPO)

    def entry(self, path: str) -> Entry:
        """A file of the repository's main branch."""
        return self.repo.entry(self.repo.resolve("main"), path)

    def read(self, path: str) -> bytes:
        """Its content."""
        entry = self.entry(path)
        return self.repo.read(entry, 0, entry.size)

    @property
    def channel(self) -> Channel:
        """What the server holds."""
        return listing.parse(self.read(CHANNEL_FILE), CHANNEL_FILE)[1]

    def put(self, **files: bytes) -> str:
        """Commits to the repository past the publisher; `channel`: the channel file."""
        named = {CHANNEL_FILE if path == "channel" else path: data for path, data in files.items()}
        return self.hub.store.seed(REPO, named)

    def mirror(self, folder: Path) -> Path:
        """The repository's files in a folder, as whoever copies it has them."""
        repo = self.repo
        for entry in repo.tree(repo.resolve("main")):
            if not entry.directory:
                (folder / entry.path).parent.mkdir(parents=True, exist_ok=True)
                (folder / entry.path).write_bytes(repo.read(entry, 0, entry.size))
        return folder

    def resign(self, channel: Channel, key: PrivateKey | None = None, *, now: str | None = None, days: int = 30) -> bytes:
        """The next channel file, signed by the publisher's key or another one."""
        return issue(channel, key or self.key, now or utc_now(), days)[1]

    def listed(self, which: str, **changes: object) -> Channel:
        """The channel with another entry for a version."""
        packs = tuple(replace(p, **changes) if p.version == which else p for p in self.channel.packs)
        return replace(self.channel, packs=packs)

    def spoil_large(self, path: str, data: bytes) -> None:
        """What the CDN serves for a large file becomes something else."""
        oid = self.entry(path).lfs
        assert oid is not None
        (self.hub.store.large / oid).write_bytes(data)

    def state(self) -> dict[str, str]:
        """The model, to the byte, with all that is kept beside it."""
        return tree_digest(self.model)


def updated(model: Path, policy: Policy, channels: Sequence[str] = (), **options: object) -> tuple[Updated, ...]:
    """`update`, where a channel that failed raises its error."""
    results = update(model, channels, policy=policy, **options)
    for result in results:
        if result.state == "failed":
            raise getattr(errors, result.error)(result.reason, advice=result.advice)
    return results


def new_scene(hub: Hub, folder: Path, model: Path) -> Scene:
    """With fresh keys."""
    base = folder / "base"
    shutil.copytree(model, base)
    return Scene(hub, folder, model, base, PrivateKey.generate(), PrivateKey.generate())


def refused(scene: Scene, error: type[NestpatchError], match: str, *, remembered: bool = True) -> None:
    """`update` raises this error; the model and what is kept beside it are as before."""
    before, known = scene.state(), recall(f"hub://{REPO}")
    with pytest.raises(error, match=match) as caught:
        scene.update()
    assert type(caught.value) is error
    assert caught.value.advice
    assert scene.state() == before
    assert read_ledger(state_dir_of(scene.model)).applied[0].version == "1.0.0"
    assert (recall(f"hub://{REPO}") == known) is remembered
