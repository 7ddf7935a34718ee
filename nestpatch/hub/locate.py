"""A base is a path or a Hub id. Finds it: on this disk, in the cache of huggingface_hub, or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from nestpatch.errors import CheckpointFormatError, HubUnavailableError
from nestpatch.formats.interface import Checkpoint
from nestpatch.formats.opening import open_checkpoint
from nestpatch.formats.safetensors import INDEX, SINGLE, SafetensorsCheckpoint
from nestpatch.hub.client import SCHEME, Reference, is_commit, look_up, parse_reference
from nestpatch.hub.remote import RemoteCheckpoint

LANDMARKS = (INDEX, SINGLE, "config.json", "README.md", ".gitattributes")
"""Files by which a cached snapshot is found: nearly every model repository has one of them."""


def open_base(text: str | Path, *, endpoint: str | None = None) -> Checkpoint:
    """Opens a model for reading: a path, or `owner/name[@revision]` on the Hub, also written hub://owner/name.

    What exists on this disk is taken as a path. A snapshot in the cache of huggingface_hub is used when it is complete and of
    the very commit that the Hub names now; with HF_HUB_OFFLINE=1 that of the commit which the cache remembers. Otherwise the
    result is a RemoteCheckpoint, which fetches only the rows that are asked for.

    Raises CheckpointFormatError when the text names no model, HubError and its kinds for what the Hub refuses.
    """
    name = str(text)
    # os.path answers no where Path.exists raises.
    if not name.startswith(SCHEME) and os.path.exists(name):  # noqa: PTH110
        return open_checkpoint(name)
    reference = parse_reference(name)
    if reference is None:
        advice = "Give a path, or owner/name[@revision] of a model on the Hugging Face Hub."
        raise CheckpointFormatError(f"there is no model at {name}", advice=advice)
    if _offline():
        return _cached_only(reference)
    if is_commit(reference.revision) and (found := cached(reference)) is not None:
        return found
    snapshot = look_up(reference.repo_id, reference.revision, endpoint=endpoint)
    return cached(Reference(snapshot.repo_id, snapshot.commit)) or RemoteCheckpoint(snapshot, endpoint=endpoint)


def cached(reference: Reference) -> SafetensorsCheckpoint | None:
    """The snapshot of a revision in the cache of huggingface_hub, if all its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    for landmark in LANDMARKS:
        file = try_to_load_from_cache(reference.repo_id, landmark, revision=reference.revision)
        if isinstance(file, str):
            try:
                return SafetensorsCheckpoint(Path(file).parent)
            except CheckpointFormatError:
                return None  # only in part: somebody needed the tokenizer, or a download was stopped
    return None


def _cached_only(reference: Reference) -> Checkpoint:
    found = cached(reference)
    if found is None:
        raise HubUnavailableError(
            f"HF_HUB_OFFLINE is set, and the cache of huggingface_hub does not hold {reference} as a whole",
            advice=f"Unset HF_HUB_OFFLINE, or fill the cache where there is a network: hf download {reference.repo_id}",
        )
    return found


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
