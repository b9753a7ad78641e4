"""Where models live below an output folder, with the published names."""

from __future__ import annotations

from pathlib import Path

from tribute.config import PruneConfig


def dataset_name(dataset: str, contributors: str) -> str:
    """Folder of a dataset; another division among contributors is another folder."""
    name = dataset_folder(dataset)
    return name if contributors == "class" else f"{name}-{contributors}"


def dataset_folder(dataset: str) -> str:
    """The name of a dataset as one folder, also that of `hub:OWNER/NAME`."""
    return dataset.replace(":", "-").replace("/", "-")


def removal_name(removal_dist: str | None, datamodel_alpha: float, removal_seed: int) -> str:
    """Folder of a coalition: `full`, or e.g. `datamodel/datamodel_alpha=0.5_seed=0`."""
    if removal_dist is None:
        return "full"
    alpha = f"_alpha={datamodel_alpha}" if removal_dist == "datamodel" else ""
    return f"{removal_dist}/{removal_dist}{alpha}_seed={removal_seed}"


def pruning_name(prune: PruneConfig) -> str:
    """Folder of a pruned architecture."""
    return f"pruner={prune.pruner}_pruning_ratio={prune.pruning_ratio}_threshold={prune.thr}"


def models_dir(outdir: Path, dataset: str, method: str, *parts: str) -> Path:
    """`OUTDIR/DATASET/METHOD/models/PARTS`."""
    return outdir / dataset / method / "models" / Path(*parts)
