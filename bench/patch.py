"""What patching costs, beside copying the model and merging a LoRA: `python bench/patch.py [--quick] [--large] [--log]`.

Every contender is a whole process. They take turns, with a warm page cache: a first round is not counted. Before each one all
dirty pages are written out, so that none pays for the one before. The last line of stdout is one JSON object.

This process imports nothing big: on Linux a child's peak RSS is at least that of the process that started it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

SHARE, CLUSTERS = 0.015, 6
"""Neurons of each layer that the pack changes, and deltas of each projection."""
WEIGHT_STD, DELTA_STD = 0.02, 0.0006
"""Deltas have 3 % of the weights' RMS."""
LORA_RANK = 8
"""On the same projections, with random factors."""
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, "dtype": "bfloat16"}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
MODELS = {
    "full": (2048, 5632, 22, 32, 4, 32000),
    "quick": (768, 2048, 12, 12, 4, 32000),
    "large": (3072, 8192, 34, 24, 8, 128256),
}
"""The large one is zeros, and holes on disk: does memory grow with the model?"""
LOG = Path(__file__).with_name("LOG.md")


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


def write_pack(model: Path, path: Path) -> None:
    """Random deltas on random rows of all gate and up projections."""
    import numpy as np

    from nestpatch.formats import nest
    from nestpatch.formats.opening import open_checkpoint
    from nestpatch.pack import BaseIdentity, Manifest, Pack, TensorDelta, TensorIdentity
    from nestpatch.rows import DTYPES, merge, sketch

    checkpoint, random = open_checkpoint(model), np.random.default_rng(1)
    deltas, identities, results = [], {}, {}
    for name in (name for name in checkpoint.tensors() if "gate_proj" in name or "up_proj" in name):
        info = checkpoint.info(name)
        neurons = round(SHARE * info.rows)
        rows = np.sort(random.choice(info.rows, neurons, replace=False)).astype(np.int32)
        old = checkpoint.read_rows(name, rows)
        change = (DELTA_STD * random.standard_normal((CLUSTERS, info.shape[1]))).astype(DTYPES["BF16"])
        delta = TensorDelta(name, change, rows, (np.arange(neurons) % CLUSTERS).astype(np.uint8), sketch(old))
        deltas.append(delta)
        identities[name] = TensorIdentity(info.shape, "BF16", digest(checkpoint.read_all(name)), digest([old.tobytes()]))
        results[name] = digest([merge(old, delta.dense()).tobytes()])
    base = BaseIdentity("bench/random", "", "LlamaForCausalLM", "BF16", identities)
    manifest = Manifest("bench", "1.0.0", "random", "Apache-2.0", "2026-01-01T00:00:00Z", base, results)
    nest.write(Pack(manifest, tuple(deltas)), path, overwrite=True)


def load(model: Path) -> Any:
    """The model in PEFT's hands."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)


def merge_adapter(model: Path, adapter: Path, output: Path) -> None:
    """The contender: what PEFT's documentation tells to do."""
    from peft import PeftModel

    PeftModel.from_pretrained(load(model), adapter).merge_and_unload().save_pretrained(output)


def prepare(size: str) -> None:
    """Makes base/, patch.nest and lora/ where they are missing or damaged, and prints their folder."""
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
    if size != "large" and importlib.util.find_spec("peft") and not (folder / "lora" / "adapter_config.json").is_file():
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=LORA_RANK, target_modules=["gate_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(load(model), config).save_pretrained(folder / "lora")
    print(folder)


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return digest(iter(lambda: file.read(1 << 20), b""))


def digest(blocks: Iterable[bytes]) -> str:
    """SHA-256 of consecutive blocks."""
    state = sha256()
    for block in blocks:
        state.update(block)
    return state.hexdigest()


class Run(NamedTuple):
    """What one process took."""

    seconds: float
    rss_mb: float
    written_mb: float
    """What it gave to write calls. The bytes that Linux counts as dirtied are whole folios, many times the rows."""


def measure(command: list[object]) -> tuple[Run, str]:
    """Runs a command to its end; gives its last line too."""
    os.sync()
    # An installed program has its bytecode; machines that build images forbid writing it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.NamedTemporaryFile() as told:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=told, text=True, env=environment
        )
        said = process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - began
        io = Path(f"/proc/{process.pid}/io")  # still there until the process is waited for
        written = int(io.read_text().split()[3]) / 1e6 if io.exists() else 0.0
        _, status, usage = os.wait4(process.pid, 0)
        process.stdout.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{command} failed:\n{Path(told.name).read_text()[-3000:]}")
    rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(seconds, rss / 1e6, written), (said.splitlines() or [""])[-1]


def contenders(folder: Path, *, large: bool) -> dict[str, list[object]]:
    """Name -> command, in the order of a round."""
    tool, model, pack, out = [sys.executable, "-m", "nestpatch"], folder / "base", folder / "patch.nest", folder / "out"
    found = {
        "in_place": [*tool, "apply", model, pack, "--in-place", "--json"],
        "verify": [*tool, "verify", model, "--json"],
        "revert": [*tool, "revert", model, "--json"],
    }
    if not large:
        found["copy"] = [*tool, "apply", model, pack, "-o", out, "--json"]
        found["copy_no_sync"] = [*tool, "apply", model, pack, "-o", out, "--json", "--no-sync"]
        found["cp"] = ["cp", "-r", model, out]
        found["cp_sync"] = ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", model, out]
        if importlib.util.find_spec("peft"):
            found["peft"] = [sys.executable, __file__, "--step", "merge", model, folder / "lora", out]
    return found


def forget(model: Path) -> None:
    """Removes what nestpatch keeps of a model."""
    (model / "nestpatch.json").unlink(missing_ok=True)
    shutil.rmtree(model / ".nestpatch", ignore_errors=True)


def one_round(folder: Path, commands: dict[str, list[object]]) -> dict[str, Run]:
    """Each contender once. Outputs and what nestpatch keeps are removed, so that each apply is a first one."""
    results, model = {}, folder / "base"
    for name, command in commands.items():
        results[name], said = measure(command)
        if name == "verify" and json.loads(said)["verdict"] != "patched":
            sys.exit(said)
        if name not in ("in_place", "verify"):
            forget(model)
        shutil.rmtree(folder / "out", ignore_errors=True)
    return results


def measure_all(size: str, rounds: int) -> dict[str, Run]:
    """The medians of the rounds that count."""
    said = subprocess.check_output([sys.executable, __file__, "--step", "prepare", size], text=True)
    folder = Path(said.splitlines()[-1])
    shutil.rmtree(folder / "out", ignore_errors=True)
    commands = contenders(folder, large=size == "large")
    done = [one_round(folder, commands) for _ in range(rounds + 1)][1:]
    if digest_file(folder / "base" / "model.safetensors") != (folder / "base.sha256").read_text():
        sys.exit("after revert the model is not what it was")
    columns = {name: zip(*(results[name] for results in done), strict=True) for name in commands}
    return {name: Run(*map(statistics.median, column)) for name, column in columns.items()}


def entry(answer: dict, results: dict[str, Run]) -> str:
    """The dated block for the log."""
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpu.read_text() if cpu.exists() else "", re.MULTILINE)
    rows = [f"| {who} | {run.seconds:.3f} | {run.rss_mb:.0f} | {run.written_mb:.1f} |" for who, run in results.items()]
    ratios = ", ".join(f"{name} {value:.2f}" for name, value in answer["ratios"].items())
    return f"""## {datetime.now(timezone.utc):%Y-%m-%d}: patching {answer["parameters"] / 1e9:.2f} B parameters

`python bench/patch.py {" ".join(sys.argv[1:])}` on {found[1] if found else platform.machine()}, {os.cpu_count()} cores.
Whole processes in turn, medians of {answer["rounds"]} rounds, page cache warm after a round that was not counted. The nestpatch
commands sync what they write, and `cp_sync`; `copy_no_sync`, `cp` and `peft` do not. After revert the model's SHA-256 was the
original.

| | seconds | peak RSS, MB | written, MB |
|---|---|---|---|
{chr(10).join(rows)}

Ratios of the times: {ratios}.
"""


def append_to_log(block: str) -> None:
    """Newest first, under the header."""
    head, mark, older = LOG.read_text(encoding="utf-8").partition("\n## ")
    LOG.write_text(f"{head.rstrip()}\n\n{block}{mark}{older}", encoding="utf-8")


def main() -> None:
    """Measures, prints the table and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="about 0.1 B parameters instead of 1.1 B")
    parser.add_argument("--large", action="store_true", help="also a sparse model of 4 B parameters, in place only")
    parser.add_argument("--log", action="store_true", help="add the result to bench/LOG.md")
    options = parser.parse_args()
    size = "quick" if options.quick else "full"
    results = measure_all(size, options.rounds)
    if "peft" not in results:
        print("peft is not installed: measured without it (pip install peft)")
    parameters = {name: sum(map(math.prod, shapes_of(sizes).values())) for name, sizes in MODELS.items()}
    answer: dict = {"parameters": parameters[size], "rounds": options.rounds, "peft_s": None, "peft_rss_mb": None}
    if options.large:
        results |= {f"large_{name}": run for name, run in measure_all("large", options.rounds).items()}
        answer["large_parameters"] = parameters["large"]
    for name, run in results.items():
        answer |= {f"{name}_s": run.seconds, f"{name}_rss_mb": run.rss_mb, f"{name}_written_mb": run.written_mb}
    pairs = (("peft", "in_place"), ("peft", "copy"), ("cp", "in_place"), ("copy_no_sync", "cp"), ("copy", "cp_sync"))
    answer["ratios"] = {f"{a}/{b}": results[a].seconds / results[b].seconds for a, b in pairs if a in results}
    block = entry(answer, results)
    print(block)
    if options.log:
        append_to_log(block)
    print(json.dumps(answer))


if sys.argv[1:2] == ["--step"]:
    {"prepare": prepare, "merge": merge_adapter}[sys.argv[2]](*sys.argv[3:])
elif __name__ == "__main__":
    main()
