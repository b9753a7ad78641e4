"""The options of large runs: what each may change, what it must not, and what is refused before any work."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tribute.config import (
    NoiseScheduleConfig,
    OptimizerConfig,
    PruneConfig,
    RuntimeConfig,
    SampleConfig,
    TrainConfig,
    UNetConfig,
    load_preset,
)
from tribute.diffusion.preflight import Launch, check_training
from tribute.diffusion.sample import sample_images
from tribute.diffusion.train import CheckpointPolicy, Progress, Trainer
from tribute.errors import ConfigError
from tribute.models import runtime as runtime_module
from tribute.models.build import build_unet, reset_weights
from tribute.models.checkpoint import load_checkpoint
from tribute.models.pruning import prune_unet
from tribute.models.runtime import find_compiler, prepare_network
from tribute.types import Images

Rows = npt.NDArray[np.int64]
Run = tuple[Images, NoiseScheduleConfig, UNetConfig, Rows, TrainConfig]

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra tribute[8bit]"
)
RUNTIMES = {
    "gradient_checkpointing": RuntimeConfig(gradient_checkpointing=True),
    "channels_last": RuntimeConfig(channels_last=True),
    "compile": RuntimeConfig(compile=True, compile_backend="aot_eager"),
    "all": RuntimeConfig(compile=True, compile_backend="aot_eager", channels_last=True, gradient_checkpointing=True),
}


def train(
    run: Run,
    *,
    runtime: RuntimeConfig | None = None,
    folder: Path | None = None,
    on_log: Callable[[Progress], None] | None = None,
) -> torch.nn.Module:
    """Train a new network, saving every second step where there is a folder."""
    images, noise_schedule, unet, rows, config = run
    policy = None if folder is None else CheckpointPolicy(folder, {"unet": unet.model_dump(mode="json")}, ckpt_freq=2)
    model = build_unet(unet, opt_seed=1)
    trainer = Trainer(images, noise_schedule, device="cpu", runtime=runtime)
    trainer.train(model, rows, config, checkpoints=policy, on_log=on_log, log_freq=1)
    return model


def distance(model: torch.nn.Module, other: torch.nn.Module) -> float:
    """Largest difference of a weight."""
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.fixture(scope="module")
def run(digit_images: Images, noise_schedule: NoiseScheduleConfig, unet_config: UNetConfig, rows: Rows) -> Run:
    # A large eps: rounding must not decide the sign of a step where a gradient is nearly zero.
    optimizer = OptimizerConfig(name="AdamW", lr=3e-3, eps=1e-4)
    config = TrainConfig(n_steps=4, batch_size=4, optimizer=optimizer, random_flip=True, ema_max_decay=0.9)
    return digit_images[:32], noise_schedule, unet_config, rows, config


# What does not change a result


@pytest.mark.parametrize("name", RUNTIMES)
def test_how_a_network_computes_does_not_change_what_it_learns(run: Run, name: str) -> None:
    start, plain = build_unet(run[2], opt_seed=1), train(run)
    model = train(run, runtime=RUNTIMES[name])
    assert distance(model, plain) < 1e-5 < 1e-3 < distance(plain, start)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(value.is_contiguous() for value in model.state_dict().values())


def test_a_compiler_that_is_wrong_about_gradients_is_refused_before_a_step(run: Run) -> None:
    import torch._dynamo

    @torch._dynamo.register_backend(name="right_forward_wrong_backward")
    def compile_wrongly(graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        return lambda *args: [output.detach() + 0.5 * (output - output.detach()) for output in graph(*args)]

    wrong = RuntimeConfig(compile=True, compile_backend="right_forward_wrong_backward")
    with pytest.raises(ConfigError, match=r"--compile: expected .* off by 50%"):
        train(run, runtime=wrong)


def test_dropout_is_the_same_when_activations_are_computed_again(run: Run, dropout_unet: UNetConfig) -> None:
    images, noise_schedule, _, rows, config = run
    run = images, noise_schedule, dropout_unet, rows, config
    before = torch.get_rng_state()
    assert distance(train(run, runtime=RUNTIMES["gradient_checkpointing"]), train(run)) < 1e-6
    assert torch.equal(before, torch.get_rng_state())


def test_a_run_may_be_resumed_with_another_runtime(run: Run, tmp_path: Path) -> None:
    images, noise_schedule, unet, rows, config = run
    train((images, noise_schedule, unet, rows, config.replace(n_steps=2)), folder=tmp_path)
    steps: list[int] = []
    changed = train(
        run, folder=tmp_path, runtime=RUNTIMES["channels_last"], on_log=lambda progress: steps.append(progress.step)
    )
    assert steps == [3, 4]
    assert distance(changed, train(run)) < 1e-5


def test_gradient_checkpointing_keeps_fewer_activations(run: Run) -> None:
    def n_bytes_kept(runtime: RuntimeConfig) -> int:
        model = build_unet(run[2]).train()
        prepare_network(model, runtime)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros(8, 1, 8, 8), torch.zeros(8))[0].sum()
        return sum(sizes.values())

    assert n_bytes_kept(RUNTIMES["gradient_checkpointing"]) < 0.6 * n_bytes_kept(RuntimeConfig())


def test_channels_last_reaches_the_layers(run: Run) -> None:
    model = build_unet(run[2])
    prepare_network(model, RUNTIMES["channels_last"])
    prepare_network(model, RUNTIMES["channels_last"])
    layouts: list[bool] = []
    model.mid_block.register_forward_hook(
        lambda _, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    model(torch.zeros(2, 1, 8, 8), 0)
    assert layouts == [True]
    assert len(model.conv_in._forward_hooks) == 1


def test_a_network_is_compiled_once_for_every_coalition(run: Run) -> None:
    """Training and sampling compile one graph each; new weights, pruned or untrained, compile none."""
    from torch._dynamo.utils import counters

    images, noise_schedule, unet, rows, config = run
    model = build_unet(unet)
    prune_unet(model, PruneConfig(pruning_ratio=0.5))
    runtime = RUNTIMES["compile"]
    trainer = Trainer(images, noise_schedule, device="cpu", runtime=runtime)
    sampling = SampleConfig(n_samples=40, batch_size=16, num_inference_steps=2)  # its last batch is smaller
    start = {name: value.clone() for name, value in model.state_dict().items()}
    torch._dynamo.reset()
    counters.clear()
    found: list[Images] = []
    n_graphs: list[int] = []
    for rows_present in (rows, rows[:5], rows):
        model.load_state_dict(start)
        trainer.train(model, rows_present, config)
        n_graphs.append(counters["stats"]["unique_graphs"])
        found.append(sample_images(model, sampling, noise_schedule, runtime=runtime))
    reset_weights(model, 3)
    sample_images(model, sampling, noise_schedule, runtime=runtime)
    assert [*n_graphs, counters["stats"]["unique_graphs"]] == [1, 2, 2, 2]
    np.testing.assert_array_equal(found[0], found[2])
    plain = build_unet(unet)
    prune_unet(plain, PruneConfig(pruning_ratio=0.5))
    reset_weights(plain, 3)
    images_plain = sample_images(plain, sampling, noise_schedule)
    images_compiled = sample_images(model, sampling, noise_schedule, runtime=runtime)
    assert np.abs(images_plain.astype(int) - images_compiled).max() <= 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # PyTorch's own
@pytest.mark.skipif(find_compiler() is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_inductor_computes_the_same(unet_config: UNetConfig) -> None:
    tiny = unet_config.replace(
        block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False
    )
    model = build_unet(tiny).eval()
    images, timesteps = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8), torch.tensor([3, 40])
    with torch.inference_mode():
        expected = model(images, timesteps)[0]
        prepare_network(model, RuntimeConfig(compile=True))
        torch.testing.assert_close(model(images, timesteps)[0], expected, rtol=1e-4, atol=1e-5)


# The 8-bit optimizer


@pytest.fixture(scope="module")
def run_8bit(run: Run) -> Run:
    images, noise_schedule, unet, rows, config = run
    optimizer = config.optimizer.replace(name="AdamW8bit", eps=1e-8, weight_decay=0.01)
    return images, noise_schedule, unet, rows, config.replace(n_steps=6, optimizer=optimizer)


def train_and_be_killed(run: Run, folder: Path) -> None:
    train(run, folder=folder, on_log=lambda at: os.kill(os.getpid(), signal.SIGKILL) if at.step == 5 else None)


@needs_bitsandbytes
def test_a_killed_run_of_the_8bit_optimizer_ends_as_if_it_had_not_been(
    run_8bit: Run, tmp_path: Path, in_new_process: Callable[..., Any]
) -> None:
    train(run_8bit, folder=tmp_path / "undisturbed")
    with pytest.raises(BrokenProcessPool):
        in_new_process(train_and_be_killed, run_8bit, tmp_path / "killed")
    assert load_checkpoint(tmp_path / "killed").n_steps == 4
    train(run_8bit, folder=tmp_path / "killed")
    undisturbed, killed = (
        load_checkpoint(tmp_path / name, with_training_state=True) for name in ("undisturbed", "killed")
    )
    assert killed.meta["files"] == undisturbed.meta["files"]
    state = killed.training_state or {}
    kinds = {name.split(".")[1]: value.dtype for name, value in state.items() if value.dtype == torch.uint8}
    assert kinds == {"state1": torch.uint8, "state2": torch.uint8}
    assert {"qmap1", "qmap2", "absmax1", "absmax2", "step"} <= {name.split(".")[1] for name in state}


@needs_bitsandbytes
def test_the_8bit_optimizer_learns_nearly_the_same(run_8bit: Run) -> None:
    images, noise_schedule, unet, rows, config = run_8bit
    plain = config.replace(optimizer=config.optimizer.replace(name="AdamW"))
    losses: dict[str, list[float]] = {"AdamW8bit": [], "AdamW": []}
    for settings in (config, plain):
        settings = settings.replace(n_steps=12, batch_size=8)
        report = losses[settings.optimizer.name].append
        train((images, noise_schedule, unet, rows, settings), on_log=lambda at, report=report: report(at.loss))
    np.testing.assert_allclose(losses["AdamW8bit"], losses["AdamW"], rtol=0.02)
    assert losses["AdamW8bit"] != losses["AdamW"]


def test_the_8bit_form_of_the_presets_optimizer_is_taken() -> None:
    preset = load_preset("digits")
    name = preset.training["gd"].optimizer.name
    assert preset.train_config("gd", use_8bit_optimizer=True).optimizer.name == f"{name}8bit"
    assert preset.train_config("gd", use_8bit_optimizer=True, lr=1e-3).optimizer.lr == 1e-3
    assert preset.train_config("gd", use_8bit_optimizer=False) == preset.training["gd"]


# Sampling in half precision


def test_images_in_bf16_are_nearly_those_in_float32(run: Run) -> None:
    model, noise_schedule = train(run), run[1]
    plain = SampleConfig(n_samples=20, batch_size=20, num_inference_steps=4)
    half = plain.replace(mixed_precision="bf16")
    expected, found = (sample_images(model, config, noise_schedule).astype(int) for config in (plain, half))
    assert 0 < np.abs(found - expected).mean() < 2  # grey levels
    alone = sample_images(model, half.replace(batch_size=7), noise_schedule)
    assert np.abs(found - alone).mean() < 0.5
    assert plain.fingerprint() != half.fingerprint()
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        sample_images(model, plain.replace(mixed_precision="fp16"), noise_schedule)


# What is refused before any work


PLAIN = TrainConfig(batch_size=6)


@pytest.mark.parametrize(
    ("changes", "launch", "expected"),
    [
        ({}, Launch(n_processes=4), "batch_size: expected a multiple of the 4 processes, found 6.*Use e.g. 8"),
        ({"mixed_precision": "fp16"}, Launch(), "fp16 needs a GPU"),
        ({}, Launch(mixed_precision="bf16"), "accelerate launch asks for 'bf16'.*settings for 'no'.*--mixed_precision"),
        ({"mixed_precision": "bf16"}, Launch(mixed_precision="fp16"), "asks for 'fp16'.*settings for 'bf16'"),
        ({}, Launch(zero_stage=2), "DeepSpeed, which is not installed.*accelerate_config_2_processes.yaml"),
    ],
)
def test_what_a_launch_cannot_do_is_refused(changes: dict[str, Any], launch: Launch, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_training(PLAIN.replace(**changes), device="cpu", launch=launch)


def test_what_deepspeed_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"zero_stage: expected at most 2, found 3"):
        check_training(PLAIN, device="cpu", launch=Launch(zero_stage=3))
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps: expected 1 with DeepSpeed, found 2"):
        check_training(PLAIN.replace(gradient_accumulation_steps=2), device="cpu", launch=Launch(zero_stage=2))
    check_training(PLAIN, device="cpu", launch=Launch(zero_stage=2))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, run_8bit: Run) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"AdamW8bit .*bitsandbytes, which is not installed.*tribute\[8bit\]"):
        check_training(run_8bit[-1], device="cpu", launch=Launch())


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="--compile: needs a C\\+\\+ compiler on the CPU; looked for g\\+\\+"):
        check_training(PLAIN, device="cpu", runtime=RuntimeConfig(compile=True), launch=Launch())
    with pytest.raises(ConfigError, match=r"compile_backend: expected one of .*inductor.*found 'fast'"):
        check_training(
            PLAIN, device="cpu", runtime=RuntimeConfig(compile=True, compile_backend="fast"), launch=Launch()
        )
    check_training(PLAIN, device="cpu", runtime=RUNTIMES["compile"], launch=Launch())


def test_the_launch_is_read_from_the_environment() -> None:
    assert Launch.from_environment({}) == Launch()
    environment = {"WORLD_SIZE": "2", "RANK": "1", "ACCELERATE_MIXED_PRECISION": "BF16"}
    assert Launch.from_environment(environment) == Launch(2, "bf16", None, is_main=False)
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    assert Launch.from_environment(deepspeed).zero_stage == 1
