"""`Pack`: the content of a `.nest` file, and the value that most of the library passes around.

`Manifest` states what the pack is, which model it is for and how it was made; `TensorDelta` holds the change of one weight
matrix; `Label` is the part of the manifest that the publisher chooses. The fields are those of docs/nest-format.md.
Each constructor checks its own object and raises PackContentError; `Pack` also checks that the parts agree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.detector import Detector, DetectorFacts
from nestpatch.errors import DataError, PackContentError
from nestpatch.rows import BLOCK_TYPES, DTYPES, SKETCHES, FloatArray, Rows, dtype_name

FORMATS = ("nest/1", "nest/2")
"""nest/2 is that of the packs whose base is quantized, at least in part, and of those with a detector."""
# semver.org, section "Is there a suggested regular expression", without build metadata groups.
_SEMVER = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(?:-(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*)?"
    r"(?:\+[0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*)?",
    re.ASCII,
)
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
"""RFC 3339, UTC, whole seconds."""
MAX_VERSION = 64
"""Characters of a version, at most."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise PackContentError(reason)


def name_problem(name: str) -> str | None:
    """Why a text is not a valid pack name, or None.

    Args:
        name: Letters, digits, dots, underscores and hyphens. Path separators are not allowed: names become file names.
    """
    return None if _NAME.fullmatch(name) else f"{name[:100]!r} is not a pack name (letters, digits, . _ -)"


def version_problem(version: str) -> str | None:
    """Why a text is not a valid version, or None.

    Args:
        version: A semantic version of at most MAX_VERSION characters: Python does not parse numbers of thousands of digits.
    """
    if len(version) > MAX_VERSION:
        return f"version {version[:20]!r}.. has {len(version)} characters; {MAX_VERSION} are allowed"
    return None if _SEMVER.fullmatch(version) else f"version {version[:100]!r} is not semver (1.2.3)"


def _require_digest(value: str, what: str) -> None:
    _require(bool(_SHA256.fullmatch(value)), f"{what} is not a SHA-256 in lower-case hex: {value[:80]!r}")


@dataclass(frozen=True)
class TensorIdentity:
    """One tensor of the base model, as it was when the pack was made."""

    shape: tuple[int, ...]
    """In elements, also where blocks are stored."""
    dtype: str
    """One of DTYPES, or of BLOCK_TYPES where it is stored quantized."""
    sha256: str
    """SHA-256 of the whole tensor's bytes, as they are stored."""
    rows_sha256: str
    """SHA-256 of the touched rows, in order, as they are stored."""

    def __post_init__(self) -> None:
        known = (*DTYPES, *BLOCK_TYPES)
        _require(self.dtype in known, f"a base tensor has dtype {self.dtype[:40]!r}; known are {', '.join(known)}")
        _require(2 <= len(self.shape) <= 3 and all(n > 0 for n in self.shape), f"impossible shape {list(self.shape)}")
        if self.quantized:
            width, elements = self.shape[-1], BLOCK_TYPES[self.dtype][0]
            _require(width % elements == 0, f"a base tensor has rows of {width} elements, {self.dtype} blocks of {elements}")
        _require_digest(self.sha256, "a tensor's sha256")
        _require_digest(self.rows_sha256, "a tensor's rows_sha256")

    @property
    def quantized(self) -> bool:
        """Whether blocks are stored instead of plain numbers: the digests are then those of the blocks."""
        return self.dtype in BLOCK_TYPES

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, in_features), with the experts of a stacked tensor flattened into the rows."""
        rows = 1
        for n in self.shape[:-1]:
            rows *= n
        return rows, self.shape[-1]


@dataclass(frozen=True)
class BaseIdentity:
    """The model that a pack is for. `model_id` and `revision` are hints for people; the digests in `tensors` decide."""

    model_id: str
    revision: str
    architecture: str
    dtype: str
    tensors: Mapping[str, TensorIdentity]


@dataclass(frozen=True)
class Manifest:
    """Everything in a pack except the arrays."""

    name: str
    version: str
    description: str
    license: str
    created: str
    """RFC 3339, UTC, whole seconds: 2026-11-23T12:00:00Z."""
    base: BaseIdentity
    result: Mapping[str, str]
    """Tensor name -> SHA-256 of its touched rows after the merge at strength 1, in the base's dtype. Of a quantized tensor it
    is a hint: two machines may round a block differently."""
    tags: tuple[str, ...] = ()
    supersedes: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    method: Mapping[str, Any] = field(default_factory=dict)
    """How the pack was made: the recipe, seeds, digests and sizes of the data, library versions, device."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """What was measured `before` and `after`; empty where nothing was."""
    detector: DetectorFacts | None = None
    """What is known of the pack's detector; None where it has none."""

    def __post_init__(self) -> None:
        for problem in (name_problem(self.name), version_problem(self.version)):
            _require(problem is None, problem or "")
        _require(is_utc_time(self.created), f"created is not a UTC time like 2026-11-23T12:00:00Z: {self.created[:80]!r}")
        for pack_id in (*self.supersedes, *self.requires):
            _require_digest(pack_id, "an entry of supersedes or requires")
        for name, value in self.result.items():
            _require_digest(value, f"the result digest of {name}")

    @property
    def format(self) -> str:
        """The format of the file, one of FORMATS: the base and the detector decide."""
        return FORMATS[self.detector is not None or any(tensor.quantized for tensor in self.base.tensors.values())]


def is_utc_time(text: str) -> bool:
    """Whether a text is a UTC time in whole seconds: 2026-11-23T12:00:00Z. Such texts sort like their times."""
    if not _CREATED.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text.removesuffix("Z") + "+00:00")
    except ValueError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """The change of one weight matrix."""

    name: str
    delta: Rows
    """F32, BF16 or F16 [clusters, in_features]."""
    rows: npt.NDArray[Any]
    """The touched rows, int32 or int64 [neurons], sorted, unique."""
    cluster: npt.NDArray[Any]
    """Which delta each touched row gets, uint8 or uint16 [neurons]."""
    sketch: npt.NDArray[np.float16]
    """Sketches of the base's rows, float16 [neurons, 4]."""

    def __post_init__(self) -> None:
        name, neurons = self.name, self.rows.shape
        _require(bool(_TENSOR_NAME.fullmatch(name)) and len(name) <= 256, f"{name[:100]!r} is not a tensor name")
        _require(self.delta.dtype in DTYPES.values(), f"{name}:delta has dtype {self.delta.dtype}")
        _require(self.rows.dtype in (np.int32, np.int64), f"{name}:rows has dtype {self.rows.dtype}")
        _require(self.cluster.dtype in (np.uint8, np.uint16), f"{name}:cluster has dtype {self.cluster.dtype}")
        _require(self.sketch.dtype == np.float16, f"{name}:sketch has dtype {self.sketch.dtype}")
        _require(self.delta.ndim == 2 and min(self.delta.shape) > 0, f"{name}:delta has shape {list(self.delta.shape)}")
        _require(len(neurons) == 1 and neurons[0] > 0, f"{name}:rows has shape {list(neurons)}")
        _require(self.cluster.shape == neurons, f"{name}: rows and cluster differ in length")
        _require(self.sketch.shape == (*neurons, SKETCHES), f"{name}:sketch has shape {list(self.sketch.shape)}")
        _require(bool(np.isfinite(self.delta.astype(np.float32)).all()), f"{name}:delta holds NaN or infinity")
        _require(bool(np.isfinite(self.sketch.astype(np.float32)).all()), f"{name}:sketch holds NaN or infinity")
        _require(int(self.rows[0]) >= 0, f"{name}: row {int(self.rows[0])} is out of range")
        _require(bool((self.rows[1:] > self.rows[:-1]).all()), f"{name}: rows are unsorted or repeated")
        used = np.unique(self.cluster)
        _require(int(used[-1]) < self.clusters, f"{name}: cluster {int(used[-1])} has no delta; there are {self.clusters}")
        _require(len(used) == self.clusters, f"{name}: {self.clusters - len(used)} of {self.clusters} deltas have no row")

    @property
    def clusters(self) -> int:
        """Number of deltas."""
        return int(self.delta.shape[0])

    @property
    def neurons(self) -> int:
        """Number of changed rows."""
        return len(self.rows)

    def dense(self, start: int = 0, stop: int | None = None) -> FloatArray:
        """The change of each touched row, with the shared deltas written out.

        Args:
            start: First touched row, counted from 0 within `rows`.
            stop: End of the slice; None for all that follow.

        Returns:
            float32 [stop - start, in_features].
        """
        dense: FloatArray = self.delta.astype(np.float32)[self.cluster[start:stop]]
        return dense


@dataclass(frozen=True, eq=False)
class Pack:
    """The content of a `.nest` file.

    Raises:
        PackContentError: The manifest and the arrays contradict each other.
    """

    manifest: Manifest
    deltas: tuple[TensorDelta, ...]
    """In the order of their names."""
    detector_weight: FloatArray | None = None
    """The weight of the detector that the manifest describes, float32 [hidden]; None where there is none."""

    def __post_init__(self) -> None:
        found, facts = self.detector_weight is not None, self.manifest.detector is not None
        _require(found or not facts, "the manifest describes a detector, and there is no tensor detector:weight")
        _require(facts or not found, "there is a tensor detector:weight, and the manifest describes no detector")
        _ = self.detector  # checks itself
        names = [delta.name for delta in self.deltas]
        _require(bool(names), "the pack changes nothing: it has no tensors")
        _require(names == sorted(set(names)), "the tensors of a pack must be unique and in the order of their names")
        for what, listed in (("base.tensors", self.manifest.base.tensors), ("result.tensors", self.manifest.result)):
            odd = sorted(set(listed) ^ set(names))
            _require(not odd, f"{what} and the arrays disagree about {', '.join(odd[:3])}")
        for delta in self.deltas:
            rows, in_features = self.manifest.base.tensors[delta.name].matrix
            last, width = int(delta.rows[-1]), int(delta.delta.shape[1])
            _require(last < rows, f"{delta.name}: row {last} is out of range; the matrix has {rows}")
            _require(width == in_features, f"{delta.name}: deltas are {width} wide, the matrix {in_features}")

    def __iter__(self) -> Iterator[TensorDelta]:
        return iter(self.deltas)

    @property
    def detector(self) -> Detector | None:
        """The detector; None where the pack has none."""
        facts, weight = self.manifest.detector, self.detector_weight
        return None if facts is None or weight is None else Detector(facts, weight)

    @property
    def parameters(self) -> int:
        """Number of values in all deltas."""
        return sum(delta.delta.size for delta in self.deltas)

    @property
    def delta_dtypes(self) -> tuple[str, ...]:
        """The storage dtypes of the deltas, by their safetensors names."""
        return tuple(sorted({dtype_name(delta.delta.dtype) for delta in self.deltas}))

    @property
    def label(self) -> str:
        """Name and version: "no-harm 1.2.0"."""
        return f"{self.manifest.name} {self.manifest.version}"


@dataclass(frozen=True)
class Label:
    """The facts of a pack that its publisher chooses.

    Attributes:
        name: Letters, digits, dots, underscores and hyphens, at most 96: "no-harm".
        version: A semantic version.
        description: One sentence for people.
        license: An SPDX identifier: "Apache-2.0".
        tags: Words to find the pack by.
        supersedes: Ids (SHA-256) of the packs that this one replaces.
        requires: Ids (SHA-256) of the packs that must be applied before this one.
    """

    name: str
    version: str = "1.0.0"
    description: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()
    supersedes: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    def check(self) -> None:
        """Checks the label before any work, by the rules that a manifest enforces at the end.

        Raises:
            DataError: The name or the version is not valid, or SOURCE_DATE_EPOCH is not a time.
        """
        if problem := name_problem(self.name) or version_problem(self.version):
            raise DataError(problem)
        creation_time()


def utc_now() -> str:
    """The time by this machine's clock, in the form of TIME_FORMAT."""
    return datetime.now(timezone.utc).strftime(TIME_FORMAT)


def creation_time() -> str:
    """The time to write into what is made now: `utc_now`, or SOURCE_DATE_EPOCH where a build has to be reproducible.

    Returns:
        A time in the form of TIME_FORMAT.

    Raises:
        DataError: SOURCE_DATE_EPOCH is not a time in seconds.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return utc_now()
    try:
        return datetime.fromtimestamp(int(epoch), timezone.utc).strftime(TIME_FORMAT)
    except (ValueError, OverflowError, OSError) as error:
        raise DataError(f"SOURCE_DATE_EPOCH is not a time in seconds: {epoch!r}") from error
