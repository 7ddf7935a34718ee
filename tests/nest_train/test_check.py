"""Checking a GGUF file by running it: sound files agree with their model, and every kind of fault is seen."""

from __future__ import annotations

import shutil

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from nestpatch.errors import BaseMismatchError, CheckpointFormatError
from nestpatch.evaluation.parity import EXACT, EXACT_GEMMA, _bound, check_gguf
from nestpatch.export.adapters import export_gguf_lora
from nestpatch.patcher.apply import apply
from tests import gguf_files
from tests.gguf_files import needs_llama, write_gguf
from tests.helpers import load_tensors
from tests.schemas import require_part
from tests.varied_packs import varied_pack

pytestmark = needs_llama

UP = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma2", "phi3", "mixtral", "qwen3-moe"])
def test_float32_files_agree(models, tmp_path, family):
    base = models(family)
    check = check_gguf(write_gguf(base, tmp_path / "m.gguf"), base)
    assert check.passed
    assert check.bound == (EXACT_GEMMA if family == "gemma2" else EXACT)
    assert check.types == ("F32",)
    assert check.same_ids.count == check.same_ids.total >= 20
    assert check.largest <= check.bound
    assert check.top1.value > 0.99
    require_part(check.as_json(), "Check")
    assert check.as_json()["passed"] is True


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16")])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "mixtral"])
def test_files_of_half_precision_agree_within_what_rounding_explains(models, tmp_path, family, kind, dtype):
    base = models(family, dtype)
    check = check_gguf(write_gguf(base, tmp_path / "m.gguf", kind), base)
    assert check.passed
    assert kind in check.types
    assert check.mixture == (family == "mixtral")
    assert 1e-4 < (check.typical if check.mixture else check.largest) < check.bound


def test_quantized_files_are_told_and_not_judged(models, tmp_path):
    base = models("llama")
    check = check_gguf(write_gguf(base, tmp_path / "m.gguf", "Q8_0"), base)
    assert check.bound is None
    assert check.passed
    assert "Q8_0" in check.types
    assert 1e-3 < check.largest < check.deviation


def test_one_changed_row_is_seen(models, tmp_path):
    base = models("llama")
    other = shutil.copytree(base, tmp_path / "other")
    tensors = {name: values.copy() for name, values in load_tensors(base).items()}
    tensors[UP[1]][5] *= 1.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    check = check_gguf(write_gguf(other, tmp_path / "m.gguf"), base)
    assert not check.passed
    assert check.largest > EXACT
    assert abs(check.place.gguf - check.place.reference) == pytest.approx(check.largest, rel=1e-3)
    assert check.same_ids.count == check.same_ids.total


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_rows_in_the_wrong_order_are_seen_in_every_float_type(models, tmp_path, monkeypatch, family, kind):
    """The classical fault of an exporter: rotary halves left as they are."""
    base = models(family)
    monkeypatch.setattr(gguf_files, "_permute", lambda values, heads: values)
    assert not check_gguf(write_gguf(base, tmp_path / "m.gguf", kind), base).passed


def test_weights_that_are_no_numbers_are_seen(models, tmp_path):
    base = models("llama")
    other = shutil.copytree(base, tmp_path / "other")
    tensors = {name: values.copy() for name, values in load_tensors(base).items()}
    tensors[UP[0]][0, 0] = np.nan
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    check = check_gguf(write_gguf(other, tmp_path / "m.gguf"), base)
    assert check.largest == np.inf
    assert not check.passed
    assert check.as_json()["largest_difference"] is None


def test_another_tokenizer_is_seen(models, tmp_path, monkeypatch):
    base, plain = models("llama"), gguf.GGUFWriter.add_add_bos_token
    monkeypatch.setattr(gguf.GGUFWriter, "add_add_bos_token", lambda self, _: plain(self, True))
    check = check_gguf(write_gguf(base, tmp_path / "m.gguf"), base)
    assert not check.passed
    assert check.same_ids.count < check.same_ids.total
    assert check.first_text is not None
    assert check.largest <= EXACT, "the logits are compared for the same ids"


def test_another_chat_template_is_seen(models, tmp_path):
    base = models("llama")
    other = shutil.copytree(base, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("assistant", "helper"), encoding="utf-8")
    check = check_gguf(write_gguf(other, tmp_path / "m.gguf"), base)
    assert not check.passed
    assert "assistant" in (check.first_text or "")


def test_a_file_of_another_vocabulary_is_refused(models, tmp_path):
    base = models("llama")
    other = shutil.copytree(base, tmp_path / "other")
    tensors = {name: v[:-5].copy() if len(v) == 320 else v.copy() for name, v in load_tensors(base).items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    config = (other / "config.json").read_text(encoding="utf-8").replace('"vocab_size": 320', '"vocab_size": 315')
    (other / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(CheckpointFormatError, match="315 tokens, its model 320"):
        check_gguf(write_gguf(other, tmp_path / "m.gguf"), base)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_patched_file_is_checked_against_the_patched_model(models, tmp_path, strength):
    base = models("llama", "bfloat16")
    pack = varied_pack(base, UP)
    apply(base, pack, tmp_path / "merged", strength=strength)
    file = write_gguf(tmp_path / "merged", tmp_path / "m.gguf")
    assert not check_gguf(file, base).passed
    assert check_gguf(file, base, pack=pack, strength=strength).passed
    assert check_gguf(file, tmp_path / "merged").passed
    with pytest.raises(BaseMismatchError):
        check_gguf(file, models("llama"), pack=varied_pack(models("qwen2"), UP))


def test_a_patched_mixture_is_checked_against_the_patched_model(models, tmp_path):
    base = models("mixtral")
    pack = varied_pack(base, ["model.layers.1.block_sparse_moe.experts.2.w1.weight"], scale=3.0)
    apply(base, pack, tmp_path / "merged")
    file = write_gguf(tmp_path / "merged", tmp_path / "m.gguf")
    assert check_gguf(file, base, pack=pack).passed


def test_an_adapter_is_checked_against_the_sum_that_it_computes(models, tmp_path):
    """bfloat16 on disk: a merged file is rounded, an adapter is not."""
    base = models("llama", "bfloat16")
    pack = varied_pack(base, UP)
    export_gguf_lora(pack, tmp_path / "lora.gguf", strength=0.5)
    file = write_gguf(base, tmp_path / "m.gguf")
    assert check_gguf(file, base, pack=pack, strength=0.5, lora=tmp_path / "lora.gguf").passed
    assert not check_gguf(file, base, lora=tmp_path / "lora.gguf").passed


def test_progress_is_told(models, tmp_path):
    base, events = models("llama"), []
    check_gguf(write_gguf(base, tmp_path / "m.gguf"), base, texts=["one", "two"], on_event=events.append)
    assert events[-1].done == events[-1].total > 2


def test_bounds_follow_the_loosest_type():
    assert _bound(["F32"], "llama", 2.0) == EXACT
    assert _bound(["F32"], "gemma3", 2.0) == EXACT_GEMMA
    assert _bound(["F16", "F32"], "llama", 2.0) < _bound(["BF16", "F16"], "llama", 2.0)
    assert _bound(["F32", "Q4_K"], "llama", 2.0) is None
