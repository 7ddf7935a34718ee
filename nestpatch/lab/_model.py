"""The lab's base model: a byte-level BPE tokenizer and a small Llama, trained from scratch on the world's dialogues."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nestpatch.events import Event, OnEvent, ignore
from nestpatch.lab._world import World, dialogues
from nestpatch.runtimes.text import IGNORED, TokenPair, collate, encode_pairs

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, BOS, EOS = "<pad>", "<|im_start|>", "<|im_end|>"
PAD_ID = 0
"""Of PAD, the first special token."""
MAX_TOKENS = 256


@dataclass(frozen=True)
class LabConfig:
    """Sizes and training of the base model. Sizes are multiples of 256, so that every GGUF block type fits."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 512
    layers: int = 3
    steps: int = 550
    batch: int = 48
    learning_rate: float = 2e-3
    corpus: int = 24_000


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with ChatML specials and a chat template."""
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
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
    )


def new_model(config: LabConfig, vocab_size: int) -> LlamaForCausalLM:
    """A randomly initialised Llama with grouped-query attention and tied embeddings."""
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
            pad_token_id=PAD_ID,
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
            ids, _, labels = collate([pairs[i] for i in group], PAD_ID, "cpu")
            yield ids, labels


def train_base(world: World, config: LabConfig, on_event: OnEvent = ignore) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Trains the tokenizer and the model in float32; deterministic for a seed on one machine and thread count.

    Args:
        world: The text.
        config: Sizes and training.
        on_event: Called with the loss every 20 steps.
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
