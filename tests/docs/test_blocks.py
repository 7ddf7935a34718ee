"""Every block of README.md and docs/ is run here on tiny models, or says in a comment why it is not run."""

from __future__ import annotations

import configparser
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nestpatch.hub import retry
from nestpatch.nest_train.recipe import make_recipe
from tests.calls import run
from tests.docs.blocks import BLOCKS, PROGRAMS, Block
from tests.docs.world import FIRST, SHORT
from tests.hubserver.accounts import WRITER
from tests.hubserver.server import Hub

TUTORIAL = "docs/tutorial.md"
"""Its blocks are one story: test_tutorial.py runs them."""
COMMANDS = [b for b in BLOCKS if b.language in (None, "sh") and b.reason is None and b.page != TUTORIAL]
SCRIPTS = [b for b in BLOCKS if b.language == "python" and b.reason is None and b.page != "README.md"]
"""tests/hub/test_readme.py runs that of the README."""
FINDS = ("diff", "doctor", "eval")
"""Commands that end with 1 when they find something: two packs differ, rows lack a pack, a random model refuses nothing."""
DATA = [b for b in BLOCKS if b.language in ("json", "toml", "ini")]


def named(blocks: list[Block]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", blocks, ids=[block.name for block in blocks])


@pytest.fixture
def hub(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A local Hub for blocks that name a repository."""
    if not re.search(r"\b(acme|fleet)/", block.text):
        yield
        return
    if shutil.which("git") is None:
        pytest.skip("the local Hub keeps its repositories in git, which is not installed")
    from huggingface_hub import close_session, constants

    server = Hub(tmp_path / "hub")
    server.start()
    url_template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HUGGINGFACE_CO_URL_TEMPLATE": url_template,
        "ENDPOINT": server.url,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {"HF_TOKEN": WRITER, "NO_PROXY": "127.0.0.1", "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retry, "WAITS", (0.0, 0.0))
    yield
    close_session()
    server.stop()


def words_of(command: str, world: Path) -> list[str]:
    """A command line as words. Folders at the root of the file system are in the world; one account owns all repositories."""
    command = re.sub(r"(?<=\s)/(srv|mnt)/", rf"{world}/\1/", command).replace("fleet/", "acme/fleet-")
    words = [word for word in shlex.split(command) if word != "\\"]
    return [found for word in words for found in (sorted(glob.glob(word)) if "*" in word and word.startswith("/") else [word])]  # noqa: PTH207 - as the shell


def make_room(words: list[str]) -> None:
    """What a command writes is not there before it."""
    outputs = [words[index + 1] for index, word in enumerate(words[:-1]) if word in ("-o", "--output")]
    if words[:2] == ["nestpatch", "keygen"]:
        outputs += [f"{words[2]}.key", f"{words[2]}.pub"]
    for output in map(Path, outputs):
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)


def carry_out(command: str, world: Path) -> None:
    """One line of a block. nestpatch runs in this process, which has imported torch once."""
    words = words_of(command, world)
    make_room(words)
    words, into = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)
    if words[0] == "nestpatch":
        words += SHORT.get(words[1], [])
        done = run(*words[1:])
        if into is not None:
            Path(into).write_text(done.stdout, "utf-8")
        wanted = (0, 1) if words[1] in FINDS else (0,)
        error = re.search(r"^\w+Error:", done.stderr, re.MULTILINE)
        assert done.exit_code in wanted, f"{command}\n{done.stdout}\n{done.stderr}"
        assert not error, f"{command}\n{done.stderr}"
        return
    if shutil.which(words[0], path=(path := f"{Path(sys.executable).parent}:{os.environ['PATH']}")) is None:
        pytest.skip(f"{words[0]} is not installed")
    subprocess.run(shlex.join(words).replace("'&&'", "&&"), shell=True, check=True, env=os.environ | {"PATH": path})


def test_every_block_is_known() -> None:
    """A block with an unknown program or language would not be run, and nothing would say so."""
    assert {block.language for block in BLOCKS} <= {None, "", "sh", "python", "json", "toml", "ini", "text", "yaml"}
    for block in BLOCKS:
        if block.language in (None, "sh") and block.reason is None:
            for command in block.commands:
                assert command.split()[0] in PROGRAMS, f"{block.name} needs a comment <!-- not run: REASON -->: {command}"


def test_reasons_are_short_and_blocks_that_come_first_exist() -> None:
    assert set(FIRST) <= {(block.page, block.commands[0]) for block in COMMANDS}
    assert all(10 <= len(block.reason) <= 80 or block.reason == "a formula" for block in BLOCKS if block.reason)


@named(COMMANDS)
def test_commands(block: Block, hub: None, world: Path) -> None:
    for command in [*FIRST.get((block.page, block.commands[0]), []), *block.commands]:
        carry_out(command, world)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@named(SCRIPTS)
def test_scripts(block: Block, world: Path) -> None:
    exec(compile(block.text.replace("builtin_suites(100)", "builtin_suites(1)"), block.name, "exec"), {})


@named([b for b in BLOCKS if b.language == "python"])
def test_scripts_compile(block: Block) -> None:
    compile(block.text, block.name, "exec")


@named(DATA)
def test_data(block: Block, tmp_path: Path) -> None:
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "ini":
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(block.text)
        assert parser.sections()
    else:
        (tmp_path / "recipe.toml").write_text(block.text, "utf-8")
        make_recipe(tmp_path / "recipe.toml")
