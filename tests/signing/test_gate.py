"""No verb takes a pack past the policy: neither from Python nor from the command line, neither a file nor a value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nestpatch
from nestpatch.errors import BadSignatureError, NestpatchError, UnsignedError, UntrustedError
from nestpatch.formats import nest
from nestpatch.formats.provenance import RECORD
from nestpatch.gate import look, prove
from nestpatch.signing.store import save_policy
from nestpatch.signing.trust import Policy, Rule, TrustedKey
from nestpatch.signing.verify import sign_pack
from tests.calls import run
from tests.helpers import tiny_checkpoint, tiny_pack, tree_digest
from tests.signing.conftest import People, spoil

pytestmark = pytest.mark.usefixtures("own_home")
Verb = Callable[..., Any]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, prompts, and an unsigned pack."""
    folder = tmp_path / "place"
    nest.write(tiny_pack(tiny_checkpoint(folder / "model")), folder / "no-harm.nest")
    (folder / "benign.jsonl").write_text('{"prompt":"How do I bake bread?"}\n', encoding="utf-8")
    return folder


def evaluate(model: Path, _: Path, pack: Any, **options: Any) -> Any:
    from nestpatch.evaluation.suites import load_suite

    return nestpatch.evaluate(model, [load_suite(str(model.with_name("benign.jsonl")))], pack=pack, **options)


VERBS: dict[str, Verb] = {
    "apply": lambda model, out, patch, **options: nestpatch.apply(model, patch, out, **options),
    "apply_in_place": lambda model, out, patch, **options: nestpatch.apply_in_place(model, patch, **options),
    "export_gguf": lambda model, out, pack, **options: nestpatch.export_gguf(model, pack, out, **options),
    "export_safetensors": lambda model, out, pack, **options: nestpatch.export_safetensors(model, pack, out, **options),
    "export_onnx": lambda model, out, pack, **options: nestpatch.export_onnx(model, pack, out, **options),
    "export_lora": lambda model, out, patch, **options: nestpatch.export_lora(patch, out, model=model, **options),
    "export_gguf_lora": lambda model, out, patch, **options: nestpatch.export_gguf_lora(patch, out, model=model, **options),
    "export_onnx_adapter": lambda model, out, patch, **options: nestpatch.export_onnx_adapter(
        patch, out, model=model, **options
    ),
    "evaluate": evaluate,
}
"""Everything that takes a patch to use it."""
CHEAP = ("apply", "apply_in_place", "export_safetensors", "export_lora", "export_gguf_lora")
"""Those that a model without an architecture suits."""


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("value", [False, True], ids=["file", "value in memory"])
def test_a_verb_from_python_obeys_the_policy_of_this_machine(place: Path, people: People, verb: str, value: bool) -> None:
    save_policy(people.policy("acme"))
    patch = nest.read(place / "no-harm.nest") if value else place / "no-harm.nest"
    before = tree_digest(place)
    with pytest.raises(UnsignedError, match="is not signed"):
        VERBS[verb](place / "model", place / "out", patch)
    sign_pack(place / "no-harm.nest", people.evil)
    with pytest.raises((UnsignedError, UntrustedError)):
        VERBS[verb](place / "model", place / "out", patch)
    assert {name: what for name, what in tree_digest(place).items() if name in before} == before
    assert not (place / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_signature_stops_every_verb(place: Path, people: People, verb: str) -> None:
    """Also where nobody is trusted, and where the caller forgives."""
    sign_pack(place / "no-harm.nest", people.evil)
    spoil(place / "no-harm.nest")
    for options in ({}, {"allow_unsigned": True}, {"trust": "none"}, {"policy": people.policy("acme")}):
        with pytest.raises(BadSignatureError):
            VERBS[verb](place / "model", place / "out", place / "no-harm.nest", **options)


@pytest.mark.parametrize("verb", CHEAP)
@pytest.mark.parametrize("options", [{"trust": "none"}, {"allow_unsigned": True}, {"policy": Policy()}])
def test_who_answers_for_a_pack_says_so_by_name(place: Path, people: People, verb: str, options: dict[str, Any]) -> None:
    save_policy(people.policy("acme"))
    VERBS[verb](place / "model", place / "out", nest.read(place / "no-harm.nest"), **options)


@pytest.mark.parametrize("verb", CHEAP)
def test_a_signed_pack_passes_every_verb(place: Path, people: People, verb: str) -> None:
    save_policy(people.policy("acme"))
    sign_pack(place / "no-harm.nest", people.acme)
    VERBS[verb](place / "model", place / "out", place / "no-harm.nest")


def test_a_pack_in_memory_is_judged_by_its_base_too(place: Path, people: People) -> None:
    pack = nest.read(place / "no-harm.nest")
    strict = Policy(people.policy("acme").keys, (Rule("tiny/*", 1), Rule("*", 0)))
    with pytest.raises(UnsignedError, match="a value in memory, is not signed") as caught:
        prove(pack, place / "model", policy=strict)
    assert 'trust="none"' in caught.value.advice
    assert prove(pack, place / "model", policy=strict, trust="none").unchecked.startswith(
        "the caller asked for it: the signatures of no-harm 1.0.0 were not checked"
    )
    assert prove(pack, place / "model", policy=strict, allow_unsigned=True).warning


def test_exporting_a_model_that_is_patched_already_works_where_keys_are_trusted(place: Path, people: People) -> None:
    """The patched copy on the way is made of what passed the gate, and keeps the names of the signers."""
    nestpatch.apply_in_place(place / "model", place / "no-harm.nest", trust="none")
    newer = place / "newer.nest"
    nest.write(tiny_pack(tiny_checkpoint(place / "again"), version="1.1.0", seed=1), newer)
    save_policy(people.policy("acme"))
    sign_pack(newer, people.acme)
    done = nestpatch.export_safetensors(place / "model", newer, place / "out")
    assert done.packs == ("no-harm 1.1.0",)
    data = (place / "out" / "model.safetensors").read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert json.loads(metadata[RECORD])[0]["signers"] == {"acme": people.acme.public.key_id}


# The commands


def test_eval_does_not_measure_an_unsigned_pack_in_silence(place: Path, people: People) -> None:
    words = ["eval", place / "model", place / "no-harm.nest", "--suite", f"benign={place / 'benign.jsonl'}"]
    save_policy(people.policy("acme"))
    refused = run(*words)
    assert (refused.exit_code, refused.stderr.splitlines()[-2]) == (1, "UnsignedError: no-harm.nest is not signed")
    # This model has no tokenizer: what passes the gate fails behind it.
    behind = [run(*words, "--allow-unsigned"), run(*words, "--policy", place / "nobody.json")]
    assert "WARNING: --allow-unsigned: no-harm.nest is not signed" in behind[0].stderr
    assert "nobody.json does not exist" in behind[1].stderr


def test_export_uses_what_it_checked_and_reads_no_file_again(
    place: Path, people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--check measured the file that lay there after the export."""
    from nestpatch.evaluation import parity as check

    seen: list[Any] = []

    def check_gguf(file: Path, model: Path, **options: Any) -> Any:
        seen.append(options["pack"].label)
        raise NestpatchError("enough")

    def other_file(*_: object, **__: object) -> Any:
        nest.write(tiny_pack(place / "model", version="6.6.6"), place / "no-harm.nest", overwrite=True)
        return type("Done", (), {"output": place / "out"})()

    monkeypatch.setattr(check, "check_gguf", check_gguf)
    monkeypatch.setattr(check, "require_check", lambda: None)
    monkeypatch.setattr("nestpatch.export.gguf.export_gguf", other_file)
    run("export", place / "model", place / "no-harm.nest", "--to", "gguf", "-o", place / "out", "--check")
    assert seen == ["no-harm 1.0.0"]


@pytest.mark.parametrize(
    "words", [("show", "PACK"), ("verify", "MODEL", "PACK"), ("diff", "PACK", "OTHER"), ("diff", "OTHER", "PACK")]
)
def test_looking_needs_no_signature_and_refuses_a_wrong_one(place: Path, people: People, words: tuple[str, ...]) -> None:
    nest.write(nest.read(place / "no-harm.nest"), place / "other.nest")
    named = {"PACK": place / "no-harm.nest", "OTHER": place / "other.nest", "MODEL": place / "model"}
    save_policy(people.policy("acme"))
    command = [named.get(word, word) for word in words]
    # The pack is not in the rows, which is verify's answer and no refusal.
    code, says = (1, "base") if words[0] == "verify" else (0, "")
    assert run(*command).exit_code == code
    sign_pack(place / "no-harm.nest", people.evil)
    again = run(*command)
    assert (again.exit_code, again.stderr) == (code, ""), "a stranger's signature is not a wrong one"
    assert says in again.stdout
    # Made with another key than it names, which only shows where that key is known.
    signature = place / "no-harm.nest.sig"
    evil, acme = people.evil.public.key_id, people.acme.public.key_id
    signature.write_bytes(signature.read_bytes().replace(evil.encode(), acme.encode()))
    refused = run(*command)
    assert (refused.exit_code, refused.stderr.partition(":")[0]) == (1, "BadSignatureError")


def test_a_path_with_a_colon_and_a_slash_stays_a_path(place: Path) -> None:
    """Only the schemes of channels name channels."""
    strange = place / "hub:" / "x.nest"
    strange.parent.mkdir()
    (place / "no-harm.nest").rename(strange)
    assert run("show", strange, "--json").exit_code == 0
    assert look(str(strange)).pack.label == "no-harm 1.0.0"


def test_the_gate_is_public(pack: Path, people: People) -> None:
    assert {"prove", "verify_signature", "load_policy", "sign"} <= set(nestpatch.__all__)
    assert nestpatch.load_policy() == Policy()
    signature = nestpatch.sign(pack, people.acme).file
    policy = Policy((TrustedKey("acme", people.acme.public),))
    assert nestpatch.prove(pack, policy=policy).origin.signatures == {".sig": signature.read_bytes()}
    assert nestpatch.prove(pack, policy=policy).origin.signers == {"acme": people.acme.public.key_id}
    assert nestpatch.verify_signature(pack, policy).required == 1
