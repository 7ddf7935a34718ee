"""Exporting with a patch asks for the same signatures as applying it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nestpatch.cli import main
from nestpatch.formats import nest
from nestpatch.signing.store import save_policy
from nestpatch.signing.verify import sign_pack
from tests.helpers import tiny_checkpoint, tiny_pack, tree_digest
from tests.signing.conftest import People

pytestmark = pytest.mark.usefixtures("own_home")


def export(*words: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, words), "--quiet"])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model and a pack for it."""
    folder = tmp_path / "place"
    nest.write(tiny_pack(tiny_checkpoint(folder / "model")), folder / "no-harm.nest")
    return folder


@pytest.mark.parametrize(
    ("target", "with_model", "made"),
    [("lora", False, "no-harm-1.0.0-lora"), ("gguf-lora", False, "no-harm-1.0.0-lora.gguf"),
     ("lora", True, "no-harm-1.0.0-lora"), ("safetensors", True, "model-no-harm-1.0.0-release")],
)  # fmt: skip
def test_an_export_wants_what_the_policy_wants(place: Path, people: People, target: str, with_model: bool, made: str) -> None:
    words = [*([place / "model"] if with_model else []), place / "no-harm.nest", "--to", target]
    save_policy(people.policy("acme"))
    before = tree_digest(place)
    refused = export(*words)
    assert (refused.exit_code, refused.stderr.splitlines()[0]) == (1, "UnsignedError: no-harm.nest is not signed")
    assert tree_digest(place) == before
    forgiven = export(*words, "--allow-unsigned", "--dry-run")
    assert (forgiven.exit_code, "WARNING: --allow-unsigned" in forgiven.stderr) == (0, True)
    sign_pack(place / "no-harm.nest", people.acme)
    done = export(*words)
    assert done.exit_code == 0, done.stderr
    new = {name.partition("/")[0] for name in tree_digest(place).keys() - before.keys()}
    assert new == {"no-harm.nest.sig", made}
