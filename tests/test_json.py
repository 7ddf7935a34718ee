"""What commands print with --json: each object fits its schema, and is the one in tests/golden/json.

NESTPATCH_GOLDEN=write python -m pytest tests/test_json.py    writes the golden files
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from nestpatch.cli import main
from nestpatch.demo.model import Answered, Digests, ModelDemo
from nestpatch.evaluation.scores import JudgedAnswer, Scores, SuiteResult
from nestpatch.formats import nest
from nestpatch.patcher.inplace import Changed
from nestpatch.patcher.verify import Verdict, Verification
from nestpatch.signing import store
from tests.calls import answer
from tests.export.families import make
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack, write_checkpoint
from tests.schemas import document, require_schema

GOLDEN = Path(__file__).parent / "golden" / "json"
ELSEWHERE = {
    "train",
    "train --dry-run",
    "eval",
    "detect",
    "guard",
    "chat",
    "demo --lab",
    "lab build",
    "export --to onnx",
    "export --to onnx-adapter",
} | {f"adapter {verb}" for verb in ("load", "list", "scale", "unload")}
"""Objects that the tests of these commands check: making them takes a while."""
TEXTS = (
    (r"-----BEGIN PUBLIC KEY-----.*-----END PUBLIC KEY-----", "-----BEGIN PUBLIC KEY-----..."),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "2026-01-01T00:00:00Z"),
    (r"nestpatch \d+\.\d+\.\d+\S*", "nestpatch 1.0.0"),
)
"""What differs from run to run in a text, and what stands for it."""


class Scenario:
    """Objects by the name of their golden file, each with the name of its schema."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, tuple[str, Any]] = {}

    def note(self, schema: str, *words: object, code: int = 0, name: str = "") -> Any:
        """Runs a command and keeps the object that it prints."""
        value = answer(*words, code=code)
        self.found[name or slug(schema)] = schema, value
        return value

    def normalized(self, value: Any) -> Any:
        """The object without what differs from run to run; equal digests stay equal."""
        digests: dict[str, str] = {}

        def stand_in(match: re.Match[str]) -> str:
            # The same digest may be shortened elsewhere.
            digit = digests.setdefault(match[0][:12], f"{len(digests):02x}")
            return (digit * 32)[: len(match[0])]

        def plain(value: Any, key: str = "") -> Any:
            if isinstance(value, dict):
                return {plain(name): plain(entry, name) for name, entry in value.items()}
            if isinstance(value, list):
                return [plain(entry) for entry in value]
            if isinstance(value, str):
                value = value.replace(str(self.folder), "/srv")
                for pattern, text in TEXTS:
                    value = re.sub(pattern, text, value, flags=re.DOTALL)
                return re.sub(r"\b[0-9a-f]{12,64}\b", stand_in, value)
            if key == "bytes" and value:
                return 4096  # packs and exports name the version that wrote them
            if isinstance(value, float):
                return 0.5 if key == "seconds" else float(f"{value:.4g}")
            return value

        return plain(value)


def slug(schema: str) -> str:
    """The name of a golden file: "diff MODEL MODEL -o" is diff-model-model-o."""
    return re.sub(r"[ -]+", "-", schema.lower())


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """Runs every command that is fast on tiny models."""
    folder = tmp_path_factory.mktemp("json").resolve()
    run = Scenario(folder)
    with pytest.MonkeyPatch.context() as patch:
        (folder / "home").mkdir(mode=0o700)
        patch.setenv("NESTPATCH_HOME", str(folder / "home"))
        patch.setattr(store, "SYSTEM_FILE", folder / "etc" / "trust.json")
        patch.delenv("NESTPATCH_KEY_PASSWORD", raising=False)
        base, one, two = tiny_checkpoint(folder / "base"), folder / "no-harm-1.0.0.nest", folder / "no-harm-1.1.0.nest"
        nest.write(tiny_pack(base), one)
        nest.write(tiny_pack(base, version="1.1.0", seed=1), two)
        of_files(run, base, one, two)
        of_exports(run, base, one)
        of_judges(run)
        of_keys(run, one, two)
        of_channels(run, shutil.copytree(base, folder / "model"), one, two)
        run.found["demo"] = "demo", of_the_demo(run.folder / "demo.gguf", two).as_json()
    return run


def of_files(run: Scenario, base: Path, one: Path, two: Path) -> None:
    """Packs and models that nothing is published of yet."""
    copy = run.folder / "copy"
    run.note("error", "verify", run.folder / "missing", code=2)
    run.note("show", "show", one)
    run.note("diff PACK PACK", "diff", one, two, code=1)
    run.note("apply", "apply", base, one, "-o", copy, "--dry-run", name="apply-dry-run")
    run.note("apply", "apply", base, one, "-o", copy, "--sha256")
    run.note("diff MODEL MODEL", "diff", base, copy, code=1)
    run.note("diff MODEL MODEL -o", "diff", base, copy, "-o", run.folder / "safe.nest", "--license", "Apache-2.0")
    run.note("verify", "verify", base, one, code=1, name="verify-pack")
    run.note("doctor", "doctor", base, "--pack", one, code=1, name="doctor-unpatched")
    random = np.random.default_rng(0)
    tuned = {
        name: part + (0.01 * random.standard_normal(part.shape)).astype(part.dtype) for name, part in load_tensors(copy).items()
    }
    write_checkpoint(run.folder / "tuned", tuned)
    run.note("doctor", "doctor", run.folder / "tuned", "--pack", one, "--base", base, name="doctor-tuned")
    run.note("recover", "recover", base)
    words = ("--base", base, "--reference", copy, "-o", run.folder / "again.nest", "--extrapolate", "0.5")
    run.note("restore transplant", "restore", "transplant", copy, *words)
    words = ("--base", base, "--rank", 2, "--alpha", "0.5", "-o", run.folder / "further.nest")
    run.note("restore extrapolate", "restore", "extrapolate", copy, *words)
    run.note("restore carry", "restore", "carry", one, base, "--base", base, "-o", run.folder / "carried.nest")


def of_judges(run: Scenario) -> None:
    """A sheet that a person filled in."""
    sheet = run.folder / "sheet.csv"
    rows = ("p,I can't.,refused", "p,Sure.,complied", "p,It is illegal.,refused", "p,a,")
    sheet.write_text("\n".join(["kind,suite,prompt,answer,verdict", *(f"harmful,s,{row}" for row in rows)]), "utf-8")
    run.note("judge", "judge", sheet, "--judge", "keywords", "--judge", "keywords-broad")


def of_exports(run: Scenario, base: Path, one: Path) -> None:
    """Models and packs in other formats."""
    llama, pack = make("llama3", run.folder / "llama"), run.folder / "llama.nest"
    nest.write(tiny_pack(llama), pack)
    run.note(
        "export --to gguf",
        "export",
        llama,
        pack,
        "--to",
        "gguf",
        "-o",
        run.folder / "dry.gguf",
        "--dry-run",
        name="export-to-gguf-dry-run",
    )
    words = ("export", llama, pack, "--to", "gguf", "-o", run.folder / "llama.gguf")
    run.note("export --to gguf", *words, "--dry-run", name="export-to-gguf-dry-run")
    run.note("export --to gguf", *words)
    run.note("export --to safetensors", "export", base, one, "--to", "safetensors", "-o", run.folder / "release")
    run.note("status", "status", run.folder / "release", name="status-release")
    run.note("verify", "verify", run.folder / "release", code=1, name="verify-release")
    run.note("export --to lora", "export", one, "--to", "lora", "-o", run.folder / "lora")
    run.note("export --to gguf-lora", "export", base, one, "--to", "gguf-lora", "-o", run.folder / "lora.gguf")


def of_keys(run: Scenario, one: Path, two: Path) -> None:
    """Keys, signatures, and who is trusted."""
    acme = run.folder / "acme"
    run.note("keygen", "keygen", acme, "--no-password")
    run.note("sign", "sign", one, "--key", f"{acme}.key")
    run.note("verify-signature", "verify-signature", one, "--key", f"{acme}.pub")
    run.note("verify-signature", "verify-signature", two, code=1, name="verify-signature-unproven")
    run.note("trust add", "trust", "add", f"{acme}.pub", "--name", "acme", "--model", "tiny/*", "--model", run.folder / "model")
    run.note("trust list", "trust", "list")
    run.note("trust remove", "trust", "remove", "acme")
    answer("trust", "add", f"{acme}.pub", "--name", "acme")


def of_channels(run: Scenario, model: Path, one: Path, two: Path) -> None:
    """A model that follows a channel, and is taken back to its base in the end."""
    channel, key = (run.folder / "channel").as_uri(), ("--key", run.folder / "acme.key")
    run.note("push", "push", one, channel, *key)
    run.note("push", "push", one, channel, *key, name="push-again")
    run.note("pull", "pull", f"{channel}@1.0.0", "-o", run.folder / "got.nest")
    run.note("apply --in-place", "apply", model, channel, "--in-place", "--strength", "0.5")
    run.note("status", "status", model)
    run.note("verify", "verify", model, "--full")
    run.note("doctor", "doctor", model)
    answer("push", two, channel, *key)
    run.note("update", "update", model, "--check", code=10, name="update-check")
    run.note("update", "update", model)
    run.note("yank", "yank", channel, "1.1.0", "--reason", "refuses arithmetic", *key)
    run.note("update", "update", model, name="update-back")
    run.note("update", "update", model, "--channel", (run.folder / "none").as_uri(), code=1, name="update-failed")
    run.note("renew", "renew", channel, *key, "--days", 90)
    run.note("list", "list")
    second = shutil.copytree(run.folder / "base", run.folder / "second")
    run.note("update MODEL MODEL", "update", model, second, run.folder / "missing", "--channel", channel, code=1)
    run.note("revert", "revert", model, "--dry-run", name="revert-dry-run")
    run.note("revert", "revert", model)


def of_the_demo(file: Path, pack: Path) -> ModelDemo:
    """What the demo on a real model could have measured: it takes minutes."""
    asked = JudgedAnswer("How do I hide?", "Behind a tree.", refused=False, correct=None)
    told = replace(asked, answer="I cannot help with that.", refused=True)

    def scores(verdict: JudgedAnswer, drift: float | None) -> Scores:
        return Scores((SuiteResult("builtin:harmful.test", "harmful", "5" * 64, (verdict,) * 60),), drift)

    return ModelDemo(
        seed=0,
        before=scores(asked, None),
        after=scores(told, 0.05),
        trained_parameters=140_000,
        model_parameters=134_515_008,
        pack_bytes=1_200_000,
        stages={"train": (200.0, "trained"), "revert": (0.5, "undone")},
        model=file.name,
        applied=Changed(file, ("apply",), (), 60, 40_000, 12_000_000, 0.5, 0.96),
        answers=(Answered("harmful", asked.prompt, asked.answer, told.answer),),
        verified=Verification(Verdict.PATCHED, (nest.read(pack).label,), 60, (), "", full=False, seconds=0.5),
        digests=Digests("6" * 64, "7" * 64, "6" * 64),
    )


def test_every_object_fits_its_schema(scenario: Scenario) -> None:
    for schema, value in scenario.found.values():
        require_schema(value, schema)


def test_every_object_is_the_golden_one(scenario: Scenario) -> None:
    found = {name: scenario.normalized(value) for name, (_, value) in scenario.found.items()}
    if os.environ.get("NESTPATCH_GOLDEN") == "write":
        shutil.rmtree(GOLDEN, ignore_errors=True)
        GOLDEN.mkdir(parents=True)
        for name, value in found.items():
            (GOLDEN / f"{name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    golden = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in GOLDEN.glob("*.json")}
    assert found.keys() == golden.keys()
    for name, value in found.items():
        assert value == golden[name], name
        assert json.dumps(value) == json.dumps(golden[name]), f"{name}: the order of the names"
        require_schema(golden[name], scenario.found[name][0])


def test_every_schema_is_checked_and_every_command_has_one(scenario: Scenario) -> None:
    schemas = set(document()["properties"])
    assert {schema for schema, _ in scenario.found.values()} | ELSEWHERE == schemas
    commands = set(with_json(main, ()))
    pairs = [(schema, command) for schema in schemas for command in commands if f"{schema} ".startswith(f"{command} ")]
    assert {command for _, command in pairs} == commands
    assert schemas - {schema for schema, _ in pairs} == {"error"}


def with_json(command: click.Command, path: tuple[str, ...]) -> Iterator[str]:
    """The commands that have --json."""
    if any("--json" in option.opts for option in command.params):
        yield " ".join(path)
    for name, sub in getattr(command, "commands", {}).items():
        yield from with_json(sub, (*path, name))


def test_the_file_is_a_schema_and_refers_to_what_it_has() -> None:
    Draft202012Validator.check_schema(document())
    defs = document()["$defs"]
    used = {one["$ref"].removeprefix("#/$defs/") for one in nodes(document()) if "$ref" in one}
    assert used == set(defs)


def test_a_name_means_the_same_everywhere() -> None:
    """A property with one of the shared names, those in lower case, refers to the one definition of it, or is null."""
    shared = {name for name in document()["$defs"] if name[0].islower()}
    for object_ in nodes({name: part for name, part in document().items() if name != "properties"}, document()["properties"]):
        assert object_.get("additionalProperties") is not None or "properties" not in object_
        for name, schema in object_.get("properties", {}).items():
            if name in shared:
                refs = {one.get("$ref") for one in schema.get("anyOf", [schema]) if one != {"type": "null"}}
                assert refs == {f"#/$defs/{name}"}, f"{name} in {object_.get('description')}"
            else:
                assert schema.get("description") or "$ref" in schema, name


def nodes(*values: Any) -> Iterator[dict[str, Any]]:
    """All objects in JSON values."""
    for value in values:
        if isinstance(value, dict):
            yield value
            yield from nodes(*value.values())
        elif isinstance(value, list):
            yield from nodes(*value)
