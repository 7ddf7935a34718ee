"""The random models and packs that are patched in the benchmarks."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

from bench.harness import digest_file

SHARE, CLUSTERS = 0.015, 6
"""Neurons of each layer that the pack changes, and deltas of each projection."""
WEIGHT_STD, DELTA_STD = 0.02, 0.0006
"""Deltas have 3 % of the weights' RMS."""
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, "dtype": "bfloat16"}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
MODELS = {
    "full": (2048, 5632, 22, 32, 4, 32000),
    "quick": (768, 2048, 12, 12, 4, 32000),
    "large": (3072, 8192, 34, 24, 8, 128256),
}
"""The large one is zeros, and holes on disk: does memory grow with the model?"""

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Of Llama 3, which every converter knows."""


QUICK = {"--quick": "about 0.1 B parameters instead of 1.1 B"}
"""The flag for the smaller one."""


def shapes_of(sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a Llama."""
    hidden, wide, layers, heads, kv_heads, vocab = sizes
    kv = hidden // heads * kv_heads
    layer = {
        **{f"mlp.{part}_proj": (wide, hidden) for part in ("gate", "up")},
        **{f"self_attn.{part}_proj": (kv, hidden) for part in "kv"},
        **{f"self_attn.{part}_proj": (hidden, hidden) for part in "oq"},
        **{f"{part}_layernorm": (hidden,) for part in ("input", "post_attention")},
        "mlp.down_proj": (hidden, wide),
    }
    inner = {f"model.layers.{n}.{part}": shape for n in range(layers) for part, shape in layer.items()}
    shapes = {"model.embed_tokens": (vocab, hidden), **inner, "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def write_model(folder: Path, sizes: tuple[int, ...], *, sparse: bool) -> None:
    """A random model, tensor by tensor, or one of zeros."""
    import ml_dtypes
    import numpy as np

    header, end = {}, 0
    for name, shape in shapes_of(sizes).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 64)
    random = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if sparse:
            file.truncate(file.tell() + end)
        for shape in () if sparse else shapes_of(sizes).values():
            norm = len(shape) == 1
            values = np.ones(shape) if norm else random.standard_normal(shape, np.float32) * np.float32(WEIGHT_STD)
            file.write(values.astype(ml_dtypes.bfloat16).view(np.uint8).data)
    (folder / "config.json").write_text(json.dumps(CONFIG | dict(zip(SIZES, sizes, strict=True))))


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


def write_pack(model: Path, path: Path) -> None:
    """Random deltas on random rows of all gate and up projections."""
    import numpy as np

    from nestpatch.formats import nest
    from nestpatch.formats.opening import open_checkpoint
    from nestpatch.pack import Label
    from nestpatch.packing import build_pack, pack_tensor
    from nestpatch.rows import DTYPES

    checkpoint, random, tensors = open_checkpoint(model), np.random.default_rng(1), []
    for name in (name for name in checkpoint.tensors() if "gate_proj" in name or "up_proj" in name):
        info = checkpoint.info(name)
        neurons = round(SHARE * info.rows)
        rows = np.sort(random.choice(info.rows, neurons, replace=False))
        change = (DELTA_STD * random.standard_normal((CLUSTERS, info.shape[1]))).astype(DTYPES["BF16"])
        tensors.append(pack_tensor(checkpoint, name, rows, change, cluster=np.arange(neurons) % CLUSTERS))
    label = Label("bench", description="random", license="Apache-2.0")
    pack = build_pack(tensors, label, model_id="bench/random", architecture="LlamaForCausalLM")
    nest.write(pack, path, overwrite=True)


def forget(model: Path) -> None:
    """Removes what nestpatch keeps of a model."""
    (model / "nestpatch.json").unlink(missing_ok=True)
    shutil.rmtree(model / ".nestpatch", ignore_errors=True)


def cached_model(size: str) -> Path:
    """The folder of a model: base/ and patch.nest in it, made where they are missing or damaged."""
    from nestpatch.lab.build import cache_folder

    sizes = MODELS[size]
    folder = cache_folder() / "bench" / "-".join(map(str, sizes))
    model, card = folder / "base", folder / "base.sha256"
    if not card.is_file() or card.read_text() != digest_file(model / "model.safetensors"):  # the card is written last
        shutil.rmtree(folder, ignore_errors=True)
        model.mkdir(parents=True)
        write_model(model, sizes, sparse=size == "large")
        card.write_text(digest_file(model / "model.safetensors"))
    forget(model)
    write_pack(model, folder / "patch.nest")
    return folder


def parameters(size: str) -> int:
    """How many numbers a model has."""
    return sum(map(math.prod, shapes_of(MODELS[size]).values()))
