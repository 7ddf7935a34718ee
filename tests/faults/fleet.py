"""A publisher's channel in a folder, a model that follows it, and the homes of both users, all in one watched folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.formats import nest
from nestpatch.signing.keys import PrivateKey
from tests.faults.cases import Case, State, digests
from tests.faults.killer import End, Killer
from tests.helpers import tiny_checkpoint, tiny_pack


@dataclass(frozen=True)
class Fleet:
    """Commands of the publisher and of the user who follows the channel. Seals and memory are valid for this folder only."""

    killer: Killer
    folder: Path

    @property
    def template(self) -> Path:
        return self.folder.with_name("template")

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def place(self) -> str:
        return (self.folder / "channel").as_uri()

    @property
    def key(self) -> list[str]:
        return ["--key", str(self.folder / "acme.key")]

    def home(self, user: str) -> Path:
        return self.folder / user

    def pack(self, version: str) -> Path:
        return self.folder / f"{version}.nest"

    def push(self, version: str) -> list[str]:
        return ["push", str(self.pack(version)), self.place, *self.key, "--json"]

    def yank(self, version: str) -> list[str]:
        return ["yank", self.place, version, "--reason", "refuses too much", *self.key, "--json"]

    def run(self, user: str, *words: str) -> End:
        """Runs a command of a user, uninterrupted."""
        end = self.killer.run(words, self.folder, home=self.home(user))
        assert (end.how, end.trouble) == ("ended", ""), end
        return end

    def answer(self, user: str, *words: str, code: int = 0) -> Any:
        """The JSON that it prints."""
        end = self.run(user, *words)
        assert end.code == code, end
        return json.loads(end.out) if end.out else None

    def keep(self) -> None:
        """Makes the present content the template that `fresh` copies."""
        shutil.copytree(self.folder, self.template)

    def fresh(self) -> Path:
        """A copy of the template."""
        shutil.rmtree(self.folder, ignore_errors=True)
        return Path(shutil.copytree(self.template, self.folder))

    def litter(self) -> list[str]:
        """Temporary files of any command."""
        return [str(file.relative_to(self.folder)) for file in self.folder.rglob("*.tmp")]

    def updating(self, applied: Sequence[str], after: Sequence[str], pack: Path) -> Case:
        """`update` as a case: from the state of the template to that after an uninterrupted run, with `applied`."""
        original = digests(self.folder / "base")
        before = State("before", digests(self.model), tuple(applied))
        self.answer("user", "update", str(self.model), "--json")
        done = State("after", digests(self.model), tuple(after))
        return Case("update", self.template / "model", "", lambda _: ["update", str(self.model)], before, done, original, pack)


def new_fleet(killer: Killer, folder: Path) -> Fleet:
    """A fleet with three unpublished packs; the user trusts the publisher."""
    fleet = Fleet(killer, folder)
    model = tiny_checkpoint(folder / "model", layers=1, hidden=32, inter=32)
    shutil.copytree(model, folder / "base")
    key = PrivateKey.generate()
    (folder / "acme.key").write_bytes(key.pem(None))
    (folder / "acme.pub").write_text(key.public.pem, encoding="ascii")
    for user in ("publisher", "user"):
        fleet.home(user).mkdir(mode=0o700)
    for number, version in enumerate(("1.0.0", "1.1.0", "1.2.0")):
        nest.write(tiny_pack(model, version=version, seed=number), fleet.pack(version))
    fleet.run("user", "trust", "add", str(folder / "acme.pub"))
    return fleet
