"""Packs as adapters of a running server: llama-server (llama.cpp) and vLLM.

llama-server reads its adapters when it starts (`--lora FILE`); GET and POST /lora-adapters read and set their scales, and an
adapter that a POST leaves out is disabled (tools/server/README.md of llama.cpp). vLLM loads and drops PEFT directories while it
runs (POST /v1/load_lora_adapter and /v1/unload_lora_adapter) and lists them as models whose parent is the base; a request
chooses one by its name (docs/features/lora.md of vLLM).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeAlias

from nestpatch.errors import DataError, EndpointAnswerError, OutputError
from nestpatch.export.adapters import export_gguf_lora, export_lora
from nestpatch.export.results import VLLM_RANKS
from nestpatch.gate import Proven
from nestpatch.patcher.plan import check_strength, make_plan
from nestpatch.patcher.recovery import open_model
from nestpatch.runtimes.endpoint import Endpoint

Server: TypeAlias = Literal["llama-server", "vllm"]
SERVERS: tuple[Server, ...] = ("llama-server", "vllm")
_OWNERS: dict[object, Server] = {"llamacpp": "llama-server", "vllm": "vllm"}
"""The `owned_by` of the models that a server lists -> the server."""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter of a server.

    Attributes:
        name: How requests and commands name it: its name in vLLM, its number in llama-server.
        path: Its file or directory, as the server names it.
        scale: What it is multiplied with; None in vLLM, which has no scales.
    """

    name: str
    path: str
    scale: float | None

    def as_json(self) -> dict[str, Any]:
        """The adapter for `--json`."""
        return {"id": self.name, "path": self.path, "scale": self.scale}


@dataclass(frozen=True)
class LoadedAdapter:
    """What `load` did.

    Attributes:
        pack: Label of the pack.
        server: "llama-server" or "vllm".
        output: The adapter on this machine.
        adapter: The adapter in the server; None where the server has to be started with it first.
        start: How the server is started with it; empty where it is loaded.
    """

    pack: str
    server: Server
    output: Path
    adapter: ServedAdapter | None
    start: str

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the address that the command was given."""
        adapter = self.adapter.as_json() if self.adapter is not None else None
        start = self.start or None
        return {"pack": self.pack, "server": self.server, "output": str(self.output), "adapter": adapter, "start": start}


def server_of(endpoint: Endpoint) -> Server:
    """Finds out which server it is.

    Args:
        endpoint: The server.

    Returns:
        Its kind, by the owner of the models that it lists.

    Raises:
        DataError: It is another server.
        EndpointError: It does not answer.
    """
    owners = {model.get("owned_by") for model in endpoint.models()}
    found = {_OWNERS[owner] for owner in owners if isinstance(owner, str) and owner in _OWNERS}
    if len(found) != 1:
        advice = f"If it is one of them: --server {' or '.join(SERVERS)}. Others: merge the pack (nestpatch apply)."
        raise DataError(f"{endpoint.url} is neither llama-server nor vLLM by the models that it lists", advice=advice)
    return found.pop()


def list_adapters(endpoint: Endpoint, server: Server) -> list[ServedAdapter]:
    """Lists the adapters of a server.

    Args:
        endpoint: The server.
        server: Its kind.

    Returns:
        The adapters that it has loaded.

    Raises:
        EndpointError: It does not answer, or does not list adapters.
    """
    if server == "vllm":
        models = endpoint.models()
        return [ServedAdapter(model["id"], str(model.get("root")), None) for model in models if model.get("parent")]
    address = f"{endpoint.server.root}/lora-adapters"
    found = endpoint.server.json("GET", address)
    try:
        return [ServedAdapter(str(int(one["id"])), str(one["path"]), float(one["scale"])) for one in found]
    except (LookupError, TypeError, ValueError):
        raise endpoint.server.strange(address, found) from None


def load(
    endpoint: Endpoint,
    server: Server,
    proven: Proven,
    output: Path,
    *,
    base: Path | None = None,
    strength: float = 1.0,
    name: str | None = None,
    server_path: str | None = None,
) -> LoadedAdapter:
    """Writes a pack as an adapter, and loads it into a server.

    Args:
        endpoint: The server.
        server: Its kind.
        proven: The pack, which passed the gate.
        output: Where the adapter is written; the same adapter may be there already.
        base: The files of the server's model, which are compared with the pack's base: a server does not show its weights.
        strength: Multiplies the pack's deltas: in the adapter for vLLM, as its scale for llama-server.
        name: Its name in vLLM; None: name and version of the pack.
        server_path: Where the server finds the adapter, if not at the absolute path of `output`.

    Returns:
        What was done. llama-server that was not started with the adapter file is not changed.

    Raises:
        DataError: The strength is out of range, or llama-server has a file of that name at another path or twice.
        OutputError: Another file is at `output`.
        BaseMismatchError: `base` is not the pack's base.
        EndpointError: The server does not answer, or refuses the adapter.
    """
    check_strength(strength)
    adapters = list_adapters(endpoint, server)  # before anything is written
    if base is not None:
        make_plan(proven.pack, open_model(base)[0])
    path = server_path or str(output.absolute())
    found = _at_path(adapters, path) if server == "llama-server" else None
    rank = _write(proven, server, output, base, strength)
    if server == "vllm":
        manifest = proven.pack.manifest
        wanted = ServedAdapter(name or f"{manifest.name}-{manifest.version}", path, None)
        _load_into_vllm(endpoint, wanted, adapters, rank)
        return LoadedAdapter(proven.pack.label, server, output, wanted, "")
    if found is None:
        return LoadedAdapter(proven.pack.label, server, output, None, f"llama-server -m BASE.gguf --lora {path}")
    return LoadedAdapter(proven.pack.label, server, output, set_scale(endpoint, server, found.name, strength), "")


def set_scale(endpoint: Endpoint, server: Server, name: str, scale: float) -> ServedAdapter:
    """Sets the scale of one adapter of llama-server; the others keep theirs.

    Args:
        endpoint: The server.
        server: Its kind.
        name: The adapter: its number, its path, or the name of its file.
        scale: What it is multiplied with; 0 disables it.

    Returns:
        The adapter as the server has it now.

    Raises:
        DataError: The server has no scales, or no such adapter.
        EndpointError: It does not answer, or did not do it.
    """
    if server == "vllm":
        advice = "Load the pack again under another name with --strength, and drop this one (nestpatch adapter unload)."
        raise DataError("vLLM has no scales of adapters", advice=advice)
    adapters = list_adapters(endpoint, server)
    found = adapter_named(adapters, name)
    if found.scale == scale:
        return found
    scales = [{"id": int(one.name), "scale": scale if one == found else one.scale} for one in adapters]
    endpoint.server.text("POST", f"{endpoint.server.root}/lora-adapters", scales)
    now = adapter_named(list_adapters(endpoint, server), found.name)
    if now.scale is None or abs(now.scale - scale) > 1e-6:
        raise EndpointAnswerError(f"{endpoint.url} keeps the scale of {name} at {now.scale}, asked for {scale:g}")
    return now


def unload(endpoint: Endpoint, server: Server, name: str) -> ServedAdapter:
    """Drops an adapter from vLLM; disables one of llama-server, which keeps it in memory.

    Args:
        endpoint: The server.
        server: Its kind.
        name: The adapter.

    Returns:
        The adapter as it was in vLLM, or as it is now in llama-server.

    Raises:
        DataError: The server has no such adapter.
        EndpointError: It does not answer, or did not do it.
    """
    if server == "llama-server":
        return set_scale(endpoint, server, name, 0.0)
    found = adapter_named(list_adapters(endpoint, server), name)
    endpoint.server.text("POST", f"{endpoint.url}/unload_lora_adapter", {"lora_name": found.name})
    if any(one.name == found.name for one in list_adapters(endpoint, server)):
        raise EndpointAnswerError(f"{endpoint.url} still lists the adapter {found.name}")
    return found


def _write(proven: Proven, server: Server, output: Path, base: Path | None, strength: float) -> int:
    """Writes the adapter, unless the same one is there already. Returns its rank."""
    export, own = (export_lora, strength) if server == "vllm" else (export_gguf_lora, 1.0)
    if not output.exists():
        return export(proven, output, model=base, strength=own).rank
    # Equal packs give equal bytes.
    with tempfile.TemporaryDirectory() as folder:
        made = export(proven, Path(folder) / output.name, model=base, strength=own)
        if _digests(made.output) != _digests(output):
            raise OutputError(f"{output} is there already, and is another adapter", advice="Choose another path with -o.")
    return made.rank


def _digests(adapter: Path) -> dict[str, str]:
    """The files of an adapter, a file or a directory."""
    files = sorted(adapter.iterdir()) if adapter.is_dir() else [adapter]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _load_into_vllm(endpoint: Endpoint, wanted: ServedAdapter, adapters: Sequence[ServedAdapter], rank: int) -> None:
    same = next((one for one in adapters if one.name == wanted.name), None)
    if same == wanted:
        return
    if same is not None:
        advice = f"Choose another --name, or drop it first: nestpatch adapter unload {endpoint.url} {wanted.name}"
        raise DataError(f"{endpoint.url} has an adapter {wanted.name} already, from {same.path}", advice=advice)
    try:
        endpoint.server.text("POST", f"{endpoint.url}/load_lora_adapter", {"lora_name": wanted.name, "lora_path": wanted.path})
    except EndpointAnswerError as error:
        accepted = next((one for one in VLLM_RANKS if one >= rank), VLLM_RANKS[-1])
        error.advice = (
            f"Start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora --max-lora-rank {accepted}. It has to "
            f"find {wanted.path} on its own disk: --server-path names it where it is elsewhere."
        )
        raise
    if wanted not in list_adapters(endpoint, "vllm"):
        raise EndpointAnswerError(f"{endpoint.url} took the adapter {wanted.name}, and does not list it")


def _at_path(adapters: Sequence[ServedAdapter], path: str) -> ServedAdapter | None:
    """The adapter of llama-server that was read from a path; None without one. Raises DataError where that is not certain."""
    found = [one for one in adapters if one.path == path]
    if len(found) > 1:
        advice = "Start llama-server with it once, or set the scale of one: nestpatch adapter scale URL NUMBER SCALE."
        raise DataError(f"the server has {len(found)} adapters from {path}", advice=advice)
    alike = [one.path for one in adapters if _file_name(one.path) == _file_name(path)]
    if alike and not found:
        advice = f"If it is the same file: --server-path {alike[0]}. If it is another adapter, choose another name with -o."
        raise DataError(f"the server has an adapter of that name from {', '.join(alike)}, and none from {path}", advice=advice)
    return found[0] if found else None


def adapter_named(adapters: Sequence[ServedAdapter], name: str) -> ServedAdapter:
    """Finds an adapter.

    Args:
        adapters: From `list_adapters`.
        name: Its name, its path, or the name of its file.

    Returns:
        The adapter.

    Raises:
        DataError: None or several are called so.
    """
    found = [one for one in adapters if name in (one.name, one.path)]
    found = found or [one for one in adapters if _file_name(one.path) in (name, f"{name}.gguf")]
    if len(found) != 1:
        listed = ", ".join(f"{one.name} ({one.path})" for one in adapters) or "none"
        what = f"{len(found)} adapters {name}" if found else f"no adapter {name}"
        raise DataError(f"the server has {what}", advice=f"Its adapters: {listed}.")
    return found[0]


def _file_name(path: str) -> str:
    """The last part of a path of any machine."""
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
