"""Tiny codecs with random weights in the diffusers format, and crops of real photographs to encode."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tribute.config import Preset
from tribute.data.contributors import contributors_by_class
from tribute.data.tensors import TrainingData
from tribute.seeding import numpy_stream
from tribute.types import Images

N_PHOTOS = 40
NAMES = ("china", "flower")

TINY_PRESET: dict[str, Any] = {
    "dataset": "cifar",
    "unet": {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8,
        "norm_num_groups": 2,
        "downsample_padding": 1,
    },
    "noise_schedule": {
        "num_train_timesteps": 50,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.03,
        "beta_end": 0.3,
        "clip_sample": False,
    },
    "training": {
        "retrain": {"n_steps": 6, "batch_size": 8, "optimizer": {"lr": 1e-3}},
        "prune_fine_tune": {"n_steps": 4, "batch_size": 8, "optimizer": {"lr": 1e-3}},
        "gd": {"n_steps": 3, "batch_size": 8, "optimizer": {"lr": 1e-2}},
    },
    "ckpt_freq": {"retrain": 2},
    "sampling": {"n_samples": 6, "num_inference_steps": 2, "batch_size": 6},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIBUTE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def photos() -> Images:
    """Crops `(40, 16, 16, 3)` of two photographs that scikit-learn ships, 20 of each."""
    from sklearn.datasets import load_sample_images

    stream = numpy_stream(0, "crops")
    crops = []
    for photo in load_sample_images()["images"]:
        for _ in range(N_PHOTOS // 2):
            top, left = stream.integers(photo.shape[0] - 16), stream.integers(photo.shape[1] - 16)
            crops.append(photo[top : top + 16, left : left + 16])
    return np.stack(crops)


@pytest.fixture(scope="session")
def photo_data(photos: Images) -> TrainingData:
    """The photographs, each half of one contributor."""
    labels = np.repeat([0, 1], N_PHOTOS // 2)
    return TrainingData.from_arrays("photos", photos, labels, NAMES, contributors_by_class(labels, NAMES))


@pytest.fixture(scope="session")
def photo_parquet(photos: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs as a Parquet file in the layout of the hub, with four classes, so that coalitions differ."""
    import datasets
    from PIL import Image

    names = ["a", "b", "c", "d"]
    records = []
    for i, pixels in enumerate(photos):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        records.append({"bytes": buffer.getvalue(), "path": f"{i}.png"})
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = pa.array(records, type=pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"img": images, "label": pa.array(np.arange(len(photos)) % 4)})
    info = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    path = tmp_path_factory.mktemp("photos") / "train.parquet"
    pq.write_table(table.replace_schema_metadata(info), path)
    return path


def _save_vq(folder: Path, seed: int, **changes: Any) -> Path:
    from diffusers.models.autoencoders.vq_model import VQModel

    settings = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "latent_channels": 3,
        "num_vq_embeddings": 32,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VQModel(**settings)
        model.quantize.embedding.weight.data.normal_()  # apart, so that it matters which one is nearest
    model.save_pretrained(folder)
    return folder


def _save_kl(folder: Path, seed: int, **changes: Any) -> Path:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    settings = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "latent_channels": 3,
        "norm_num_groups": 4,
        "scaling_factor": 0.8,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoencoderKL(**settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_codec() -> Callable[..., Path]:
    """Write a tiny codec: `save_codec(kind, folder, seed=0, **changes of its settings)`."""

    def save(kind: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
        return {"vq": _save_vq, "kl": _save_kl}[kind](folder, seed, **changes)

    return save


@pytest.fixture(scope="session")
def codecs(save_codec: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`vq`, `vq2` (other weights) and `kl`, as pipelines keep them: in a sub-folder."""
    root = tmp_path_factory.mktemp("codecs")
    save_codec("vq", root / "vq" / "vqvae")
    save_codec("vq", root / "vq2" / "vqvae", seed=1)
    save_codec("kl", root / "kl" / "vae")
    return {name: root / name for name in ("vq", "vq2", "kl")}


@pytest.fixture
def latent_preset(codecs: dict[str, Path]) -> Callable[..., Preset]:
    """A preset of 16x16 images and 8x8 latents with one of the codecs."""

    def make(codec: str = "vq", **changes: Any) -> Preset:
        values = {**TINY_PRESET, "codec": {"path": str(codecs[codec]), "factor": 2, "batch_size": 8}, **changes}
        return Preset.parse(values, where="test")

    return make
