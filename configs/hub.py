"""The Hugging Face hub: what counts as a hub id, and the one place that downloads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.errors import InputError


def is_hub_id(reference: str) -> bool:
    """Return whether `reference` is `organisation/name` or `organisation/name@revision`, and not a path."""
    return reference.count("/") == 1 and not reference.startswith((".", "/", "~"))


def download_snapshot(hub_id: str, patterns: Sequence[str], key: str) -> Path:
    """The local folder of a hub repository's files that match `patterns`, downloaded where it is not cached.

    Args:
        hub_id: `organisation/name`, or `organisation/name@revision` for a branch, a tag or a commit.
        patterns: File name patterns. Never name pickled weights here.
        key: The configuration key or option that named the repository, for the message.

    Raises:
        InputError: The hub has no such repository or does not answer.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises a family of network, HTTP and cache errors
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"{key}: {hub_id} is not a directory here, and the Hugging Face hub does not give it "
            f"({type(error).__name__}: {reason}); give a local directory or another hub id",
            key=key,
            code="hub-unavailable",
        ) from None
