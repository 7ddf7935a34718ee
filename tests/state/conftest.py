"""Models of every format, with packs and keys, for tests of state that another party wrote."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher.state_dir import StateDir, state_dir_of
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.store import save_policy
from nestpatch.signing.trust import Policy, TrustedKey
from nestpatch.signing.verify import sign_pack
from tests.faults.cases import convert
from tests.gguf.files import gguf_of, repacked
from tests.helpers import tiny_checkpoint, tiny_pack

KINDS = {
    # Name -> the weight file that is the model; "" for a directory
    "safetensors": "",
    "sharded": "",
    "gguf": "m.Q8_0.gguf",
    "onnx": "m.columns.onnx",
    # With packs whose base is the Q8_0 file: that file, and the float model that it was made of
    "own-gguf": "m.Q8_0.gguf",
    "own-float": "",
}
ORIGIN = "m.Q8_0.gguf"
"""The base of the packs of the kinds that begin with "own-", beside the checkpoint."""


@dataclass(frozen=True)
class Scene:
    """One model, its packs, and two publishers."""

    kind: str
    folder: Path
    """The model's directory."""
    model: Path
    """The path that commands get: the directory, or the file in it."""
    base: Path
    """The float checkpoint that the packs were made from; never changed."""
    acme: PrivateKey
    evil: PrivateKey

    @property
    def quantized(self) -> bool:
        """Whether the model is stored in blocks."""
        return self.model.suffix == ".gguf"

    @property
    def state_dir(self) -> StateDir:
        return state_dir_of(self.model)

    def pack(self, name: str = "no-harm", version: str = "1.0.0", seed: int = 1, **options: object) -> Pack:
        """A pack for the base. The seed decides which rows it changes."""
        pack = tiny_pack(self.base, name=name, version=version, seed=seed, **options)  # type: ignore[arg-type]
        return repacked(self.base.parent / ORIGIN, pack) if self.kind.startswith("own-") else pack

    def write(self, pack: Pack, key: PrivateKey | None = None) -> Path:
        """Writes the pack to a file, signed if a key is given."""
        file = self.base.parent / f"{pack.manifest.name}-{pack.manifest.version}-{nest.pack_id(pack)[:6]}.nest"
        nest.write(pack, file, overwrite=True)
        if key is not None:
            sign_pack(file, key, overwrite=True)
        return file

    def weights(self) -> dict[str, bytes]:
        """Weight file -> its bytes."""
        return {file.name: file.read_bytes() for file in open_checkpoint(self.model).files}

    def restore(self, weights: dict[str, bytes]) -> None:
        """Overwrites weight files without nestpatch, as a download does."""
        for name, data in weights.items():
            (self.folder / name).write_bytes(data)

    def trust(self, **keys: PrivateKey) -> Policy:
        """Writes the user's list of trusted keys."""
        policy = Policy(tuple(TrustedKey(name, key.public) for name, key in keys.items()))
        save_policy(policy)
        return policy

    def sent(self, name: str = "sent") -> Scene:
        """The model as another user receives it: copied to another folder with everything beside it."""
        folder = Path(shutil.copytree(self.folder, self.folder.with_name(name), symlinks=True))
        return Scene(self.kind, folder, folder / self.model.relative_to(self.folder), self.base, self.acme, self.evil)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate nestpatch home for this test."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("NESTPATCH_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model of each kind, with the checkpoint that it was made from."""
    root = tmp_path_factory.mktemp("templates")
    for kind, inside in KINDS.items():
        dtype = "F32" if kind == "onnx" else "BF16"
        base = tiny_checkpoint(root / kind / "base", dtype=dtype, sharded=kind == "sharded", hidden=32, inter=32)
        model = Path(shutil.copytree(base, root / kind / "model"))
        if inside:
            convert(model, inside)
            (model / "model.safetensors").unlink()
        if kind.startswith("own-"):
            gguf_of(base, root / kind / ORIGIN, "Q8_0")
    return root


def make_scene(templates: Path, tmp_path: Path, kind: str) -> Scene:
    """A scene of one kind, in the test's own folder."""
    root = Path(shutil.copytree(templates / kind, tmp_path.resolve() / "place"))
    return Scene(
        kind, root / "model", root / "model" / KINDS[kind], root / "base", PrivateKey.generate(), PrivateKey.generate()
    )


@pytest.fixture(params=KINDS)
def scene(request: pytest.FixtureRequest, templates: Path, tmp_path: Path) -> Scene:
    """A scene of every kind."""
    return make_scene(templates, tmp_path, request.param)


@pytest.fixture
def plain(templates: Path, tmp_path: Path) -> Scene:
    """A safetensors model, where the format does not matter."""
    return make_scene(templates, tmp_path, "safetensors")
