"""Whole decoders that torch exported, patched where they are: the bytes and the answers of exporting the merged model."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.verify import Verdict, verify
from tests.helpers import load_tensors, tiny_pack
from tests.onnx.files import data_of, narrowed, quantized, save

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
FAMILIES: Mapping[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Phi3": {"original_max_position_embeddings": 64},
    "Gemma2": {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16},
}
"""Separate weights; gate and up in one; gelu by tanh, and norms after the blocks too."""
EXPORTS = [("Llama", True), ("Llama", False), ("Phi3", True), ("Gemma2", True)]
TOKENS = np.arange(20, dtype=np.int64).reshape(2, 10) + 5


class Logits(torch.nn.Module):  # type: ignore[misc]
    """A decoder without its cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.lm = model

    def forward(self, input_ids: Any) -> Any:
        return self.lm(input_ids=input_ids, use_cache=False).logits


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def export(folder: Path, target: Path, *, optimize: bool) -> Path:
    """As torch does it now."""
    target.mkdir()
    # torch and onnxscript warn about themselves.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Logits(load(folder)),
            (torch.ones(2, 3, dtype=torch.long),),
            dynamo=True,
            optimize=optimize,
            verbose=False,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch", 1: "length"},),
        )
        program.save(target / "model.onnx", external_data=True)
    return target / "model.onnx"


class Shop:
    """Families, their packs, and their exports; each made once and never changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def base(self, family: str) -> Path:
        folder = self.folder / family
        if not folder.exists():
            torch.manual_seed(0)
            config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
            getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
        return folder

    def pack(self, family: str, scale: float = 0.02) -> Pack:
        names = [name for name in load_tensors(self.base(family)) if ".gate" in name or ".up_proj" in name]
        return tiny_pack(self.base(family), tensors=names, scale=scale, delta_dtype="F32", neurons=20)

    def merged(self, family: str) -> Path:
        folder = self.folder / f"{family}-merged"
        return folder if folder.exists() else apply(self.base(family), self.pack(family), folder).output

    def exported(self, family: str, which: str, *, optimize: bool) -> Path:
        folder = self.folder / f"{family}-{which}-{optimize}"
        if not folder.exists():
            export(getattr(self, which)(family), folder, optimize=optimize)
        return folder / "model.onnx"

    def copy(self, family: str, optimize: bool, folder: Path) -> Path:
        shutil.copytree(self.exported(family, "base", optimize=optimize).parent, folder)
        return folder / "model.onnx"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("exports"))


def logits(path: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    answer: np.ndarray = session.run(["logits"], {"input_ids": TOKENS})[0]
    return answer


@pytest.mark.parametrize(("family", "optimize"), EXPORTS)
def test_patched_is_exporting_the_merged_model(family: str, optimize: bool, shop: Shop, tmp_path: Path) -> None:
    path = shop.copy(family, optimize, tmp_path / "m")
    original, pack = data_of(path), shop.pack(family)
    done = apply_in_place(path.parent, pack)
    assert done.tensors == (2 if family == "Phi3" else 4)
    assert data_of(path) == data_of(shop.exported(family, "merged", optimize=optimize))
    with torch.no_grad():
        expected = load(shop.merged(family))(torch.tensor(TOKENS)).logits.numpy()
        before = load(shop.base(family))(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(logits(path) - expected).max() < 1e-4
    assert np.abs(expected - before).max() > 1e-3
    assert verify(path, full=True).verdict is Verdict.PATCHED
    revert(path)
    assert data_of(path) == original
    assert verify(path, pack, full=True).verdict is Verdict.BASE


def stripped(path: Path) -> Path:
    """The model without a name of an operation, and without metadata."""
    proto = onnx.load(path, load_external_data=False)
    for node in proto.graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
    for number, tensor in enumerate(proto.graph.initializer):
        for node in proto.graph.node:
            node.input[:] = [f"t{number}" if name == tensor.name else name for name in node.input]
        tensor.name = f"t{number}"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(("family", "optimize"), EXPORTS)
def test_without_any_name(family: str, optimize: bool, shop: Shop, tmp_path: Path) -> None:
    path = stripped(shop.copy(family, optimize, tmp_path / "m"))
    graph = path.read_bytes()
    apply_in_place(path, shop.pack(family))
    merged = data_of(shop.exported(family, "merged", optimize=optimize))
    assert data_of(path) == {"model.onnx": graph, "model.onnx.data": merged["model.onnx.data"]}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_quantized_exports(family: str, later: bool, shop: Shop, tmp_path: Path) -> None:
    def make(which: str) -> Path:
        proto = quantized(onnx.load(shop.exported(family, which, optimize=True)), symmetric=False)
        return save(narrowed(proto) if later else proto, tmp_path / which)

    path, goal = make("base"), make("merged")
    original = data_of(path)
    apply_in_place(path, shop.pack(family), base=shop.base(family))
    assert data_of(path) == data_of(goal)
    revert(path)
    assert data_of(path) == original
