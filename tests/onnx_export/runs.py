"""onnxruntime by hand: what the tests compare with, without the library under test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class Run:
    """A session that keeps its cache."""

    def __init__(self, file: Path, adapter: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.how = onnxruntime.RunOptions()
        if adapter is not None:
            self.adapter = onnxruntime.LoraAdapter()
            self.adapter.Load(str(adapter))
            self.how.add_active_adapter(self.adapter)
        self.past: dict[str, np.ndarray] = {}

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits of ids that come after what was read before; mask covers both."""
        positions = np.clip(mask.cumsum(-1) - 1, 0, None)[:, -ids.shape[1] :]
        plain = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed = {}
        for entry in self.session.get_inputs():
            empty = [len(ids), entry.shape[1], 0, entry.shape[-1]]
            feed[entry.name] = plain.get(entry.name, self.past.get(entry.name))
            if feed[entry.name] is None:
                feed[entry.name] = np.zeros(empty, TYPES[entry.type])
        names = [output.name for output in self.session.get_outputs()]
        out = dict(zip(names, self.session.run(names, feed, self.how), strict=True))
        self.past = {name.replace("present", "past_key_values"): out[name] for name in names if name != "logits"}
        return out["logits"].astype(np.float32)


def batch(rows: int, length: int, pads: tuple[int, ...] = (), seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), the first rows padded at the left by so many tokens."""
    ids = np.random.default_rng(seed).integers(3, 300, (rows, length))
    mask = np.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad] = mask[row, :pad] = 0
    return ids, mask


def reference(model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The logits of transformers."""
    positions = torch.from_numpy(np.clip(mask.cumsum(-1) - 1, 0, None))
    with torch.no_grad():
        out = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=positions, use_cache=False)
    return out.logits.float().numpy()


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Every initializer of an export, external ones included."""
    model = onnx.load(str(folder / "model.onnx"))
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def unsigned(folder: Path) -> bytes:
    """The graph's bytes without what nestpatch says of it."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    del model.metadata_props[:]
    return model.SerializeToString(deterministic=True)


def facts(folder: Path) -> dict[str, str]:
    """What the graph says of itself."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    return {entry.key: entry.value for entry in model.metadata_props}
