"""What the options of large runs save, and how far each leads away from the plain run.

Every option trains the same network on the same batches in a process of its own, then samples from the weights that
the plain run ended with. Seconds are those of the processor, which other programs on the machine disturb less than
the clock's. Prints a Markdown table; docs/performance.md holds one.

    python -m benchmarks.options --network 32x32
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tribute.config import (
    NoiseScheduleConfig,
    Preset,
    RuntimeConfig,
    SampleConfig,
    TrainConfig,
    UNetConfig,
    load_preset,
)
from tribute.diffusion.sample import sample_images
from tribute.diffusion.train import CheckpointPolicy, Progress, Trainer
from tribute.models.build import build_unet
from tribute.models.checkpoint import load_weights
from tribute.types import Images


@dataclass(frozen=True)
class Option:
    """One way to run.

    Attributes:
        training: Changes to the training settings, as `Preset.train_config` takes them.
        runtime: Fields of `RuntimeConfig` that are on.
        sampling: Changes to the sampling settings.
        same_draws: Whether its batches are those of the plain run, so that losses can be compared.
    """

    training: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    same_draws: bool = True


BF16 = {"mixed_precision": "bf16"}
OPTIONS = {
    "plain": Option(),
    "bf16": Option(BF16, {}, BF16),
    "8bit": Option({"use_8bit_optimizer": True}),
    "gradient_checkpointing": Option({}, {"gradient_checkpointing": True}),
    "channels_last": Option({}, {"channels_last": True}),
    "gradient_accumulation": Option({"gradient_accumulation_steps": 2}, same_draws=False),
    "compile": Option({}, {"compile": True}),
    "compile_bf16_channels_last": Option(BF16, {"compile": True, "channels_last": True}, BF16),
}
"""`gradient_accumulation` halves the batch and takes two of them per step."""

NETWORKS = {"32x32": "cifar-small", "digits": "digits"}
N_IMAGES = 16
N_CALLS = 5


def network(name: str, batch_size: int) -> tuple[Preset, TrainConfig, Images]:
    """A preset, its training settings, and real scans in its size."""
    from sklearn.datasets import load_digits

    preset = load_preset(NETWORKS[name])
    flat = np.asarray(load_digits(return_X_y=True)[0])
    scans = np.round(flat.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)[:512, :, :, None]
    enlarged = scans.repeat(preset.unet.sample_size // 8, 1).repeat(preset.unet.sample_size // 8, 2)
    images = np.ascontiguousarray(enlarged.repeat(preset.unet.in_channels, 3))
    return preset, preset.train_config("retrain", batch_size=batch_size), images


def measure(name: str, option: Option, n_steps: int, batch_size: int, folder: Path) -> dict[str, Any]:
    """Train and sample in this process; the plain run leaves its weights and images in `folder`."""
    preset, config, images = network(name, batch_size)
    changes = dict(option.training)
    if not option.same_draws:
        changes["batch_size"] = batch_size // 2
    train = preset.replace(training={"retrain": config.model_dump()}).train_config(
        "retrain", n_steps=n_steps, **changes
    )
    runtime = RuntimeConfig(**option.runtime)
    trainer = Trainer(
        images, preset.noise_schedule, mixed_precision=train.mixed_precision, runtime=runtime, device="cpu"
    )
    model = build_unet(preset.unet)
    times, losses = [time.process_time()], []

    def on_log(at: Progress) -> None:
        times.append(time.process_time())
        losses.append(at.loss)

    before = resident_mib()
    with tempfile.TemporaryDirectory() as checkpoints:
        policy = CheckpointPolicy(Path(checkpoints), {"unet": preset.unet.model_dump(mode="json")}, ckpt_freq=n_steps)
        result = trainer.train(model, np.arange(len(images)), train, checkpoints=policy, on_log=on_log, log_freq=1)
        (state,) = Path(checkpoints).rglob("training_state.safetensors")
        state_mib = state.stat().st_size / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before
    found = {
        "seconds_step": float(np.median(np.diff(times)[2:])),
        "seconds_first_step": times[1] - times[0],
        "peak_mib": peak,
        "state_mib": state_mib,
        "losses": losses,
        **sampling_figures(model, preset.unet, preset.noise_schedule, option, runtime, folder, result.ema),
    }
    return found | {"weights": deviation(model, preset.unet, folder)}


def sampling_figures(
    model: Any,
    unet: UNetConfig,
    noise_schedule: NoiseScheduleConfig,
    option: Option,
    runtime: RuntimeConfig,
    folder: Path,
    ema: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Seconds per image and network call, and how far the images are from the plain ones, in grey levels."""
    weights_path, images_path = folder / "plain.safetensors", folder / "plain.npy"
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    if not weights_path.exists():
        save_file(trained, weights_path)
    load_weights(model, load_file(weights_path), where=weights_path)
    sampling = SampleConfig(n_samples=N_IMAGES, num_inference_steps=N_CALLS, batch_size=N_IMAGES, **option.sampling)
    sample_images(model, sampling, noise_schedule, runtime=runtime)  # compiles
    started = time.process_time()
    images = sample_images(model, sampling, noise_schedule, runtime=runtime)
    seconds = time.process_time() - started
    if not images_path.exists():
        np.save(images_path, images)
    difference = np.abs(images.astype(float) - np.load(images_path))
    load_weights(model, trained, where=weights_path)
    return {"milliseconds_call": 1e3 * seconds / (N_IMAGES * N_CALLS), "grey_levels": float(difference.mean())}


def deviation(model: Any, unet: UNetConfig, folder: Path) -> float:
    """Distance of the weights from the plain run's, as a share of the way that those went."""
    plain = load_file(folder / "plain.safetensors")
    start = build_unet(unet).state_dict()
    square = {"off": 0.0, "way": 0.0}
    for name, value in model.state_dict().items():
        square["off"] += float((value - plain[name]).double().square().sum())
        square["way"] += float((start[name] - plain[name]).double().square().sum())
    return (square["off"] / square["way"]) ** 0.5


def resident_mib() -> float:
    """Memory that this process occupies now."""
    n_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return n_pages * resource.getpagesize() / 2**20


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    plain = results["plain"]
    lines = [
        "| option | CPU s per step | CPU s of the first step | peak memory, MiB | optimizer state, MiB "
        "| loss off by at most | weights off by | CPU ms per image and call | pixels off by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        same = OPTIONS[name].same_draws
        off = max(abs(a - b) / b for a, b in zip(found["losses"], plain["losses"], strict=True))
        lines.append(
            f"| {name} | {found['seconds_step']:.3f} | {found['seconds_first_step']:.1f} | {found['peak_mib']:.0f} "
            f"| {found['state_mib']:.1f} | {f'{off:.1e}' if same else 'other draws'} "
            f"| {found['weights']:.1e} | {found['milliseconds_call']:.2f} | {found['grey_levels']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every option, each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", choices=NETWORKS, default="32x32")
    parser.add_argument("--n_steps", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--n_threads", type=int, default=1)
    parser.add_argument(
        "--option", choices=OPTIONS, nargs="*", default=list(OPTIONS), help="Which; plain is always run."
    )
    parser.add_argument("--here", type=Path, help="Measure the one option in this process, against files in a folder.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.n_threads)
    if arguments.here is not None:
        option = OPTIONS[arguments.option[0]]
        found = measure(arguments.network, option, arguments.n_steps, arguments.batch_size, arguments.here)
        print(json.dumps(found))
        return
    shared = [f"--{name}={getattr(arguments, name)}" for name in ("network", "n_steps", "batch_size", "n_threads")]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in dict.fromkeys(["plain", *arguments.option]):
            command = [sys.executable, "-m", "benchmarks.options", *shared, "--here", folder, "--option", name]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                print(f"{name}: no figures: {reason}", flush=True)
                continue
            results[name] = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps({"option": name, **results[name]}), file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
