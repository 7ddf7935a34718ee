"""A host that patches needs numpy alone; inside the package every import points down."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import nestpatch
from nestpatch.formats import nest
from tests.export.families import model_around
from tests.export.tokenizers_made import byte_level
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.onnx.files import build, save

PACKAGE = Path(nestpatch.__file__).parent
HEAVY = {"torch", "transformers", "click", "sklearn", "accelerate", "datasets", "rich", "scipy", "pandas", "huggingface_hub"}
"""Beside these, cryptography is loaded only where something is signed or verified."""
LAYERS = [
    {"nestpatch"},  # the root holds __version__; its own imports happen on first use
    {"nestpatch.errors"},
    {"nestpatch.plain"},
    {"nestpatch.measured"},
    {"nestpatch.events"},
    {"nestpatch.version"},
    {"nestpatch.rows"},
    {"nestpatch.delta"},
    {"nestpatch.detector"},
    {"nestpatch.files"},
    {"nestpatch.pack"},
    {"nestpatch.formats"},
    {"nestpatch.packing"},
    {"nestpatch.signing"},
    {"nestpatch.hub"},
    {"nestpatch.channels"},
    {"nestpatch.gate"},
    {"nestpatch.patcher"},
    {"nestpatch.compare"},
    {"nestpatch.restore"},
    {"nestpatch.prompts"},
    {"nestpatch.runtimes"},
    {"nestpatch.health"},
    {"nestpatch.export"},
    {"nestpatch.guarding"},
    {"nestpatch.evaluation"},
    {"nestpatch.chat"},
    {"nestpatch.nest_train"},
    {"nestpatch.lab"},
    {"nestpatch.demo"},
    {"nestpatch.report"},
    {"nestpatch.views"},
    {"nestpatch.commands"},
    {"nestpatch.cli"},
    {"nestpatch.__main__", "nestpatch.nest_train.__main__"},
]


def modules_after(code: str, *arguments: str, whole: bool = False) -> set[str]:
    """The top-level modules that a fresh Python holds after some code, which prints nothing itself; `whole`: all modules."""
    names = "name" if whole else "name.partition('.')[0]"
    report = f"\nimport json, sys; print(json.dumps(sorted({{{names} for name in sys.modules}})))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code + report, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
LIGHT = ("files", "formats", "signing", "patcher", "compare", "restore", "health", "export")
DEPLOYED = [
    name for name in FILES if name.startswith(tuple(f"nestpatch.{room}" for room in LIGHT)) and ".export.onnx" not in name
]
HUB = [name for name in FILES if name.startswith(("nestpatch.hub", "nestpatch.channels"))]


def test_the_modules_are_found() -> None:
    """An empty list would make every test below pass."""
    assert {
        "nestpatch.formats.nest",
        "nestpatch.formats.safetensors",
        "nestpatch.patcher.apply",
        "nestpatch.signing.verify",
    } <= set(DEPLOYED)
    assert {"nestpatch.hub.client", "nestpatch.hub.remote", "nestpatch.channels.rules", "nestpatch.channels.follow"} <= set(HUB)
    assert len(FILES) > 20


def test_importing_the_deployment_side_stays_light() -> None:
    names = [
        "nestpatch.errors",
        "nestpatch.files.reading",
        "nestpatch.events",
        "nestpatch.rows",
        "nestpatch.delta",
        "nestpatch.pack",
        "nestpatch.packing",
        *DEPLOYED,
        *HUB,
    ]
    loaded = modules_after("\n".join(f"import {name}" for name in names))
    assert "numpy" in loaded
    assert not loaded & (HEAVY | {"cryptography"})


def test_applying_stays_light(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "base", sharded=True)
    nest.write(tiny_pack(model), tmp_path / "x.nest")
    code = "import sys, nestpatch\nnestpatch.apply(*sys.argv[1:])\nnestpatch.load_pack(sys.argv[2])"
    loaded = modules_after(code, str(model), str(tmp_path / "x.nest"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").is_file()
    assert not loaded & HEAVY


START = {
    "rich",
    "numpy.ma",
    "numpy.random",
    "cryptography",
    "difflib",
    "traceback",
    "logging",
    "concurrent",
    "jsonschema",
    "http",
    "ssl",
    "asyncio",
    "email",
}
"""What takes milliseconds to import and patching does not need."""


@pytest.mark.parametrize(
    ("words", "rooms"),
    [
        (["apply", "base", "x.nest", "--in-place", "--allow-unsigned"], {"patching"}),
        (["verify", "base"], {"inspecting", "patching"}),
        (["status", "base"], {"inspecting", "patching"}),
        (["revert", "base"], {"patching"}),
    ],
)
def test_a_command_imports_what_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], rooms: set[str]
) -> None:
    """The start of a command is half of its time on a small model, so its modules are counted here by name."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("NESTPATCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    nest.write(tiny_pack(tiny_checkpoint(tmp_path / "base")), tmp_path / "x.nest")
    if words[0] != "apply":
        nestpatch.apply_in_place("base", "x.nest")
    code = """import sys, io
from contextlib import redirect_stdout
from nestpatch.cli import main
try:
    with redirect_stdout(io.StringIO()):
        main([*sys.argv[1:], "--json"])
except SystemExit as end:
    assert not end.code"""
    loaded = modules_after(code, *words, whole=True)
    assert not loaded & START
    assert {name.split(".")[2] for name in loaded if name.startswith("nestpatch.commands.")} == {*rooms, "options"}
    strange = {name.split(".")[1] for name in loaded if name.startswith("nestpatch.")} & {"views", "hub", "channels", "compare"}
    assert not strange


def test_exporting_adapters_stays_light(tmp_path: Path) -> None:
    nest.write(tiny_pack(tiny_checkpoint(tmp_path / "base")), tmp_path / "x.nest")
    code = """import sys
from nestpatch.export.adapters import export_gguf_lora, export_lora
export_lora(sys.argv[1], sys.argv[2])
export_gguf_lora(sys.argv[1], sys.argv[3])"""
    loaded = modules_after(code, str(tmp_path / "x.nest"), str(tmp_path / "lora"), str(tmp_path / "lora.gguf"))
    assert (tmp_path / "lora" / "adapter_config.json").is_file()
    assert (tmp_path / "lora.gguf").is_file()
    assert not loaded & HEAVY


def test_a_report_stays_light(tmp_path: Path) -> None:
    nest.write(tiny_pack(tiny_checkpoint(tmp_path / "base")), tmp_path / "x.nest")
    code = "import sys\nfrom pathlib import Path\nfrom nestpatch.report.page import write_report\n"
    loaded = modules_after(
        code + "write_report(sys.argv[1], Path(sys.argv[2]))", str(tmp_path / "x.nest"), str(tmp_path / "x.html")
    )
    assert (tmp_path / "x.html").is_file()
    assert not loaded & (HEAVY | {"matplotlib", "lxml"})


def test_exporting_stays_light(tmp_path: Path) -> None:
    model = model_around(tmp_path / "model")
    byte_level(model, "gpt2")
    nest.write(tiny_pack(model), tmp_path / "x.nest")
    code = "import sys, nestpatch\nnestpatch.export_gguf(*sys.argv[1:])"
    loaded = modules_after(code, str(model), str(tmp_path / "x.nest"), str(tmp_path / "out.gguf"))
    assert (tmp_path / "out.gguf").is_file()
    assert not loaded & (HEAVY | {"llama_cpp", "tokenizers"})


def test_reading_a_model_from_gguf_stays_light(tmp_path: Path) -> None:
    model = model_around(tmp_path / "model")
    byte_level(model, "gpt2")
    code = """import sys, nestpatch
nestpatch.export_gguf(sys.argv[1], output=sys.argv[2], type="q8_0")
nestpatch.export_safetensors(sys.argv[2], output=sys.argv[3])"""
    loaded = modules_after(code, str(model), str(tmp_path / "m.gguf"), str(tmp_path / "back"))
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert not loaded & (HEAVY | {"tokenizers", "safetensors"})


def test_patching_onnx_needs_no_onnx_package(tmp_path: Path) -> None:
    """Not onnx, whose import takes longer than the patch, and whose reader loads what a file claims."""
    base = tiny_checkpoint(tmp_path / "base", dtype="F32")
    save(build(base, "nameless"), tmp_path / "model")
    nest.write(tiny_pack(base), tmp_path / "x.nest")
    code = "import sys, nestpatch\nnestpatch.apply_in_place(*sys.argv[1:])"
    loaded = modules_after(code, str(tmp_path / "model"), str(tmp_path / "x.nest"))
    assert (tmp_path / "model" / "model.onnx.nestpatch.json").is_file()
    assert not loaded & (HEAVY | {"onnx", "onnxruntime", "gguf"})


def test_importing_the_package_loads_nothing() -> None:
    assert not modules_after("import nestpatch") & (HEAVY | {"numpy", "ml_dtypes", "safetensors"})


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["apply", "--help"], ["train", "--help"], ["export", "--help"], ["trust", "add", "--help"], ["--version"]],
)
def test_help_loads_only_click(arguments: list[str]) -> None:
    code = """
import contextlib, io, sys
from nestpatch.cli import main
text = io.StringIO()
with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
    main(sys.argv[1:], prog_name="nestpatch")
assert "nestpatch" in text.getvalue(), text.getvalue()
"""
    loaded = modules_after(code, *arguments)
    assert "click" in loaded
    assert not loaded & ((HEAVY - {"click"}) | {"numpy", "ml_dtypes", "safetensors"})


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of this package that one statement imports; `from a import b` may name the module a.b."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not followed here"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in FILES else str(node.module) for name in names]
    else:
        return
    yield from (name for name in names if name in FILES)


def statements(node: ast.AST, *, lazy: bool) -> Iterator[ast.AST]:
    """Everything below a node; without `lazy` only what runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not lazy and (isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(child)):
            continue
        yield child
        yield from statements(child, lazy=lazy)


@cache
def imports_of(name: str, *, lazy: bool) -> frozenset[str]:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    return frozenset(found for node in statements(tree, lazy=lazy) for found in imported(node)) - {name}


def layer(name: str) -> int:
    """The layer of a module: that of its longest known prefix."""
    while True:
        for number, members in enumerate(LAYERS):
            if name in members:
                return number
        name = name.rpartition(".")[0]
        assert name != "nestpatch", "a new top-level module: give it a layer"


@pytest.mark.parametrize("name", [name for name in FILES if name != "nestpatch"])
def test_imports_point_down(name: str) -> None:
    """Imports inside functions and for type checkers count too: they are dependencies as well."""
    upward = [other for other in imports_of(name, lazy=True) if layer(other) > layer(name)]
    assert not upward, f"{name} imports {', '.join(upward)} from a higher layer"


@pytest.mark.parametrize("name", list(FILES))
def test_private_modules_stay_in_their_room(name: str) -> None:
    """A module with an underscore is imported by its neighbours and by the rooms inside its own alone."""
    for other in imports_of(name, lazy=True):
        room, _, module = other.rpartition(".")
        if module.startswith("_") and not module.startswith("__"):
            assert name == room or name.startswith(f"{room}."), f"{name} imports {other}, which is private to {room}"


def test_the_root_imports_nothing_when_it_is_imported() -> None:
    assert imports_of("nestpatch", lazy=False) == frozenset()


def test_only_the_registry_of_formats_looks_back() -> None:
    """No cycle among the imports that run at import time; among all, only open_checkpoint knows its formats."""
    assert cycles(lazy=False) == set()
    assert cycles(lazy=True) <= {("nestpatch.formats.checkpoint", f"nestpatch.formats.{f}") for f in ("safetensors",)}


def cycles(*, lazy: bool) -> set[tuple[str, str]]:
    """Pairs (a, b) where a imports b, and b reaches a again. The root's lazy doors lead everywhere and are left out."""

    def reach(name: str) -> set[str]:
        seen: set[str] = set()
        todo = [name]
        while todo:
            fresh = imports_of(todo.pop(), lazy=lazy) - seen - {"nestpatch"}
            seen |= fresh
            todo += fresh
        return seen

    pairs = {(a, b) for a in FILES for b in imports_of(a, lazy=lazy) - {"nestpatch"} if a != "nestpatch" and a in reach(b)}
    # Either direction names the same cycle.
    return {tuple(sorted(pair)) for pair in pairs}  # type: ignore[misc]


@pytest.mark.parametrize(
    "name",
    [*(f"nestpatch.{name}" for name in ("errors", "events", "rows", "delta", "pack", "packing")), *DEPLOYED],
)
def test_the_deployment_side_names_no_heavy_package(name: str) -> None:
    """Not even lazily: an import inside a function would fail on a host without the package."""
    assert not named_packages(name) & HEAVY


def named_packages(name: str) -> set[str]:
    """The packages that a module imports anywhere."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named.add(str(node.module).partition(".")[0])
    return named


@pytest.mark.parametrize("name", HUB)
def test_the_hub_side_names_its_client_alone(name: str) -> None:
    """And that only inside functions: whoever patches a local file does not pay for it."""
    assert not named_packages(name) & (HEAVY - {"huggingface_hub"})
