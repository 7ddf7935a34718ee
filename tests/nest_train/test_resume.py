"""A training that is killed and run again gives the pack of one that was not; what a run directory holds is not trusted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import nestpatch
from nestpatch.cli import main
from nestpatch.errors import BusyError, DataError, MissingExtraError, OutputError
from nestpatch.evaluation.suites import load_suite
from nestpatch.files.locks import lock
from nestpatch.formats import nest
from nestpatch.nest_train import train as module
from nestpatch.nest_train.result import Trained
from nestpatch.nest_train.train import train
from nestpatch.pack import Label
from nestpatch.prompts.readers import Prompt, load_prompts
from tests.nest_train.quick import KINDS, QUICK, options, write_prompts

RECIPE = dataclasses.replace(QUICK, check_prompts=2, refusals="auto", first_layer=1)
SUITES = ("harmful-test", "benign-test")
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks processes and stops them")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More harmless prompts than one batch of answers has, so that a kill can come between two."""
    return write_prompts(tmp_path_factory.mktemp("prompts"), 40)


@pytest.fixture(scope="module")
def data(prompts: Path) -> nestpatch.TrainingData:
    return nestpatch.TrainingData(*(load_prompts(prompts / f"{kind}.jsonl") for kind in KINDS))


@pytest.fixture(scope="module")
def suites(prompts: Path) -> list[Any]:
    return [load_suite(str(prompts / f"{name}.jsonl")) for name in SUITES]


@pytest.fixture(autouse=True)
def _one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="module")
def command(models, prompts: Path) -> list[str]:
    sets = [f"--{kind}={prompts / kind}.jsonl" for kind in KINDS]
    return ["train", str(models("llama")), *sets, *(f"--suite={prompts / name}.jsonl" for name in SUITES), *options(RECIPE)]


class Trainer:
    """The process that forks trainings."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        root = str(Path(__file__).parent.parent.parent)
        paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.nest_train.trainer"],
            env={**os.environ, **threads, "PYTHONPATH": paths, "SOURCE_DATE_EPOCH": "1700000000"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, *more: str, **moment: Any) -> dict[str, Any]:
        """One training with its files in a folder, killed where `moment` says so."""
        args = [*self.command, "-o", str(folder / "x.nest"), "--run", str(folder / "run"), *more]
        request = {"args": args, "folder": str(folder), "signal": int(signal.SIGKILL), **moment}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def trainer(command: list[str]) -> Iterator[Trainer]:
    started = Trainer(command)
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    done = trainer.run(folder)
    assert (done["stopped"], done["code"]) == (False, 0), done
    return folder


MOMENTS = {
    "load": ("load", 0, "", 0),
    "answers of the base": ("evaluate", 1, "the base", 0),
    "distil, after one batch": ("distil", 64, "", 0),
    "probe": ("probe", 64, "", 0),
    "select": ("select", 1, "", 0),
    "cluster": ("cluster", 1, "", 0),
    "remember": ("remember", 1, "", 0),
    "a look": ("look", 1, "", 0),
    "a look that is not yet stored": ("tune", 3, "held-out", 0),
    "a step after a look": ("tune", 5, "loss", 3),
    "answers of the pack": ("evaluate", 1, "the base with the pack", 6),
}
"""Name -> the event at which the training is killed (stage, units done, part of its note), and the steps stored by then."""


@needs_fork
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_training_killed_in_any_stage_goes_on(trainer: Trainer, whole: Path, tmp_path: Path, moment: str) -> None:
    stage, done, note, steps = MOMENTS[moment]
    killed = trainer.run(tmp_path, event={"stage": stage, "done": done, "note": note})
    assert killed["stopped"]
    again = trainer.run(tmp_path)
    assert again["code"] == 0, again
    assert (tmp_path / "x.nest").read_bytes() == (whole / "x.nest").read_bytes()
    record, want = (json.loads((folder / "run" / "run.json").read_text()) for folder in (tmp_path, whole))
    assert [session["state"] for session in record["sessions"]] == ["killed", "done"]
    assert record["tuning"] == want["tuning"]
    assert len(record["tuning"]["losses"]) == 6
    if stage == "tune":
        assert "reused: 80 of 80 distilled answers" in again["err"]
        assert f"reused: {steps} of 6 tuning steps" in again["err"]
    if steps == 6:
        assert "running the frozen layers once" not in again["err"]


@needs_fork
@pytest.mark.parametrize("first", [2, 5])
def test_a_training_killed_before_a_file_appears_goes_on(trainer: Trainer, whole: Path, tmp_path: Path, first: int) -> None:
    """Killed again and again, each time some files later than before, until it ends."""
    for kills in range(100):
        done = trainer.run(tmp_path, rename=first + 6 * kills)
        if not done["stopped"]:
            break
    assert kills > 1
    assert (tmp_path / "x.nest").read_bytes() == (whole / "x.nest").read_bytes()
    left = [file.name for file in (tmp_path / "run").iterdir() if file.name.endswith(".tmp")]
    assert (done["code"], left) == (0, []), done["err"]


@needs_fork
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_training_in_order(trainer: Trainer, whole: Path, tmp_path: Path, sent: int, code: int) -> None:
    ended = trainer.run(tmp_path, event={"stage": "tune", "done": 4, "note": "loss"}, signal=int(sent))
    assert ended["stopped"]
    assert ended["code"] == code, ended["err"]
    said = f"Interrupted. The same command goes on from what is in {tmp_path / 'run'}."
    assert ended["err"].splitlines()[-1] == said
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["sessions"][0]["state"] == "interrupted"
    assert trainer.run(tmp_path)["code"] == 0
    assert (tmp_path / "x.nest").read_bytes() == (whole / "x.nest").read_bytes()


# What is reused


def run(
    base: Path, data: Any, folder: Path | None, recipe: Any = RECIPE, name: str = "x", **more: Any
) -> tuple[Trained, list[str]]:
    """A training in this process, and its notes."""
    notes: list[str] = []
    trained = train(base, data, Label(name), recipe=recipe, run_dir=folder, on_event=lambda e: notes.append(e.note), **more)
    return trained, [note for note in notes if "reused" in note]


@pytest.fixture(scope="module")
def kept(models, data, suites, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The run directory of a whole training, and its pack."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        trained, notes = run(models("llama"), data, folder, suites=suites)
        alone, _ = run(models("llama"), data, None, suites=suites)
    assert notes == []
    assert nest.encode(trained.pack) == nest.encode(alone.pack), "a run directory changes nothing"
    return folder, nest.encode(trained.pack)


@pytest.fixture
def copied(kept: tuple[Path, bytes], tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept[0], tmp_path / "run"))


def test_a_training_that_ended_is_only_read(models, data, suites, copied: Path, kept, monkeypatch) -> None:
    monkeypatch.setattr("nestpatch.nest_train._layers.collect", None)
    monkeypatch.setattr("nestpatch.nest_train._layers.cluster", None)
    monkeypatch.setattr("nestpatch.nest_train._tune._look", None)
    trained, notes = run(models("llama"), data, copied, suites=suites)
    assert nest.encode(trained.pack) == kept[1] == (copied / "pack.nest").read_bytes()
    assert [note.removeprefix("reused: ") for note in notes] == [
        "6 of 6 base answers",
        "6 of 6 base answers",
        "40 of 40 distilled answers",
        "80 of 80 distilled answers",
        "selections of 2 blocks",
        "clusters of 2 blocks",
        "6 of 6 tuning steps",
        "6 of 6 pack answers",
        "6 of 6 pack answers",
    ]


@pytest.mark.parametrize(
    ("change", "reused", "again"),
    [
        ({"steps": 4}, {"clusters of 2 blocks"}, "tuning of an earlier training not reused: another steps"),
        (
            {"k_max": 9},
            {"selections of 2 blocks", "activations of 2 blocks"},
            "clusters of an earlier training not reused: another",
        ),
        ({"threshold": 0.7}, {"activations of 2 blocks"}, "selections of an earlier training not reused: another threshold"),
        (
            {"probe_batch": 32},
            {"80 of 80 distilled answers"},
            "activations/files of an earlier training not reused: another batch",
        ),
        ({"max_prompt_tokens": 300}, set(), "distilled-answers of an earlier training not reused: another prompt tokens"),
    ],
)
def test_another_setting_invalidates_what_depends_on_it(
    models, data, copied: Path, change: dict[str, Any], reused: set[str], again: str
) -> None:
    recipe = dataclasses.replace(RECIPE, **change)
    trained, notes = run(models("llama"), data, copied, recipe)
    assert reused <= {note.removeprefix("reused: ") for note in notes}
    assert any(note.startswith(again) for note in notes), notes
    alone, _ = run(models("llama"), data, None, recipe)
    assert nest.encode(trained.pack) == nest.encode(alone.pack)


def test_more_prompts_need_more_answers_and_another_base_all_of_them(models, data, copied: Path) -> None:
    more = data.adding(benign=nestpatch.PromptSet("more", (Prompt("Tell me how to paint a door."),)))
    _, notes = run(models("llama"), more, copied)
    assert {"reused: 80 of 81 distilled answers", "reused: 40 of 40 distilled answers"} <= set(notes)
    assert any(note.startswith("activations/files of an earlier training not reused: another prompts") for note in notes)
    _, notes = run(models("qwen2"), data, copied)
    assert not any(note.startswith("reused") for note in notes)
    assert any("not reused: another base" in note for note in notes)


def test_a_state_between_two_looks_is_stored_and_used(models, data, tmp_path: Path, monkeypatch) -> None:
    """With the rounding of a quantized base, whose residual is computed again."""
    from tests.gguf_files import write_gguf

    base = write_gguf(models("llama"), tmp_path / "m.gguf", "Q8_0")
    monkeypatch.setattr("nestpatch.nest_train._tune_state._SAVE_EVERY", -1.0)

    def stop(event: nestpatch.Event) -> None:
        if event.stage == "tune" and event.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, data, Label("x"), recipe=RECIPE, run_dir=tmp_path / "run", on_event=stop)
    trained, notes = run(base, data, tmp_path / "run")
    assert "reused: 4 of 6 tuning steps" in notes
    assert nest.encode(trained.pack) == nest.encode(run(base, data, None)[0].pack)


def test_the_tuning_draws_no_random_numbers_but_those_of_its_batches(models, data) -> None:
    """Only the batches are drawn again when a tuning goes on: a state of PyTorch's generator would have to be stored."""
    import torch

    run(models("llama"), data, None)
    after = torch.get_rng_state()
    torch.manual_seed(RECIPE.seed)
    assert torch.equal(after, torch.get_rng_state())


# Damage


def damage(data: bytes, kind: str) -> bytes:
    middle = len(data) // 2
    return {
        "flipped": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "first half": data[:middle],
        "deep": b"[" * 100_000,
        "a list": b"[1]\n[2]\n",
        "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    }[kind]


@pytest.mark.parametrize("kind", ["flipped", "first half", "deep", "a list", "pickle"])
def test_damaged_files_are_noticed_and_made_again(models, data, suites, copied: Path, kept, kind: str) -> None:
    files = [file for file in copied.rglob("*") if file.is_file() and file.name not in ("lock", "pack.nest")]
    assert {file.suffix for file in files} == {".json", ".jsonl", ".safetensors", ".npy"}
    for file in files:
        file.write_bytes(damage(file.read_bytes(), kind))
    trained, notes = run(models("llama"), data, copied, suites=suites)
    assert nest.encode(trained.pack) == kept[1]
    damaged = {note.partition(" ")[0] for note in notes if "damaged" in note}
    wanted = {"dtype", "distilled-answers", "base-answers", "pack-answers", "selections", "clusters", "tuning", "created"}
    assert damaged >= wanted, notes
    assert damaged & {"activations/files", "activations"}


def test_one_damaged_array_is_noticed(models, data, suites, copied: Path, kept) -> None:
    for name in ("selections", "clusters"):
        (copied / f"{name}.jsonl").unlink()
    np.save(copied / "activations" / "1.npy", np.array([{}], dtype=object), allow_pickle=True)
    trained, notes = run(models("llama"), data, copied, suites=suites)
    assert any(note.startswith("activations of an earlier training not reused, the file is damaged") for note in notes)
    assert nest.encode(trained.pack) == kept[1]


def forge(file: Path, rows: list[Any]) -> None:
    """A record of these rows whose digest is right."""
    from hashlib import sha256

    header = json.loads(file.read_bytes().partition(b"\n")[0])
    body = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    header["sha256"] = sha256(body).hexdigest()
    file.write_bytes(json.dumps(header).encode() + b"\n" + body)


FORGED: dict[str, list[Any]] = {
    "distilled-answers": [{"prompt": 1, "answer": "x"}, 5, ["a"]],
    "selections": [
        {"layer": 0, "accuracy": 1.0, "neurons": [10**9], "z": [1.0], "reason": ""},
        {"layer": [], "accuracy": 1.0, "neurons": [], "z": [], "reason": ""},
        {"layer": 1, "accuracy": 1.0, "neurons": [3], "z": [1.0], "reason": ""},
        {"layer": 0, "accuracy": "nan?", "neurons": [3], "z": [1.0], "reason": ""},
    ],
    "clusters": [
        {"layer": 0, "neurons": [3], "labels": [-1], "k": 1, "silhouette": None, "reason": ""},
        {"layer": 0, "neurons": [3], "labels": [0], "k": 1, "silhouette": None, "reason": ""},
        {"layer": 0, "neurons": [4, 3], "labels": [0, 0], "k": 10**30, "silhouette": None, "reason": ""},
    ],
    "dtype": [["float64", ""], "float32", [[], ""]],
    "created": ["yesterday", 17, None],
    "written": [7, None],
}


@pytest.mark.parametrize("place", range(4))
def test_forged_rows_are_refused(models, data, suites, copied: Path, kept, place: int) -> None:
    for name, rows in FORGED.items():
        forge(copied / f"{name}.jsonl", [rows[place % len(rows)]])
    trained, notes = run(models("llama"), data, copied, suites=suites)
    assert sum("the file is damaged" in note for note in notes) >= 4, notes
    assert nest.encode(trained.pack) == kept[1]


@pytest.mark.parametrize("change", ["shape", "nan", "missing", "facts", "steps"])
def test_a_forged_state_is_refused(models, data, suites, copied: Path, kept, change: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from nestpatch.nest_train._digests import digest_tensors, encode_json

    file = copied / "tuning.safetensors"
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["nestpatch"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if change == "shape":
        tensors["kept.0"] = tensors["kept.0"][:1].clone()
    elif change == "nan":
        tensors["now.0"][0, 0] = float("nan")
    elif change == "missing":
        del tensors["exp_avg.1"]
    elif change == "facts":
        header["facts"]["looks"] = [{"step": 0}]
    else:
        header["facts"]["best"] = 99
    header["sha256"] = digest_tensors(header["facts"], tensors)
    save_file(tensors, file, {"nestpatch": encode_json(header)})
    trained, notes = run(models("llama"), data, copied, suites=suites)
    assert any(note.startswith("tuning of an earlier training not reused, the file is damaged") for note in notes)
    assert nest.encode(trained.pack) == kept[1]


# The directory, the output and the record


def test_two_trainings_do_not_share_a_directory(models, data, copied: Path) -> None:
    before = (copied / "run.json").read_bytes()
    with open(copied / "lock") as file:
        assert lock(file.fileno(), wait=False)
        with pytest.raises(BusyError, match="another training uses the run directory"):
            run(models("llama"), data, copied)
    assert (copied / "run.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(models, data, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match="is not empty, and is not a run directory"):
        run(models("llama"), data, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputError, match="cannot write the run directory"):
        run(models("llama"), data, tmp_path / "thesis.txt")


def test_only_its_own_pack_is_replaced(models, data, copied: Path, tmp_path: Path) -> None:
    pack = tmp_path / "x.nest"
    first, _ = run(models("llama"), data, copied, output=pack)
    again, _ = run(models("llama"), data, copied, output=pack)
    assert again.pack_id == first.pack_id
    with pytest.raises(OutputError, match="exists already"):
        run(models("llama"), data, copied, dataclasses.replace(RECIPE, steps=4), output=pack)
    with pytest.raises(OutputError, match="exists already"):
        run(models("llama"), data, copied, name="y", output=pack)
    other = nest.encode(first.pack)[:-1]
    pack.write_bytes(other)
    with pytest.raises(OutputError, match="exists already"):
        run(models("llama"), data, copied, output=pack)
    assert pack.read_bytes() == other


def test_the_record_tells_how_to_do_it_again(models, data, suites, copied: Path, kept) -> None:
    record = json.loads((copied / "run.json").read_text())
    assert record["format"] == "nestpatch-run/1"
    assert nestpatch.Recipe(**record["recipe"]) == RECIPE
    assert record["data"]["benign"]["sha256"] == data.benign.digest
    assert [suite["sha256"] for suite in record["suites"]] == [suite.prompts.digest for suite in suites]
    assert record["base"]["model"] == Path(models("llama")).name
    assert set(record["versions"]) >= {"python", "torch", "nestpatch"}
    assert set(record["machine"]) == {"system", "processor", "cores"}
    assert record["decisions"] == nest.decode(kept[1]).manifest.method["decisions"]
    assert (len(record["tuning"]["losses"]), [look["step"] for look in record["tuning"]["looks"]]) == (6, [0, 3, 6])
    assert record["result"]["pack_id"] == nest.pack_id(nest.decode(kept[1]))
    (session,) = record["sessions"]
    stages = {"load", "evaluate", "distil", "probe", "select", "cluster", "remember", "tune", "pack"}
    assert (session["state"], set(session["seconds"])) == ("done", stages)
    assert session["command"] == sys.argv
    assert session["tokens_per_second"] > 0
    assert session["peak_memory_bytes"]["cpu"] > 1 << 20


def test_a_failure_is_recorded(models, data, tmp_path: Path) -> None:
    with pytest.raises(nestpatch.errors.TrainingError):
        run(models("llama"), data, tmp_path / "run", dataclasses.replace(RECIPE, threshold=50.0))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [session["state"] for session in record["sessions"]] == ["failed"]


# Trackers


def test_a_tracker_that_is_not_installed_is_named_before_any_work(data, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(MissingExtraError, match="tracking with wandb") as caught:
        train("nowhere", data, Label("x"), run_dir=tmp_path / "run", track="wandb")
    assert caught.value.advice == "pip install 'nestpatch[wandb]'"
    with pytest.raises(DataError, match="there is no tracker 'mlflow'"):
        train("nowhere", data, Label("x"), track="mlflow")
    assert not (tmp_path / "run").exists()


def test_curves_need_a_folder(command: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "x.nest"), "--track", "wandb"])
    assert (done.exit_code, "add --run DIR" in done.stderr) == (2, True)


@needs_fork
def test_what_is_in_the_place_of_a_file_is_not_opened(models, data, copied: Path, tmp_path: Path) -> None:
    """A pipe without a writer would be read for ever."""
    (copied / "tuning.safetensors").unlink()
    os.mkfifo(copied / "tuning.safetensors")
    (tmp_path / "outside").write_bytes((copied / "dtype.jsonl").read_bytes()[:-1])
    (copied / "dtype.jsonl").unlink()
    (copied / "dtype.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(OutputError, match=r"tuning\.safetensors is not a file, and is not replaced"):
        run(models("llama"), data, copied)
    assert not (copied / "dtype.jsonl").is_symlink()
    assert not (tmp_path / "outside").read_bytes().endswith(b"\n")


STAND_IN = """
import json, pathlib
class Run:
    def __init__(self, **given): self.given, self.lines = given, []
    def log(self, values, step=None): self.lines.append({"step": step, **values})
    def finish(self):
        told = {"given": self.given, "lines": self.lines, "config": settings}
        (pathlib.Path(self.given["dir"]) / "told.json").write_text(json.dumps(told))
settings = {}
class Config:
    def update(self, values, **_): settings.update(values)
config = Config()
def init(**given): return Run(**given)
"""


def test_curves_are_sent_through_accelerate(models, data, tmp_path: Path, monkeypatch) -> None:
    """wandb itself is replaced: it is not installed here, and needs a server."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    run(models("llama"), data, tmp_path / "run", track="wandb")
    told = json.loads((tmp_path / "run" / "told.json").read_text())
    assert told["given"]["project"] == "nestpatch"
    assert told["given"]["resume"] == "allow"
    assert told["config"]["steps"] == 6
    losses = [line for line in told["lines"] if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4, 5, 6]
    assert set(losses[0]) == {"step", "loss", "learning_rate", "tokens_per_second"}
    looks = [line for line in told["lines"] if "held_out/loss" in line]
    assert [line["step"] for line in looks] == [0, 3, 6]
    assert "held_out/attack_success" in looks[0]
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
