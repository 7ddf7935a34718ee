import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestpatch.errors import PromptDataError
from nestpatch.nest_train._targets import Example, Examples
from nestpatch.prompts.readers import Prompt, join_sets, load_prompts, sample_set
from nestpatch.runtimes.text import IGNORED, TokenPair, collate, encode_pairs, pad_left, prompt_ids

ROWS = [{"prompt": "a, b", "reference": "x"}, {"prompt": 'say "c"', "reference": ""}, {"prompt": "ü\nd", "reference": "y"}]
PROMPTS = (Prompt("a, b", "x"), Prompt('say "c"', None), Prompt("ü\nd", "y"))


def write(folder, kind):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "reference"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_file_type_gives_the_same_set(tmp_path, kind):
    prompts = load_prompts(write(tmp_path, kind))
    assert prompts.prompts == PROMPTS
    assert prompts.name == "rows"
    assert prompts.digest == load_prompts(write(tmp_path, "jsonl")).digest


def test_other_column_names_plain_strings_and_text_files(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"instructions": ["one", "two", "one"]}')
    assert load_prompts(path).prompts == (Prompt("one"), Prompt("two"))
    path.write_text('[{"instruction": "do", "input": "this", "output": "done"}]')
    assert load_prompts(path).prompts == (Prompt("do\n\nthis", "done"),)
    text = tmp_path / "x.txt"
    text.write_text("one\n\ntwo\nthree\n")
    assert [p.text for p in load_prompts(text).prompts] == ["one", "two", "three"]


def test_slices_are_pythons(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a\nb\nc\nd\n")
    assert [p.text for p in load_prompts(f"{path}[1:3]").prompts] == ["b", "c"]
    assert [p.text for p in load_prompts(f"{path}[-1:]").prompts] == ["d"]
    assert load_prompts(f"{path}[:2]").name == "x[:2]"


def test_a_data_set_of_the_hub_is_a_source_too(tmp_path):
    """`datasets` reads a local folder by the same call as a Hub id."""
    folder = tmp_path / "some-set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    from nestpatch.prompts import readers as data

    assert [row["prompt"] for row in data.hub_rows(str(folder))] == ["a", "b"]
    with pytest.raises(PromptDataError, match="the Hub gave no data set"):
        load_prompts("nobody/nothing-here")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", b"", "contains no prompts"),
        ("x.jsonl", b'{"prompt": "a"}\n{broken\n', "line 2"),
        ("x.jsonl", b'{"prompt": ""}\n', "row 1: prompt is empty"),
        ("x.jsonl", b'{"prompt": null}\n', "row 1: prompt is empty"),
        ("x.jsonl", b'{"prompt": 5}\n', "row 1: prompt is 5"),
        ("x.jsonl", b'{"other": "a"}\n', "no column prompt"),
        ("x.jsonl", b"[1]\n", "row 1: expected an object, found list"),
        ("x.jsonl", b"\xff\xfe\n", "cannot read"),
        ("x.json", b'{"a": 1}', "expected a list of prompts, found dict"),
        ("x.csv", b"prompt\n", "contains no prompts"),
        ("x.csv", b'goal\nok\n"', "cannot read"),
        ("x.parquet", b"PAR1", "cannot read"),
        ("x.doc", b"hello", "is not a prompt file"),
    ],
)
def test_malformed_files_are_named_with_the_place(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptDataError, match=says) as caught:
        load_prompts(path)
    assert caught.value.advice


def test_a_hub_that_cannot_be_reached_is_reported_at_once(monkeypatch):
    """`datasets` would retry for half a minute, with a warning for each attempt."""
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")

    def refused(*_, **__):
        raise OSError("connection refused")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.HfApi, "dataset_info", refused)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked without a connection"))
    with pytest.raises(PromptDataError, match="the Hub gave no data set: connection refused"):
        load_prompts("acme/no-such-set")


def test_a_missing_file_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(PromptDataError, match="there is no prompt file"):
        load_prompts(tmp_path / "none.jsonl")


def test_joining_drops_duplicates_and_sampling_keeps_order(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("\n".join(f"p{i}" for i in range(50)))
    whole = load_prompts(path)
    assert len(join_sets([whole, load_prompts(f"{path}[:10]")]).prompts) == 50
    few = sample_set(whole, 10, seed=3)
    assert len(few.prompts) == 10
    assert few == sample_set(whole, 10, seed=3)
    assert few != sample_set(whole, 10, seed=4)
    numbers = [int(p.text[1:]) for p in few.prompts]
    assert numbers == sorted(numbers)


def test_labels_cover_the_answer_and_its_end_token_only(tokenizer):
    (pair,) = encode_pairs(tokenizer, [("Hello?", "To paint.")], 64, 64)
    assert pair.answer[-1] == tokenizer.eos_token_id
    ids, mask, labels = collate([pair, TokenPair((5,), (6,))], tokenizer.pad_token_id, "cpu")
    answer = labels[0][labels[0] != IGNORED]
    assert answer.tolist() == list(pair.answer)
    assert ids[0].tolist() == list(pair.prompt + pair.answer)
    assert ids[1, :2].tolist() == [5, 6]
    assert mask[1].sum() == 2
    assert (labels[1, 2:] == IGNORED).all()
    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n")


def test_long_prompts_keep_their_end_and_long_answers_their_begin(tokenizer):
    full = prompt_ids(tokenizer, ["word " * 50], 1000)[0]
    assert prompt_ids(tokenizer, ["word " * 50], 9)[0] == full[-9:]
    (pair,) = encode_pairs(tokenizer, [("a", "To paint a fence")], 64, 3)
    assert len(pair.answer) == 3
    assert tokenizer.eos_token_id not in pair.answer


def test_left_padding_ends_all_prompts_together():
    ids, mask = pad_left([[1, 2, 3], [4]], 0)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def examples(count, name):
    return tuple(Example(f"{name} {i}", TokenPair((i,), (0,))) for i in range(count))


@given(
    st.integers(2, 60), st.integers(2, 60), st.integers(0, 60).filter(lambda n: n != 1), st.floats(0.02, 0.5), st.integers(0, 5)
)
def test_split_off_is_a_partition_of_each_kind(harmful, benign, lookalike, share, seed):
    data = Examples(examples(harmful, "h"), examples(benign, "b"), examples(lookalike, "l"))
    kept, held = data.split_off(share, random.Random(seed))
    for kind in ("harmful", "benign", "lookalike"):
        both = getattr(kept, kind) + getattr(held, kind)
        assert sorted(example.text for example in both) == sorted(example.text for example in getattr(data, kind))
        assert bool(getattr(kept, kind)) == bool(getattr(held, kind)) == bool(both)


def test_one_prompt_cannot_be_split():
    with pytest.raises(PromptDataError, match="too few"):
        Examples(examples(1, "h"), examples(5, "b")).split_off(0.1, random.Random(0))
