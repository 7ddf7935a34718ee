"""The .nest file: one pack, one sequence of bytes, in a form that any safetensors reader opens."""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from nestpatch.delta import TensorDelta
from nestpatch.errors import OutputError, PackContentError, PackError
from nestpatch.files.atomic import new_place
from nestpatch.formats import nest
from nestpatch.formats.manifest import canonical_json, manifest_json, parse_manifest
from nestpatch.pack import BaseIdentity, Manifest, Pack, TensorIdentity
from tests.attacks import tools
from tests.helpers import DTYPES, FLOATS, PROPERTY, changed, tiny_checkpoint, tiny_pack, tree_digest

GOLDEN = "7e570c003a34a6f163597827b8eba754abb1f2407de1db4471c9325e53e9427b"
GOLDEN_LOW_RANK = "41f3924bcbfba0405c2c472b0b5658e28e092d384f8377b2f21411c3b25133ee"
GOLDEN_2 = "9b95dfe047e99b5370cb5671afa83904218e50a5064d91191f60336ecc5be42b"
BLOCKS = {"Q8_0": 32, "Q4_1": 32, "Q4_K": 256}
"""Some quantized types of bases, with the elements of a block."""


def fixed_pack() -> Pack:
    """Two tensors in every dtype of the format, from plain numbers: no random generator can change it."""
    small = TensorDelta(
        "a.weight",
        delta=np.arange(6, dtype=np.float32).reshape(2, 3),
        rows=np.array([0, 3, 9], np.int32),
        cluster=np.array([1, 0, 1], np.uint8),
        sketch=np.arange(12, dtype=np.float16).reshape(3, 4),
    )
    stacked = TensorDelta(
        "b.experts",
        delta=np.array([[0.5, -0.25]], DTYPES["BF16"]),
        rows=np.array([5], np.int64),
        cluster=np.array([0], np.uint16),
        sketch=np.ones((1, 4), np.float16),
    )
    identities = {
        "a.weight": TensorIdentity((10, 3), "F32", "0" * 64, "1" * 64),
        "b.experts": TensorIdentity((2, 4, 2), "BF16", "2" * 64, "3" * 64),
    }
    manifest = Manifest(
        name="golden",
        version="1.2.3-rc.1",
        description='Größe "1/2"\n',
        license="MIT",
        created="2026-11-23T12:00:00Z",
        base=BaseIdentity("tiny/golden", "", "LlamaForCausalLM", "F32", identities),
        result={"a.weight": "4" * 64, "b.experts": "5" * 64},
        tags=("z", "a"),
        supersedes=("6" * 64,),
        method={"nested": {"b": [1, 2.5, None, True], "a": -0.0}},
        evaluation={},
    )
    return Pack(manifest, (small, stacked))


def fixed_quantized_pack() -> Pack:
    """The same beside a matrix that is stored quantized."""
    blocks = TensorDelta(
        "c.weight",
        delta=np.arange(64, dtype=np.float32).reshape(2, 32),
        rows=np.array([1, 2], np.int32),
        cluster=np.array([1, 0], np.uint8),
        sketch=np.arange(8, dtype=np.float16).reshape(2, 4),
    )
    pack = fixed_pack()
    base, result = pack.manifest.base, {**pack.manifest.result, "c.weight": "8" * 64}
    tensors = {**base.tensors, "c.weight": TensorIdentity((4, 32), "Q4_1", "6" * 64, "7" * 64)}
    manifest = replace(pack.manifest, base=replace(base, dtype="F32/Q4_1", tensors=tensors), result=result)
    return Pack(manifest, (*pack.deltas, blocks))


def fixed_low_rank_pack() -> Pack:
    """The first of its tensors with factors in place of clusters."""
    pack = fixed_pack()
    factors = np.array([[0.5, -2], [0, 1], [3, 0]], np.float16)
    return replace(pack, deltas=(replace(pack.deltas[0], cluster=None, factors=factors), *pack.deltas[1:]))


def assert_same_pack(got: Pack, want: Pack) -> None:
    assert got.manifest == want.manifest
    assert [d.name for d in got] == [d.name for d in want]
    for ours, theirs in zip(got, want, strict=True):
        assert nest.parts(ours).keys() == nest.parts(theirs).keys()
        for part in nest.parts(ours):
            a, b = getattr(ours, part), getattr(theirs, part)
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), part


NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,6}(\.[A-Za-z0-9_-]{1,6}){0,3}", fullmatch=True).filter(lambda name: name[0] != "-")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
DIGESTS = st.integers(0, 2**256 - 1).map(lambda number: f"{number:064x}")


@st.composite
def tensors(draw: st.DrawFn, name: str) -> tuple[TensorDelta, TensorIdentity]:
    """One tensor's change and identity, of any legal shape and dtype."""
    stored = draw(st.sampled_from([*FLOATS, *BLOCKS]))
    clusters, width = draw(st.integers(1, 3)), BLOCKS.get(stored) or draw(st.integers(1, 5))
    rows = sorted(draw(st.sets(st.integers(0, 40), min_size=clusters, max_size=8)))
    # Every vector is used at least once, in any order.
    cluster = np.array(draw(st.permutations([number % clusters for number in range(len(rows))])))
    if draw(st.booleans()):
        kind = {"cluster": cluster.astype(draw(st.sampled_from([np.uint8, np.uint16])))}
    else:
        some = np.array(draw(st.lists(st.sampled_from([-2, -0.5, 0, 0, 1, 3]), min_size=clusters, max_size=clusters)))
        one = np.arange(clusters) == cluster[:, None]
        kind = {"factors": np.where(one, 1, some).astype(DTYPES[draw(st.sampled_from(FLOATS))])}
    dtype = draw(st.sampled_from(FLOATS))
    value = st.floats(-4, 4, width=16)
    delta = np.resize([draw(value) for _ in range(min(5, width) * clusters)], (clusters, width))
    sketch = [[draw(value) for _ in range(4)] for _ in rows]
    change = TensorDelta(
        name,
        delta=delta.astype(DTYPES[dtype]),
        rows=np.array(rows, draw(st.sampled_from([np.int32, np.int64]))),
        sketch=np.array(sketch, np.float16),
        **kind,
    )
    shape = draw(st.sampled_from([(41, width), (1, 41, width), (6, 7, width)]))
    return change, TensorIdentity(shape, stored, draw(DIGESTS), draw(DIGESTS))


@st.composite
def packs(draw: st.DrawFn) -> Pack:
    made = [draw(tensors(name)) for name in sorted(draw(st.sets(NAMES, min_size=1, max_size=3)))]
    names = [change.name for change, _ in made]
    manifest = Manifest(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        version=draw(st.sampled_from(["0.0.0", "1.2.3", "1.0.0-rc.1", "1.0.0+build.5"])),
        description=draw(st.text(max_size=20)),
        license=draw(st.text(max_size=5)),
        created=draw(st.datetimes()).strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0"),
        base=BaseIdentity(*(draw(st.text(max_size=5)) for _ in range(4)), {c.name: i for c, i in made}),
        result={name: draw(DIGESTS) for name in names},
        tags=tuple(draw(st.lists(st.text(max_size=5), max_size=2))),
        supersedes=tuple(draw(st.lists(DIGESTS, max_size=2))),
        requires=tuple(draw(st.lists(DIGESTS, max_size=2))),
        method=draw(st.dictionaries(st.text(max_size=4), JSON, max_size=3)),
    )
    return Pack(manifest, tuple(change for change, _ in made))


@PROPERTY
@given(packs())
def test_round_trip(pack: Pack) -> None:
    data = nest.encode(pack)
    assert_same_pack(nest.decode(data), pack)
    assert nest.encode(nest.decode(data)) == data
    assert nest.pack_id(pack) == sha256(data).hexdigest()


def test_golden_bytes() -> None:
    """A change of this digest is a change of the format: every published pack would get another id."""
    assert nest.pack_id(fixed_pack()) == GOLDEN
    assert nest.pack_id(fixed_quantized_pack()) == GOLDEN_2
    assert nest.pack_id(fixed_low_rank_pack()) == GOLDEN_LOW_RANK


def test_the_content_decides_the_format() -> None:
    """Older readers refuse nest/2 by its name; what they can read does not change."""
    for pack, name in ((fixed_pack(), "nest/1"), (fixed_quantized_pack(), "nest/2"), (fixed_low_rank_pack(), "nest/2")):
        data = nest.encode(pack)
        (length,) = struct.unpack("<Q", data[:8])
        manifest = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["nest"])
        assert manifest["format"] == pack.format == name
        assert bool(pack.additions) == (name == "nest/2")
        assert_same_pack(nest.decode(data), pack)
        other = {"nest/1": "nest/2", "nest/2": "nest/1"}[name]
        with pytest.raises(PackContentError, match=f"{other}"):
            nest.decode(tools.with_manifest(data, lambda manifest, other=other: manifest.update(format=other)))


def test_the_layout_is_that_of_the_format_document() -> None:
    """Wide types first, no gap, the header padded with spaces to a multiple of 64."""
    data = nest.encode(fixed_pack())
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 64 == 0
    header = json.loads(data[8 : 8 + length])
    manifest = header.pop("__metadata__")["nest"]
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    kinds = [header[name]["dtype"] for name in order]
    assert kinds == ["I64", "F32", "I32", "F16", "U16", "BF16", "F16", "U8"]
    assert order[1:3] == ["a.weight:delta", "a.weight:rows"]
    assert [header[name]["data_offsets"][0] for name in order] == [0, 8, 32, 44, 68, 70, 74, 82]
    assert len(data) == 8 + length + 85
    assert manifest.startswith(
        '{"base":{"architecture":"LlamaForCausalLM","dtype":"F32","model_id":"tiny/golden","revision":""'
    )
    assert '"description":"Größe \\"1/2\\"\\n","evaluation":{},"format":"nest/1","license":"MIT","method":' in manifest
    assert manifest == tools.compact(json.loads(manifest))


def test_an_independent_writer_gives_the_same_bytes() -> None:
    good = nest.encode(fixed_pack())
    assert tools.with_arrays(good, lambda arrays: None) == good
    assert tools.with_manifest(good, lambda manifest: None) == good


def test_equal_packs_give_equal_bytes_whatever_the_order_of_their_mappings() -> None:
    pack = fixed_pack()
    manifest = pack.manifest
    turned = replace(
        manifest,
        base=replace(manifest.base, tensors=dict(reversed(manifest.base.tensors.items()))),
        result=dict(reversed(manifest.result.items())),
        method={"nested": {"a": -0.0, "b": (1, 2.5, None, True)}},
    )
    strided = replace(pack.deltas[0], delta=np.repeat(pack.deltas[0].delta, 2, axis=1)[:, ::2])
    assert not strided.delta.flags.c_contiguous
    assert nest.encode(Pack(turned, (strided, pack.deltas[1]))) == nest.encode(pack)


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "base")
    pack = tiny_pack(model, delta_dtype="F32")
    nest.write(pack, tmp_path / "x.nest")
    with safe_open(tmp_path / "x.nest", framework="np") as file:
        assert list(file.metadata()) == ["nest"]
        assert json.loads(file.metadata()["nest"])["format"] == "nest/1"
    arrays = load_file(tmp_path / "x.nest")
    assert sorted(arrays) == sorted(f"{d.name}:{part}" for d in pack for part in ("delta", "rows", "cluster", "sketch"))
    for d in pack:
        for part in ("delta", "rows", "cluster", "sketch"):
            np.testing.assert_array_equal(arrays[f"{d.name}:{part}"], getattr(d, part), strict=True)


def test_write_gives_the_id_and_read_gives_the_pack(tmp_path: Path) -> None:
    pack = fixed_pack()
    pack_id = nest.write(pack, tmp_path / "x.nest")
    assert tree_digest(tmp_path) == {"x.nest": pack_id}
    assert pack_id == nest.pack_id(pack)
    assert_same_pack(nest.read(tmp_path / "x.nest"), pack)
    assert_same_pack(nest.read(str(tmp_path / "x.nest")), pack)


def test_what_is_read_does_not_depend_on_the_bytes() -> None:
    data = bytearray(nest.encode(fixed_pack()))
    pack = nest.decode(data)
    data[-60:] = bytes(60)
    assert_same_pack(pack, fixed_pack())


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_write_never_overwrites(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "x.nest"
    if kind == "file":
        place.write_bytes(b"precious")
    elif kind == "link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.mkdir()
    before = tree_digest(tmp_path)
    with pytest.raises(OutputError, match=r"x\.nest exists already"):
        nest.write(fixed_pack(), place)
    assert tree_digest(tmp_path) == before


def test_overwriting_is_said_aloud(tmp_path: Path) -> None:
    (tmp_path / "x.nest").write_bytes(b"old")
    pack_id = nest.write(fixed_pack(), tmp_path / "x.nest", overwrite=True)
    assert tree_digest(tmp_path) == {"x.nest": pack_id}


@pytest.mark.parametrize("place", ["missing/x.nest", "a-file/x.nest", "x" * 250, "x" * 300])
def test_write_to_a_place_that_cannot_be(tmp_path: Path, place: str) -> None:
    """A name of 250 characters fits, but the temporary name beside it does not."""
    (tmp_path / "a-file").write_bytes(b"precious")
    before = tree_digest(tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        nest.write(fixed_pack(), tmp_path / place)
    assert tree_digest(tmp_path) == before


def test_a_place_taken_meanwhile_is_left_alone(tmp_path: Path) -> None:
    def write() -> None:
        with new_place(tmp_path / "x.nest") as sibling:
            sibling.write_bytes(b"ours")
            (tmp_path / "x.nest").write_bytes(b"theirs")

    with pytest.raises(OutputError, match="exists already"):
        write()
    assert tree_digest(tmp_path) == {"x.nest": sha256(b"theirs").hexdigest()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, PackError])
@pytest.mark.parametrize("kind", ["file", "directory", "nothing"])
def test_an_interrupted_writer_leaves_nothing(tmp_path: Path, kind: str, error: type[BaseException]) -> None:
    def write() -> None:
        with new_place(tmp_path / "x") as sibling:
            if kind == "file":
                sibling.write_bytes(b"half")
            elif kind == "directory":
                (sibling / "deep").mkdir(parents=True)
            raise error("stop")

    with pytest.raises(error, match="stop"):
        write()
    assert tree_digest(tmp_path) == {}


@pytest.mark.parametrize("place", ["missing.nest", "."])
def test_reading_what_is_not_there(tmp_path: Path, place: str) -> None:
    with pytest.raises(PackError, match="cannot read the pack") as caught:
        nest.read(tmp_path / place)
    assert caught.value.advice == "Check the path."


def test_read_names_the_file_and_keeps_class_and_advice(tmp_path: Path) -> None:
    newer = tools.with_manifest(nest.encode(fixed_pack()), lambda manifest: manifest.update(format="nest/3"))
    (tmp_path / "x.nest").write_bytes(newer)
    with pytest.raises(nest.PackTooNewError) as caught:
        nest.read(tmp_path / "x.nest")
    assert (
        str(caught.value) == f"{tmp_path / 'x.nest'}: the pack has format 'nest/3'; this nestpatch reads 'nest/1' and 'nest/2'"
    )
    assert caught.value.advice == "Upgrade nestpatch: pip install -U nestpatch"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes", "\ud800"])
def test_a_manifest_that_json_cannot_hold_is_not_written(tmp_path: Path, value: Any) -> None:
    pack = replace(fixed_pack(), manifest=replace(fixed_pack().manifest, method={"a": [value]}))
    with pytest.raises(PackContentError, match="the manifest cannot be written as JSON"):
        nest.write(pack, tmp_path / "x.nest")
    assert tree_digest(tmp_path) == {}


def test_the_header_may_have_a_mebibyte_and_no_more() -> None:
    def sized(length: int) -> Pack:
        return replace(fixed_pack(), manifest=replace(fixed_pack().manifest, description="d" * length))

    (empty,) = struct.unpack("<Q", nest.encode(sized(0))[:8])
    # The padding rounds up, to 64 minus the 8 bytes before the header.
    full = (1 << 20) - 8 - empty
    spare = len(nest.encode(sized(0))[8 : 8 + empty]) - len(nest.encode(sized(0))[8 : 8 + empty].rstrip(b" "))
    largest = nest.encode(sized(full + spare))
    assert struct.unpack("<Q", largest[:8]) == ((1 << 20) - 8,)
    assert nest.encode(nest.decode(largest)) == largest
    with pytest.raises(PackContentError, match="the header would have 1048632 bytes; 1048576 are allowed"):
        nest.encode(sized(full + spare + 1))


def refusal(data: bytes) -> PackError | None:
    """The error that the reader raises, or None for a pack whose only encoding is this file. Nothing else may happen."""
    try:
        pack = nest.decode(data)
    except PackError as error:
        return error
    assert nest.encode(pack) == data
    return None


@settings(PROPERTY, max_examples=300)
@given(st.data())
def test_a_changed_byte_is_refused_or_is_another_pack(data: st.DataObject) -> None:
    good = nest.encode(fixed_pack())
    at = data.draw(st.integers(0, len(good) - 1))
    kind = data.draw(st.sampled_from(["change", "drop", "insert", "cut", "double"]))
    byte = bytes([data.draw(st.integers(0, 255))])
    hostile = {
        "change": good[:at] + byte + good[at + 1 :],
        "drop": good[:at] + good[at + 1 :],
        "insert": good[:at] + byte + good[at:],
        "cut": good[:at],
        "double": good[:at] + good[max(0, at - 30) :],
    }[kind]
    error = refusal(hostile)
    assert error is None or error.advice
    assert error or kind == "change" or hostile == good, "only a changed byte can give another pack"


def test_every_depth_of_nesting_is_read_or_refused() -> None:
    """Reader and writer recurse; between their limits no depth may end in a RecursionError."""
    good, limit = nest.encode(fixed_pack()), sys.getrecursionlimit()
    errors = []
    for depth in range(limit - 250, limit + 10):
        deep = '"method":{"a":' + "[" * depth + "]" * depth + ","
        errors.append(refusal(tools.with_manifest_text(good, lambda text, deep=deep: text.replace('"method":{', deep, 1))))
    assert errors[0] is None
    assert "the manifest is not valid JSON" in str(errors[-1])


def test_manifest_json_and_parse_manifest_are_inverse() -> None:
    manifest = fixed_pack().manifest
    value = manifest_json(fixed_pack())
    assert parse_manifest(canonical_json(value)) == ("nest/1", manifest)
    assert value["result"] == {"tensors": {"a.weight": {"rows_sha256": "4" * 64}, "b.experts": {"rows_sha256": "5" * 64}}}
    renamed = changed(value, lambda v: v.update(name="other"))
    assert parse_manifest(canonical_json(renamed)) == ("nest/1", replace(manifest, name="other"))
