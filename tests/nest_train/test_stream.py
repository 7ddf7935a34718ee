"""Answers that come piece by piece: joined they are those of `generate`, and no character is torn, in every runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nestpatch.errors import DataError
from nestpatch.runtimes._pieces import pieces
from nestpatch.runtimes.protocol import Runtime, open_runtime
from nestpatch.runtimes.text import Turn, prompt_room
from nestpatch.runtimes.transformers import TransformersRuntime
from tests.gguf_files import needs_llama, write_gguf
from tests.varied_packs import varied_pack

PROMPTS = ["How do I paint the bank?", "Why?", "", "Tell me about the old red fence, in a few words. \U0001f600 \u00e9"]
TALK = [Turn("user", "How do I paint?"), Turn("assistant", "With a brush."), Turn("user", "Which one?")]


def require_same(model: Runtime, prompts: Sequence[str] = PROMPTS) -> None:
    """Fails unless the pieces of each prompt join to its answer."""
    for prompt in prompts:
        parts = list(model.stream(prompt))
        assert "".join(parts) == model.generate([prompt])[0], prompt
        assert all(parts), "an empty piece"
        assert list(model.stream([Turn("user", prompt)])) == parts


FAMILIES = ["llama", "gemma2", "opt", "mixtral", "qwen2-vl", "granite4", "gpt-neo"]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_streams_what_it_generates(models: Callable[..., Path], family: str) -> None:
    with open_runtime(models(family), device="cpu", max_new_tokens=12) as model:
        require_same(model, PROMPTS[:2])


@needs_llama
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_llama_streams_what_it_generates(models: Callable[..., Path], tmp_path: Path, family: str) -> None:
    with open_runtime(write_gguf(models(family), tmp_path / "m.gguf"), threads=1, max_new_tokens=24) as model:
        require_same(model)
