"""Who signed the applied packs, and whether exactly one pack is in the rows: `status` and `verify MODEL PACK`."""

from __future__ import annotations

import pytest

from nestpatch.formats import nest
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.ledger import read_ledger
from tests.calls import answer, run
from tests.state import forging
from tests.state.conftest import Scene
from tests.state.forging import apart, based, harmless


def test_status_says_what_was_checked_and_what_is_claimed(scene: Scene) -> None:
    scene.trust(acme=scene.acme)
    file = harmless(scene)
    assert run("apply", scene.model, file, "--in-place", *based(scene)).exit_code == 0
    assert "signed by acme" in run("status", scene.model).stdout
    got = scene.sent()
    forging.edit(
        got.state_dir,
        lambda value: value["applied"][0].update(signers={"acme": scene.acme.public.key_id, "NIST": scene.evil.public.key_id}),
    )
    shown = run("status", got.model).stdout
    assert ", signed by acme, claims to be signed by NIST," in shown
    (entry,) = answer("status", got.model)["applied"]
    assert entry["signers"] == {"acme": scene.acme.public.key_id}
    assert entry["claims"] == ["NIST"]
    for signature in got.state_dir.folder.glob("*.sig"):
        signature.unlink()
    shown = run("status", got.model).stdout
    assert "claims to be signed by acme, NIST" in shown
    assert ", signed by acme" not in shown
    # Another key's signature under acme's name proves nothing either.
    other = scene.write(scene.pack(version="1.1.0"), scene.acme)
    kept = got.state_dir.pack(nest.pack_id(nest.read(file)))
    kept.with_name(f"{kept.name}.sig").write_bytes(other.with_name(f"{other.name}.sig").read_bytes())
    assert "claims to be signed by acme, NIST" in run("status", got.model).stdout


# verify MODEL PACK


def test_verify_with_a_patch_asks_for_exactly_this_pack(scene: Scene) -> None:
    file, more = harmless(scene), based(scene)
    assert answer("verify", scene.model, file, *more, code=1)["verdict"] == "base"
    assert run("apply", scene.model, file, "--in-place", "--strength", "0.5", *more).exit_code == 0
    half = answer("verify", scene.model, file, *more, code=1)
    assert half["verdict"] == "altered"
    assert "0.5" in half["detail"]
    assert answer("verify", scene.model, file, "--strength", "0.5", *more)["known"]
    assert run("apply", scene.model, file, "--in-place", *more).exit_code == 0
    assert answer("verify", scene.model, file, *more)["known"]
    assert not answer("verify", scene.model, file, "--strength", "0.5", *more, code=1)["known"]
    assert not answer("verify", scene.model, scene.write(scene.pack(seed=9)), *more, code=1)["known"]
    # Without a ledger the rows are enough.
    scene.state_dir.ledger.unlink()
    assert answer("verify", scene.model, file, *more)["verdict"] == "patched"


def test_verify_with_a_patch_names_the_packs_beside_it(scene: Scene) -> None:
    file, pack = harmless(scene), scene.pack()
    other = scene.write(apart(scene, pack))
    for one in (file, other):
        assert run("apply", scene.model, one, "--in-place", *based(scene)).exit_code == 0
    found = answer("verify", scene.model, file, *based(scene))
    assert found["known"]
    assert "the ledger also names other 1.0.0" in found["detail"]


@pytest.mark.parametrize("foreign", [False, True])
def test_verify_with_a_patch_names_a_pack_on_top_of_it(plain: Scene, *, foreign: bool) -> None:
    file = harmless(plain)
    assert run("apply", plain.model, file, "--in-place").exit_code == 0
    assert run("apply", plain.model, plain.write(plain.pack("other", seed=2)), "--in-place", "--allow-overlap").exit_code == 0
    found = answer("verify", (plain.sent() if foreign else plain).model, file, code=1)
    assert found["verdict"] == "altered"
    assert any("changed again by other 1.0.0" in one["detail"] for one in found["differences"])


def test_rows_at_another_strength_are_called_so(scene: Scene) -> None:
    """A repository that patched at a tenth of the strength: the ledger is true, and the strength is reported."""
    if scene.quantized:
        pytest.skip("rounding loses a tenth of this pack: applying it is refused")
    scene.trust(acme=scene.acme)
    file = harmless(scene)
    assert run("apply", scene.model, file, "--in-place", "--strength", "0.1").exit_code == 0
    got = scene.sent()
    assert "at strength 0.1" in answer("verify", got.model)["detail"]
    assert not answer("verify", got.model, file, code=1)["known"]


def test_own_and_foreign_entries_stand_side_by_side(plain: Scene) -> None:
    """A pack that this machine adds to a model that came patched does not make the earlier entry trusted."""
    plain.trust(acme=plain.acme)
    apply_in_place(plain.model, harmless(plain))
    got = plain.sent()
    apply_in_place(got.model, plain.write(apart(plain, plain.pack()), plain.acme))
    assert [entry.foreign for entry in read_ledger(got.state_dir).applied] == [True, False]
    assert answer("verify", got.model)["known"]
