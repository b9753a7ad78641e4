"""Training and sampling at full size on the device that is there, with and without compilation.

Trains the published CIFAR network on random images (their content does not change the speed), then samples from it.
Prints images per second, and the share of the device's peak that this is, where the peak is given.

    python -m benchmarks.gpu                                  # 2,000 steps and 2,048 images in bf16; for a GPU
    python -m benchmarks.gpu --n_steps 2 --n_samples 4 --preset digits --batch_size 4   # whether it works, anywhere
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from tribute.config import RuntimeConfig, load_preset
from tribute.diffusion.sample import sample_images
from tribute.diffusion.train import Progress, Trainer
from tribute.models.build import build_unet
from tribute.models.pruning import count_macs
from tribute.study.provenance import provenance

N_IMAGES = 4096
FLOPS_PER_MAC = 2
PASSES_PER_STEP = 3
"""A forward pass, and a backward pass of twice its work."""


def measure(arguments: argparse.Namespace, *, compiled: bool) -> dict[str, float]:
    """Images per second of training and of sampling (network calls times images), once what is compiled is compiled."""
    preset = load_preset(arguments.preset)
    size, n_channels = preset.unet.sample_size, preset.unet.in_channels
    stream = np.random.Generator(np.random.PCG64(0))
    images = stream.integers(0, 256, (N_IMAGES, size, size, n_channels), dtype=np.uint8)
    runtime = RuntimeConfig(compile=compiled, compile_backend=arguments.backend, channels_last=arguments.channels_last)
    trainer = Trainer(images, preset.noise_schedule, mixed_precision=arguments.mixed_precision, runtime=runtime)
    config = preset.train_config(
        "retrain",
        n_steps=arguments.n_steps,
        batch_size=arguments.batch_size,
        mixed_precision=arguments.mixed_precision,
    )
    model = build_unet(preset.unet)
    reports: list[tuple[float, int]] = []

    def on_log(at: Progress) -> None:  # the loss was read, so the device has done the steps
        reports.append((time.perf_counter(), at.step))

    trainer.train(model, np.arange(N_IMAGES), config, on_log=on_log, log_freq=max(1, arguments.n_steps // 10))
    (first_time, first_step), (last_time, last_step) = reports[0], reports[-1]
    sampling = preset.sampling.replace(
        n_samples=arguments.n_samples,
        batch_size=min(arguments.sample_batch_size, arguments.n_samples),
        num_inference_steps=arguments.num_inference_steps,
        sampler="ddim",
        mixed_precision=arguments.mixed_precision,
    )
    sample_images(model, sampling.replace(n_samples=sampling.batch_size), preset.noise_schedule, runtime=runtime)
    started = time.perf_counter()
    sample_images(model, sampling, preset.noise_schedule, runtime=runtime)
    seconds = time.perf_counter() - started
    return {
        "train": (last_step - first_step) * config.batch_size / (last_time - first_time),
        "sample": sampling.n_samples / seconds,
        "calls": sampling.n_samples * sampling.num_inference_steps / seconds,
        "macs": float(count_macs(model)),
    }


def main() -> None:
    """Measure with and without compilation and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", default="cifar")
    parser.add_argument("--n_steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--n_samples", type=int, default=2048)
    parser.add_argument("--sample_batch_size", type=int, default=512)
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="bf16")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--peak_tflops", type=float, help="of the device in this precision, from its data sheet")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{provenance(device)['device']}, torch {torch.__version__}, {arguments.mixed_precision}")
    print("| compiled | training images/s | sampled images/s | network calls x images/s | share of peak |")
    print("|---|---|---|---|---|")
    for compiled in (False, True):
        found = measure(arguments, compiled=compiled)
        flops = FLOPS_PER_MAC * found["macs"] * np.array([PASSES_PER_STEP * found["train"], found["calls"]])
        share = "-"
        if arguments.peak_tflops:
            share = ", ".join(f"{value:.0%}" for value in flops / (1e12 * arguments.peak_tflops))
        speeds = f"{found['train']:.1f} | {found['sample']:.2f} | {found['calls']:.1f}"
        print(f"| {compiled} | {speeds} | {share} |", flush=True)


if __name__ == "__main__":
    main()
