"""Folders of diffusers, here or on the hub: what networks and codecs have in common. Pickles are never read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tribute.errors import CheckpointError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
"""Of every network that diffusers saves."""

_HUB_ID = re.compile(r"(?:hub:)?(?P<name>\w[\w.-]*/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class NotOnTheHub(CheckpointError):
    """A repository that cannot be read, with the reason on one line; who asks for it says what to do."""


def parse_hub_id(text: str) -> tuple[str, str | None] | None:
    """`OWNER/NAME` and the revision of `OWNER/NAME`, `OWNER/NAME@REVISION`; None if it is no such id."""
    found = _HUB_ID.fullmatch(text)
    return None if found is None else (found["name"], found["revision"])


def download_snapshot(
    name: str, revision: str | None, patterns: Sequence[str], *, local_files_only: bool = False
) -> Path:
    """The folder of a repository with the files that match: those in the hub's cache, or else downloaded.

    Raises:
        NotOnTheHub: It does not exist, must be asked for, or there is no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=local_files_only)
        )
    except (OSError, ValueError, HfHubHTTPError) as error:  # a wrong id is a ValueError
        details = str(error).splitlines()[0] if str(error) else "no details"
        raise NotOnTheHub(f"{type(error).__name__}: {details}") from error


def find_pickle(folder: Path) -> str | None:
    """Name of a pickle in a folder, for the message to who expected safe weights there; None if there is none."""
    return min((path.name for pattern in _PICKLES for path in folder.glob(pattern)), default=None)
