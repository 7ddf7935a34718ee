"""Tiny ONNX models of tiny checkpoints, in the ways in which exporters leave their weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from nestpatch.formats.onnx._nbits import NBitsCodec
from tests.helpers import load_tensors

CODES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
PARTS = ("gate", "up", "down")


@dataclass
class Model:
    """A graph under construction."""

    dtype: str = "F32"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(200))

    def node(self, op: str, inputs: list[str], output: str, *, name: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def proto(self, hidden: int, last: str) -> onnx.ModelProto:
        """With all data inside; element types that numpy does not know are kept."""
        code = CODES[self.dtype]
        values = [helper.make_tensor_value_info(name, code, ["batch", hidden]) for name in ("x", last)]
        tensors = [tensor_proto(name, tensor) for name, tensor in self.tensors.items()]
        graph = helper.make_graph(self.nodes, "main", values[:1], values[1:], tensors)
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10, producer_name="by hand")


def tensor_proto(name: str, tensor: np.ndarray) -> onnx.TensorProto:
    """A tensor with raw data inside the model."""
    code = next((code for key, code in CODES.items() if NUMPY[key] == tensor.dtype), None)
    return helper.make_tensor(
        name, code or helper.np_dtype_to_tensor_dtype(tensor.dtype), tensor.shape, tensor.tobytes(), raw=True
    )


Linear = Callable[[Model, str, str, np.ndarray], str]
"""(model, module name, input, weight [out, in]) -> output: multiplies as an exporter would write it."""


def kept(model: Model, module: str, x: str, weight: np.ndarray) -> str:
    """As torch does without optimizing: the name and the rows are kept, the graph transposes."""
    model.tensors[f"{module}.weight"] = weight
    turned = model.node("Transpose", [f"{module}.weight"], f"val_{next(model.numbers)}", perm=[1, 0])
    return model.node("MatMul", [x, turned], f"linear_{next(model.numbers)}", name=f"node_linear_{next(model.numbers)}")


def wrapped(model: Model, module: str, x: str, weight: np.ndarray) -> str:
    """The same behind a wrapper's name."""
    return kept(model, f"lm.{module}", x, weight)


def genai(model: Model, module: str, x: str, weight: np.ndarray) -> str:
    """As the onnxruntime-genai builder does, and this package: a name, and columns."""
    model.tensors[f"{module}.MatMul.weight"] = np.ascontiguousarray(weight.T)
    return model.node(
        "MatMul", [x, f"{module}.MatMul.weight"], f"{slashed(module)}/MatMul/output_0", name=f"{slashed(module)}/MatMul"
    )


def optimum(model: Model, module: str, x: str, weight: np.ndarray) -> str:
    """As optimum does: only the operation has a name."""
    name = f"onnx::MatMul_{next(model.numbers)}"
    model.tensors[name] = np.ascontiguousarray(weight.T)
    return model.node("MatMul", [x, name], f"{slashed(module)}/MatMul_output_0", name=f"{slashed(module)}/MatMul")


def scoped(model: Model, module: str, x: str, weight: np.ndarray) -> str:
    """As torch does when it optimizes: the names are in the metadata."""
    out = nameless(model, module, x, weight)
    parts = module.split(".")
    scopes = ["", *(".".join(parts[: n + 1]) for n in range(len(parts))), "linear"]
    node = model.nodes[-1]
    node.name = f"node_linear_{next(model.numbers)}"
    for key, value in {"namespace": "x" * 40, "pkg.torch.onnx.name_scopes": repr(scopes)}.items():
        entry = node.metadata_props.add()
        entry.key, entry.value = key, value
    return out


def nameless(model: Model, module: str, x: str, weight: np.ndarray) -> str:
    """No names at all."""
    name = f"val_{next(model.numbers)}"
    model.tensors[name] = np.ascontiguousarray(weight.T)
    return model.node("MatMul", [x, name], f"linear_{next(model.numbers)}")


def gemm(model: Model, module: str, x: str, weight: np.ndarray) -> str:
    """A Gemm with rows."""
    model.tensors[f"{module}.weight"] = weight
    return model.node("Gemm", [x, f"{module}.weight"], f"gemm_{next(model.numbers)}", name=f"{slashed(module)}/Gemm", transB=1)


def constant(model: Model, module: str, x: str, weight: np.ndarray) -> str:
    """The weight in a Constant operation instead of an initializer."""
    name = f"val_{next(model.numbers)}"
    value = tensor_proto("", np.ascontiguousarray(weight.T))
    model.nodes.append(helper.make_node("Constant", [], [name], value=value))
    return model.node("MatMul", [x, name], f"out_{next(model.numbers)}", name=f"{slashed(module)}/MatMul")


def fused(model: Model, module: str, x: str, weight: np.ndarray) -> str:
    """onnxruntime's own operation, with one dimension more in front."""
    name = f"val_{next(model.numbers)}"
    model.tensors[name] = weight[None]
    node = {"name": f"{slashed(module)}/MatMul_fused", "transB": 1, "domain": "com.microsoft"}
    product = model.node("FusedMatMul", [x, name], f"out_{next(model.numbers)}", **node)
    model.tensors.setdefault("zeroth", np.array([0], np.int64))
    return model.node("Squeeze", [product, "zeroth"], f"out_{next(model.numbers)}")


LINEARS: Mapping[str, Linear] = {
    function.__name__: function for function in (kept, wrapped, genai, optimum, scoped, nameless, gemm, constant, fused)
}


def slashed(module: str) -> str:
    """ "model.layers.0.mlp" -> "/model/layers.0/mlp", as exporters from TorchScript name operations."""
    head, _, tail = module.partition(".layers.")
    number, _, rest = tail.partition(".")
    return f"/{head}/layers.{number}/{rest.replace('.', '/')}"


def build(
    checkpoint: Path, style: str = "genai", *, dtype: str = "F32", packed: str = "", act: str = "silu"
) -> onnx.ModelProto:
    """The feed-forward blocks of a tiny checkpoint one after the other, each added to its input.

    `packed`: "gate first" or "up first" puts both into one weight. `act`: "silu", "gelu" (by tanh) or "plain" (no gate).
    """
    weights = {name: tensor.astype(NUMPY[dtype]) for name, tensor in load_tensors(checkpoint).items()}
    model, x, linear = Model(dtype), "x", LINEARS[style]
    layers = sum(name.endswith("down_proj.weight") for name in weights)
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        gate_w, up_w, down_w = (weights[f"{mlp}.{part}_proj.weight"] for part in PARTS)
        if packed:
            gate, up = split(model, linear, mlp, x, gate_w, up_w, packed)
        else:
            gate, up = (linear(model, f"{mlp}.{part}_proj", x, w) for part, w in (("gate", gate_w), ("up", up_w)))
        inner = model.node("Mul", [activated(model, gate, act), up], f"mul_{next(model.numbers)}")
        x = model.node("Add", [x, linear(model, f"{mlp}.down_proj", inner, down_w)], f"add_{next(model.numbers)}")
    return model.proto(down_w.shape[0], x)


def split(model: Model, linear: Linear, mlp: str, x: str, gate: np.ndarray, up: np.ndarray, order: str) -> tuple[str, str]:
    both = [gate, up] if order == "gate first" else [up, gate]
    product = linear(model, f"{mlp}.gate_up_proj", x, np.concatenate(both))
    halves = [f"half_{next(model.numbers)}" for _ in range(2)]
    model.nodes.append(helper.make_node("Split", [product], halves, axis=1, num_outputs=2))
    first, second = halves
    return (first, second) if order == "gate first" else (second, first)


def activated(model: Model, x: str, act: str) -> str:
    def op(kind: str, *inputs: str) -> str:
        return model.node(kind, list(inputs), f"act_{next(model.numbers)}")

    if act == "silu":
        return op("Mul", x, op("Sigmoid", x))
    for name, value in {"half": 0.5, "one": 1.0, "cubic": 0.044715, "root": 0.7978845608, "three": 3.0}.items():
        model.tensors[name] = np.array(value, NUMPY[model.dtype])
    inside = op("Mul", op("Add", x, op("Mul", op("Pow", x, "three"), "cubic")), "root")
    return op("Mul", op("Mul", x, op("Add", op("Tanh", inside), "one")), "half")


def save(proto: onnx.ModelProto, folder: Path, where: str = "one file", *, name: str = "model.onnx") -> Path:
    """Writes a model: its data in "one file" beside it, "inside", in a "file each", or inside as "floats"."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    if where == "floats":
        for tensor in copy.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                tensor.float_data.extend(np.frombuffer(tensor.raw_data, np.float32).tolist())
                tensor.ClearField("raw_data")
    elif where != "inside":
        together = {
            "all_tensors_to_one_file": where == "one file",
            "location": "model.onnx_data" if where == "one file" else None,
        }
        onnx.save(copy, path, save_as_external_data=True, size_threshold=64, **together)
        return path
    onnx.save(copy, path)
    return path


def quantized(proto: onnx.ModelProto, *, bits: int = 4, block: int = 32, symmetric: bool = True) -> onnx.ModelProto:
    """The model as onnxruntime's own quantizer makes it."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    quantizer = MatMulNBitsQuantizer(copy, bits=bits, block_size=block, is_symmetric=symmetric)
    quantizer.process()
    result: onnx.ModelProto = quantizer.model.model
    return result


def narrowed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Scales rounded to F16 after the model was quantized, as converters to half precision do."""
    for tensor in proto.graph.initializer:
        if tensor.name.endswith("_scales"):
            scales = np.frombuffer(tensor.raw_data, np.float32).astype(np.float16)
            tensor.CopyFrom(tensor_proto(tensor.name, scales.reshape(tuple(tensor.dims))))
    return proto


def in_blocks(proto: onnx.ModelProto, base: Path) -> onnx.ModelProto:
    """A model of genai's style with every weight as MatMulNBits, by the codec that is tested against onnxruntime elsewhere."""
    stored = load_tensors(base)
    for node in proto.graph.node:
        if node.op_type == "MatMul":
            matrix = stored[node.input[1].replace(".MatMul", "")].astype(np.float32)
            codec = NBitsCodec(4, 16, matrix.shape[1], "F32", zero_points=False)
            blocks = codec.encode(matrix)
            names = [f"{node.input[1]}_Q4", f"{node.input[1]}_scales"]
            numbers, scales = blocks[:, : codec.parts[0]], np.ascontiguousarray(blocks[:, codec.parts[0] :])
            parts = numbers.reshape(len(matrix), codec.blocks, -1), scales.view(np.float32)
            proto.graph.initializer.extend(map(tensor_proto, names, parts))
            del node.input[1]
            node.input.extend(names)
            node.op_type, node.domain = "MatMulNBits", "com.microsoft"
            sizes = {"bits": 4, "block_size": 16, "K": matrix.shape[1], "N": matrix.shape[0]}
            node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in sizes.items())
    kept = [t for t in proto.graph.initializer if not t.name.endswith(".MatMul.weight")]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def data_of(path: Path) -> dict[str, bytes]:
    """Every file of a model but what is kept of patches -> its bytes."""
    files = (file for file in sorted(path.parent.iterdir()) if file.is_file() and "nestpatch" not in file.name)
    return {file.name: file.read_bytes() for file in files}


def run(path: Path, rows: int = 3) -> np.ndarray:
    """What a model answers, in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((rows, session.get_inputs()[0].shape[1]))
    kind = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    answer: np.ndarray = session.run(None, {"x": x.astype(kind)})[0]
    return answer
