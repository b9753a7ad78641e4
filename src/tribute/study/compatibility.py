"""Whether a model that was trained before goes with the data, the codec and the models at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tribute.config import UNetConfig
from tribute.data.tensors import TrainingData
from tribute.errors import MixedResultsError
from tribute.models.checkpoint import Checkpoint
from tribute.models.pipelines import is_foreign
from tribute.study.latents import LatentSpace


class TrainsOnData(Protocol):
    """What a `Worker` is asked here: the data that it trains on, and their codec."""

    data: TrainingData
    latent_space: LatentSpace | None

    def codec_identity(self) -> dict[str, str]:
        """The codec's fingerprint, where there is a codec."""
        ...


def check_same_data(checkpoint: Checkpoint, worker: TrainsOnData) -> None:
    """Refuse a model that was trained on other data than the worker's, or on latents of another codec.

    Raises:
        MixedResultsError: Dataset, division among contributors, number of examples or codec differ.
    """
    if is_foreign(checkpoint):
        return  # it does not say what it was trained on
    saved_codec = (checkpoint.meta.get("codec") or {}).get("fingerprint")
    if saved_codec != worker.codec_identity().get("codec"):
        raise MixedResultsError(
            f"{checkpoint.path} was trained on latents of another codec: saved {_codec_text(checkpoint.meta)}, asked "
            f"for {_codec_text({'codec': worker.latent_space and worker.latent_space.record()})}. Give the --codec of "
            "the training run, or leave it out"
        )
    saved = checkpoint.meta.get("data", {}).get("fingerprint")
    if saved != worker.data.fingerprint:
        raise MixedResultsError(
            f"{checkpoint.path} was trained on other data: dataset {checkpoint.meta.get('dataset')!r} with "
            f"{len(checkpoint.meta.get('contributor_names', []))} contributors (fingerprint {str(saved)[:12]}), "
            f"asked for {worker.data.dataset!r} with {worker.data.contributors.n_contributors} "
            f"({worker.data.fingerprint[:12]}). Give the --dataset, --contributors, --data_dir and --max_examples "
            "of the training run"
        )


def check_trained_on_everybody(checkpoint: Checkpoint, *, setting: str) -> None:
    """Refuse a model of a part of the contributors where the full model is asked for; `setting` names it.

    Raises:
        MixedResultsError: It was trained on a coalition.
    """
    coalition = checkpoint.meta.get("coalition", "1")
    if "0" in coalition:
        raise MixedResultsError(
            f"{setting}: {checkpoint.path} was trained on the coalition {coalition} (1: present); expected a model of "
            "everybody's data. Give the model that main.py --method retrain trains without --removal_dist"
        )


def check_not_pruned(checkpoint: Checkpoint, *, setting: str) -> None:
    """Refuse a pruned model where it would be pruned again, and compared with unpruned ones.

    Raises:
        MixedResultsError: It is pruned.
    """
    if checkpoint.pruning is not None:
        raise MixedResultsError(
            f"{setting}: {checkpoint.path} is pruned; expected the full model, which a study prunes itself. Give the "
            "model that main.py --method retrain trained"
        )


def check_same_shape(checkpoint: Checkpoint, unet: UNetConfig, *, setting: str) -> None:
    """Refuse a model whose images, or latents, have another shape than those of a network.

    Raises:
        MixedResultsError: Channels or size differ.
    """
    saved = UNetConfig.parse(checkpoint.meta["unet"], where=str(checkpoint.path))
    if (saved.in_channels, saved.sample_size) != (unet.in_channels, unet.sample_size):
        raise MixedResultsError(
            f"{setting}: {checkpoint.path} generates {saved.in_channels} channels of "
            f"{saved.sample_size}x{saved.sample_size}, the coalitions' models generate {unet.in_channels} of "
            f"{unet.sample_size}x{unet.sample_size}. Compare models of one kind"
        )


def _codec_text(meta: Mapping[str, Any]) -> str:
    """The codec of a checkpoint for a message."""
    codec = meta.get("codec")
    return f"{codec['path']} (fingerprint {codec['fingerprint'][:12]})" if codec else "none (pixels)"
