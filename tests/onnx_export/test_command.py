"""`nestpatch export --to onnx` and `--to onnx-adapter`, as people type them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.formats import nest
from tests.helpers import tiny_pack
from tests.onnx_export.runs import facts
from tests.schemas import require_schema


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["export", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def pack(sources, tmp_path):
    nest.write(tiny_pack(sources("small"), scale=0.2), tmp_path / "p.nest")
    return tmp_path / "p.nest"


def test_export_then_adapter(sources, pack, tmp_path):
    folder = tmp_path / "onnx"
    told = run(sources("small"), "--to", "onnx", "-o", folder, "--adapter-ready", "--int8")
    for part in ("LlamaForCausalLM, fp32, 8 matrices in 8 bits", "2 weights accept a pack", "limit", "reported only"):
        assert part in told
    assert "nestpatch.adapter" in facts(folder)
    for number, arguments in enumerate([(pack, "--for", folder), (folder, pack)]):
        out = tmp_path / f"{number}.onnx_adapter"
        done = CliRunner().invoke(
            main, ["export", *map(str, arguments), "--to", "onnx-adapter", "-o", str(out), "--json", "-q"]
        )
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        require_schema(found, "export --to onnx-adapter")
        assert (found["format"], found["matrices"], found["bytes"]) == ("onnx-adapter", 2, out.stat().st_size)
    assert "add_active_adapter" in run(pack, "--to", "onnx-adapter", "--for", folder)
    assert (tmp_path / "no-harm-1.0.0.onnx_adapter").is_file()


def test_a_dry_run_names_the_place(sources, pack):
    model = sources("small")
    told = run(model, pack, "--to", "onnx", "--int4", "--dry-run")
    assert "would write" in told
    assert "small-no-harm-1.0.0-onnx-int4" in told
    assert "no-harm 1.0.0" in told
    assert not model.with_name("small-no-harm-1.0.0-onnx-int4").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--to", "onnx", "--type", "f16"), "--type: only with --to gguf"),
        (("--to", "gguf", "--int4", "--dtype", "fp16"), "--dtype, --int4 or --int8: only with --to onnx"),
        (("--to", "onnx", "--for", "."), "--for: only with --to onnx-adapter"),
        (("--to", "onnx", "--check"), "--check: only with --to gguf"),
        (("--to", "onnx-adapter"), "name the ONNX model"),
        (("--to", "onnx", "--dtype", "bf16"), "bf16"),
    ],
)
def test_options_of_other_targets_are_refused(sources, arguments, reason):
    assert reason in run(sources("small"), *arguments, code=2)


def test_errors_have_a_way_out(sources, pack, tmp_path):
    told = run(sources("small"), pack, "--to", "onnx", "--adapter-ready", "-o", tmp_path / "x", code=2)
    assert "What to do" in told
    assert "--to onnx-adapter" in told


def test_a_killed_export_leaves_nothing(sources, tmp_path):
    command = [sys.executable, "-m", "nestpatch", "export", str(sources("small")), "--to", "onnx", "-o", str(tmp_path / "x")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "tracing" in line:
                break
        time.sleep(0.5)
        assert list(tmp_path.iterdir()), "the temporary directory is there"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
