"""Every hostile file in tests/attacks/ is refused by its own error, and costs the user nothing."""

from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.errors import PackError
from nestpatch.formats import nest
from tests.attacks.tools import with_manifest
from tests.helpers import tiny_checkpoint, tiny_pack, tree_digest

ATTACKS = sorted({file.stem for file in (Path(__file__).parent / "attacks").glob("*.py")} - {"__init__", "tools"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that every attack is tried on; none may change it or leave something beside it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def good(model: Path) -> bytes:
    return nest.encode(tiny_pack(model))


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused(name: str, model: Path, good: bytes, tmp_path: Path) -> None:
    attack = import_module(f"tests.attacks.{name}")
    hostile = attack.attack(good)
    assert hostile != good
    with pytest.raises(PackError) as caught:
        nest.decode(hostile)
    assert type(caught.value) is attack.ERROR
    assert attack.SAYS in str(caught.value)
    assert caught.value.advice.strip()

    patch = tmp_path / "hostile.nest"
    patch.write_bytes(hostile)
    before = tree_digest(model.parent)
    result = CliRunner().invoke(main, ["apply", str(model), str(patch)])
    assert tree_digest(model.parent) == before
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith(f"{attack.ERROR.__name__}: {patch}: ")
    assert attack.SAYS in result.stderr
    assert "Traceback" not in result.stderr
    assert {c for c in result.stderr if ord(c) < 32} <= {"\n"}, "a hostile text reaches the terminal"


def test_the_good_pack_is_accepted(model: Path, good: bytes, tmp_path: Path) -> None:
    """Without this, the attacks could be refused for a reason that has nothing to do with them."""
    patch = tmp_path / "good.nest"
    patch.write_bytes(good)
    result = CliRunner().invoke(main, ["apply", str(model), str(patch), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_pack_cannot_drive_the_terminal(good: bytes, tmp_path: Path) -> None:
    """`show` prints what strangers wrote: their escape sequences must not reach the screen."""
    patch = tmp_path / "x.nest"
    text = "\x1b]0;owned\x07\x1b[2J"
    hostile = with_manifest(good, lambda manifest: manifest.update(description=text, license=text, tags=[text]))
    patch.write_bytes(hostile)
    result = CliRunner().invoke(main, ["show", str(patch)])
    assert result.exit_code == 0
    assert {c for c in result.output if ord(c) < 32} <= {"\n"}
