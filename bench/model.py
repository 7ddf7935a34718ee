"""The random models and packs that are patched in the benchmarks."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.harness import digest_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = dict[str, npt.NDArray[np.int64]]

SHARE, CLUSTERS = 0.015, 6
"""Neurons of each layer that the pack changes, and deltas of each projection."""
WEIGHT_STD, DELTA_STD = 0.02, 0.0006
"""Deltas have 3 % of the weights' RMS."""
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
PATCHED = ("gate", "up")


class Sizes(NamedTuple):
    """What determines the shapes of a Llama."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False


MODELS = {
    "quick": Sizes(768, 2048, 12, 12, 4, 32000),
    "1b": Sizes(2048, 5632, 22, 32, 4, 32000),
    "3b": Sizes(3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True),
    "8b": Sizes(4096, 14336, 32, 32, 8, 128256),
    "70b": Sizes(8192, 28672, 80, 64, 8, 128256),
}
"""The shapes of TinyLlama 1.1B, Llama 3.2 3B, Llama 3.1 8B and 70B. The last two are sparse files (bench/sparse.py)."""

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Of Llama 3, which every converter knows."""


QUICK = {"--quick": "about 0.1 B parameters instead of 1.1 B"}
"""The flag for the smaller one."""


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a Llama."""
    hidden, wide, layers, heads, kv_heads, vocab, tied = sizes
    kv = hidden // heads * kv_heads
    layer = {
        **{f"mlp.{part}_proj": (wide, hidden) for part in PATCHED},
        **{f"self_attn.{part}_proj": (kv, hidden) for part in "kv"},
        **{f"self_attn.{part}_proj": (hidden, hidden) for part in "oq"},
        **{f"{part}_layernorm": (hidden,) for part in ("input", "post_attention")},
        "mlp.down_proj": (hidden, wide),
    }
    inner = {f"model.layers.{n}.{part}": shape for n in range(layers) for part, shape in layer.items()}
    shapes = {"model.embed_tokens": (vocab, hidden), **inner, "model.norm": (hidden,)}
    if not tied:
        shapes["lm_head"] = (vocab, hidden)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def safetensors_header(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """(what precedes the tensors of a bfloat16 file, bytes of the tensors)."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 64)
    return struct.pack("<Q", len(text)) + text, end


def write_config(folder: Path, sizes: Sizes) -> None:
    """The config.json of a model."""
    (folder / "config.json").write_text(json.dumps(CONFIG | sizes._asdict()))


def write_model(folder: Path, sizes: Sizes) -> None:
    """A random model, tensor by tensor."""
    import ml_dtypes
    import numpy as np

    shapes, random = shapes_of(sizes), np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(safetensors_header(shapes)[0])
        for shape in shapes.values():
            norm = len(shape) == 1
            values = np.ones(shape) if norm else random.standard_normal(shape, np.float32) * np.float32(WEIGHT_STD)
            file.write(values.astype(ml_dtypes.bfloat16).view(np.uint8).data)
    write_config(folder, sizes)


def write_tokenizer(model: Path) -> None:
    """A byte-level vocabulary of the model's size that merges nothing, for formats that carry one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"word{n}" for n in range(vocabulary - len(alphabet) - 2)), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(model / "tokenizer.json"))
    facts = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(facts))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}))


def touched_rows(sizes: Sizes, share: float = SHARE, layers: Iterable[int] | None = None) -> Rows:
    """Tensor name -> the rows that packs change: the same neurons in the gate and up projections of a layer.

    Args:
        sizes: Of the model.
        share: Of the neurons of a layer.
        layers: Which layers; all when None.
    """
    import numpy as np

    random, found = np.random.default_rng(1), {}
    for layer in range(sizes.num_hidden_layers) if layers is None else layers:
        wide = sizes.intermediate_size
        rows = np.sort(random.choice(wide, round(share * wide), replace=False))
        found |= {f"model.layers.{layer}.mlp.{part}_proj.weight": rows for part in PATCHED}
    return found


def write_pack(model: Path, rows: Rows, path: Path, version: str = "1.0.0") -> None:
    """Random deltas on the rows."""
    import numpy as np

    from nestpatch.formats import nest
    from nestpatch.formats.opening import open_checkpoint
    from nestpatch.pack import Label
    from nestpatch.packing import build_pack, pack_tensor
    from nestpatch.rows import DTYPES

    checkpoint, random, tensors = open_checkpoint(model), np.random.default_rng(1), []
    for name, chosen in rows.items():
        change = (DELTA_STD * random.standard_normal((CLUSTERS, checkpoint.info(name).shape[1]))).astype(DTYPES["BF16"])
        tensors.append(pack_tensor(checkpoint, name, chosen, change, cluster=np.arange(len(chosen)) % CLUSTERS))
    label = Label("no-harm", version, description="random", license="Apache-2.0")
    pack = build_pack(tensors, label, model_id="bench/random", architecture="LlamaForCausalLM")
    nest.write(pack, path, overwrite=True)


def forget(model: Path) -> None:
    """Removes what nestpatch keeps of a model, a directory or a file."""
    ledger, state = (model / "nestpatch.json", model / ".nestpatch")
    if not model.is_dir():
        ledger, state = model.with_name(f"{model.name}.nestpatch.json"), model.with_name(f".{model.name}.nestpatch")
    ledger.unlink(missing_ok=True)
    shutil.rmtree(state, ignore_errors=True)


def place_of(sizes: Sizes) -> Path:
    """Where a model is kept between runs."""
    from nestpatch.lab.build import cache_folder

    return cache_folder() / "bench" / "-".join(map(str, sizes[:6]))


def cached_model(size: str) -> Path:
    """The folder of a dense model: base/ and patch.nest in it, made where they are missing or damaged."""
    sizes = MODELS[size]
    folder = place_of(sizes)
    model, card = folder / "base", folder / "base.sha256"
    if not card.is_file() or card.read_text() != digest_file(model / "model.safetensors"):  # the card is written last
        shutil.rmtree(folder, ignore_errors=True)
        model.mkdir(parents=True)
        write_model(model, sizes)
        card.write_text(digest_file(model / "model.safetensors"))
    forget(model)
    write_pack(model, touched_rows(sizes), folder / "patch.nest")
    return folder


def parameters(size: str) -> int:
    """How many numbers a model has."""
    return sum(map(math.prod, shapes_of(MODELS[size]).values()))
