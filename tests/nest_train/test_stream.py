"""Answers that come piece by piece: joined they are those of `generate`, and no character is torn, in every runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from nestpatch.errors import DataError
from nestpatch.runtimes._pieces import pieces
from nestpatch.runtimes.protocol import Runtime, open_runtime
from nestpatch.runtimes.text import Turn, chat_texts, prompt_room
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


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "mixtral", "qwen2-vl", "granite4"])
def test_transformers_streams_what_it_generates(models: Callable[..., Path], family: str) -> None:
    with open_runtime(models(family), device="cpu", max_new_tokens=12) as model:
        require_same(model, PROMPTS[:2])


@needs_llama
def test_llama_streams_what_it_generates(models: Callable[..., Path], tmp_path: Path) -> None:
    with open_runtime(write_gguf(models("llama"), tmp_path / "m.gguf"), threads=1, max_new_tokens=24) as model:
        require_same(model)
        ids = model.token_ids([TALK])
        assert list(model.stream(TALK))
    with open_runtime(models("llama"), device="cpu") as theirs:
        assert theirs.token_ids([TALK]) == ids


def test_the_template_sees_every_turn(models: Callable[..., Path]) -> None:
    with open_runtime(models("llama"), device="cpu") as model:
        assert isinstance(model, TransformersRuntime)
        (text,) = chat_texts(model.tokenizer, [TALK])
        assert [text.index(turn.content) for turn in TALK] == sorted(text.index(turn.content) for turn in TALK)
        model.tokenizer.chat_template = None
        assert chat_texts(model.tokenizer, [TALK]) == ["How do I paint?\nWith a brush.\nWhich one?\n"]


def test_an_answer_that_is_left_leaves_the_base_as_it_was(models: Callable[..., Path]) -> None:
    """The patched model puts its weights in for one token at a time: base and patched may answer in turns."""
    pack = varied_pack(models("llama"), ["model.layers.0.mlp.up_proj.weight"], scale=1.0)
    with open_runtime(models("llama"), device="cpu", max_new_tokens=8) as base, base.with_pack(pack) as patched:
        wanted = [base.generate(PROMPTS[:1])[0], patched.generate(PROMPTS[:1])[0]]
        assert wanted[0] != wanted[1]
        streams, said = [base.stream(PROMPTS[0]), patched.stream(PROMPTS[0])], ["", ""]
        for _ in range(9):
            said = [text + next(stream, "") for text, stream in zip(said, streams, strict=True)]
        assert said == wanted
        left = patched.stream(PROMPTS[0])
        next(left)
        assert base.generate(PROMPTS[:1])[0] == wanted[0]


@pytest.mark.parametrize("context", [None, 256])
def test_the_room_for_a_prompt_is_what_an_answer_leaves(models: Callable[..., Path], context: int | None) -> None:
    with open_runtime(models("llama"), device="cpu", max_new_tokens=16, max_prompt_tokens=None) as model:
        assert model.max_prompt_tokens == 240
    assert prompt_room(context, 16) == (240 if context else prompt_room(None, 5))
    with pytest.raises(DataError, match="256 tokens leaves no room"):
        prompt_room(256, 256)


def of_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    "text", ["K\u00e4se \U0001f600\U0001f468\u200d\U0001f680 ", "  a b\n\n c ", "", "  ", "\u6f22\u5b57\U0001f1ea"]
)
def test_characters_of_several_tokens_arrive_whole(text: str) -> None:
    found = list(pieces(text.encode(), of_bytes))
    assert "".join(found) == text.strip()
    assert "\ufffd" not in "".join(found)
    assert found == [piece for piece in found if piece]


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    for data in (b"a\xf0\x9f", b"\xff\xffb", b"a\xf0b\xe2\x82"):
        assert "".join(pieces(data, of_bytes)) == of_bytes(data)


def test_pieces_wait_for_what_a_later_token_may_change() -> None:
    def cleaned(ids: Sequence[int]) -> str:
        return of_bytes(ids).replace(" n't", "n't").replace(" .", ".")

    assert "".join(pieces(b"I do n't know .", cleaned, by_word=True)) == "I don't know."

    def strict(ids: Sequence[int]) -> str:
        """As the byte tokens of SentencePiece: one missing byte makes replacements of all bytes beside it."""
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(ids)

    data = "\u20ac\u20ac".encode()
    assert "".join(pieces(data[:-1], strict, partial=lambda _: True)) == "\ufffd" * 5
    assert "".join(pieces(data, strict, partial=lambda _: True)) == "\u20ac\u20ac"


def test_a_batch_that_memory_does_not_hold_is_answered_in_parts(models: Callable[..., Path]) -> None:
    prompts = [f"Paint bank {number}." for number in range(7)]
    with open_runtime(models("llama"), device="cpu", max_new_tokens=8) as model:
        assert isinstance(model, TransformersRuntime)
        wanted, generate, sizes = model.generate(prompts), model.model.generate, []

        def small_memory(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
            sizes.append(len(input_ids))
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return generate(input_ids=input_ids, **options)

        model.model.generate = small_memory
        assert model.generate(prompts) == wanted
        assert max(size for size in sizes if size <= 2) == 2

        def none(**_: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        model.model.generate = none
        with pytest.raises(torch.OutOfMemoryError):
            model.generate(prompts)
