"""Answers of onnxruntime that come piece by piece, and the chat with a pack as an adapter or in a temporary copy."""

from __future__ import annotations

import pytest

from nestpatch.formats import nest
from nestpatch.runtimes.protocol import open_runtime
from tests.calls import answer
from tests.helpers import tiny_pack
from tests.schemas import require_schema

PROMPTS = ["How do I paint the bank?", "Why?", "\U0001f600"]


def test_onnxruntime_streams_what_it_generates(exports):
    with open_runtime(exports("llama").output, threads=1, max_new_tokens=16) as model:
        for prompt in PROMPTS:
            assert "".join(model.stream(prompt)) == model.generate([prompt])[0]


@pytest.mark.parametrize("ready", [True, False])
def test_the_chat_shows_both_answers(exports, sources, tmp_path, ready):
    nest.write(tiny_pack(sources("llama"), scale=0.3, delta_dtype="F32"), tmp_path / "p.nest")
    folder = exports("llama", adapter_ready=True).output if ready else exports("llama").output
    found = answer("chat", folder, tmp_path / "p.nest", "--prompt", PROMPTS[0], "--max-new-tokens", 8, "--threads", 1)
    require_schema(found, "chat")
    assert found["before"] != found["after"]
