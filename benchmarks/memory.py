"""Peak memory of reading a tensor cache that is much larger than memory should hold.

Writes a synthetic cache to a temporary folder, opens it (which hashes all of it), reads shuffled batches as training
does and then every row once, and prints the peak resident memory. With `--train` a small network then trains on it,
PyTorch and all. The folder is removed.

    python -m benchmarks.memory                 # 8 GB of 256x256 images
    python -m benchmarks.memory --train 40
    python -m benchmarks.memory --gigabytes 1 --image_size 64
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tribute.data.tensors import gather, open_tensor_cache, write_tensor_cache
from tribute.seeding import numpy_stream
from tribute.types import Images

WRITE_ROWS = 128


def main() -> None:
    """Build, open, read; one line for each with seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the cache")
    parser.add_argument("--image_size", type=int, default=256, help="height and width, pixels")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--n_steps", type=int, default=500)
    parser.add_argument("--train", type=int, default=0, help="steps of training a small network, 8 images each")
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder is made")
    arguments = parser.parse_args()
    shape = (arguments.image_size, arguments.image_size, 3)
    n_images = int(arguments.gigabytes * 1e9 / np.prod(shape))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cache_dir = Path(folder) / "cache"
        measure(cache_dir, n_images, shape, arguments.batch_size, arguments.n_steps)
        if arguments.train:
            train(cache_dir, arguments.train)


def measure(cache_dir: Path, n_images: int, shape: tuple[int, int, int], batch_size: int, n_steps: int) -> int:
    """Peak resident memory in bytes after all of it."""
    started = time.perf_counter()
    report("start", started)

    started = time.perf_counter()
    write_tensor_cache(cache_dir, noise(n_images, shape), shape=(n_images, *shape), columns={}, source={})
    report(f"write {n_images:,} images, {n_images * np.prod(shape) / 1e9:.2f} GB", started)

    started = time.perf_counter()
    images = open_tensor_cache(cache_dir).images
    report("open and verify", started)

    started = time.perf_counter()
    stream = numpy_stream(0, "benchmark.memory")
    for _ in range(n_steps):
        gather(images, stream.integers(0, n_images, batch_size))
    report(f"{n_steps} steps of {batch_size} random rows", started)

    started = time.perf_counter()
    for start in range(0, n_images, batch_size):
        gather(images, np.arange(start, min(n_images, start + batch_size)))
    return report("every row once", started)


def train(cache_dir: Path, n_steps: int) -> None:
    """Train a network of some thousand weights on the cache, as a run does."""
    import torch

    from tribute.config import NoiseScheduleConfig, TrainConfig, UNetConfig
    from tribute.diffusion.train import Trainer
    from tribute.models.build import build_unet, count_parameters

    torch.set_num_threads(1)
    images = open_tensor_cache(cache_dir).images
    unet = UNetConfig(
        sample_size=images.shape[1],
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        norm_num_groups=4,
    )
    model = build_unet(unet)
    trainer = Trainer(images, NoiseScheduleConfig(), device="cpu")
    report("import PyTorch, build", time.perf_counter())
    started = time.perf_counter()
    config = TrainConfig(n_steps=n_steps, batch_size=8, random_flip=True)
    trainer.train(model, np.arange(len(images)), config)
    report(f"train {count_parameters(model):,} weights for {n_steps} steps of 8 images", started)


def noise(n_images: int, shape: tuple[int, int, int]) -> Iterator[Images]:
    """Random pixels, a few rows at a time."""
    stream = numpy_stream(0, "benchmark.memory.pixels")
    for start in range(0, n_images, WRITE_ROWS):
        n_rows = min(WRITE_ROWS, n_images - start)
        yield np.frombuffer(stream.bytes(n_rows * int(np.prod(shape))), dtype=np.uint8).reshape(n_rows, *shape)


def report(what: str, started: float) -> int:
    """Print seconds and memory; the peak in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    marks = " ".join(line.replace("\t", " ") for line in lines if line.startswith(("VmHWM", "VmRSS")))
    print(f"{what}: {time.perf_counter() - started:.2f} s, peak {peak / 1e9:.3f} GB ({marks})", flush=True)
    return peak


if __name__ == "__main__":
    main()
