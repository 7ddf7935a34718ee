"""The types of GGUF files: those written here, those that llama.cpp mixes, those that are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, LlamaFileType

from nestpatch.errors import DataError, MissingExtraError, OutputError, QuantizationError
from nestpatch.events import Event
from nestpatch.export import _quantizer as quantizing
from nestpatch.export._gguf_writer import write_gguf
from nestpatch.formats.gguf import quants
from nestpatch.formats.gguf import quants as gguf_types
from nestpatch.formats.gguf.quants import ALIASES, DIRECT, NEED_IMATRIX, QUANTIZED, file_type
from nestpatch.formats.opening import open_checkpoint
from tests.export.expected import expected_tensors
from tests.export.running import loaded, logits
from tests.export.test_families import IDS, assert_holds, stored, with_tensors
from tests.helpers import load_tensors

Made = Callable[[str], Path]


@pytest.mark.parametrize("kind", ["f16", "BF16", "q8_0", "Q8_0"])
@pytest.mark.parametrize("name", ["llama2", "gemma2", "mixtral", "phi"])
def test_types_written_here(name: str, kind: str, family: Made, tmp_path: Path) -> None:
    done = write_gguf(open_checkpoint(family(name)), tmp_path / "out.gguf", kind=kind)
    assert done.type == kind.upper()
    assert_holds(done.output, expected_tensors(family(name)), kind.upper())
    assert GGUFReader(done.output).fields["general.file_type"].contents() == LlamaFileType[f"MOSTLY_{kind.upper()}"]


def test_rows_that_blocks_do_not_fill_become_f16(family: Made, tmp_path: Path) -> None:
    tensors = load_tensors(family("llama2"))
    for name in tensors:
        if "down_proj" in name:
            tensors[name] = tensors[name][:, :90].copy()
        elif "mlp" in name:
            tensors[name] = tensors[name][:90].copy()
    folder = with_tensors(family("llama2"), tmp_path / "odd", tensors)
    found = stored(write_gguf(open_checkpoint(folder), tmp_path / "out.gguf", kind="q8_0").output)
    assert found["blk.0.ffn_down.weight"][0] == "F16"
    assert found["blk.0.ffn_up.weight"][0] == "Q8_0"


def test_values_beyond_f16_are_refused_and_nothing_is_left(family: Made, tmp_path: Path) -> None:
    tensors = load_tensors(family("llama2"))
    large = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    large[3, 5] = 70000.0
    folder = with_tensors(family("llama2"), tmp_path / "large", {**tensors, "model.layers.1.mlp.up_proj.weight": large})
    (tmp_path / "out").mkdir()
    with pytest.raises(QuantizationError, match=r"blk.1.ffn_up.weight .* range of F16") as caught:
        write_gguf(open_checkpoint(folder), tmp_path / "out" / "x.gguf", kind="f16")
    assert "bf16" in caught.value.advice
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", QUANTIZED)
def test_types_that_llama_cpp_mixes_are_made_from_all_bits_and_run(kind: str, wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    events: list[Event] = []
    done = write_gguf(
        open_checkpoint(wide), tmp_path / "out.gguf", kind=kind.lower(), keys={"x.y": "kept"}, on_event=events.append
    )
    reader = GGUFReader(done.output)
    assert reader.fields["general.file_type"].contents() == gguf_types.code(kind)
    assert reader.fields["x.y"].contents() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    want = expected_tensors(wide)
    types = set()
    for name, (dtype, shape, data) in stored(done.output).items():
        if name in want and dtype != "F32":
            rows = want[name].astype(np.float32).reshape(-1, shape[-1])
            assert data == quants.codec(dtype).encode(rows).tobytes(), (name, dtype)
            types.add(dtype)
    assert types - {"F32", "F16", "BF16"}
    last = [event for event in events if event.stage == "quantize"][-1]
    assert last.done == last.total == done.tensors
    with loaded(done.output, 64) as model:
        assert np.isfinite(logits(model, IDS)).all()


@pytest.mark.parametrize("kind", NEED_IMATRIX)
def test_types_that_need_an_imatrix_are_refused_by_name(kind: str, wide: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=f"{kind} needs an importance matrix"):
        write_gguf(open_checkpoint(wide), tmp_path / "out.gguf", kind=kind.lower())


@pytest.mark.parametrize("kind", ["IQ3_XS", "Q2_K_S", "IQ2_XS"])
def test_llama_cpp_itself_refuses_those(kind: str, wide: Path, tmp_path: Path) -> None:
    """The list of refused types is llama.cpp's own; and its words reach the user when it fails."""
    pytest.importorskip("llama_cpp")
    whole = write_gguf(open_checkpoint(wide), tmp_path / "whole.gguf").output
    with pytest.raises(QuantizationError, match="imatrix"):
        quantizing.quantize_file(whole, tmp_path / "out.gguf", kind)


def test_names_of_types() -> None:
    assert file_type("q4_k_m") == file_type("Q4-K-M") == file_type("q4_k")
    assert {file_type(name).direct for name in DIRECT} == {True}
    assert {file_type(name).direct for name in QUANTIZED} == {False}
    assert all(gguf_types.code(name) >= 0 for name in DIRECT + QUANTIZED)
    assert not set(ALIASES) & set(DIRECT + QUANTIZED)
    with pytest.raises(DataError, match="'q9'") as caught:
        file_type("q9")
    assert "Q4_K_M" in caught.value.advice
    assert "Did you mean" not in caught.value.advice
    for name in ("q4km", "Q4_K-L", "q4_k_mm"):
        with pytest.raises(DataError) as caught:
            file_type(name)
        assert "Did you mean q4_k" in caught.value.advice


def test_without_llama_cpp_python_the_install_line_is_given(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None in sys.modules: as if it were not installed.
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtraError) as caught:
        write_gguf(open_checkpoint(wide), tmp_path / "out.gguf", kind="q4_k_m")
    assert caught.value.advice == "pip install 'nestpatch[llama]'"
    assert not list(tmp_path.iterdir())
    assert write_gguf(open_checkpoint(wide), tmp_path / "out.gguf", kind="q8_0").nbytes > 0


def test_a_dry_run_tells_the_size_and_writes_nothing(wide: Path, tmp_path: Path) -> None:
    for kind in ("auto", "f32", "q8_0"):
        planned = write_gguf(open_checkpoint(wide), tmp_path / "out.gguf", kind=kind, dry_run=True)
        assert (planned.dry_run, planned.sha256, list(tmp_path.iterdir())) == (True, "", [])
        done = write_gguf(open_checkpoint(wide), tmp_path / "out.gguf", kind=kind)
        assert planned.nbytes == done.nbytes == done.output.stat().st_size
        done.output.unlink()


def test_a_failing_disk_leaves_nothing(wide: Path, tmp_path: Path) -> None:
    def fail(event: Event) -> None:
        if event.done == 5:
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_gguf(open_checkpoint(wide), tmp_path / "out.gguf", on_event=fail)
    assert not list(tmp_path.iterdir())


def test_a_failing_quantizer_leaves_nothing(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")

    def spoil(event: Event) -> None:
        if event.stage == "quantize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(open_checkpoint(wide), tmp_path / "out.gguf", kind="q4_0", on_event=spoil)
    assert not list(tmp_path.iterdir())
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(QuantizationError, match="Q4_0"):
        quantizing.quantize_file(broken, tmp_path / "out.gguf", "Q4_0")


def test_the_quantizers_process_imports_nothing_heavy() -> None:
    code = "import sys, nestpatch.export._quantizer\nprint({'numpy', 'gguf', 'llama_cpp', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def facts_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def test_exports_are_reproducible(wide: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(wide)
    first, second = (write_gguf(checkpoint, tmp_path / f"{n}.gguf", name="same") for n in "ab")
    assert first.sha256 == second.sha256
    assert facts_of(first.output) == facts_of(second.output)
