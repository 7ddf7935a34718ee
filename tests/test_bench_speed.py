"""The benchmarks of speed: memory does not grow with the model, sparse models are models, README shows what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench import large, merge_script, peers, readme
from bench.harness import TOOL, measure_apart
from bench.model import Sizes
from bench.sparse import GGUF, VERSIONS, digest_data, make_sparse, weight_files
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher.apply import apply
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack

NARROW = Sizes(512, 1024, 4, 4, 4, 1000)
WIDE = {"safetensors": Sizes(4096, 14336, 8, 32, 8, 1000), "gguf": Sizes(4096, 14336, 2, 32, 8, 128256)}
"""Blocks of rows as large as those of an 8 B model; for GGUF also its vocabulary, and few rows, as they are quantized."""
GROWTH_MB = 20
"""The packs and some blocks of rows. All touched rows of the wide models would be 28 MB, and two of their tensors 7 MB."""


@pytest.fixture
def sparse(tmp_path: Path) -> Callable[..., Path]:
    def make(sizes: Sizes, *, gguf: bool = False) -> Path:
        folder = tmp_path / "-".join(map(str, sizes))
        make_sparse(folder, sizes, limit=200_000_000, gguf=gguf)
        return folder

    return make


def peaks(folder: Path, kind: str) -> dict[str, float]:
    """Peak memory of each command, MB; after them the files hold what they held before."""
    model, base = (folder / "base", []) if kind == "safetensors" else (folder / GGUF, ["--base", folder / "base"])
    first, second = (folder / f"{version}.nest" for version in VERSIONS)
    commands = {
        "apply": ["apply", model, first, "--in-place", "--quiet", "--json", *base],
        "upgrade": ["apply", model, second, "--in-place", "--quiet", "--json", *base],
        "verify": ["verify", model, "--json"],
        "revert": ["revert", model, "--quiet", "--json"],
    }
    found = {}
    for name, words in commands.items():
        run, said = measure_apart([*TOOL, *words])
        assert name != "verify" or json.loads(said)["verdict"] == "patched"
        found[name] = run.rss_mb
    files = [file for file in weight_files(folder) if file.is_file()]
    assert digest_data(files) == (folder / "base.sha256").read_text()
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="files have no holes there")
@pytest.mark.parametrize("kind", WIDE)
def test_memory_does_not_grow_with_the_model(sparse, kind: str) -> None:
    if kind == "gguf":
        pytest.importorskip("llama_cpp")
    narrow, wide = (peaks(sparse(sizes, gguf=kind == "gguf"), kind) for sizes in (NARROW, WIDE[kind]))
    growth = {name: wide[name] - narrow[name] for name in narrow}
    assert max(growth.values()) < GROWTH_MB, (narrow, wide)


def test_a_sparse_model_has_shards_and_numbers_in_the_touched_rows(sparse) -> None:
    folder = sparse(Sizes(512, 1024, 40, 4, 4, 1000))
    assert len(list((folder / "base").glob("*.safetensors"))) == 2
    first, second = (nest.read(folder / f"{version}.nest") for version in VERSIONS)
    checkpoint = open_checkpoint(folder / "base")
    assert {delta.name for delta in first} == {
        f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in range(10, 30) for part in ("gate", "up")
    }
    for ours, theirs in zip(first, second, strict=True):
        rows = checkpoint.read_rows(ours.name, ours.rows.astype(np.int64))
        assert abs(float(rows.astype(np.float32).std()) - 0.02) < 0.001
        assert (ours.rows == theirs.rows).all()
        assert not (ours.delta == theirs.delta).all()


def test_a_large_model_is_patched_and_updated_and_left_as_it_was(sparse) -> None:
    folder = sparse(NARROW)
    base, pack = folder / "base", folder / f"{VERSIONS[0]}.nest"
    files = set(base.iterdir())
    assert large.first_three(base, pack, []).keys() == {"in_place", "verify", "revert"}
    assert large.update_once(base, folder, []).rss_mb > 20
    assert digest_data(weight_files(folder)[:-1]) == (folder / "base.sha256").read_text()
    assert set(base.iterdir()) == files


def test_a_digest_of_the_data_sees_each_page_and_its_place(tmp_path: Path) -> None:
    file = tmp_path / "file"
    digests = set()
    for at, byte in ((None, b""), (5, b"a"), (5, b"b"), (4101, b"a"), (99_999, b"a")):
        with open(file, "wb") as handle:
            handle.truncate(100_000)
            if at is not None:
                handle.seek(at)
                handle.write(byte)
        digests.add(digest_data([file]))
    assert len(digests) == 5
    file.write_bytes(file.read_bytes())  # zeros instead of holes
    assert digest_data([file]) in digests


def test_the_script_writes_the_weights_that_nestpatch_writes(tmp_path: Path) -> None:
    model, pack = tiny_checkpoint(tmp_path / "model"), tmp_path / "p.nest"
    nest.write(tiny_pack(model), pack)
    merge_script.main(str(model), str(pack), str(tmp_path / "script"))
    apply(model, pack, tmp_path / "ours", listed=False)
    ours, theirs = load_tensors(tmp_path / "ours"), load_tensors(tmp_path / "script")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_a_peer_that_is_absent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(peers.EXPORT_LORA, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert any("llama-export-lora" in line for line in peers.absent())
    assert "export_lora" not in peers.peers_of(tmp_path)
    monkeypatch.setenv(peers.EXPORT_LORA, "/opt/llama-export-lora")
    assert peers.peers_of(tmp_path)["export_lora"][0] == "/opt/llama-export-lora"
    assert not any("llama-export-lora" in line for line in peers.absent())


def test_readme_has_the_tables_of_what_was_measured() -> None:
    text, found = readme.README.read_text("utf-8"), json.loads(readme.KEPT.read_text("utf-8"))
    between = text.split(readme.MARKS[0])[1].split(readme.MARKS[1])[0]
    assert between.strip() == readme.tables(found), "python -m bench.readme writes README's tables"
    for measured in found.values():
        assert measured["date"] in between
        assert measured["machine"] in between


def test_numbers_of_one_day_are_kept_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "KEPT", tmp_path / "speed.json")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    readme.README.write_text(f"before\n\n{readme.MARKS[0]}\nstale\n{readme.MARKS[1]}\n\nafter\n")
    run = readme.Run(1.5, 58, 2)
    readme.keep("8b", {"in_place": run}, parameters=8e9, rounds=1)
    readme.keep("8b", {"gguf_in_place": run}, parameters=8e9, rounds=1)
    assert set(json.loads(readme.KEPT.read_text())["8b"]["runs"]) == {"in_place", "gguf_in_place"}
    readme.keep("8b", {"verify": run}, parameters=8e9, rounds=5)
    assert set(json.loads(readme.KEPT.read_text())["8b"]["runs"]) == {"verify"}
    shown = readme.README.read_text()
    assert shown.startswith("before\n\n")
    assert shown.endswith("\n\nafter\n")
    assert "stale" not in shown
    assert "| verify, safetensors | 1.50 | 58 |" in shown
