"""In which arithmetic a model is computed, and why."""

from __future__ import annotations

import pytest

from nestpatch.runtimes import devices as module
from nestpatch.runtimes.devices import pick_dtype

LARGE = 200_000_000


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the processor gains by bfloat16; emptied by the question for it."""
    left = [4.0]
    monkeypatch.setattr(module, "_bfloat16_gain", left.pop)
    return left


def test_what_is_asked_for_is_taken(gain: list[float]) -> None:
    assert pick_dtype("float16", "cpu", LARGE) == ("float16", "asked for")
    assert pick_dtype("float32", "cuda", LARGE) == ("float32", "asked for")
    assert gain, "the processor was not asked"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_accelerators_compute_in_bfloat16(gain: list[float], device: str) -> None:
    assert pick_dtype("auto", device)[0] == "bfloat16"
    assert gain


@pytest.mark.parametrize("nbytes", [0, 1_000_000])
def test_small_models_and_those_of_unknown_size_stay_exact(gain: list[float], nbytes: int) -> None:
    assert pick_dtype("auto", "cpu", nbytes)[0] == "float32"
    assert gain


@pytest.mark.parametrize(("times", "wanted"), [(4.0, "bfloat16"), (1.5, "bfloat16"), (1.4, "float32"), (0.3, "float32")])
def test_a_large_model_is_computed_in_what_is_faster(gain: list[float], times: float, wanted: str) -> None:
    gain[:] = [times]
    dtype, reason = pick_dtype("auto", "cpu", LARGE)
    assert (dtype, gain) == (wanted, [])
    assert "1.5 times as fast" in reason
    assert f"{times:g} times" not in reason or times == 1.5, "a measured number would change the bytes of a pack"


def test_the_gain_is_measured() -> None:
    assert 0.001 < module._bfloat16_gain() < 1000
