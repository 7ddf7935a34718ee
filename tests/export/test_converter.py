"""The route through llama.cpp's own converter, with a script in its place that writes what it was given."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader

from nestpatch.errors import DataError, UnsupportedModelError
from nestpatch.export._converter import SCRIPT
from nestpatch.export._gguf_writer import write_gguf
from nestpatch.export.gguf import export_gguf
from nestpatch.formats.opening import open_checkpoint
from tests.export.expected import expected_tensors
from tests.export.families import make
from tests.export.test_export import listed, merged
from tests.export.test_families import assert_holds, changed, stored
from tests.helpers import tiny_pack

Made = Callable[[str], Path]
REAL = os.environ.get("NESTPATCH_LLAMA_CPP")

# Takes the arguments of the real one, pretends that the model is a Llama, and exports it.
STAND_IN = """
import argparse, json, pathlib, sys
from nestpatch.export._gguf_writer import write_gguf
from nestpatch.formats.opening import open_checkpoint
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
for name in ("--outfile", "--outtype", "--model-name"):
    parser.add_argument(name, required=True)
given = parser.parse_args()
config = json.loads((given.model / "config.json").read_text())
if config["architectures"] == ["Unheard"]:
    sys.exit("Model Unheard is not supported")
(given.model / "config.json").unlink()
(given.model / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
write_gguf(open_checkpoint(given.model), pathlib.Path(given.outfile), kind=given.outtype, name=given.model_name + "!")
(given.model / "config.json").write_text(json.dumps(config))
"""


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import nestpatch

    monkeypatch.setenv("PYTHONPATH", str(Path(nestpatch.__file__).parent.parent))
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / SCRIPT).write_text(STAND_IN, encoding="utf-8")
    return tmp_path / "llama.cpp"


@pytest.fixture
def unknown(family: Made, tmp_path: Path) -> Path:
    return changed(family("llama3"), tmp_path / "unknown", architectures=["NewForCausalLM"])


def test_a_model_that_is_unknown_here_goes_through_the_converter(
    unknown: Path, exported: Made, llama_cpp: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="NewForCausalLM"):
        export_gguf(unknown, output=tmp_path / "x.gguf")
    done = export_gguf(unknown, output=tmp_path / "x.gguf", llama_cpp=llama_cpp)
    assert stored(done.output) == stored(exported("llama3"))
    assert (done.architecture, done.tensors) == ("llama", len(stored(done.output)))
    fields = {key: field.contents() for key, field in GGUFReader(done.output).fields.items()}
    assert fields["general.name"] == "unknown!"
    assert fields["nestpatch.version"]
    assert {path.name for path in tmp_path.iterdir()} == {"unknown", "llama.cpp", "x.gguf"}


def test_a_patch_is_applied_to_a_copy_first(unknown: Path, family: Made, llama_cpp: Path, tmp_path: Path) -> None:
    pack = tiny_pack(unknown)
    (tmp_path / "out").mkdir()
    done = export_gguf(unknown, pack, tmp_path / "out" / "x.gguf", llama_cpp=llama_cpp, type="f16")
    assert_holds(done.output, expected_tensors(family("llama3"), merged(unknown, pack)), "F16", {"rope_freqs.weight"})
    assert [entry["name"] for entry in listed(done.output)] == ["no-harm"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.gguf"]


def test_llama_cpp_mixes_what_the_converter_wrote(unknown: Path, llama_cpp: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    (tmp_path / "out").mkdir()
    done = export_gguf(unknown, tiny_pack(unknown), tmp_path / "out" / "x.gguf", llama_cpp=llama_cpp, type="q4_0")
    assert stored(done.output)["blk.0.ffn_gate.weight"][0] == "Q4_0"
    assert [entry["name"] for entry in listed(done.output)] == ["no-harm"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.gguf"]


def test_its_last_words_are_in_the_error(family: Made, llama_cpp: Path, tmp_path: Path) -> None:
    folder = changed(family("llama3"), tmp_path / "model", architectures=["Unheard"])
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedModelError, match=r"(?s)exit code 1.*Unheard is not supported"):
        export_gguf(folder, tiny_pack(folder), tmp_path / "out" / "x.gguf", llama_cpp=llama_cpp)
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_without_it_is_named(family: Made, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=SCRIPT):
        export_gguf(family("llama3"), output=tmp_path / "x.gguf", llama_cpp=tmp_path)


def test_a_dry_run_does_not_start_it(unknown: Path, llama_cpp: Path, tmp_path: Path) -> None:
    done = export_gguf(unknown, output=tmp_path / "x.gguf", llama_cpp=llama_cpp, dry_run=True)
    assert (done.dry_run, done.nbytes, done.output.exists()) == (True, 0, False)


@pytest.mark.skipif(not REAL, reason="NESTPATCH_LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("name", ["llama_spm", "mixtral", "qwen2"])
def test_the_real_converter_writes_the_same_tensors(name: str, tmp_path: Path) -> None:
    from tests.export.tokenizers_made import sentencepiece

    folder = make("llama2" if name == "llama_spm" else name, tmp_path / name, dtype="bfloat16")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    sentencepiece(folder, "model")
    theirs = export_gguf(folder, output=tmp_path / "theirs.gguf", llama_cpp=Path(str(REAL)), type="q8_0")
    ours = write_gguf(open_checkpoint(folder), tmp_path / "ours.gguf", kind="q8_0")
    assert stored(ours.output) == stored(theirs.output)
