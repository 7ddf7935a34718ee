"""Builds the lab in a directory: base/ (model and tokenizer), prompts/*.jsonl and lab.json. Cached by seed and source.

The base is a byte-level BPE tokenizer and a small Llama, trained from scratch on the dialogues of the lab's world.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestpatch.errors import OutputError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import new_place
from nestpatch.lab._world import World, dialogues, make_world, prompt_sets
from nestpatch.runtimes import text
from nestpatch.runtimes.text import IGNORED, TokenPair, collate, encode_pairs

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_CARD = "lab.json"


@dataclass(frozen=True)
class Lab:
    """A lab on disk."""

    path: Path
    seed: int
    parameters: int
    """Parameters of the model."""
    cached: bool
    """Whether it existed already."""

    @property
    def base(self) -> Path:
        """The directory of the model."""
        return self.path / "base"

    def prompts(self, name: str) -> Path:
        """The file of a prompt set.

        Args:
            name: The set, such as "harmful.train".

        Returns:
            Its path.
        """
        return self.path / "prompts" / f"{name}.jsonl"

    def as_json(self) -> dict[str, Any]:
        """The lab for `--json`."""
        return {"output": str(self.path), "seed": self.seed, "model_parameters": self.parameters, "cached": self.cached}


def _lab_key(seed: int, config: LabConfig) -> str:
    """A digest of everything that a lab depends on: seed, sizes, the source code and the library versions."""
    state = sha256(json.dumps([seed, dataclasses.asdict(config)]).encode())
    folder = Path(__file__).parent
    for source in (*(folder / name for name in ("_words.py", "_world.py", "build.py")), Path(text.__file__)):
        # Line endings differ between checkouts.
        state.update(source.read_bytes().replace(b"\r\n", b"\n"))
    for package in ("torch", "transformers", "tokenizers"):
        state.update(version(package).encode())
    return state.hexdigest()[:16]


def cache_folder() -> Path:
    """Where labs are kept between runs: $NESTPATCH_CACHE, or the platform's cache folder.

    Returns:
        The folder, which need not exist.

    Raises:
        OutputError: The home directory of this user is not known.
    """
    if chosen := os.environ.get("NESTPATCH_CACHE"):
        return Path(chosen)
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "nestpatch" / "cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "nestpatch"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestpatch"
    except RuntimeError as error:
        raise OutputError(f"the cache folder is not known: {error}", advice="Set NESTPATCH_CACHE to a folder.") from error


def cached_lab(seed: int, config: LabConfig | None = None, on_event: OnEvent = ignore) -> Lab:
    """The lab of a seed from the cache, built there when it is missing.

    Args:
        seed: Seed of the world and of the training.
        config: Sizes of the model; None for the default.
        on_event: Called with the progress.

    Returns:
        The lab.

    Raises:
        OutputError: The cache folder is not known or cannot be written.
    """
    config = config or LabConfig()
    folder = cache_folder() / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    return build_lab(folder / f"seed{seed}-{_lab_key(seed, config)}", seed, config, on_event)


def build_lab(path: str | Path, seed: int = 0, config: LabConfig | None = None, on_event: OnEvent = ignore) -> Lab:
    """Builds the lab of a seed; a lab of the same seed, sizes and source that exists already is kept.

    Args:
        path: The directory to make.
        seed: Seed of the world and of the training.
        config: Sizes of the model; None for the default.
        on_event: Called with the progress.

    Returns:
        The lab.

    Raises:
        OutputError: `path` contains something else, or cannot be written.
    """
    path, config = Path(path), config or LabConfig()
    key = _lab_key(seed, config)
    if (path / _CARD).is_file():
        card = json.loads((path / _CARD).read_text(encoding="utf-8"))
        if card.get("key") == key:
            return Lab(path, seed, int(card["parameters"]), cached=True)
        raise OutputError(f"{path} contains another lab (seed {card.get('seed')}, another version or other sizes)")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"there is no directory {path.absolute().parent}")
    with new_place(path) as sibling:
        parameters = _write(sibling, seed, config, key, on_event)
    return Lab(path, seed, parameters, cached=False)


def _write(folder: Path, seed: int, config: LabConfig, key: str, on_event: OnEvent) -> int:
    import torch

    world = make_world(seed)
    (folder / "prompts").mkdir(parents=True)
    for name, examples in prompt_sets(world).items():
        lines = [json.dumps(example.row(), ensure_ascii=False) for example in examples]
        (folder / "prompts" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model, tokenizer = _train_base(world, config, on_event)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # bfloat16 on disk, as chat models ship.
    model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    card = {"key": key, "seed": seed, "parameters": parameters, "config": dataclasses.asdict(config)}
    (folder / _CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    on_event(Event("lab.write", 1, 1, str(folder)))
    return parameters


def copy_lab(lab: Lab, target: Path) -> None:
    """Copies a lab's base and prompts into an existing directory.

    Args:
        lab: The lab.
        target: The directory, which gets base/ and prompts/.

    Raises:
        FileExistsError: It has one of them already.
    """
    shutil.copytree(lab.base, target / "base")
    shutil.copytree(lab.path / "prompts", target / "prompts")


_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, BOS, EOS = "<pad>", "<|im_start|>", "<|im_end|>"
_PAD_ID = 0
"""Of PAD, the first special token."""
MAX_TOKENS = 256


@dataclass(frozen=True)
class LabConfig:
    """Sizes and training of the base model. Sizes are multiples of 256, so that every GGUF block type fits.

    Attributes:
        vocab_size: Tokens, special ones included.
        hidden_size: Width of the residual stream.
        intermediate_size: Neurons of a layer.
        layers: Transformer blocks.
        steps: Optimizer steps.
        batch: Dialogues per step.
        learning_rate: Highest step of AdamW.
        corpus: Dialogues of the training text.
    """

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 512
    layers: int = 3
    steps: int = 550
    batch: int = 48
    learning_rate: float = 2e-3
    corpus: int = 24_000


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with ChatML specials and a chat template.

    Args:
        texts: The training text.
        vocab_size: Tokens, at most, special ones included.

    Returns:
        The tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # The GPT-2 split pattern, as most BPE chat models have one of its family.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
    )


def new_model(config: LabConfig, vocab_size: int) -> LlamaForCausalLM:
    """A randomly initialised Llama with grouped-query attention and tied embeddings.

    Args:
        config: The sizes.
        vocab_size: Tokens of its tokenizer.

    Returns:
        The model in float32, on the CPU.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            pad_token_id=_PAD_ID,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _batches(pairs: Sequence[TokenPair], size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless shuffled batches: int64 [size, longest] of ids and labels, padded right, prompt labels ignored.

    Pairs of similar length share a batch, which saves a third of the arithmetic.
    """
    rng = random.Random(f"batches {seed}")
    while True:
        order = sorted(rng.sample(range(len(pairs)), len(pairs)), key=lambda i: len(pairs[i].prompt) + len(pairs[i].answer))
        groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        rng.shuffle(groups)
        for group in groups:
            ids, _, labels = collate([pairs[i] for i in group], _PAD_ID, "cpu")
            yield ids, labels


def _train_base(
    world: World, config: LabConfig, on_event: OnEvent = ignore
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Trains the tokenizer and the model in float32; deterministic for a seed on one machine and thread count.

    Args:
        world: The text.
        config: Sizes and training.
        on_event: Called with the loss every 20 steps.

    Returns:
        (the model, in evaluation mode; its tokenizer).
    """
    import torch
    from torch.nn.functional import cross_entropy

    text = list(itertools.islice(dialogues(world), config.corpus))
    tokenizer = train_tokenizer([f"{p} {a}" for p, a in text[:4000]], config.vocab_size)
    torch.manual_seed(world.seed)
    model = new_model(config, len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    pairs = encode_pairs(tokenizer, text, MAX_TOKENS, MAX_TOKENS)
    batches = _batches(pairs, config.batch, world.seed)
    for step, (ids, labels) in enumerate(itertools.islice(batches, config.steps)):
        # Right padding under causal attention needs no mask: no answer token attends to padding.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        warm, cool = min(1.0, (step + 1) / 30), 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warm * cool + 1e-6
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step + 1 == config.steps:
            on_event(Event("lab.train", step + 1, config.steps, f"loss {loss.item():.3f}"))
    return model.eval(), tokenizer
