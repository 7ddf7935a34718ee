"""The floor of patching in place: floor.c, compiled where there is a C compiler and OpenSSL, and the job that it does."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCE = Path(__file__).with_name("floor.c")


def build_floor(folder: Path) -> Path | None:
    """Compiles the program.

    Args:
        folder: Where it is written.

    Returns:
        The program; None without a compiler or OpenSSL's headers.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    program = folder / "floor"
    with TemporaryDirectory(dir=folder) as place:
        made = Path(place) / "floor"
        words = [compiler, "-O3", "-march=native", "-Wall", "-Wextra", "-Werror", "-o", made, SOURCE, "-lcrypto"]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            return None
        made.replace(program)
    return program


def write_job(model: Path, pack: Path, job: Path) -> None:
    """Writes the rows, deltas and digests of a pack in the form of floor.c.

    Args:
        model: The pack's base: one safetensors file of bfloat16.
        pack: The pack.
        job: The file to write.
    """
    import numpy as np

    from nestpatch.formats import nest

    content = nest.read(pack)
    with open(model, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    with open(job, "wb") as file:
        file.write(struct.pack("<Q", len(content.deltas)))
        for delta in content:
            offset = 8 + length + header[delta.name]["data_offsets"][0]
            digests = content.manifest.base.tensors[delta.name].rows_sha256, content.manifest.result[delta.name]
            file.write(struct.pack("<4Q", offset, delta.delta.shape[1], delta.neurons, delta.clusters))
            file.write(b"".join(map(bytes.fromhex, digests)))
            file.write(delta.rows.astype("<i8").tobytes())
            file.write(delta.cluster.astype("<i4").tobytes())
            file.write(delta.delta.astype(np.float32).tobytes())
