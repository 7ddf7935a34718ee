"""What a fleet's nightly `nestpatch update` costs: `python -m bench.update [--rounds N] [--log]`.

Whole processes against a Hub on loopback: nothing new, an upgrade, going back; and a host with 20 models, updated by one
command and by 20. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.harness import TOOL, Run, measure, medians, options_of, publish
from tests.hubserver.accounts import WRITER
from tests.hubserver.server import Hub

REPO = "acme/no-harm"
MODELS = 20


def prepare(folder: Path) -> None:
    """Makes the model and two versions, in a process of its own: what it loads would count for every child."""
    from nestpatch.formats import nest
    from tests.helpers import tiny_checkpoint, tiny_pack

    model = tiny_checkpoint(folder / "model", hidden=256, inter=1024, layers=8)
    for version, seed in (("1.0.0", 0), ("1.1.0", 1)):
        nest.write(tiny_pack(model, version=version, seed=seed, neurons=64), folder / f"{version}.nest")


class Fleet:
    """A publisher, a model that follows its channel, and the requests that the Hub has seen."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.hub, self.folder, self.model = hub, folder, folder / "model"
        self.host = [folder / "host" / f"model-{number}" for number in range(MODELS)]
        subprocess.run([sys.executable, "-m", "bench.update", "--step", folder], check=True)
        self.run("keygen", folder / "acme", "--no-password")
        self.run("trust", "add", folder / "acme.pub")

    def run(self, *words: object) -> tuple[Run, int]:
        """One command; what it took, and how many requests it made."""
        before = len(self.hub.log)
        taken, _ = measure([*TOOL, *words])
        return taken, len(self.hub.log) - before

    def run_each(self) -> tuple[Run, int]:
        """One command for each model of the host, one after another: seconds and bytes are sums."""
        runs, requests = zip(*(self.run("update", model, "--quiet", "--json") for model in self.host), strict=True)
        seconds, rss, written = zip(*runs, strict=True)
        return Run(sum(seconds), max(rss), sum(written)), sum(requests)

    def push(self, version: str) -> None:
        """Publishes a version."""
        self.run("push", self.folder / f"{version}.nest", REPO, "--key", self.folder / "acme.key")

    def one_round(self) -> dict[str, tuple[Run, int]]:
        """From a fresh channel to the base and back; the repository and the memory of it are new each time."""
        self.push("1.0.0")
        self.run("apply", self.model, f"hub://{REPO}", "--in-place", "--quiet")
        results = {"current": self.run("update", self.model, "--quiet", "--json")}
        results["status"] = self.run("status", self.model, "--json")
        self.push("1.1.0")
        results["upgrade"] = self.run("update", self.model, "--quiet", "--json")
        self.run("yank", REPO, "1.1.0", "--reason", "bench", "--key", self.folder / "acme.key")
        results["go_back"] = self.run("update", self.model, "--quiet", "--json")
        self.run("revert", self.model, "--quiet")
        self.forget()
        return results

    def round_of_the_host(self) -> dict[str, tuple[Run, int]]:
        """From a fresh channel to its second version, by one command and, from the same state, by one for each model."""
        self.push("1.0.0")
        for model in self.host:
            shutil.rmtree(model, ignore_errors=True)
            shutil.copytree(self.model, model)
        self.run("update", *self.host, "--channel", REPO, "--quiet")
        everything, kept = self.folder / "host", self.folder / "kept"
        shutil.copytree(everything, kept)
        self.push("1.1.0")
        results = {"upgrade, one command": self.run("update", *self.host, "--quiet", "--json")}
        results["current, one command"] = self.run("update", *self.host, "--quiet", "--json")
        shutil.rmtree(everything)
        kept.rename(everything)
        results["upgrade, each by its own"] = self.run_each()
        results["current, each by its own"] = self.run_each()
        shutil.rmtree(everything)
        self.forget()
        return {f"{MODELS} models: {name}": taken for name, taken in results.items()}

    def forget(self) -> None:
        """The next round starts with a first contact."""
        shutil.rmtree(self.hub.store.repo("model", REPO).folder)
        shutil.rmtree(self.folder / "user" / "channels")


@contextmanager
def local_hub(folder: Path) -> Iterator[Hub]:
    """A Hub that processes started meanwhile find, with a home of nestpatch of their own."""
    hub, before = Hub(folder / "hub"), dict(os.environ)
    hub.start()
    (folder / "user").mkdir(exist_ok=True)
    mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "NESTPATCH_HOME": str(folder / "user")}
    os.environ.update(mine | {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"})
    try:
        yield hub
    finally:
        os.environ.clear()
        os.environ.update(before)
        hub.stop()


def main() -> None:
    """Measures, prints the table and the JSON object."""
    options = options_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name, local_hub(Path(name)) as hub:
        fleet = Fleet(Path(name), hub)
        rounds = [fleet.one_round() | fleet.round_of_the_host() for _ in range(options.rounds + 1)][1:]
    results = {name: medians([done[name][0] for done in rounds]) for name in rounds[0]}
    requests = {name: max(done[name][1] for done in rounds) for name in rounds[0]}
    counted = "; ".join(f"{name}: {count}" for name, count in requests.items())
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    publish(
        "a fleet's update",
        f"Whole processes against the local Hub of the tests, medians of\n{options.rounds} rounds after one that was not"
        f" counted. `status` is a command without a network, for comparison.\nRequests: {counted}.\nLoad: {load}.",
        results,
        {"rounds": options.rounds, "requests": requests},
        log=options.log,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        prepare(Path(sys.argv[2]))
    else:
        main()
