"""Exporting with a patch: merged while reading, never on disk; the model's ledger; the command; kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFReader

import nestpatch
from nestpatch.cli import main
from nestpatch.errors import BaseMismatchError, BusyError, DataError, DowngradeError, OutputError, PackContentError
from nestpatch.events import Event
from nestpatch.export._source import merged_view, open_request
from nestpatch.export.gguf import export_gguf
from nestpatch.files.scratch import claimed, sweep
from nestpatch.formats import _rowio as rowio
from nestpatch.formats import checkpoint as interface
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.formats.provenance import PACKS
from nestpatch.gate import prove
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place
from tests.export.expected import expected_tensors
from tests.export.families import make
from tests.export.test_families import assert_holds, stored
from tests.helpers import load_tensors, tiny_pack, tree_digest

Made = Callable[[str], Path]
PATCHED = {
    "llama3": ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"],
    "mixtral": ["model.layers.0.block_sparse_moe.experts.2.w1.weight", "model.layers.1.block_sparse_moe.experts.0.w3.weight"],
    "qwen3_moe": ["model.layers.1.mlp.experts.3.up_proj.weight"],
    "gemma3": ["model.layers.4.mlp.gate_proj.weight"],
    "phi": ["model.layers.0.mlp.gate_up_proj.weight"],
    "gpt_neox": ["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Name -> a bfloat16 model of that family."""
    root = tmp_path_factory.mktemp("patched")
    found: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in found:
            found[name] = make(name, root / name, dtype="bfloat16", shards="100KB")
        return found[name]

    return get


def merged(folder: Path, pack: Pack, strength: float = 1.0) -> dict[str, np.ndarray]:
    """The weights after the merge rule, row by row."""
    tensors = {name: values.copy() for name, values in load_tensors(folder).items()}
    for delta in pack.deltas:
        matrix = tensors[delta.name].reshape(-1, tensors[delta.name].shape[-1])
        for row, cluster in zip(delta.rows, delta.cluster, strict=True):
            total = matrix[row].astype(np.float32) + np.float32(strength) * delta.delta[cluster].astype(np.float32)
            matrix[row] = total.astype(matrix.dtype)
    return tensors


def listed(path: Path) -> list[dict[str, Any]]:
    """What an exported file says of its patches."""
    field = GGUFReader(path).fields.get(PACKS)
    return json.loads(field.contents()) if field is not None else []


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", PATCHED)
def test_a_patch_is_merged_while_reading(name: str, strength: float, models: Made, tmp_path: Path) -> None:
    folder = models(name)
    before = tree_digest(folder)
    pack = tiny_pack(folder, tensors=PATCHED[name])
    done = export_gguf(folder, pack, tmp_path / "out.gguf", strength=strength)
    want = expected_tensors(folder, merged(folder, pack, strength))
    assert want.keys() == expected_tensors(folder).keys()
    assert_holds(done.output, want, "BF16", {"rope_freqs.weight"})
    assert tree_digest(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert done.packs == ("no-harm 1.0.0",)
    assert listed(done.output) == [{"name": "no-harm", "version": "1.0.0", "pack_id": nest.pack_id(pack), "strength": strength}]


def test_the_file_is_that_of_a_patched_copy(models: Made, tmp_path: Path) -> None:
    folder = models("llama3")
    pack = tiny_pack(folder)
    apply(folder, pack, tmp_path / "copy")
    on_the_way = export_gguf(folder, pack, tmp_path / "a.gguf", name="same")
    afterwards = export_gguf(tmp_path / "copy", output=tmp_path / "b.gguf", name="same")
    assert on_the_way.sha256 == afterwards.sha256
    assert afterwards.packs == ("no-harm 1.0.0",)


def test_a_patch_in_a_quantized_file_is_that_of_the_merged_weights(models: Made, tmp_path: Path) -> None:
    folder = models("llama3")
    pack = tiny_pack(folder)
    done = export_gguf(folder, pack, tmp_path / "out.gguf", type="q8_0")
    assert_holds(done.output, expected_tensors(folder, merged(folder, pack)), "Q8_0", {"rope_freqs.weight"})


def test_the_view_reads_in_blocks_and_single_rows(models: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (interface, rowio):
        monkeypatch.setattr(module, "CHUNK", 700)
    folder = models("llama3")
    pack = tiny_pack(folder)
    view, want = merged_view(pack, open_checkpoint(folder)), merged(folder, pack)
    assert view.tensors() == open_checkpoint(folder).tensors()
    for name, values in want.items():
        assert b"".join(view.read_all(name)) == values.tobytes()
        assert (view.extent(name) is None) == (name in {delta.name for delta in pack})
        if values.ndim == 2:
            for rows in ([0], [len(values) - 1], [1, 2, 5], list(range(len(values))), []):
                assert np.array_equal(view.read_rows(name, np.array(rows, np.int64)), values[rows])
    with pytest.raises(OutputError, match="cannot be written"):
        view.write_rows("model.norm.weight", np.array([0]), np.zeros((1, 64)))
    with pytest.raises(OutputError, match="nothing at"):
        view.reopen(folder)
    assert dict(view.metadata()) == dict(open_checkpoint(folder).metadata())


def test_another_base_is_refused_and_nothing_is_written(models: Made, tmp_path: Path) -> None:
    other = tiny_pack(make("llama3", tmp_path / "other", dtype="bfloat16", intermediate_size=64))
    (tmp_path / "out").mkdir()
    with pytest.raises(BaseMismatchError, match="not the base of no-harm"):
        export_gguf(models("llama3"), other, tmp_path / "out" / "x.gguf")
    assert not list((tmp_path / "out").iterdir())


def test_a_pack_that_breaks_its_promise_is_refused(models: Made, tmp_path: Path) -> None:
    import dataclasses

    pack = tiny_pack(models("llama3"))
    results = dict.fromkeys(pack.manifest.result, "0" * 64)
    liar = Pack(dataclasses.replace(pack.manifest, result=results), pack.deltas)
    with pytest.raises(PackContentError, match="promises"):
        export_gguf(models("llama3"), liar, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_a_patched_model_exports_what_its_files_hold(models: Made, tmp_path: Path) -> None:
    """Its ledger goes into the file; a second pack comes on top; an applied one is not applied twice."""
    apply(models("llama3"), tiny_pack(models("llama3"), neurons=5), tmp_path / "model")
    plain = export_gguf(tmp_path / "model", output=tmp_path / "plain.gguf")
    assert plain.packs == ("no-harm 1.0.0",)
    assert_holds(plain.output, expected_tensors(tmp_path / "model"), "BF16", {"rope_freqs.weight"})
    again = export_gguf(tmp_path / "model", tiny_pack(models("llama3"), neurons=5), tmp_path / "again.gguf")
    assert again.packs == plain.packs
    assert stored(again.output) == stored(plain.output)
    second = tiny_pack(tmp_path / "model", name="other", seed=5, tensors=["model.layers.0.mlp.down_proj.weight"])
    both = export_gguf(tmp_path / "model", second, tmp_path / "both.gguf")
    assert both.packs == ("no-harm 1.0.0", "other 1.0.0")
    want = expected_tensors(tmp_path / "model", merged(tmp_path / "model", second))
    assert_holds(both.output, want, "BF16", {"rope_freqs.weight"})


def test_a_newer_version_replaces_the_applied_one(models: Made, tmp_path: Path) -> None:
    """That has to be undone first, which a view cannot do: a patched copy is made for the while."""
    base, old, new = (
        models("llama3"),
        tiny_pack(models("llama3"), neurons=5),
        tiny_pack(models("llama3"), version="1.1.0", seed=3),
    )
    apply(base, old, tmp_path / "model")
    (tmp_path / "out").mkdir()
    planned = export_gguf(tmp_path / "model", new, tmp_path / "out" / "x.gguf", dry_run=True)
    assert not list((tmp_path / "out").iterdir())
    done = export_gguf(tmp_path / "model", new, tmp_path / "out" / "x.gguf")
    assert planned.packs == done.packs == ("no-harm 1.1.0",)
    assert planned.nbytes == done.nbytes
    assert_holds(done.output, expected_tensors(base, merged(base, new)), "BF16", {"rope_freqs.weight"})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.gguf"]
    apply(base, new, tmp_path / "newer")
    with pytest.raises(DowngradeError):
        export_gguf(tmp_path / "newer", old, tmp_path / "out" / "y.gguf")


def test_a_model_that_changes_meanwhile_is_told(models: Made, tmp_path: Path) -> None:
    apply(models("llama3"), tiny_pack(models("llama3"), neurons=5), tmp_path / "model")
    second = tiny_pack(tmp_path / "model", name="other", tensors=["model.layers.0.mlp.down_proj.weight"])

    def meanwhile(event: Event) -> None:
        if event.stage == "export" and event.done == 3:
            apply_in_place(tmp_path / "model", second)

    with pytest.raises(BusyError, match="was changed"):
        export_gguf(tmp_path / "model", output=tmp_path / "out.gguf", on_event=meanwhile)
    assert not (tmp_path / "out.gguf").exists()


def test_places_and_names(models: Made, tmp_path: Path) -> None:
    folder, pack = models("llama3"), tiny_pack(models("llama3"))
    assert open_request(folder, None, 1.0).beside(".gguf") == folder.with_name("llama3.gguf")
    assert open_request(folder, prove(pack, trust="none"), 1.0).beside(".gguf", "Q4_K_M") == folder.with_name(
        "llama3-no-harm-1.0.0-Q4_K_M.gguf"
    )
    (tmp_path / "taken.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        export_gguf(folder, output=tmp_path / "taken.gguf")
    assert (tmp_path / "taken.gguf").read_bytes() == b"mine"
    with pytest.raises(OutputError, match="no directory"):
        export_gguf(folder, output=tmp_path / "none" / "x.gguf")
    with pytest.raises(OutputError, match="too long"):
        export_gguf(folder, output=tmp_path / ("x" * 230 + ".gguf"))
    with pytest.raises(DataError, match="strength"):
        export_gguf(folder, pack, tmp_path / "x.gguf", strength=7)
    done = nestpatch.export_gguf(folder, output=tmp_path / "x.gguf", name="Named Otherwise")
    assert GGUFReader(done.output).fields["general.name"].contents() == "Named Otherwise"


def test_a_single_file_uses_the_config_beside_it(exported: Made, family: Made, tmp_path: Path) -> None:
    done = export_gguf(family("llama2") / "model.safetensors", output=tmp_path / "x.gguf")
    assert stored(done.output) == stored(exported("llama2"))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_the_command(models: Made, tmp_path: Path) -> None:
    folder, patch = models("llama3"), tmp_path / "x.nest"
    nest.write(tiny_pack(folder), patch)
    done = run(folder, patch, "--to", "gguf", "-o", tmp_path / "a.gguf", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["output"] == str(tmp_path / "a.gguf")
    assert answer["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert (answer["type"], answer["packs"], answer["dry_run"]) == ("BF16", ["no-harm 1.0.0"], False)
    told = run(folder, "--to", "gguf", "-o", tmp_path / "b.gguf", "--type", "q8_0", "--dry-run", "-q")
    assert told.exit_code == 0
    assert "would write" in told.stdout
    assert not (tmp_path / "b.gguf").exists()
    human = run(folder, patch, "--to", "gguf", "-o", tmp_path / "b.gguf", "--strength", "0.5")
    assert "no-harm 1.0.0" in human.stdout
    assert "writing tensors" in human.stderr


def test_the_command_names_what_is_wrong(models: Made, tmp_path: Path) -> None:
    unknown = run(models("llama3"), "--to", "gguf", "-o", tmp_path / "x.gguf", "--type", "q9")
    assert (unknown.exit_code, "Known types" in unknown.stderr) == (2, True)
    imatrix = run(models("llama3"), "--to", "gguf", "-o", tmp_path / "x.gguf", "--type", "iq2_xs")
    assert (imatrix.exit_code, "importance matrix" in imatrix.stderr) == (1, True)
    assert run(models("llama3"), "--to", "tarball").exit_code == 2
    assert run(models("llama3"), "--to", "gguf", "--strength", "0.5").exit_code == 2
    assert run(models("llama3")).exit_code == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("x.nest", "model", "--to", "gguf"), "MODEL comes first. Write: nestpatch export --to gguf model x.nest"),
        (("x.nest", "--to", "gguf"), "x.nest is a pack, and MODEL is expected: nestpatch export --to gguf MODEL"),
        (("model", "x.nest", "--to", "gguf", "--type", "q4_km"), "Did you mean q4_k_m?"),
        (("model", "x.nest", "--to", "gguf", "--type", "q4km"), "Did you mean q4_k_m?"),
        (("model", "x.nest", "--to", "gguf", "-o", "no/where.gguf"), "there is no directory"),
        (("model", "x.nest", "--to", "gguf", "--strength", "7"), "strength must be over 0"),
        (("model", "x.nest", "--to", "safetensors", "-o", "taken"), "taken exists already"),
        (("model", "--to", "safetensors", "--strength", "0.5"), "--strength: only with a PACK"),
        (("model", "x.nest", "--to", "gguf", "--check", "--dry-run"), "--check runs the file that was written"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the model nor the pack can be read."""
    monkeypatch.chdir(tmp_path)
    for name in ("taken", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "x.nest").touch()
    done = run(*words)
    assert done.exit_code in {1, 2}
    assert says in " ".join(done.stderr.split())


def test_the_strength_is_printed(models: Made, tmp_path: Path) -> None:
    pack = tmp_path / "x.nest"
    nest.write(tiny_pack(models("llama3")), pack)
    for target in ("gguf", "safetensors"):
        arguments = (models("llama3"), pack, "--to", target, "-o", tmp_path / target, "--strength", "0.5")
        assert "no-harm 1.0.0, at strength 0.5" in run(*arguments, "--dry-run").stdout
        answer = json.loads(run(*arguments, "--dry-run", "--json").stdout)
        assert (answer["strength"], answer["packs"], answer["output"]) == (0.5, ["no-harm 1.0.0"], str(tmp_path / target))
    adapter = run(pack, "--to", "lora", "-o", tmp_path / "lora", "--strength", "0.5").stdout
    assert "0.5, contained in the numbers: load it at scale 1" in adapter


def test_the_help_has_examples() -> None:
    assert run("--help").stdout.count("\n    nestpatch export ") == 2


def start(folder: Path, target: Path, *more: str) -> subprocess.Popen[bytes]:
    """An export in a process of its own, stopped at its fourth tensor."""
    code = """
import os, signal, sys
from nestpatch.export import gguf as export
written = export.write_gguf
def stopping(*arguments, on_event, **options):
    def hear(event):
        on_event(event)
        if event.done == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
    return written(*arguments, on_event=hear, **options)
export.write_gguf = stopping
from nestpatch.cli import main
main(sys.argv[1:])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(nestpatch.__file__).parent.parent)}
    command = [sys.executable, "-c", code, "export", str(folder), "--to", "gguf", "-o", str(target), "-q", *more]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the export never came to its fourth tensor")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["auto", "q4_0"])
def test_a_killed_export_leaves_nothing(kind: str, models: Made, tmp_path: Path) -> None:
    if kind != "auto":
        pytest.importorskip("llama_cpp")
    target = tmp_path / "x.gguf"
    process = start(models("llama3"), target, "--type", kind)
    assert not target.exists()
    left = list(tmp_path.iterdir())
    assert left
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_what_a_crash_leaves_is_cleared_by_the_next_export(models: Made, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    process = start(models("llama3"), target, "--type", "q4_0")
    left = sorted(tmp_path.iterdir())
    assert len(left) == 2
    sweep(target)
    assert sorted(tmp_path.iterdir()) == left  # its process lives
    process.kill()
    process.wait(60)
    assert sorted(tmp_path.iterdir()) == left
    export_gguf(models("llama3"), output=target)
    assert list(tmp_path.iterdir()) == [target]


def test_only_the_own_temporary_files_are_swept(tmp_path: Path) -> None:
    names = [".x.gguf.0123abcd.tmp", ".x.gguf.0123abcd.tmp.whole", ".x.gguf.89abcdef.tmp.patched"]
    others = [".y.gguf.0123abcd.tmp", ".x.gguf.0123.tmp", "x.gguf.0123abcd.tmp", ".x.gguf.0123abcd.tmp.other"]
    for name in [*names[:2], *others]:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / names[2] / "deep").mkdir(parents=True)
    with claimed(tmp_path / names[0]):
        sweep(tmp_path / "x.gguf")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[0], *others])
    sweep(tmp_path / "x.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
