"""The HTML page of `nestpatch report`: what it says of packs, models and evaluations, and that it says no more than they do."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from hashlib import sha256
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from nestpatch.errors import DataError, OutputError
from nestpatch.evaluation.answers import write_answers
from nestpatch.evaluation.dose import Dose, DosePoint, dose_json
from nestpatch.evaluation.judges import Verdict
from nestpatch.evaluation.shares import Share
from nestpatch.evaluation.suites import Evaluation, JudgedAnswer, Scores, SuiteResult
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.report.page import write_report
from nestpatch.report.structure import layers
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.verify import sign_pack
from tests.browser import CHROMIUM, WHY_NOT, Browser, started
from tests.calls import refused, run
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack
from tests.test_shipped_packs import SMOLLM2

HOSTILE = (
    "<script>alert(1)</script>",
    "</style></title></desc><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "javascript:alert(4)",
    "{{ 7 * 191 }}{% raw %}",
    "\u202eevil\u2066 \x1b[2J \u200b]]>",
    "<!-- --><svg onload=alert(5)>",
)
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")
DOSE = Dose(
    tuple(
        DosePoint(strength, Share(attack, 100), Share(benign, 100), Share(2 * benign, 100), kl_to_base=drift)
        for strength, attack, benign, drift in ((0.0, 84, 2, None), (0.5, 41, 3, 0.02), (1.0, 8, 7, 0.06), (1.5, 2, 20, 0.2))
    )
)


def answers_of(suite: str, kind: str, refused: int, total: int, words: str = "word") -> SuiteResult:
    verdicts = [Verdict.REFUSED if number < refused else Verdict.COMPLIED for number in range(total)]
    said = [
        JudgedAnswer(f"{words} {kind} prompt {n}", f"{words} {kind} answer {n}", one is Verdict.REFUSED, None, False, (one,))
        for n, one in enumerate(verdicts)
    ]
    return SuiteResult(suite, kind, "0" * 64, tuple(said))


def evaluation(words: str = "word") -> Evaluation:
    def scores(attacks: int, benign: int, drift: float | None) -> Scores:
        names = (f"harmful {words}", f"benign {words}", f"lookalike {words}")
        kinds, counts = ("harmful", "benign", "lookalike"), (100 - attacks, benign, 2 * benign)
        suites = [answers_of(name, kind, many, 100, words) for name, kind, many in zip(names, kinds, counts, strict=True)]
        return Scores(tuple(suites), drift)

    return Evaluation(scores(84, 2, None), scores(8, 7, 0.0642), (f"a note {words}",))


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """What `eval --json` printed, with a dose curve; beside it the answers."""
    result = evaluation()
    value = {"model": "tiny/llama", "pack": "no-harm 1.0.0", "adapter": None, **result.as_json(), **dose_json(DOSE)}
    (tmp_path / "eval.json").write_text(json.dumps(value), encoding="utf-8")
    write_answers(result, tmp_path / "answers.jsonl")
    return tmp_path / "eval.json"


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """A model and a pack for it."""
    model = tiny_checkpoint(tmp_path / "model")
    nest.write(tiny_pack(model), tmp_path / "no-harm-1.0.0.nest")
    return model, tmp_path / "no-harm-1.0.0.nest"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(WHY_NOT)
    pytest.importorskip("playwright")
    with started() as process:
        yield process


def page_of(source: object, tmp_path: Path, **options: Any) -> str:
    """The page about something, as text without markup."""
    file = write_report(str(source), tmp_path / "report.html", **options)
    return text_of(file.read_text("utf-8"))


def text_of(html: str) -> str:
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", html)))


def hostile_pack(model: Path) -> Pack:
    """A pack that says hostile things wherever the format has room for them."""
    words = " ".join(HOSTILE)
    numbers = evaluation(words)
    pack = tiny_pack(model)
    changes: dict[str, Any] = {
        "description": words,
        "license": words,
        "tags": HOSTILE,
        "base": dataclasses.replace(pack.manifest.base, model_id=words, revision=words, architecture=words, dtype=words),
        "method": {
            "data": {words: {"name": words, "prompts": words, "sha256": words}},
            "decisions": {words: words},
            "recipe": words,
            words: HOSTILE[0],
        },
        "evaluation": {
            "before": numbers.model.as_json(),
            "after": numbers.patched.as_json() if numbers.patched else None,
            "seen_in_training": {words: 3},
            "notes": [words],
            "dose": DOSE.as_json(),
            "recommended": {"strength": 1.0, "reason": words},
        },
    }
    return Pack(dataclasses.replace(pack.manifest, **changes), pack.deltas)


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


def test_hostile_text_does_nothing_in_a_browser(browser: Browser, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = tiny
    words = " ".join(HOSTILE)
    nest.write(hostile_pack(model), tmp_path / "hostile.nest")
    write_answers(evaluation(words), tmp_path / "answers.jsonl")
    file = write_report(
        str(tmp_path / "hostile.nest"), tmp_path / "x.html", answers=tmp_path / "answers.jsonl", show_harmful=True
    )
    with browser.open(file, width=390) as opened:
        opened.unfold()
        assert opened.messages == []
        assert opened.requests == [file.as_uri()]
        assert opened.page.locator("script, img, iframe, [onload], [onerror]").count() == 0
        assert opened.page.locator("style").count() == 1
        assert opened.page.locator(".lead").first.inner_text() == words_shown(words)
        assert opened.page.locator("blockquote").count() > 10
        assert opened.overflow() <= 0


def words_shown(words: str) -> str:
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), words)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_is_readable_and_asks_for_nothing(
    browser: Browser, measured: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    evaluated = write_report(str(measured), tmp_path / "e.html", answers=tmp_path / "answers.jsonl")
    for file in (write_report(str(SMOLLM2), tmp_path / "p.html"), evaluated):
        with browser.open(file, width=width, scheme=scheme) as opened:
            opened.unfold()
            assert opened.messages == []
            assert opened.requests == [file.as_uri()]
            assert opened.overflow() <= 0
            texts = opened.contrasts()
            assert len(texts) > 100
            assert [one for one in texts if one[0] < one[1]] == []


def test_the_keyboard_reaches_everything_in_order(browser: Browser, measured: Path, tmp_path: Path) -> None:
    file = write_report(str(measured), tmp_path / "e.html", answers=tmp_path / "answers.jsonl")
    with browser.open(file) as opened:
        order = "a[href], summary, [tabindex='0']"
        shown = "(all) => all.filter((one) => one.checkVisibility()).map((one) => one.textContent.trim().slice(0, 40))"
        expected = opened.page.locator(order).evaluate_all(shown)
        reached = [opened.tab() for _ in expected]
        assert [text for _, text, _ in reached] == expected
        assert all(seen for _, _, seen in reached)
        assert reached[0][1] == "Skip to the report"


def test_charts_speak(browser: Browser, measured: Path, tmp_path: Path) -> None:
    """Each has a name and a description of its own, and a table beside it has its numbers."""
    words = "(all) => all.map((id) => document.getElementById(id).textContent)"
    with browser.open(write_report(str(measured), tmp_path / "e.html")) as opened:
        charts = [one.get_attribute("aria-labelledby").split() for one in opened.page.locator("svg[role=img]").all()]
        assert len(charts) == 4 + 3 + 2
        assert len({name for ids in charts for name in ids}) == 2 * len(charts)
        said = [opened.page.evaluate(words, ids) for ids in charts]
        assert ["attack_success: attack success", "before 84.0%, 75.6% to 89.9%; after 8.0%, 4.1% to 15.0%"] in said
        assert opened.page.locator("table").count() == 2


def test_bars_and_whiskers_are_as_long_as_their_numbers(browser: Browser, measured: Path, tmp_path: Path) -> None:
    """Of attack success: 84 % before, 8 % after with 4.1 to 15 %."""
    with browser.open(write_report(str(measured), tmp_path / "e.html")) as opened:
        chart = opened.page.locator("svg.bars").first
        before, after = (chart.locator(f".serie-{n} rect.rect").bounding_box() for n in (0, 1))
        assert before["y"] < after["y"]
        assert before["width"] / after["width"] == pytest.approx(84 / 8, rel=0.05)
        whisker = chart.locator(".plot.overlay .serie-1 .ci path").evaluate("(p) => { const b = p.getBBox(); return b.width; }")
        bar = chart.locator(".serie-1 rect.rect").evaluate("(p) => p.getBBox().width")
        assert whisker / bar == pytest.approx((15.0 - 4.11) / 8, rel=0.02)


def test_paper_shows_what_is_folded_but_not_what_is_harmful(browser: Browser, measured: Path, tmp_path: Path) -> None:
    file = write_report(str(measured), tmp_path / "e.html", answers=tmp_path / "answers.jsonl", show_harmful=True)
    with browser.open(file, media="print", scheme="dark") as opened:
        assert not opened.page.locator("nav").is_visible()
        assert opened.page.locator("#measured details table").is_visible()
        assert not opened.page.locator("details.harmful blockquote").first.is_visible()
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 247)"
        assert len(opened.page.pdf()) > 10_000
