"""`Pack`: the content of a `.nest` file, and the value that most of the library passes around.

`Manifest` states what the pack is, which model it is for and how it was made; `TensorDelta`, of `nestpatch.delta`, holds the
change of one weight matrix; `Label` is the part of the manifest that the publisher chooses. The fields are those of
docs/nest-format.md.
Each constructor checks its own object and raises PackContentError; `Pack` also checks that the parts agree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from datetime import datetime, timezone
from typing import Any

from nestpatch.delta import TensorDelta, require
from nestpatch.detector import Detector, DetectorFacts
from nestpatch.errors import DataError
from nestpatch.rows import BLOCK_TYPES, DTYPES, FloatArray, dtype_name
from nestpatch.values import dataclass

FORMATS = ("nest/1", "nest/2")
"""nest/2 is that of the packs that hold something of `Pack.additions`."""
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
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


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
    require(bool(_SHA256.fullmatch(value)), f"{what} is not a SHA-256 in lower-case hex: {value[:80]!r}")


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
        require(self.dtype in known, f"a base tensor has dtype {self.dtype[:40]!r}; known are {', '.join(known)}")
        require(2 <= len(self.shape) <= 3 and all(n > 0 for n in self.shape), f"impossible shape {list(self.shape)}")
        if self.quantized:
            width, elements = self.shape[-1], BLOCK_TYPES[self.dtype][0]
            require(width % elements == 0, f"a base tensor has rows of {width} elements, {self.dtype} blocks of {elements}")
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
            require(problem is None, problem or "")
        require(is_utc_time(self.created), f"created is not a UTC time like 2026-11-23T12:00:00Z: {self.created[:80]!r}")
        for pack_id in (*self.supersedes, *self.requires):
            _require_digest(pack_id, "an entry of supersedes or requires")
        for name, value in self.result.items():
            _require_digest(value, f"the result digest of {name}")


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
        require(found or not facts, "the manifest describes a detector, and there is no tensor detector:weight")
        require(facts or not found, "there is a tensor detector:weight, and the manifest describes no detector")
        _ = self.detector  # checks itself
        names = [delta.name for delta in self.deltas]
        require(bool(names), "the pack changes nothing: it has no tensors")
        require(names == sorted(set(names)), "the tensors of a pack must be unique and in the order of their names")
        for what, listed in (("base.tensors", self.manifest.base.tensors), ("result.tensors", self.manifest.result)):
            odd = sorted(set(listed) ^ set(names))
            require(not odd, f"{what} and the arrays disagree about {', '.join(odd[:3])}")
        for delta in self.deltas:
            rows, in_features = self.manifest.base.tensors[delta.name].matrix
            last, width = int(delta.rows[-1]), int(delta.delta.shape[1])
            require(last < rows, f"{delta.name}: row {last} is out of range; the matrix has {rows}")
            require(width == in_features, f"{delta.name}: deltas are {width} wide, the matrix {in_features}")

    def __iter__(self) -> Iterator[TensorDelta]:
        return iter(self.deltas)

    @property
    def detector(self) -> Detector | None:
        """The detector; None where the pack has none."""
        facts, weight = self.manifest.detector, self.detector_weight
        return None if facts is None or weight is None else Detector(facts, weight)

    @property
    def additions(self) -> tuple[str, ...]:
        """What the pack holds that nest/1 does not have: the reasons for its format."""
        tensors = self.manifest.base.tensors.items()
        quantized = [f"base tensor {name!r} is quantized ({tensor.dtype})" for name, tensor in tensors if tensor.quantized]
        factors = [f"tensor {delta.name!r} has factors" for delta in self.deltas if delta.factors is not None]
        return (*quantized, *factors, *(["a detector"] if self.manifest.detector is not None else []))

    @property
    def format(self) -> str:
        """The format of the file, one of FORMATS."""
        return FORMATS[bool(self.additions)]

    @property
    def parameters(self) -> int:
        """Number of values in all vectors and factors."""
        return sum(delta.delta.size + (0 if delta.factors is None else delta.factors.size) for delta in self.deltas)

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
