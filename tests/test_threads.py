"""Any number of threads: the same bytes in the model and in its state, and every error where the work was asked for."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.errors import DataError, PackContentError, UndoError
from nestpatch.files.threads import allowed, beside, cores, in_parts, limited, spread
from nestpatch.formats import checkpoint as interface
from nestpatch.formats import nest
from nestpatch.formats.gguf import quants
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher import _row_writer
from nestpatch.patcher._undo import UndoReader
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.state_dir import state_dir_of
from tests.gguf.files import gguf_of, needs_llama
from tests.helpers import tiny_checkpoint, tiny_pack, tree_digest

SIZES = {"hidden": 256, "inter": 320}
"""Blocks of the K types have 256 elements."""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a tensor, and every row is worth a thread."""
    monkeypatch.setattr(interface, "CHUNK", 7000)
    monkeypatch.setattr(quants, "_WORTHWHILE", 1)


def run(*words: object) -> None:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["safetensors", "Q8_0", pytest.param("Q4_K", marks=needs_llama)])
def test_any_number_of_threads_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", **SIZES)
    pack = tmp_path / "x.nest"
    nest.write(tiny_pack(base, neurons=24), pack)
    found = []
    for threads in (1, 2, 5):
        folder = tmp_path / str(threads)
        folder.mkdir()
        model = folder / "m.safetensors" if kind == "safetensors" else gguf_of(base, folder / "m.gguf", kind)
        if kind == "safetensors":
            shutil.copy(base / "model.safetensors", model)
        before, options = model.read_bytes(), ["--threads", threads, "--json"]
        exact = [] if kind == "safetensors" else ["--base", base]
        run("apply", model, pack, "--in-place", "--allow-unsigned", *exact, *options)
        (record,) = state_dir_of(model).folder.glob("*.undo")
        found.append((model.read_bytes(), record.read_bytes()))
        run("verify", model, *options)
        run("revert", model, *options)
        assert model.read_bytes() == before != found[-1][0]
    assert found[1] == found[0]
    assert found[2] == found[0]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_damaged_record_is_found_with_any_number_of_threads(tmp_path: Path, threads: int) -> None:
    """The other thread finds it, after rows of other tensors were written: they are rolled back."""
    model = tiny_checkpoint(tmp_path / "base")
    pack = tiny_pack(model)
    apply_in_place(model, pack)
    (record,) = state_dir_of(model).folder.glob("*.undo")
    names = [delta.name for delta in pack]
    offset, length = UndoReader(record, names).parts[names[-1]].residual
    data = bytearray(record.read_bytes())
    data[offset + 2 : offset + length] = bytes(length - 2)
    record.write_bytes(data)
    before = (model / "model.safetensors").read_bytes()
    with limited(threads), pytest.raises(UndoError):
        revert(model)
    assert (model / "model.safetensors").read_bytes() == before
    assert not state_dir_of(model).journal.exists()


@pytest.mark.parametrize("quantized", [False, True])
def test_no_thread_outlives_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized: bool) -> None:
    """Even while the error is held: at its end a process waits for every thread."""

    def fail(*_: object) -> None:
        raise PackContentError("not what was promised")

    base = tiny_checkpoint(tmp_path / "base", **SIZES)
    model = gguf_of(base, tmp_path / "m.gguf", "Q8_0") if quantized else base
    monkeypatch.setattr(_row_writer._TensorLog, "record", fail)
    before, held = set(threading.enumerate()), []
    for _ in range(2):
        with limited(3), pytest.raises(PackContentError, match="promised") as caught:
            apply_in_place(model, tiny_pack(base), base=base if quantized else None)
        held.append(caught.value)
        assert set(threading.enumerate()) == before


def test_reading_stays_in_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read and written where the command runs: two threads with many small calls are slower than one."""
    model, seen = tiny_checkpoint(tmp_path / "base"), set()
    kind = type(open_checkpoint(model))
    for name in ("read_rows", "write_rows"):
        whole = getattr(kind, name)

        def watched(*args: object, whole=whole) -> object:
            seen.add(threading.current_thread())
            return whole(*args)

        monkeypatch.setattr(kind, name, watched)
    before = tree_digest(model)
    with limited(4):
        apply_in_place(model, tiny_pack(model))
        revert(model)
    assert seen == {threading.main_thread()}
    assert {name: tree_digest(model)[name] for name in before} == before


def test_limits_nest_and_end() -> None:
    assert allowed() == cores() >= 1
    with limited(3):
        assert allowed() == 3
        with limited(None):
            assert allowed() == 3
        with limited(1):
            assert allowed() == 1
    assert allowed() == cores()
    with pytest.raises(DataError, match="at least 1"), limited(0):
        pass


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_parts_cover_a_range_once(threads: int) -> None:
    for count in (0, 1, 6, 7, 100):
        done = np.zeros(count, int)

        def work(part: slice, done: np.ndarray = done) -> None:
            done[part] += 1

        with limited(threads):
            in_parts(work, count, 2)
        assert (done == 1).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [0, 8])
def test_the_error_of_a_part_is_raised(threads: int, bad: int) -> None:
    def work(part: slice) -> None:
        if part.start <= bad < part.stop:
            raise UndoError("this part")

    with limited(threads), pytest.raises(UndoError, match="this part"):
        in_parts(work, 9, 1)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("mapped", [beside, spread])
def test_results_keep_their_order_and_errors_their_place(mapped: Callable[..., Iterator[int]], threads: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        if item == 5:
            raise UndoError("five")
        return -item

    found = []
    with limited(threads), pytest.raises(UndoError, match="five"):
        found += mapped(work, range(9))
    assert found == [0, -1, -2, -3, -4]
    with limited(threads):
        assert list(mapped(work, range(5))) == [0, -1, -2, -3, -4]


def test_spread_work_runs_at_once_and_is_divided_no_further() -> None:
    """Each of four items waits until all four have begun."""
    together, inside = threading.Barrier(4, timeout=30), []

    def work(_: int) -> None:
        together.wait()
        inside.append(allowed())

    with limited(4):
        assert len(list(spread(work, range(4)))) == 4
    assert inside == [1] * 4


def test_few_items_are_read_before_their_results_are_wanted() -> None:
    """Each item holds rows in memory."""
    read = []

    def items() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    with limited(3):
        for result in spread(abs, items()):
            assert len(read) <= result + 4


def test_the_command_line_rejects_no_threads(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["verify", str(tmp_path), "--threads", "0"])
    assert done.exit_code == 2
    assert "--threads" in done.output
