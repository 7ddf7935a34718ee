"""Time-boxed fuzzing of everything that reads bytes from elsewhere: `python -m tests.fuzz_readers [--seconds 60] [--seed N]`.

Valid files are mutated (bits, cuts, copies, numbers and words of their JSON) and read again. A reader may accept a file or
raise a NestpatchError; any other exception, and a pack that is accepted but would be written otherwise, ends the run with the
input kept.
`pytest` runs it for a moment; `make fuzz` for a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np

from nestpatch.errors import NestpatchError
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.gguf.checkpoint import GgufCheckpoint
from nestpatch.formats.gguf.header import encode_header, padding
from nestpatch.formats.gguf.hf.model import FloatModel
from nestpatch.formats.onnx.checkpoint import OnnxCheckpoint
from nestpatch.formats.opening import open_checkpoint
from nestpatch.formats.safetensors import INDEX, SafetensorsCheckpoint
from nestpatch.patcher._journal import Region, write_journal
from nestpatch.patcher._undo import UndoReader
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.recovery import recover_model
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.verify import verify
from tests.gguf.files import gguf_of
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.onnx.files import build, in_blocks, save

NUMBERS = [b"0", b"-1", b"1e999", b"18446744073709551615", b"9" * 400, b"true", b"null", b"[]", b'"x"', b"{}", b"NaN"]
Reader = Callable[[Path, bytes], None]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four small injuries."""
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(INJURIES)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice([1, 8, 100, len(data)]) :]


def _copy(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice([1, 8, 64])]
    at = rng.randrange(len(data) + 1)
    return data[:at] + piece + data[at:]


def _number(data: bytes, rng: random.Random) -> bytes:
    """Replaces a number of the JSON part by something else."""
    found = list(re.finditer(rb"\d+", data[:4000]))
    if not found:
        return data
    match = rng.choice(found)
    return data[: match.start()] + rng.choice(NUMBERS) + data[match.end() :]


def _swap_words(data: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb'"[^"\\]*"', data[:4000]))
    if len(found) < 2:
        return data
    one, other = rng.sample(found, 2)
    return data[: one.start()] + other.group() + data[one.end() :]


INJURIES = [_flip, _flip, _cut, _copy, _number, _number, _swap_words]


def read_pack(folder: Path, data: bytes) -> None:
    """A pack that is accepted must be the canonical one."""
    pack = nest.decode(data)
    assert nest.encode(pack) == data, "accepted, but not canonical"
    assert all(np.isfinite(delta.dense()).all() for delta in pack), "accepted, but its change is not finite"


def read_tensors(checkpoint: Checkpoint) -> None:
    """All bytes of all tensors."""
    for name in checkpoint.tensors():
        for _ in checkpoint.read_all(name):
            pass


def read_checkpoint(folder: Path, data: bytes) -> None:
    """Headers may lie about anything."""
    path = folder / "x.safetensors"
    path.write_bytes(data)
    read_tensors(SafetensorsCheckpoint(path))


def read_gguf(folder: Path, data: bytes) -> None:
    """The same of GGUF files."""
    path = folder / "x.gguf"
    path.write_bytes(data)
    read_tensors(GgufCheckpoint(path))


def read_gguf_model(folder: Path, data: bytes) -> None:
    """GGUF files as models of transformers: configuration, tokenizer, and dequantized weights."""
    path = folder / "y.gguf"
    path.write_bytes(data)
    model = FloatModel(GgufCheckpoint(path))
    assert {name for name in model.companions if "/" in name} == set(), "a file outside of the directory"
    read_tensors(model)


def whole_gguf() -> bytes:
    """A Llama of one layer with 300 tokens, most of them bytes."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (300, 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.0.{part}.weight": (32, 32) for part in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.ffn_{part}.weight": (32, 32) for part in ("gate", "up", "down")}
    shapes |= {f"blk.0.{part}_norm.weight": (32,) for part in ("attn", "ffn")}
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}
    facts = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in sizes.items()}}
    facts |= {"llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5}
    texts = ["<unk>", "<s>", *(f"<0x{n:02X}>" for n in range(256)), *"abcdefghijklmnop", "ab", "cd", "abcd"]
    tokenizer = {
        "model": "llama",
        "tokens": texts,
        "token_type": [2, 3, *[6] * 256, *[1] * (len(texts) - 258)],
        "scores": [-float(n) for n in range(len(texts))],
        "bos_token_id": 1,
    }
    facts |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    sized = [(name, shape, "F32", 4 * int(np.prod(shape))) for name, shape in shapes.items()]
    body = b"".join(bytes(nbytes + padding(nbytes)) for *_, nbytes in sized)
    return encode_header({**facts, "tokenizer.chat_template": "{{ messages }}"}, sized) + body


def read_onnx(folder: Path, data: bytes) -> None:
    """The same of ONNX models, and of the weights that are found in their graphs."""
    path = folder / "x.onnx"
    path.write_bytes(data)
    checkpoint = OnnxCheckpoint(path)
    read_tensors(checkpoint)
    for part in ("gate_proj", "up_proj", "gate_up_proj"):
        name = f"model.layers.1.mlp.{part}.weight"
        if checkpoint.has(name):
            checkpoint.read_rows(name, np.arange(min(3, checkpoint.info(name).rows)))


def onnx_models(folder: Path) -> dict[str, tuple[bytes, Reader]]:
    """One of columns that only module names tell, and one of blocks."""
    base = tiny_checkpoint(folder / "third", dtype="F32")
    protos = {"columns": build(base, "scoped"), "blocks": in_blocks(build(base), base)}
    return {f"onnx {kind}": (save(proto, folder / kind, "inside").read_bytes(), read_onnx) for kind, proto in protos.items()}


def in_model(name: str) -> Reader:
    """A reader of a model in which one file is replaced."""

    def read(folder: Path, data: bytes) -> None:
        path = folder / "model" / name
        whole = path.read_bytes()
        try:
            path.write_bytes(data)
            verify(folder / "model")
        finally:
            path.write_bytes(whole)

    return read


def read_forged_ledger(folder: Path, data: bytes) -> None:
    """A ledger with a right checksum, which anybody can make: whatever it says, it is refused by name or judged by the rows."""
    try:
        content = json.loads(data)
        content.pop("seal", None)
        content.pop("sha256", None)
        digest = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except (ValueError, AttributeError):
        return
    name = state_dir_of(folder / "model").ledger.name
    in_model(name)(folder, json.dumps({**content, "sha256": digest}).encode())


def read_undo(folder: Path, data: bytes) -> None:
    """Residuals and checksums of an undo record."""
    path = folder / "x.undo"
    path.write_bytes(data)
    reader = UndoReader(path, ["a", "b", "c", "d"])
    for name in ("a", "b", "c", "d"):
        for _ in reader.residuals(name, iter([100, 60, 20])):
            pass
        reader.checksums(name, 9)


def read_damaged_journal(folder: Path, data: bytes) -> None:
    """A damaged journal is not whole, or its seal is gone; it changes nothing."""
    recover_from(folder, data)


def read_forged_journal(folder: Path, data: bytes) -> None:
    """The same with a right checksum, which anybody can make: whatever it says, it changes nothing."""
    recover_from(folder, data[:-64] + sha256(data[:-64]).digest() + bytes(32))


def recover_from(folder: Path, data: bytes) -> None:
    """Lets a model be recovered by a journal that nestpatch did not write."""
    model = folder / "model"
    state_dir = state_dir_of(model)
    weights = {file: file.read_bytes() for file in model.glob("*.safetensors")}
    state_dir.journal.write_bytes(data)
    try:
        assert recover_model(model).action == "nothing was changed", "a journal of nobody was carried out"
    finally:
        state_dir.journal.unlink(missing_ok=True)
        assert weights == {file: file.read_bytes() for file in model.glob("*.safetensors")}


def prepare(folder: Path) -> dict[str, tuple[bytes, Reader]]:
    """A patched model and, per reader, a valid input."""
    model = tiny_checkpoint(folder / "model", sharded=True)
    pack = tiny_pack(model)
    apply_in_place(model, pack)
    state_dir = state_dir_of(model)
    (undo,) = state_dir.folder.glob("*.undo")
    shard = next(model.glob("*.safetensors"))
    checkpoint = open_checkpoint(model)
    other = tiny_checkpoint(folder / "other")
    write_journal(
        state_dir, "0" * 16, checkpoint, [Region(checkpoint.info(delta.name), delta.rows.astype("int64")) for delta in pack]
    )
    journal = state_dir.journal.read_bytes()
    state_dir.journal.unlink()
    assert read_ledger(state_dir).applied
    return {
        "pack": (nest.encode(pack), read_pack),
        "low-rank pack": (nest.encode(tiny_pack(other, kind="mixed")), read_pack),
        "checkpoint": (shard.read_bytes(), read_checkpoint),
        "gguf": (gguf_of(other, folder / "m.gguf", "F16").read_bytes(), read_gguf),
        "gguf model": (whole_gguf(), read_gguf_model),
        **onnx_models(folder),
        "index": ((model / INDEX).read_bytes(), in_model(INDEX)),
        "ledger": (state_dir.ledger.read_bytes(), in_model(state_dir.ledger.name)),
        "forged ledger": (state_dir.ledger.read_bytes(), read_forged_ledger),
        "undo": (undo.read_bytes(), read_undo),
        "damaged journal": (journal, read_damaged_journal),
        "forged journal": (journal, read_forged_journal),
    }


def fuzz(seconds: float, seed: int) -> dict[str, Counter[str]]:
    """Reader -> outcome -> how often. Raises what a reader should not have raised; the input is then in fuzz-failure.bin."""
    rng = random.Random(seed)
    outcomes: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = prepare(folder)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for reader, (valid, read) in inputs.items():
                data = mutate(valid, rng)
                if data == valid:
                    continue
                try:
                    read(folder, data)
                    outcome = "accepted"
                except NestpatchError as error:
                    outcome = type(error).__name__ if error.advice else "an error without advice"
                except BaseException:
                    Path("fuzz-failure.bin").write_bytes(data)
                    print(f"{reader} failed with seed {seed}; the input is in fuzz-failure.bin", file=sys.stderr)
                    raise
                outcomes.setdefault(reader, Counter())[outcome] += 1
    return outcomes


def main() -> None:
    """Fuzzes and prints what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    for reader, outcomes in fuzz(options.seconds, options.seed).items():
        told = ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
        print(f"{reader}: {outcomes.total()} inputs: {told}")


if __name__ == "__main__":
    main()
