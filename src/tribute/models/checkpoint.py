"""Checkpoints: safetensors and JSON, whole or not at all, never a pickle.

A checkpoint is a folder `ckpt_steps_00020000/`:

    unet.safetensors             weights
    ema.safetensors              moving average of the weights
    training_state.safetensors   optimizer state (only while it may be needed to resume)
    pruning.json                 how the architecture was pruned (sparse models only)
    config.json                  settings, provenance, the SHA-256 of every file above and of itself

It is written beside its place and renamed, so a folder of that name is complete. A folder that
turns out damaged is renamed to `*.damaged` and reported; nothing is deleted because it could not
be read.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tribute.config import UNetConfig, fingerprint
from tribute.errors import CheckpointError
from tribute.files import room_sentence, sha256_of_file, write_whole_dir

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CKPT_NAME = re.compile(r"^ckpt_steps_(\d{8})$")
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")

Tensors = dict[str, "torch.Tensor"]


class _NewerFormat(CheckpointError):
    """A whole checkpoint that this version cannot read."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        path: The folder.
        meta: `config.json`: `n_steps`, `unet`, `noise_schedule`, and what the writer added.
        unet: Weights by name.
        ema: Moving average by name.
        pruning: The recipe of a pruned architecture, or None.
        training_state: Optimizer tensors, or None when not asked for or absent.
    """

    path: Path
    meta: dict[str, Any]
    unet: Tensors = field(repr=False)
    ema: Tensors = field(repr=False)
    pruning: dict[str, Any] | None = field(default=None, repr=False)
    training_state: Tensors | None = field(default=None, repr=False)

    @property
    def n_steps(self) -> int:
        """Optimizer updates done."""
        return int(self.meta["n_steps"])

    @property
    def model_hash(self) -> str:
        """SHA-256 of weights, moving average and recipe: the identity of the model."""
        files = self.meta["files"]
        return fingerprint({k: v for k, v in files.items() if not k.startswith("training_state")})


def ckpt_name(n_steps: int) -> str:
    """Folder name of the checkpoint after `n_steps` updates."""
    return f"ckpt_steps_{n_steps:08d}"


def save_checkpoint(
    folder: Path,
    *,
    n_steps: int,
    unet: Mapping[str, torch.Tensor],
    ema: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    pruning: Mapping[str, Any] | None = None,
    training_state: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint below `folder`, whole or not at all.

    Returns:
        The path of the checkpoint folder.

    Raises:
        CheckpointError: The disk is full or the place is not writable; what was there is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = folder / ckpt_name(n_steps)

    def write(partial: Path) -> None:
        for name, tensors in (("unet", unet), ("ema", ema), ("training_state", training_state)):
            if tensors is not None:
                contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                save_file(contiguous, partial / f"{name}.safetensors")
        if pruning is not None:
            (partial / "pruning.json").write_text(json.dumps(pruning))
        files = {path.name: sha256_of_file(path) for path in sorted(partial.iterdir())}
        config = {**meta, "format_version": FORMAT_VERSION, "n_steps": n_steps, "files": files}
        as_read_back = json.loads(json.dumps(config))
        (partial / "config.json").write_text(json.dumps({**config, "sha256": fingerprint(as_read_back)}, indent=1))

    try:
        write_whole_dir(target, write)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        parts = [tensors.values() for tensors in (unet, ema, training_state) if tensors is not None]
        n_bytes = sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part)
        raise CheckpointError(
            f"the checkpoint {target} could not be written ({error}; {room_sentence(folder, n_bytes)}); earlier "
            "checkpoints are untouched. Free space or choose another --outdir, then run the same command again to "
            "resume"
        ) from error
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint folders below `folder`, fewest steps first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if CKPT_NAME.match(path.name) and path.is_dir())


def load_checkpoint(path: Path, *, with_training_state: bool = False) -> Checkpoint:
    """Read one checkpoint folder, or the last one below a folder; every file is checked by its hash.

    Raises:
        CheckpointError: Missing, empty, half-written, damaged, or in a format that is not safe.
    """
    path = resolve_checkpoint(path)
    try:
        meta = json.loads((path / "config.json").read_text())
        recorded = meta.pop("sha256", None)
        files = dict(meta["files"])
        version = int(meta["format_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / 'config.json'} is missing or damaged ({error}); expected a checkpoint written by Tribute"
        ) from error
    if recorded not in (None, fingerprint(meta)):
        raise CheckpointError(f"{path / 'config.json'} is damaged: its SHA-256 is not the one that it names")
    if version > FORMAT_VERSION:
        raise _NewerFormat(
            f"{path} has checkpoint format {version}, this version reads up to {FORMAT_VERSION}; upgrade Tribute"
        )
    wanted = [name for name in files if with_training_state or not name.startswith("training_state")]
    for name in wanted:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        try:
            found = sha256_of_file(file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if found != files[name]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one in config.json")
    missing = {"unet.safetensors", "ema.safetensors"} - set(files)
    if missing:
        raise CheckpointError(f"{path} is incomplete: {', '.join(sorted(missing))} is not listed in config.json")
    return Checkpoint(
        path=path,
        meta=meta,
        unet=read_tensors(path / "unet.safetensors"),
        ema=read_tensors(path / "ema.safetensors"),
        pruning=json.loads((path / "pruning.json").read_text()) if "pruning.json" in files else None,
        training_state=read_tensors(path / "training_state.safetensors")
        if "training_state.safetensors" in wanted
        else None,
    )


def load_last_intact(folder: Path, *, with_training_state: bool = False) -> Checkpoint | None:
    """The checkpoint with the most steps that can be read; damaged ones are kept aside and named.

    Returns:
        None when there is none.

    Raises:
        CheckpointError: The last one is of a newer format, which is no damage.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path, with_training_state=with_training_state)
        except _NewerFormat:
            raise
        except CheckpointError as error:
            aside = keep_aside(path)
            logger.warning("%s. Kept aside as %s; going on from the checkpoint before it.", error, aside.name)
    return None


def keep_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is not read again; returns its new path."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.replace(aside)
    return aside


def delete_older(folder: Path, keep: Path) -> None:
    """Delete the complete checkpoints below `folder` with fewer steps than `keep`."""
    for path in list_checkpoints(folder):
        if path.name < keep.name:
            shutil.rmtree(path)


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the last one below it."""
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint at {path}; expected a folder ckpt_steps_* or the folder above it, "
            "as written by main.py or prune.py"
        )
    if path.is_file():
        kind = "a pickle, which can run code when it is loaded" if path.suffix in _PICKLE_SUFFIXES else "a file"
        raise CheckpointError(
            f"{path} is {kind}; expected a checkpoint folder of safetensors and JSON written by Tribute"
        )
    if (path / "config.json").exists() or CKPT_NAME.match(path.name):
        return path
    checkpoints = list_checkpoints(path)
    if checkpoints:
        return checkpoints[-1]
    pickles = sorted(item.name for item in path.iterdir() if item.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{path} holds pickles ({pickles[0]}, ...), which can run code when they are loaded; "
            "expected a checkpoint folder of safetensors and JSON written by Tribute"
        )
    raise CheckpointError(f"{path} holds no checkpoint; expected a folder named like {ckpt_name(20000)}")


def build_model(checkpoint: Checkpoint, *, use_ema: bool = True, device: torch.device | str = "cpu") -> UNet2DModel:
    """Rebuild the model of a checkpoint, pruned or not, in evaluation mode.

    Raises:
        CheckpointError: The weights do not fit the architecture named in the checkpoint.
    """
    from tribute.models.build import build_unet
    from tribute.models.pruning import apply_recipe

    model = build_unet(UNetConfig.parse(checkpoint.meta["unet"], where=str(checkpoint.path)))
    if checkpoint.pruning is not None:
        apply_recipe(model, checkpoint.pruning)
    load_weights(model, checkpoint.ema if use_ema else checkpoint.unet, where=checkpoint.path)
    torch.nn.Module.to(model, device)
    return model.eval()


def load_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, where: Path) -> None:
    """Copy weights into a model; the error names the first tensor that does not fit."""
    check_weights(model, tensors, where=where)
    model.load_state_dict(dict(tensors))


def check_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, where: Path) -> None:
    """Refuse weights that do not fit a model, be it on the device `meta`; the error names the first such tensor."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = wrong[0]
        raise CheckpointError(
            f"{where} belongs to another architecture: {len(wrong)} tensors differ, e.g. {name}: "
            f"expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        )


def read_tensors(path: Path) -> Tensors:
    """Tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
