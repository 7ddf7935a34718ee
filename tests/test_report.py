"""The HTML page of `nestpatch report`: what it says of packs, models and evaluations, and that it says no more than they do."""

from __future__ import annotations

import dataclasses
import json
import re
from hashlib import sha256
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from nestpatch.errors import DataError, OutputError
from nestpatch.evaluation.shares import Share
from nestpatch.evaluation.suites import Suite, overlaps
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.prompts.readers import Prompt, PromptSet
from nestpatch.report.page import write_report
from nestpatch.report.structure import layers
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.verify import sign_pack
from tests.calls import refused, run
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack
from tests.report_pages import HIDDEN, hostile_pack, write_measured
from tests.test_shipped_packs import SMOLLM2


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    return write_measured(tmp_path)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """A model and a pack for it."""
    model = tiny_checkpoint(tmp_path / "model")
    nest.write(tiny_pack(model), tmp_path / "no-harm-1.0.0.nest")
    return model, tmp_path / "no-harm-1.0.0.nest"


def page_of(source: object, tmp_path: Path, **options: Any) -> str:
    """The page about something, as text without markup."""
    file = write_report(str(source), tmp_path / "report.html", **options)
    return text_of(file.read_text("utf-8"))


def text_of(html: str) -> str:
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", html)))


def test_the_page_of_the_shipped_pack_says_what_the_pack_says(tmp_path: Path) -> None:
    text = page_of(SMOLLM2, tmp_path)
    manifest = nest.read(SMOLLM2).manifest
    assert sha256(SMOLLM2.read_bytes()).hexdigest() in text
    for fact in (
        manifest.description,
        manifest.license,
        manifest.base.model_id,
        "attack success 84 % → 8 % 6 to 10 %, 46 of 598",
    ):
        assert fact in text
    for suite, share in manifest.evaluation["after"]["suites"].items():
        stored = share["attack_success" if share["kind"] == "harmful" else "refused"]
        row = rf"{re.escape(suite)} (attack success|refusals) \d+ % [^%]*% *, \d+ of \d+ {100 * stored['value']:.0f} % "
        assert re.search(row, text), suite
    assert "657 neurons in 17 layers, through 117,504 trained values" in text
    assert "refusals of look-alike prompts rose by 17.0 points" in text
    assert "nestpatch verify MODEL no-harm-1.0.0.nest" in text


def test_the_map_counts_what_the_arrays_hold(tiny: tuple[Path, Path]) -> None:
    pack = tiny_pack(tiny[0], clusters=3, neurons=10)
    found = layers(pack)
    assert len(found) == 4, "the rows of the two matrices of a layer differ here"
    assert [one.name for one in found] == ["0", "0", "1", "1"]
    for layer in found:
        delta = next(d for d in pack if f"layers.{layer.name}.mlp.{layer.matrices[0]}" in d.name)
        assert [cell.neurons for cell in layer.cells] == [sum(delta.cluster == c) for c in range(3)]
        assert layer.norm == pytest.approx(float((delta.dense() ** 2).sum()) ** 0.5, rel=1e-5)


def test_the_layers_are_in_numeric_order_and_matrices_of_the_same_rows_are_one_line() -> None:
    found = layers(nest.read(SMOLLM2))
    assert [one.name for one in found] == [str(number) for number in range(13, 30)]
    assert {one.matrices for one in found} == {("gate_proj", "up_proj")}


@pytest.mark.parametrize(
    ("signed", "trusted", "verdict"), [(True, True, "signed"), (True, False, "not trusted"), (False, True, "not signed")]
)
def test_a_signature_is_worth_what_the_policy_says(
    tiny: tuple[Path, Path], tmp_path: Path, signed: bool, trusted: bool, verdict: str
) -> None:
    acme, other = PrivateKey.generate(), PrivateKey.generate()
    policy = {"format": "nestpatch-trust/1", "keys": [{"name": "acme", "pem": (acme if trusted else other).public.pem}]}
    (tmp_path / "policy.json").write_text(json.dumps(policy), encoding="utf-8")
    if signed:
        sign_pack(tiny[1], acme)
    text = page_of(tiny[1], tmp_path, policy_file=tmp_path / "policy.json")
    assert f"Signature {verdict}" in text
    assert ("Signed by: acme" in text) is (verdict == "signed")


def test_a_wrong_signature_makes_no_page(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.nest"
    nest.write(tiny_pack(tiny[0], seed=1), other)
    sign_pack(other, PrivateKey.generate(), tiny[1].with_name(f"{tiny[1].name}.sig"))
    refused("BadSignatureError", "report", tiny[1], "-o", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_model_is_compared_with_its_ledger(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model, pack = tiny
    assert "Nothing is applied to this model" in page_of(model, tmp_path)
    apply_in_place(model, pack)
    (tmp_path / "report.html").unlink()
    text = page_of(model, tmp_path, pack=str(pack))
    assert "The rows hold what the ledger and the files name" in text
    assert "no-harm 1.0.0 In the rows yes" in text
    assert f"nestpatch verify {model} no-harm-1.0.0.nest" in text
    file, name = model / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    data, first = bytearray(file.read_bytes()), load_tensors(model)[name].tobytes()
    at = bytes(data).index(first)
    data[at : at + len(first)] = bytes(len(first))
    file.write_bytes(data)
    (tmp_path / "report.html").unlink()
    text = page_of(model, tmp_path)
    assert "The rows do not hold all" in text
    assert name in text


def test_an_evaluation_is_drawn_with_its_dose_curve(measured: Path, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    text = page_of(measured, tmp_path)
    assert "Numbers of tiny/llama with no-harm 1.0.0" in text
    assert "attack success 84 % → 8 %" in text
    assert "a note word" in text
    assert "0.5 41 % 32 to 51 3 % 1 to 8" in text
    assert "What it changes" not in text
    (tmp_path / "report.html").unlink()
    both = page_of(measured, tmp_path, pack=str(tiny[1]))
    assert "What it changes" in both
    assert "not those that the pack states" in both


def test_an_evaluation_without_neurons_and_by_category_is_shown(measured: Path, tmp_path: Path) -> None:
    page = (write_report(str(measured), tmp_path / "x.html")).read_text(encoding="utf-8")
    assert "Of 92 harmful prompts that the whole model refuses, 39 are still refused" in page
    assert "812 of 46,080 neurons were switched off" in page
    assert "without 812 random ones" in page
    assert page.count("word hazard 1") == 1
    assert "Attack success by category and strength" in page
    numbers = json.loads(measured.read_text())
    for odd in (None, 3, {}, {**numbers["ablation"], "chosen": 3}, {**numbers["ablation"], "neurons": "many"}):
        measured.write_text(json.dumps({**numbers, "ablation": odd, "dose": None}))
        assert "Without some neurons" not in write_report(str(measured), tmp_path / f"{len(str(odd))}.html").read_text()
    share = numbers["before"]["attack_success"]
    numbers["before"]["attack_success_by_category"] = {"<i>": share, "odd": [], **{str(n): {"value": 3} for n in range(99)}}
    measured.write_text(json.dumps(numbers))
    page = write_report(str(measured), tmp_path / "y.html").read_text()
    assert "&lt;i&gt;" in page
    assert "<i>" not in page


def test_an_evaluation_of_another_pack_is_refused(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"measures no-harm 1\.0\.0, and --pack gives other 1\.0\.0"):
        write_report(str(measured), tmp_path / "x.html", pack=str(other_pack(tmp_path)))


def other_pack(folder: Path) -> Path:
    nest.write(tiny_pack(tiny_checkpoint(folder / "base"), name="other"), folder / "other.nest")
    return folder / "other.nest"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"before": 3}', "[" * 100_000, "\ud800"])
def test_what_is_no_evaluation_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    result = run("report", tmp_path / "eval.json", "-o", tmp_path / "report.html")
    assert result.exit_code == 2
    assert result.stderr.startswith("DataError:")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]\n", '{"of": "model", "suite": 3}', '{"of":"patched","suite":"s"}', "x"])
def test_what_are_no_answers_is_refused(content: str, measured: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(content, encoding="utf-8")
    result = run("report", measured, "--answers", tmp_path / "bad.jsonl", "-o", tmp_path / "report.html")
    assert (result.exit_code, result.stderr.partition(":")[0]) == (2, "DataError")


def test_an_existing_file_is_kept(measured: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="exists already"):
        write_report(str(measured), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "mine"


def test_harmful_words_are_left_out_unless_asked_for(measured: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    html = write_report(str(measured), tmp_path / "redacted.html", answers=answers).read_text("utf-8")
    assert "word benign answer" in html
    assert "word harmful" not in text_of(html).replace("harmful word", "")
    assert "redacted, 4 words" in text_of(html)
    html = write_report(str(measured), tmp_path / "full.html", answers=answers, show_harmful=True).read_text("utf-8")
    assert "word harmful answer 99" not in html
    assert html.index("<details class=") < html.index("word harmful answer"), "folded away all the same"


def test_a_suite_of_unknown_kind_counts_as_harmful(measured: Path, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    html = write_report(str(tiny[1]), tmp_path / "x.html", answers=tmp_path / "answers.jsonl").read_text("utf-8")
    assert "word benign answer" not in html


@pytest.mark.parametrize(
    "odd", [None, 3, "x", [], {}, [None], {"suites": 3}, {"suites": {"x": 3}}, {"attack_success": {"value": 2}}]
)
def test_a_malformed_evaluation_in_a_pack_is_not_drawn(odd: Any, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    pack = tiny_pack(tiny[0])
    stored = {"before": odd, "after": odd, "dose": odd, "notes": odd, "seen_in_training": odd}
    method = dict.fromkeys(("data", "decisions", "recipe", "tuning", "layers"), odd)
    manifest = dataclasses.replace(pack.manifest, evaluation=stored, method=method)
    nest.write(Pack(manifest, pack.deltas), tmp_path / "odd.nest")
    assert "the pack states no numbers" in page_of(tmp_path / "odd.nest", tmp_path)


def test_the_same_page_every_time(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1764150000")
    first, second = (write_report(str(measured), tmp_path / name) for name in ("1.html", "2.html"))
    assert first.read_bytes() == second.read_bytes()


def test_a_page_names_nothing_to_load_or_to_run(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    nest.write(hostile_pack(tiny[0]), tmp_path / "hostile.nest")
    html = write_report(str(tmp_path / "hostile.nest"), tmp_path / "x.html").read_text("utf-8")
    assert not re.search(r"<(script|link|img|iframe|object|embed|base|form|image|use|foreignObject)\b", html)
    assert not re.findall(r"\s(?:src|srcset|action|data|style|on\w+)\s*=", re.sub(r">[^<]*<", "><", html))
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', html))
    assert not re.search(r"url\(|@import|@font-face", html)
    assert html.count("<style>") == 1
    assert not HIDDEN.search(html)
    assert "{{ 7 * 191 }}" in unescape(html)


def test_of_a_curve_the_answers_at_the_strength_of_the_numbers_are_shown(measured: Path, tmp_path: Path) -> None:
    line = {"suite": "benign word", "prompt": "hello", "refused": False}
    rows = [{**line, "of": "model", "answer": "of the base"}]
    rows += [{**line, "of": "patched", "strength": s, "answer": f"at {s}"} for s in (0.5, 1.0)]
    (tmp_path / "curve.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = page_of(measured, tmp_path, answers=tmp_path / "curve.jsonl")
    assert "after answered at 1.0" in text
    assert "at 0.5" not in text
    stored = json.loads(measured.read_text("utf-8"))
    measured.write_text(json.dumps({**stored, "strength": 0.8}), encoding="utf-8")
    with pytest.raises(DataError, match=r"no answers of the patched model at strength 0\.8"):
        write_report(str(measured), tmp_path / "x.html", answers=tmp_path / "curve.jsonl")


def test_an_answer_that_is_no_language_is_named(measured: Path, tmp_path: Path) -> None:
    line = {"suite": "benign word", "answer": "a b c", "refused": False, "incoherent": False}
    rows = [{**line, "of": of, "prompt": f"same {n}"} for of in ("model", "patched") for n in range(5)]
    rows += [{**line, "of": "model", "prompt": "breaks"}, {**line, "of": "patched", "prompt": "breaks", "incoherent": True}]
    (tmp_path / "broken.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = page_of(measured, tmp_path, answers=tmp_path / "broken.jsonl")
    assert "breaks before answered a b c after incoherent a b c same 0" in text


def test_the_dose_table_has_every_share_that_was_measured(measured: Path, tmp_path: Path) -> None:
    stored = json.loads(measured.read_text("utf-8"))
    stored["dose"][1]["incoherent"] = Share(33, 100).as_json()
    measured.write_text(json.dumps(stored), encoding="utf-8")
    text = page_of(measured, tmp_path)
    assert "strength attack success incoherent refusals, benign refusals, look-alike KL" in text
    assert "0.5 41 % 32 to 51 33 %" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strength": 0.5}, "tiny/llama with no-harm 1.0.0 at strength 0.5 ."),
        ({"strength": 1}, "tiny/llama with no-harm 1.0.0 ."),
        ({"strength": None, "after": None}, "tiny/llama ."),
    ],
)
def test_the_page_says_what_its_numbers_are_of(change: dict[str, Any], said: str, measured: Path, tmp_path: Path) -> None:
    stored = json.loads(measured.read_text("utf-8"))
    measured.write_text(json.dumps({**stored, **change}), encoding="utf-8")
    assert f"Numbers of {said}" in page_of(measured, tmp_path)


def test_prompts_that_notes_quote_are_left_out_unless_asked_for(measured: Path, tmp_path: Path) -> None:
    prompts = ("how to 'harm' someone", 'it\'s "harm"', "harm")
    kinds = ("harmful", "benign")
    notes = [next(overlaps([Suite(kind, PromptSet(kind, (Prompt(text),))) for kind in kinds])) for text in prompts]
    stored = json.loads(measured.read_text("utf-8"))
    measured.write_text(json.dumps({**stored, "notes": [*notes, "the model's note"]}), encoding="utf-8")
    text = page_of(measured, tmp_path)
    assert text.count("1 prompts are in both harmful and benign, as harmful and as benign; the first is (redacted) ") == 3
    assert "the model's note" in text
    (tmp_path / "report.html").unlink()
    shown = page_of(measured, tmp_path, show_harmful=True)
    assert all(note in shown for note in notes)
