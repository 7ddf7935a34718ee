"""Another machine: a fresh home, a fresh process, and the environment by which huggingface_hub finds the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nestpatch

# What is in a developer's environment must not reach the tests; loopback never goes through a proxy.
FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
QUIET = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "HF_HUB_DISABLE_PROGRESS_BARS")


@dataclass(frozen=True)
class Machine:
    """Somebody's account on some machine."""

    home: Path
    endpoint: str
    token: str | None = None
    more: dict[str, str] = field(default_factory=dict)

    def environment(self, **more: str) -> dict[str, str]:
        """Of a process on this machine."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        own = {"HOME": str(self.home), "HF_HOME": str(self.home / "hf"), "HF_ENDPOINT": self.endpoint}
        token = {"HF_TOKEN": self.token} if self.token else {}
        root = str(Path(nestpatch.__file__).parent.parent)
        return kept | own | token | dict.fromkeys(QUIET, "1") | {"PYTHONPATH": root} | self.more | more

    def start(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs `python ...` in a process of its own, whatever becomes of it."""
        self.home.mkdir(parents=True, exist_ok=True)
        environment = self.environment(**more)
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)

    def run(self, code: str, *arguments: str, **more: str) -> Any:
        """Runs Python code that may leave a JSON value in `result`; returns it. Fails with its stderr."""
        full = f"import json, sys\nresult = None\n{code}\nprint(json.dumps(result))"
        done = self.start("-c", full, *arguments, **more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])
