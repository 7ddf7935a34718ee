"""Servers that speak the adapter protocols of llama-server and of vLLM, as their documentation and sources have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.hubserver.messages import Answer, Request, as_json
from tests.hubserver.server import Listener


class AdapterServer:
    """What both have: a port, and the list of models."""

    owner = ""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, Any]] = []
        self.listener = Listener(self._answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.port}/v1"

    def __enter__(self):
        self.listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.stop()

    def _answer(self, request: Request) -> Answer:
        self.log.append((request.method, request.path, request.json()))
        if (request.method, request.path) == ("GET", "/v1/models"):
            return as_json({"object": "list", "data": self.models()})
        return self.answer(request.method, request.path, request.json())

    def models(self) -> list[dict[str, Any]]:
        return [{"id": "base", "object": "model", "owned_by": self.owner, "root": "/models/base", "parent": None}]

    def answer(self, method: str, path: str, body: Any) -> Answer:
        raise NotImplementedError


class LlamaServer(AdapterServer):
    """Adapters are given at the start, at scale 1; POST sets all scales, and 0 for those that it leaves out."""

    owner = "llamacpp"

    def __init__(self, *files: str) -> None:
        super().__init__()
        self.files, self.scales = list(files), [1.0] * len(files)

    def answer(self, method: str, path: str, body: Any) -> Answer:
        if path != "/lora-adapters":
            return as_json({"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}, 404)
        if method == "POST":
            wanted = {entry["id"]: float(entry["scale"]) for entry in body}
            self.scales = [wanted.get(number, 0.0) for number in range(len(self.files))]
            return as_json({"success": True})
        pairs = enumerate(zip(self.files, self.scales, strict=True))
        more = {"task_name": "", "prompt_prefix": ""}
        return as_json([{"id": number, "path": file, "scale": scale} | more for number, (file, scale) in pairs])


class Vllm(AdapterServer):
    """Loads directories that it finds, answers with plain text, and refuses a name that it has already."""

    owner = "vllm"

    def __init__(self, *, updates: bool = True) -> None:
        super().__init__()
        self.updates, self.adapters = updates, dict[str, str]()

    def models(self) -> list[dict[str, Any]]:
        found = [{"id": name, "owned_by": "vllm", "root": path, "parent": "base"} for name, path in self.adapters.items()]
        return super().models() + found

    def answer(self, method: str, path: str, body: Any) -> Answer:
        if not self.updates or path not in {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}:
            return as_json({"detail": "Not Found"}, 404)
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            if self.adapters.pop(name, None) is None:
                return self._error(f"The lora adapter '{name}' cannot be found.", 404)
            return Answer(200, {"Content-Type": "text/plain"}, f"Success: LoRA adapter '{name}' removed successfully.".encode())
        if name in self.adapters:
            return self._error(f"The lora adapter '{name}' has already been loaded.", 400)
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return self._error(f"Loading lora {name} failed: No adapter found for {body['lora_path']}", 404)
        self.adapters[name] = body["lora_path"]
        return Answer(200, {"Content-Type": "text/plain"}, f"Success: LoRA adapter '{name}' added successfully.".encode())

    def _error(self, message: str, status: int) -> Answer:
        return as_json({"error": {"message": message, "type": "InvalidUserInput", "code": status}}, status)
