"""Runs GGUF files in llama.cpp, as the tests need it: exact key-value cache, one thread, no log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.gguf_files import silence_llama


@contextmanager
def loaded(path: Path, context: int = 256) -> Iterator[Any]:
    """A llama_cpp.Llama for a file."""
    import llama_cpp
    from llama_cpp import llama_cpp as low

    defaults = low.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        # Repacked weights are for speed, and use instructions (AMX) that some virtual machines announce and forbid.
        params.use_extra_bufts = False
        return params

    low.llama_model_default_params = plain
    silence_llama()
    try:
        model = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=context, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1,
            type_k=0, type_v=0,
        )  # fmt: skip
    finally:
        low.llama_model_default_params = defaults
    try:
        yield model
    finally:
        model.close()


def logits(model: Any, ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocabulary]."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)], np.float32)


def reference_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """The same in transformers, float32, eager attention."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return found


def token_ids(model: Any, text: str, *, framed: bool) -> list[int]:
    """llama.cpp's token ids; special tokens in the text count as such, as in transformers."""
    return list(model.tokenize(text.encode(), add_bos=framed, special=True))
