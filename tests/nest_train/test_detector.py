"""The stage detector, from the hidden states of a tiny model to the pack, and in both runtimes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nestpatch import Label, load_suite, train
from nestpatch.detector import Detector
from nestpatch.errors import RecipeError
from nestpatch.evaluation.detection import area_under_roc, score_prompts
from nestpatch.formats import nest
from nestpatch.nest_train._detector import candidates, conformal_threshold, fit_detector, standard_error
from nestpatch.nest_train.recipe import Recipe, make_recipe
from nestpatch.runtimes.transformers import TransformersRuntime
from tests.nest_train.quick import QUICK, write_prompts

DETECTING = dataclasses.replace(QUICK, detector=True)


def test_few_layers_are_tried_and_never_the_last() -> None:
    assert candidates(1) == []
    assert [layer for layer, pooling in candidates(2) if pooling == "last"] == [0]
    layers = [layer for layer, pooling in candidates(61) if pooling == "max"]
    assert (layers[0], layers[-1], len(layers), len(set(layers))) == (0, 59, 16, 16)


def test_the_threshold_keeps_its_promise_on_new_prompts() -> None:
    """Over many calibrations, the mean share of new prompts above it is at most the stated one, and not far below."""
    random = np.random.default_rng(0)
    shares = [(random.standard_normal(200) > conformal_threshold(random.standard_normal(60), 0.1)).mean() for _ in range(2000)]
    assert 0.09 < float(np.mean(shares)) <= 0.1
    assert conformal_threshold(np.array([3.0, 1.0]), 0.05) == 3.0


def test_the_standard_error_is_that_of_many_samples() -> None:
    random = np.random.default_rng(0)
    areas = [area_under_roc(random.standard_normal(40) + 1.5, random.standard_normal(80)) for _ in range(2000)]
    assert standard_error(float(np.mean(areas)), 40, 80) == pytest.approx(float(np.std(areas)), rel=0.15)


def states_of(signal: dict[int, float], harmful: np.ndarray, places: list[tuple[int, str]]):
    """Random states that tell the prompts apart by some standard deviations in some layers."""

    def states(number: int) -> np.ndarray:
        random = np.random.default_rng(number)
        values = random.standard_normal((len(harmful), 6)).astype(np.float32)
        values[:, 2] += np.float32(signal.get(places[number][0], 0)) * harmful
        return 5 * values + 3

    return states


@pytest.mark.parametrize(
    ("signal", "first", "layer"),
    [({2: 3.0, 6: 3.2}, 4, 2), ({2: 1.0, 6: 4.0}, 4, 6), ({2: 1.0, 6: 4.0}, 0, 6)],
    ids=["as good below", "worse below", "all are patched"],
)
def test_a_layer_below_the_patched_ones_is_preferred(signal: dict[int, float], first: int, layer: int) -> None:
    harmful = np.arange(400) < 160
    places = [(number, "last") for number in range(8)]
    detector, reason = fit_detector(places, states_of(signal, harmful, places), harmful, first, Recipe())
    assert detector.facts.layer == layer
    assert ("below the patched layers" in reason) == (layer < first)
    assert detector.facts.auc > 0.95
    assert detector.facts.harmful + detector.facts.harmless == 50
    # The weight is for states as they are, not for standardised ones.
    scores = detector.scores(states_of(signal, harmful, places)(layer))
    fired = scores > detector.facts.threshold
    assert fired[harmful].mean() > 0.8
    assert fired[~harmful].mean() < 0.15


@pytest.fixture(scope="module")
def trained(models, data, tmp_path_factory):
    folder = write_prompts(tmp_path_factory.mktemp("suites"), 40)
    suites = [load_suite(f"{kind}={folder / f'{kind}-test.jsonl'}") for kind in ("harmful", "benign", "lookalike")]
    return models("llama"), train(models("llama"), data, Label("x"), recipe=DETECTING, suites=suites), data


def test_a_pack_gets_a_detector(trained) -> None:
    model, result, data = trained
    pack = nest.decode(nest.encode(result.pack))
    assert pack.format == "nest/2"
    assert isinstance(pack.detector, Detector)
    assert pack.detector.weight.shape == (32,)
    assert pack.detector.facts.auc > 0.9
    assert pack.manifest.evaluation["detector"]["detection"]["total"] == 6
    assert "detector" in pack.manifest.method["decisions"]
    runtime = TransformersRuntime.load(model, device="cpu", dtype="float32", max_prompt_tokens=256)
    bad = score_prompts(runtime, pack.detector, [p.text for p in data.harmful.prompts])
    good = score_prompts(runtime, pack.detector, [p.text for p in data.harmless])
    assert (bad > pack.detector.facts.threshold).mean() > (good > pack.detector.facts.threshold).mean() + 0.5


def test_without_the_setting_the_pack_has_the_bytes_as_ever(trained, models, data) -> None:
    """Everything but the detector and the settings is the same."""
    _, result, _ = trained
    plain = train(models("llama"), data, Label("x"), recipe=QUICK).pack
    assert plain.format == "nest/1"
    assert [d.delta.tobytes() for d in plain] == [d.delta.tobytes() for d in result.pack]


def test_an_interrupted_training_finds_its_detector_again(models, data, tmp_path, monkeypatch) -> None:
    first = train(models("llama"), data, Label("x"), recipe=DETECTING, run_dir=tmp_path / "run")
    notes: list[str] = []
    monkeypatch.setattr("nestpatch.nest_train._detector.fit_detector", None)  # a second fit would fail

    def again(recipe: Recipe):
        return train(models("llama"), data, Label("x"), recipe=recipe, run_dir=tmp_path / "run", on_event=listen)

    def listen(event) -> None:
        notes.append(event.note)

    assert nest.encode(again(DETECTING).pack) == nest.encode(first.pack)
    assert "reused: detector" in notes
    row = (tmp_path / "run" / "detector.jsonl").read_text(encoding="utf-8")
    (tmp_path / "run" / "detector.jsonl").write_text(row.replace('"layer":0', '"layer":-1'), encoding="utf-8")
    with pytest.raises(TypeError):
        again(DETECTING)
    assert any("detector of an earlier training not reused, the file is damaged" in note for note in notes)


def test_the_setting_is_read_from_texts_and_files(tmp_path) -> None:
    (tmp_path / "r.toml").write_text("detector = true\ndetector_false_positives = 0.1\n", encoding="utf-8")
    assert make_recipe(tmp_path / "r.toml").detector is True
    assert make_recipe(None, ["detector=false"], {"detector": True}).detector is False
    with pytest.raises(RecipeError, match="detector must be bool, got 'maybe'"):
        make_recipe(None, ["detector=maybe"])
