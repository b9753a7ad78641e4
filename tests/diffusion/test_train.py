from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tribute.config import NoiseScheduleConfig, OptimizerConfig, TrainConfig, UNetConfig
from tribute.diffusion import train as train_module
from tribute.diffusion.loss import draw_timesteps
from tribute.diffusion.sample import from_uint8
from tribute.diffusion.train import CheckpointPolicy, Ema, Progress, Trainer, batch_rows, learning_rate
from tribute.errors import CheckpointError, ConfigError, MixedResultsError, TributeError
from tribute.models.build import build_noise_schedule, build_unet
from tribute.models.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from tribute.seeding import torch_stream
from tribute.types import Images

Rows = npt.NDArray[np.int64]


def policy(folder: Path, unet: UNetConfig, **changes: Any) -> CheckpointPolicy:
    values = {
        "meta": {"unet": unet.model_dump(mode="json"), "identity": {"data": "digits"}},
        "ckpt_freq": 3,
        "keep_all": True,
        **changes,
    }
    return CheckpointPolicy(folder, **values)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Data order


@pytest.mark.parametrize(("n_examples", "batch_size"), [(13, 4), (8, 8), (5, 12), (1, 3), (64, 1)])
def test_every_epoch_holds_every_example_once(n_examples: int, batch_size: int) -> None:
    n_epochs = 6
    n_batches = math.ceil(n_epochs * n_examples / batch_size)
    order = np.concatenate([batch_rows(n_examples, batch_size, number, 3) for number in range(n_batches)])
    assert len(order) == n_batches * batch_size
    epochs = order[: n_epochs * n_examples].reshape(n_epochs, n_examples)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n_examples), (n_epochs, 1)))
    if n_examples > 4:
        assert len(np.unique(epochs, axis=0)) == n_epochs  # a new order each time


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    forwards = [batch_rows(13, 4, number, 3) for number in range(20)]
    backwards = [batch_rows(13, 4, number, 3) for number in reversed(range(20))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    # Two batch sizes walk through the same order; another seed does not.
    np.testing.assert_array_equal(np.concatenate(forwards), batch_rows(13, 80, 0, 3))
    assert not np.array_equal(batch_rows(13, 80, 0, 3), batch_rows(13, 80, 0, 4))


# Formulas


@pytest.mark.parametrize(("max_decay", "inv_gamma", "power"), [(0.9999, 1.0, 0.75), (0.5, 1.0, 0.75), (0.99, 5.0, 1.0)])
def test_the_moving_average_follows_its_formula(max_decay: float, inv_gamma: float, power: float) -> None:
    config = TrainConfig(ema_max_decay=max_decay, ema_inv_gamma=inv_gamma, ema_power=power)
    layer = torch.nn.Linear(3, 2)
    ema = Ema(layer, config)
    expected = layer.weight.detach().double().numpy().copy()
    stream = np.random.Generator(np.random.PCG64(0))
    for step in range(1, 40):
        values = stream.standard_normal((2, 3))
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(values))
        ema.update(layer, step)
        decay = min(max_decay, 1 - (1 + step / inv_gamma) ** -power)
        expected = decay * expected + (1 - decay) * values
    np.testing.assert_allclose(ema.state()["weight"].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert list(ema.state()) == ["weight", "bias"]
    other = Ema(layer, config)
    other.load(ema.state())
    assert equal(other.state(), ema.state())
    assert ema.state()["weight"] is not other.state()["weight"]


def test_learning_rates() -> None:
    def rates(n_steps: int, **settings: Any) -> list[float]:
        config = TrainConfig(n_steps=n_steps, optimizer=OptimizerConfig(lr=8.0, **settings))
        return [learning_rate(config, step) for step in range(n_steps)]

    assert rates(4) == [8.0] * 4
    assert rates(6, n_warmup_steps=4) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    cosine = rates(8, n_warmup_steps=4, lr_schedule="cosine")
    half = math.sqrt(0.5)
    np.testing.assert_allclose(cosine, [2, 4, 6, 8, 8, 4 * (1 + half), 4, 4 * (1 - half)])
    assert rates(2, n_warmup_steps=4, lr_schedule="cosine") == [2.0, 4.0]


def naive_training(
    model: torch.nn.Module, images: Images, rows: Rows, config: TrainConfig, schedule: NoiseScheduleConfig
) -> dict[str, np.ndarray]:
    """The training loop written out, one large batch per update; returns the moving average."""
    kept = build_noise_schedule(schedule).alphas_cumprod
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.lr, eps=config.optimizer.eps)
    average = {name: value.detach().double().numpy().copy() for name, value in model.named_parameters()}
    for step in range(config.n_steps):
        parts = []
        for number in range(step * config.gradient_accumulation_steps, (step + 1) * config.gradient_accumulation_steps):
            generator = torch_stream(config.opt_seed, "training batch", number)
            chosen = rows[batch_rows(len(rows), config.batch_size, number, config.opt_seed)]
            clean = from_uint8(images[chosen])
            noise = torch.randn(clean.shape, generator=generator)
            timesteps = draw_timesteps(len(clean), schedule.num_train_timesteps, generator)
            parts.append((clean, noise, timesteps))
        clean, noise, timesteps = (torch.cat(part) for part in zip(*parts, strict=True))
        level = kept[timesteps][:, None, None, None]
        prediction = model(level.sqrt() * clean + (1 - level).sqrt() * noise, timesteps)[0]
        loss = (prediction - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.sqrt(sum((gradient.square().sum() for gradient in gradients), torch.zeros(())))
        for gradient in gradients:
            gradient *= min(1.0, config.max_grad_norm / (norm.item() + 1e-6))
        optimizer.step()
        decay = min(config.ema_max_decay, 1 - (2 + step) ** -0.75)
        for name, value in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * value.detach().double().numpy()
    return average


@pytest.mark.parametrize(("n_accumulated", "max_grad_norm"), [(1, 0.05), (2, 1e3)])  # clipped, and not
def test_training_agrees_with_a_naive_loop(
    trainer: Trainer,
    unet_config: UNetConfig,
    digit_images: Images,
    rows: Rows,
    noise_schedule: Any,
    n_accumulated: int,
    max_grad_norm: float,
) -> None:
    config = TrainConfig(
        n_steps=4,
        batch_size=4,
        gradient_accumulation_steps=n_accumulated,
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-4),  # large enough that rounding does not decide the sign of a step
        max_grad_norm=max_grad_norm,
        ema_max_decay=0.5,
        opt_seed=7,
    )
    model, twin = build_unet(unet_config), build_unet(unet_config)
    start = weights(model)
    result = trainer.train(model, rows, config)
    average = naive_training(twin, digit_images, rows, config, noise_schedule)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result.ema[name].numpy(), average[name], rtol=1e-4, atol=1e-5)
    assert max((start[name] - value).abs().max().item() for name, value in twin.state_dict().items()) > 1e-3
    assert result.n_steps == 4


def test_accumulated_batches_are_a_run_of_their_own(trainer: Trainer, dropout_unet: Any, rows: Rows) -> None:
    def run(n_accumulated: int, batch_size: int) -> dict[str, torch.Tensor]:
        config = TrainConfig(
            n_steps=2, batch_size=batch_size, gradient_accumulation_steps=n_accumulated, random_flip=True
        )
        model = build_unet(dropout_unet)
        trainer.train(model, rows, config)
        return weights(model)

    assert equal(run(2, 4), run(2, 4))
    assert not equal(run(2, 4), run(1, 8))  # other noise
    assert not equal(run(2, 4), run(1, 4))


def test_training_depends_on_rows_and_seed_only(
    trainer: Trainer, dropout_unet: Any, rows: Rows, train_config: Any
) -> None:
    def run(rows: Rows, opt_seed: int) -> dict[str, torch.Tensor]:
        model = build_unet(dropout_unet)
        trainer.train(model, rows, train_config.replace(opt_seed=opt_seed, n_steps=2))
        return weights(model)

    first = run(rows, 1)
    run(rows[:5], 3)
    torch.rand(7)
    assert equal(run(rows, 1), first)
    assert not equal(run(rows, 2), first)
    assert not equal(run(rows + 1, 1), first)


def test_training_leaves_the_global_generators_alone(trainer: Trainer, dropout_unet: Any, rows: Rows) -> None:
    before = torch.get_rng_state()
    trainer.train(build_unet(dropout_unet), rows, TrainConfig(n_steps=2, batch_size=4, random_flip=True))
    assert torch.equal(before, torch.get_rng_state())


def test_training_lowers_the_loss(trainer: Trainer, unet_config: UNetConfig, rows: Rows) -> None:
    reports: list[Progress] = []
    config = TrainConfig(n_steps=60, batch_size=16, optimizer=OptimizerConfig(lr=3e-3))
    trainer.train(build_unet(unet_config), rows, config, on_log=reports.append, log_freq=20)
    assert [(report.step, report.n_steps) for report in reports] == [(20, 60), (40, 60), (60, 60)]
    assert reports[-1].loss < 0.6 * reports[0].loss
    assert all(report.images_per_second > 0 and report.lr == 3e-3 for report in reports)


def test_what_an_interrupted_run_left_does_not_count(trainer: Trainer, unet_config: UNetConfig, rows: Rows) -> None:
    config = TrainConfig(n_steps=1, batch_size=4)
    clean, warm = build_unet(unet_config), build_unet(unet_config)
    warm(torch.ones(1, 1, 8, 8), 3)[0].sum().backward()
    trainer.train(clean, rows, config)
    trainer.train(warm, rows, config)
    assert equal(weights(clean), weights(warm))


# Checkpoints


def test_checkpoints_hold_the_run(trainer: Trainer, unet_config: UNetConfig, rows: Rows, tmp_path: Path) -> None:
    config = TrainConfig(n_steps=8, batch_size=4, ema_max_decay=0.9)
    model = build_unet(unet_config)
    result = trainer.train(model, rows, config, checkpoints=policy(tmp_path, unet_config))
    assert [path.name[-2:] for path in list_checkpoints(tmp_path)] == ["03", "06", "08"]
    found = load_checkpoint(tmp_path, with_training_state=True)
    assert equal(found.unet, weights(model))
    assert equal(found.ema, {name: value.contiguous() for name, value in result.ema.items()})
    assert TrainConfig.parse(found.meta["train"], where="checkpoint") == config
    assert found.meta["identity"] == {"data": "digits"}
    statistics = {name.split(".")[1] for name in found.training_state or {}}
    assert statistics == {"step", "exp_avg", "exp_avg_sq"}
    assert len(found.training_state or {}) == 3 * len(list(model.parameters()))


def test_only_the_last_checkpoint_is_kept_on_request(
    trainer: Trainer, unet_config: UNetConfig, rows: Rows, tmp_path: Path
) -> None:
    config = TrainConfig(n_steps=8, batch_size=4)
    trainer.train(build_unet(unet_config), rows, config, checkpoints=policy(tmp_path, unet_config, keep_all=False))
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_steps_00000008"]


def test_no_steps_save_the_model_as_it_is(
    trainer: Trainer, unet_config: UNetConfig, rows: Rows, tmp_path: Path
) -> None:
    model = build_unet(unet_config)
    before = weights(model)
    for _ in range(2):
        trainer.train(model, rows, TrainConfig(n_steps=0), checkpoints=policy(tmp_path, unet_config))
    found = load_checkpoint(tmp_path)
    assert found.n_steps == 0
    assert equal(found.unet, before)
    assert equal(found.ema, before)


def test_a_finished_run_is_not_repeated(trainer: Trainer, unet_config: UNetConfig, rows: Rows, tmp_path: Path) -> None:
    config = TrainConfig(n_steps=4, batch_size=4)
    model, other = build_unet(unet_config), build_unet(unet_config, opt_seed=9)
    first = trainer.train(model, rows, config, checkpoints=policy(tmp_path, unet_config))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second = trainer.train(other, rows, config, checkpoints=policy(tmp_path, unet_config))
    assert equal(weights(model), weights(other))
    assert equal(first.ema, second.ema)
    assert second.seconds >= load_checkpoint(tmp_path).meta["seconds_train"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_more_steps_continue_and_fewer_are_refused(
    trainer: Trainer, unet_config: UNetConfig, rows: Rows, tmp_path: Path
) -> None:
    config = TrainConfig(n_steps=4, batch_size=4)
    trainer.train(build_unet(unet_config), rows, config, checkpoints=policy(tmp_path, unet_config))
    longer, undisturbed = build_unet(unet_config), build_unet(unet_config)
    trainer.train(longer, rows, config.replace(n_steps=7), checkpoints=policy(tmp_path, unet_config))
    trainer.train(undisturbed, rows, config.replace(n_steps=7))
    assert equal(weights(longer), weights(undisturbed))
    with pytest.raises(MixedResultsError, match=r"already has 7 steps, asked for 4.*--outdir"):
        trainer.train(build_unet(unet_config), rows, config, checkpoints=policy(tmp_path, unet_config))


def test_a_cosine_schedule_cannot_be_prolonged(
    trainer: Trainer, unet_config: UNetConfig, rows: Rows, tmp_path: Path
) -> None:
    """Its learning rates depend on the number of steps, so no run of 7 steps begins like one of 4."""
    config = TrainConfig(n_steps=4, batch_size=4, optimizer=OptimizerConfig(lr_schedule="cosine"))
    trainer.train(build_unet(unet_config), rows, config, checkpoints=policy(tmp_path, unet_config))
    with pytest.raises(MixedResultsError, match=r"train\.n_steps: saved 4, asked 7"):
        trainer.train(
            build_unet(unet_config), rows, config.replace(n_steps=7), checkpoints=policy(tmp_path, unet_config)
        )


def test_another_setting_shows_both_values(
    trainer: Trainer, unet_config: UNetConfig, rows: Rows, tmp_path: Path
) -> None:
    config = TrainConfig(n_steps=2, batch_size=4)
    trainer.train(build_unet(unet_config), rows, config, checkpoints=policy(tmp_path, unet_config))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    model = build_unet(unet_config)
    start = weights(model)
    other = config.replace(batch_size=8, optimizer={"lr": 0.5})
    with pytest.raises(MixedResultsError) as error:
        trainer.train(model, rows, other, checkpoints=policy(tmp_path, unet_config))
    assert "train.batch_size: saved 4, asked 8; train.optimizer.lr: saved 0.0001, asked 0.5" in str(error.value)
    assert "--outdir" in str(error.value)
    changed = policy(tmp_path, unet_config, meta={"unet": {}, "identity": {"data": "cifar", "start": "x"}})
    with pytest.raises(MixedResultsError) as error:
        trainer.train(model, rows, config, checkpoints=changed)
    assert "data: saved 'digits', asked 'cifar'; start: saved None, asked 'x'" in str(error.value)
    assert equal(weights(model), start)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_without_optimizer_state_is_not_continued(
    trainer: Trainer, unet_config: UNetConfig, rows: Rows, tmp_path: Path
) -> None:
    model, config = build_unet(unet_config), TrainConfig(n_steps=2, batch_size=4)
    trainer.train(model, rows, config, checkpoints=policy(tmp_path, unet_config))
    found = load_checkpoint(tmp_path)
    meta = {key: value for key, value in found.meta.items() if key not in ("files", "n_steps")}
    save_checkpoint(tmp_path, n_steps=2, unet=found.unet, ema=found.ema, meta=meta)
    trainer.train(model, rows, config, checkpoints=policy(tmp_path, unet_config))
    with pytest.raises(CheckpointError, match="cannot be resumed exactly"):
        trainer.train(model, rows, config.replace(n_steps=3), checkpoints=policy(tmp_path, unet_config))


# What cannot be trained


def test_a_loss_that_is_not_finite_ends_the_run(
    trainer: Trainer, unet_config: UNetConfig, rows: Rows, tmp_path: Path
) -> None:
    config = TrainConfig(n_steps=40, batch_size=4, optimizer=OptimizerConfig(lr=1e18))
    with pytest.raises(TributeError, match=r"before step (\d+): the loss is (nan|inf).*learning rate"):
        trainer.train(build_unet(unet_config), rows, config, checkpoints=policy(tmp_path, unet_config, ckpt_freq=1))
    saved = [load_checkpoint(path) for path in list_checkpoints(tmp_path)]
    assert len(saved) < 10
    assert all(value.isfinite().all() for found in saved for value in (*found.unet.values(), *found.ema.values()))


def test_a_run_that_fails_leaves_the_network_as_it_came(
    trainer: Trainer, unet_config: UNetConfig, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several processes the network is wrapped to train; what wraps it is taken off whatever happens."""
    taken_off: list[Any] = []
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer.accelerator, "prepare_model", torch.nn.Sequential)
    monkeypatch.setattr(trainer.accelerator, "unwrap_model", lambda model, **_: taken_off.append(model))

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(trainer, "_steps", fail)
    model = build_unet(unet_config)
    with pytest.raises(RuntimeError, match="the device is gone"):
        trainer.train(model, rows, TrainConfig(n_steps=1, batch_size=4))
    assert [wrapper[0] is model for wrapper in taken_off] == [True]


def test_infinite_gradients_of_a_finite_loss_end_the_run(
    trainer: Trainer, unet_config: UNetConfig, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(n_steps=5, batch_size=4)
    trainer.train(
        build_unet(unet_config), rows, config.replace(n_steps=1), checkpoints=policy(tmp_path, unet_config, ckpt_freq=1)
    )

    def root_of_zero(model: Any, *_: Any) -> torch.Tensor:
        return (model.conv_in.bias.sum() * 0).sqrt()

    monkeypatch.setattr(train_module, "denoising_loss", root_of_zero)
    with pytest.raises(TributeError, match=r"before step 2: the loss is 0\.0"):
        trainer.train(build_unet(unet_config), rows, config, checkpoints=policy(tmp_path, unet_config, ckpt_freq=1))
    assert load_checkpoint(tmp_path).n_steps == 1


def test_nothing_to_train_on(trainer: Trainer, unet_config: UNetConfig) -> None:
    with pytest.raises(ConfigError, match="at least one training example"):
        trainer.train(build_unet(unet_config), np.array([], dtype=np.int64), TrainConfig(n_steps=1))


@pytest.mark.usefixtures("fresh_accelerator")
def test_fp16_needs_a_gpu(digit_images: Images, noise_schedule: Any) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        Trainer(digit_images, noise_schedule, mixed_precision="fp16", device="cpu")


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_device_that_is_not_there(digit_images: Images, noise_schedule: Any) -> None:
    with pytest.raises(ConfigError, match="device: asked for 'npu'"):
        Trainer(digit_images, noise_schedule, device="npu")
    with pytest.raises(ConfigError, match="found 'cuda:1'"):
        Trainer(digit_images, noise_schedule, device="cuda:1")


@pytest.mark.usefixtures("fresh_accelerator")
def test_one_process_has_one_precision(
    digit_images: Images, noise_schedule: Any, unet_config: UNetConfig, rows: Rows
) -> None:
    trainer = Trainer(digit_images, noise_schedule, device="cpu")
    with pytest.raises(ConfigError, match="mixed_precision"):
        Trainer(digit_images, noise_schedule, mixed_precision="bf16", device="cpu")
    with pytest.raises(ConfigError, match=r"set up for 'no', the training settings ask for 'bf16'"):
        trainer.train(build_unet(unet_config), rows, TrainConfig(n_steps=1, mixed_precision="bf16"))


@pytest.mark.usefixtures("fresh_accelerator")
def test_bf16_trains_nearly_as_float32_and_leaves_the_model_in_float32(
    digit_images: Images, noise_schedule: Any, unet_config: UNetConfig, rows: Rows
) -> None:
    from accelerate.state import AcceleratorState

    config = TrainConfig(n_steps=3, batch_size=8, optimizer=OptimizerConfig(lr=1e-3, eps=1e-4))
    precise, coarse = build_unet(unet_config), build_unet(unet_config)
    Trainer(digit_images, noise_schedule, device="cpu").train(precise, rows, config)
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(digit_images, noise_schedule, mixed_precision="bf16", device="cpu")
    for _ in range(2):
        coarse.load_state_dict(build_unet(unet_config).state_dict())
        assert math.isfinite(trainer.train(coarse, rows, config.replace(mixed_precision="bf16")).final_loss)
    trained, start = weights(precise), build_unet(unet_config).state_dict()
    travelled = torch.cat([(trained[name] - start[name]).flatten() for name in start]).abs().mean()
    apart = torch.cat([(trained[name] - value).flatten() for name, value in weights(coarse).items()]).abs().mean()
    assert 0 < apart < 0.2 * travelled
    # The same weights in a model that was never trained in bf16 predict the same.
    untouched = build_unet(unet_config)
    untouched.load_state_dict(coarse.state_dict())
    probe = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(coarse.eval()(probe, 3)[0], untouched.eval()(probe, 3)[0])
    assert {value.dtype for value in weights(coarse).values()} == {torch.float32}
