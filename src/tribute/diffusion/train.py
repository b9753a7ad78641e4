"""The training loop: full, retrained, sparse and coalition models differ only in its settings.

Nothing in the loop has a memory other than weights, moving average and optimizer: data order,
noise and timesteps of step k come from streams named by (opt_seed, k). A run that was killed and
resumed from a checkpoint therefore ends with the weights of one that was not, bit for bit on the
CPU in float32, and the number of processes does not change the global batch. Only dropout, where a
network has it, is drawn by each process for its share, so that it depends on their number.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tribute import pulse
from tribute.config import NoiseScheduleConfig, RuntimeConfig, TrainConfig
from tribute.diffusion.deepspeed import in_full_precision, prepare_engine, uses_deepspeed
from tribute.diffusion.examples import PixelExamples, TrainingExamples
from tribute.diffusion.loss import denoising_loss, draw_timesteps
from tribute.diffusion.preflight import check_batch_size, check_optimizer, check_precision
from tribute.diffusion.processes import Processes
from tribute.errors import CheckpointError, ConfigError, MixedResultsError, OutOfMemory, StoppedEarly, TributeError
from tribute.memory import brief, free_memory, is_out_of_memory
from tribute.models.build import build_noise_schedule, check_classes
from tribute.models.checkpoint import (
    Checkpoint,
    delete_older,
    load_last_intact,
    load_weights,
    save_checkpoint,
)
from tribute.models.runtime import check_compiled_gradients, check_runtime, prepare_network
from tribute.seeding import numpy_stream, stream_seed, torch_stream
from tribute.types import Images

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_STATE_PREFIX = "optimizer"

GRADIENT_TOLERANCE, HALF_GRADIENT_TOLERANCE = 1e-3, 0.1
"""How far gradients of a compiled network may be off, relative to their length: in float32, and in bf16 or fp16."""

_LONGEST_WAIT = timedelta(days=1)
"""Of a process for the others: one of them trains the classifier, encodes latents or prunes while they wait."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, as given to `on_log`.

    Attributes:
        step: Optimizer updates done.
        n_steps: Updates to do in all.
        loss: Mean loss since the last report.
        images_per_second: Training examples per second since the last report.
        lr: Learning rate of the last update.
    """

    step: int
    n_steps: int
    loss: float
    images_per_second: float
    lr: float


@dataclass(frozen=True)
class CheckpointPolicy:
    """Where and how often a run is saved.

    Attributes:
        folder: Parent of the `ckpt_steps_*` folders; a run found there is resumed.
        meta: What `config.json` says besides the loop's own entries; its `identity` must agree on resuming.
        ckpt_freq: Steps between checkpoints; the last step is always saved.
        keep_all: Keep every checkpoint, not only the last.
        pruning: Recipe of a pruned architecture.
        stop_early: Asked after every update but the last, with several processes after every `log_freq`: of the updates
            done and the seconds they took, over all parts of the run. True saves there and ends the run by
            `StoppedEarly`. It is not asked where a run cannot be resumed exactly.
    """

    folder: Path
    meta: Mapping[str, Any]
    ckpt_freq: int
    keep_all: bool = False
    pruning: Mapping[str, Any] | None = None
    stop_early: Callable[[int, float], bool] | None = None


@dataclass(frozen=True)
class TrainResult:
    """A trained model's moving average, and what training took.

    Attributes:
        ema: Moving average of the weights, by name.
        n_steps: Optimizer updates done.
        seconds: Wall-clock seconds of training, over all resumed parts.
        final_loss: Mean loss of the last report period; NaN when no step was done here.
    """

    ema: dict[str, torch.Tensor] = field(repr=False)
    n_steps: int
    seconds: float
    final_loss: float


class Ema:
    """Exponential moving average of parameters with warm-up, in fused multi-tensor operations."""

    def __init__(self, model: torch.nn.Module, config: TrainConfig) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.shadow = [parameter.detach().clone() for parameter in model.parameters()]
        self.config = config

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move towards the weights after update number `step` (1-based)."""
        decay = min(self.config.ema_max_decay, 1 - (1 + step / self.config.ema_inv_gamma) ** -self.config.ema_power)
        weights = [weight.to(torch.float32) for weight in model.parameters()]  # DeepSpeed's may be of half precision
        torch._foreach_lerp_(self.shadow, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def state(self) -> dict[str, torch.Tensor]:
        """Averages by parameter name."""
        return dict(zip(self.names, self.shadow, strict=True))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the averages."""
        for average, value in zip(self.shadow, (tensors[name] for name in self.names), strict=True):
            average.copy_(value)


class Trainer:
    """Trains models on rows of one tensor; built once and used for every coalition.

    Args:
        examples: Training examples, or images `(n_examples, height, width, channels)` uint8 without labels.
        noise_schedule: The forward process.
        mixed_precision: `no`, `fp16` or `bf16`.
        runtime: How networks compute.
        device: Where to train; None lets Accelerate choose.
        log_with: Trackers of Accelerate, e.g. `("tensorboard",)`.
        project_dir: Where trackers write.

    Raises:
        ConfigError: The device is not there, or not with this precision, or the process already uses another.
    """

    def __init__(
        self,
        examples: TrainingExamples | Images,
        noise_schedule: NoiseScheduleConfig,
        *,
        mixed_precision: str = "no",
        runtime: RuntimeConfig | None = None,
        device: str | None = None,
        log_with: Sequence[str] = (),
        project_dir: Path | None = None,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        check_precision(mixed_precision, device)
        if device is not None and ":" in device:
            raise ConfigError(
                f"device: expected cpu or cuda, found {device!r}; choose one of several GPUs by CUDA_VISIBLE_DEVICES"
            )
        self.examples: TrainingExamples = PixelExamples(examples) if isinstance(examples, np.ndarray) else examples
        self.noise_schedule_config = noise_schedule
        self.noise_schedule = build_noise_schedule(noise_schedule)
        self.runtime = runtime or RuntimeConfig()
        try:
            self.accelerator: Accelerator = Accelerator(
                mixed_precision=mixed_precision,
                cpu=device == "cpu",
                log_with=list(log_with) or None,
                project_dir=project_dir,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
            )
        except (ValueError, ImportError) as error:  # e.g. another precision earlier in this process, or no DeepSpeed
            raise ConfigError(
                f"mixed_precision, device, tracker or launcher: Accelerate refuses them: {error}"
            ) from error
        if len(self.accelerator.log_with) < len(log_with):  # Accelerate leaves out what is not installed
            raise ConfigError(
                f"report_to: the package of the tracker {', '.join(log_with)} is not installed; install it, or leave "
                "--report_to out"
            )
        if device is not None and device.split(":")[0] != self.device.type:
            raise ConfigError(f"device: asked for {device!r}, found {self.device.type!r} only; leave --device out")
        check_runtime(self.runtime, self.device.type)
        self.processes = Processes(self.accelerator)
        self._scaler_state = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}

    @property
    def device(self) -> torch.device:
        """Where models are trained."""
        return self.accelerator.device

    def train(
        self,
        model: torch.nn.Module,
        example_idx: npt.NDArray[np.int64],
        config: TrainConfig,
        *,
        checkpoints: CheckpointPolicy | None = None,
        on_log: Callable[[Progress], None] | None = None,
        log_freq: int = 100,
    ) -> TrainResult:
        """Train `model` in place on some rows of the images.

        Args:
            model: Starts from its present weights unless a checkpoint is resumed. Its moving average
                starts there, too.
            example_idx: `(n,)` rows to train on.
            config: Steps, batch, optimizer, seed.
            checkpoints: Where to save and resume; None trains in memory only.
            on_log: Called every `log_freq` steps on the main process.

        Raises:
            TributeError: The loss is not finite; the message names the step.
            OutOfMemory: A batch does not fit into memory. It is not made smaller: that would change every draw of
                random numbers, and with them what is trained.
            MixedResultsError: The folder holds a run with other settings.
            StoppedEarly: `checkpoints.stop_early` said so; the run can be resumed.
        """
        try:
            return self._train(model, example_idx, config, checkpoints, on_log, log_freq)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            shortage = brief(error)
        # Only here: the exception, gone by now, kept what the step had allocated.
        model.zero_grad(set_to_none=True)
        free_memory()
        raise OutOfMemory(_too_large(config, self.runtime, shortage, saves=checkpoints is not None))

    def _train(
        self,
        model: torch.nn.Module,
        example_idx: npt.NDArray[np.int64],
        config: TrainConfig,
        checkpoints: CheckpointPolicy | None,
        on_log: Callable[[Progress], None] | None,
        log_freq: int,
    ) -> TrainResult:
        """As `train`, with the errors of allocators."""
        accelerator = self.accelerator
        if len(example_idx) == 0:
            raise ConfigError("expected at least one training example, found none")
        if config.mixed_precision != accelerator.mixed_precision:
            raise ConfigError(
                f"mixed_precision: this process was set up for {accelerator.mixed_precision!r}, the training settings "
                f"ask for {config.mixed_precision!r}; use the same in both"
            )
        check_batch_size(config.batch_size, accelerator.num_processes)
        check_optimizer(config)
        self._check_fits(model, config)
        model.to(accelerator.device).train()
        prepare_network(model, self.runtime)
        model.zero_grad(set_to_none=True)  # of a run that was interrupted between two forward passes
        if config.n_steps > 0:
            tolerance = GRADIENT_TOLERANCE if accelerator.mixed_precision == "no" else HALF_GRADIENT_TOLERANCE
            check_compiled_gradients(model, lambda: self._loss(model, example_idx, config, 0), tolerance=tolerance)
        ema = Ema(model, config)
        with self._prepared(model, config) as (wrapped, optimizer):
            seconds, final_loss = self._steps(
                model, wrapped, optimizer, ema, example_idx, config, checkpoints, on_log, log_freq
            )
        accelerator.wait_for_everyone()  # nobody reads the last checkpoint before it is written
        return TrainResult(ema=ema.state(), n_steps=config.n_steps, seconds=seconds, final_loss=final_loss)

    @contextmanager
    def _prepared(self, model: torch.nn.Module, config: TrainConfig) -> Iterator[tuple[torch.nn.Module, Any]]:
        """The model as the processes train it together, and its optimizer; after that the model is as it came."""
        accelerator = self.accelerator
        wrapped, optimizer = model, _build_optimizer(model, config)
        with_deepspeed = uses_deepspeed(accelerator)
        if accelerator.num_processes > 1 or accelerator.mixed_precision != "no" or with_deepspeed:
            accelerator.free_memory()  # it remembers every optimizer that it prepared
        try:
            if with_deepspeed:
                wrapped, optimizer = prepare_engine(accelerator, model, optimizer, config)
            elif accelerator.num_processes > 1 or accelerator.mixed_precision != "no":
                optimizer = accelerator.prepare_optimizer(optimizer)
            if accelerator.num_processes > 1 and not with_deepspeed:
                wrapped = accelerator.prepare_model(model)
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(self._scaler_state)  # no run depends on the one before it
            yield wrapped, optimizer
        finally:
            if wrapped is not model:
                accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
            if with_deepspeed:
                model.float()

    def _steps(
        self,
        raw_model: torch.nn.Module,
        model: torch.nn.Module,
        optimizer: Any,
        ema: Ema,
        example_idx: npt.NDArray[np.int64],
        config: TrainConfig,
        checkpoints: CheckpointPolicy | None,
        on_log: Callable[[Progress], None] | None,
        log_freq: int,
    ) -> tuple[float, float]:
        """Do the steps that are left, and save; returns seconds over all parts of the run, and the last mean loss."""
        accelerator = self.accelerator
        first_step, seconds_before = 0, 0.0
        if checkpoints is not None:
            with accelerator.main_process_first():  # only one process keeps a damaged checkpoint aside
                found = load_last_intact(checkpoints.folder, with_training_state=True)
            if found is not None:
                first_step = _resume(found, raw_model, ema, optimizer, config, checkpoints)
                seconds_before = float(found.meta["seconds_train"])
                if not checkpoints.keep_all and accelerator.is_main_process:
                    delete_older(checkpoints.folder, found.path)  # a killed process may not have come to it
        started = time.perf_counter()
        report_started, report_step = started, first_step
        losses: list[torch.Tensor] = []
        final_loss = math.nan
        for step in range(first_step, config.n_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            for micro_step in range(config.gradient_accumulation_steps):
                pulse.beat()
                loss = self._loss(model, example_idx, config, step * config.gradient_accumulation_steps + micro_step)
                accelerator.backward(loss / config.gradient_accumulation_steps)
                losses.append(loss.detach())
            accelerator.clip_grad_norm_(raw_model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            ema.update(raw_model, done)
            is_last = done == config.n_steps
            stops = (
                not is_last
                and (accelerator.num_processes == 1 or done % log_freq == 0)
                and self._stops_early(checkpoints, done, seconds_before + time.perf_counter() - started)
            )
            save_now = checkpoints is not None and (is_last or stops or done % checkpoints.ckpt_freq == 0)
            if is_last or save_now or done % log_freq == 0:
                final_loss = self._mean(losses)
                losses.clear()
                if not math.isfinite(final_loss) or not _has_finite_weights(raw_model):
                    raise TributeError(
                        f"training diverged before step {done}: the loss is {final_loss}, loss or weights are not "
                        "finite; nothing was saved from this part of the run. Lower the learning rate or use "
                        "mixed_precision no"
                    )
                now = time.perf_counter()
                if on_log is not None and accelerator.is_main_process:
                    rate = (done - report_step) * config.examples_per_step / max(now - report_started, 1e-9)
                    on_log(Progress(done, config.n_steps, final_loss, rate, learning_rate(config, step)))
                accelerator.log({"loss": final_loss, "lr": learning_rate(config, step)}, step=done)
                report_started, report_step = now, done
            if checkpoints is not None and save_now and accelerator.is_main_process:
                _save(
                    checkpoints,
                    raw_model,
                    ema,
                    optimizer,
                    done,
                    config,
                    seconds_before + time.perf_counter() - started,
                    resumable=not uses_deepspeed(accelerator),
                )
            if stops:
                accelerator.wait_for_everyone()
                raise StoppedEarly(f"training was stopped after {done} of {config.n_steps} updates, which are saved")
        if checkpoints is not None and config.n_steps == 0 and accelerator.is_main_process:
            _save(checkpoints, raw_model, ema, optimizer, 0, config, 0.0, resumable=True)
        return seconds_before + time.perf_counter() - started, final_loss

    def _stops_early(self, checkpoints: CheckpointPolicy | None, done: int, seconds: float) -> bool:
        """Whether the run is to end here, which the main process decides for all."""
        if checkpoints is None or checkpoints.stop_early is None or uses_deepspeed(self.accelerator):
            return False
        return bool(self.processes.agree([int(checkpoints.stop_early(done, seconds))])[0])

    def _mean(self, losses: Sequence[torch.Tensor]) -> float:
        """Mean loss of all processes, each of which has its share of every batch."""
        mean = torch.stack(list(losses)).mean()
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(mean, "mean")
        return float(mean)  # pyright: ignore[reportArgumentType]

    def _loss(
        self,
        model: torch.nn.Module,
        example_idx: npt.NDArray[np.int64],
        config: TrainConfig,
        batch_number: int,
    ) -> torch.Tensor:
        """Loss of this process's share of a batch; all draws come from the batch's own stream."""
        accelerator = self.accelerator
        generator = torch_stream(config.opt_seed, "training batch", batch_number)
        rows = batch_rows(len(example_idx), config.batch_size, batch_number, config.opt_seed)
        posterior = torch_stream(config.opt_seed, "latent posterior", batch_number)
        clean = self.examples.batch(example_idx[rows], posterior).to(accelerator.device)
        if config.random_flip:
            flip = torch.rand(len(clean), generator=generator) < 0.5
            clean = torch.where(flip.to(clean.device)[:, None, None, None], clean.flip(-1), clean)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        timesteps = draw_timesteps(
            len(clean),
            self.noise_schedule_config.num_train_timesteps,
            generator,
            antithetic=config.antithetic_timesteps,
        ).to(clean.device)
        labels = self._dropped(model, self.labels_for(model, example_idx[rows]), config, batch_number)
        share = len(clean) // accelerator.num_processes
        mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        gpus = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus, enabled=_has_dropout(model)):
            if _has_dropout(model):
                torch.manual_seed(stream_seed(config.opt_seed, "dropout", batch_number, accelerator.process_index))
            with accelerator.autocast():
                return denoising_loss(
                    model,
                    self.noise_schedule,
                    clean[mine],
                    noise[mine],
                    timesteps[mine],
                    None if labels is None else labels[mine],
                )

    def labels_for(self, model: torch.nn.Module, example_idx: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """Labels `(n,)` of some examples for a class-conditional model; None for an unconditional one."""
        if self.examples.labels is None or not _n_classes(model):
            return None
        return torch.from_numpy(self.examples.labels[example_idx]).to(self.device)

    def _dropped(
        self, model: torch.nn.Module, labels: torch.Tensor | None, config: TrainConfig, batch_number: int
    ) -> torch.Tensor | None:
        """Labels of a batch with some of them dropped, for guidance."""
        if labels is None or config.label_dropout == 0:
            return labels
        generator = torch_stream(config.opt_seed, "label dropout", batch_number)
        dropped = torch.rand(len(labels), generator=generator) < config.label_dropout
        return labels.masked_fill(dropped.to(labels.device), _n_classes(model) - 1)

    def _check_fits(self, model: torch.nn.Module, config: TrainConfig) -> None:
        """Refuse a model or settings that do not go with the examples."""
        if config.random_flip and not self.examples.can_flip:
            raise ConfigError(
                "random_flip: expected images in pixels; found latents, whose mirror image is not the latent of the "
                "mirrored image. Set random_flip: false, or mirror the images before they are encoded"
            )
        n_classes = _n_classes(model)
        if not n_classes:
            return
        if self.examples.labels is None:
            raise ConfigError("unet: a class-conditional network needs labelled examples; found none")
        check_classes(n_classes, self.examples.n_labels, guided=config.label_dropout > 0, setting="label_dropout")


def batch_rows(n_examples: int, batch_size: int, batch_number: int, opt_seed: int) -> npt.NDArray[np.int64]:
    """Positions `(batch_size,)` of a batch: consecutive pieces of one random permutation per epoch.

    An epoch that ends within a batch is followed by the next, so every example is seen equally often.
    """
    rows: list[npt.NDArray[np.int64]] = []
    start, missing = batch_number * batch_size, batch_size
    while missing > 0:
        epoch, offset = divmod(start, n_examples)
        piece = _epoch_order(n_examples, epoch, opt_seed)[offset : offset + missing]
        rows.append(piece)
        start += len(piece)
        missing -= len(piece)
    return np.concatenate(rows)


_epoch_cache: dict[tuple[int, int, int], npt.NDArray[np.int64]] = {}


def _epoch_order(n_examples: int, epoch: int, opt_seed: int) -> npt.NDArray[np.int64]:
    """The permutation of an epoch; the last two are remembered."""
    key = (n_examples, epoch, opt_seed)
    if key not in _epoch_cache:
        while len(_epoch_cache) > 1:
            _epoch_cache.pop(next(iter(_epoch_cache)))
        _epoch_cache[key] = numpy_stream(opt_seed, "data order", epoch).permutation(n_examples)
    return _epoch_cache[key]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of update `step` (0-based): linear warm-up, then constant or cosine to zero."""
    optimizer = config.optimizer
    if step < optimizer.n_warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.n_warmup_steps
    if optimizer.lr_schedule == "constant":
        return optimizer.lr
    progress = (step - optimizer.n_warmup_steps) / max(1, config.n_steps - optimizer.n_warmup_steps)
    return optimizer.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the settings, over all parameters."""
    settings: dict[str, Any] = {
        "lr": config.optimizer.lr,
        "betas": config.optimizer.betas,
        "eps": config.optimizer.eps,
        "weight_decay": config.optimizer.weight_decay,
    }
    if config.optimizer.is_8bit:
        import bitsandbytes.optim

        return getattr(bitsandbytes.optim, config.optimizer.name)(model.parameters(), **settings)
    optimizer_class = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[config.optimizer.name]
    return optimizer_class(model.parameters(), foreach=True, **settings)


def _too_large(config: TrainConfig, runtime: RuntimeConfig, shortage: str, *, saves: bool) -> str:
    """What to do about a batch that does not fit, beginning with what leaves the result as it is."""
    ways = []
    if not runtime.gradient_checkpointing:
        ways.append("set runtime.gradient_checkpointing, which changes results by rounding only and takes longer")
    ways.append(
        f"divide batch_size ({config.batch_size}) and multiply gradient_accumulation_steps "
        f"({config.gradient_accumulation_steps}) by the same number, which is another study"
    )
    if not config.optimizer.is_8bit:
        ways.append("set use_8bit_optimizer, which is another study, too")
    saved = " What is saved already is kept." if saves else ""
    return f"training: a batch does not fit into memory ({shortage}). Free the device, or {'; or '.join(ways)}.{saved}"


def _has_finite_weights(model: torch.nn.Module) -> bool:
    """A finite loss may have infinite gradients."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def _n_classes(model: torch.nn.Module) -> int:
    """Classes of a conditional network, that for no label included; 0 for an unconditional one."""
    config = getattr(getattr(model, "module", model), "config", {})
    return int(config.get("num_class_embeds") or 0)


def _has_dropout(model: torch.nn.Module) -> bool:
    """Whether the forward pass draws random numbers of its own."""
    config = getattr(getattr(model, "module", model), "config", {})
    return bool(config.get("dropout", 0.0))


def _save(
    policy: CheckpointPolicy,
    model: torch.nn.Module,
    ema: Ema,
    optimizer: Any,
    n_steps: int,
    config: TrainConfig,
    seconds: float,
    *,
    resumable: bool,
) -> None:
    """Write a checkpoint, with the optimizer's state where training is to resume from it exactly."""
    path = save_checkpoint(
        policy.folder,
        n_steps=n_steps,
        unet=in_full_precision(model.state_dict()),
        ema=ema.state(),
        meta={**policy.meta, "train": config.model_dump(mode="json"), "seconds_train": seconds},
        pruning=policy.pruning,
        training_state=_optimizer_tensors(model, optimizer) if resumable else None,
    )
    if not policy.keep_all:
        delete_older(policy.folder, path)


def _optimizer_tensors(model: torch.nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Optimizer state by `optimizer.STATISTIC.PARAMETER`; empty before the first update.

    An 8-bit optimizer counts steps in Python and shares its quantisation maps among parameters; a file holds neither
    numbers nor shared tensors, so the ones become tensors and the others are copied.
    """
    tensors = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        for statistic, value in optimizer.state.get(parameter, {}).items():
            tensor = torch.as_tensor(value)
            tensors[f"{_STATE_PREFIX}.{statistic}.{name}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
    return tensors


def _resume(
    found: Checkpoint,
    model: torch.nn.Module,
    ema: Ema,
    optimizer: Any,
    config: TrainConfig,
    policy: CheckpointPolicy,
) -> int:
    """Restore weights, average and optimizer; returns the steps done.

    Only the number of steps may differ from what the checkpoint was made with, only upwards, and only where the
    learning rate does not depend on it.
    """
    may_differ = {"n_steps"} if config.optimizer.lr_schedule == "constant" else set()
    identity = {
        **dict(policy.meta.get("identity", {})),
        "train": config.model_dump(mode="json", exclude=may_differ),
    }
    # Read through the model: a checkpoint of an earlier version lacks settings that came since, with their defaults.
    saved_train = TrainConfig.parse(found.meta["train"], where=str(found.path))
    saved = {
        **dict(found.meta.get("identity", {})),
        "train": saved_train.model_dump(mode="json", exclude=may_differ),
    }
    differing = _differences(saved, identity)
    if differing:
        raise MixedResultsError(
            f"{found.path} was made with other settings: {'; '.join(differing)}. "
            "Use the settings it was made with, or another --outdir to start afresh"
        )
    if found.n_steps > config.n_steps:
        raise MixedResultsError(
            f"{found.path} already has {found.n_steps} steps, asked for {config.n_steps}. "
            "Ask for at least as many steps, or use another --outdir"
        )
    load_weights(model, found.unet, where=found.path)
    ema.load(found.ema)
    if found.n_steps < config.n_steps and found.n_steps > 0:
        if not found.training_state:
            raise CheckpointError(
                f"{found.path} has no training_state.safetensors, so it cannot be resumed exactly; "
                "expected a checkpoint of an unfinished run"
            )
        _load_optimizer(model, optimizer, found)
    if found.n_steps < config.n_steps:
        logger.info("Resuming %s at step %d of %d.", policy.folder, found.n_steps, config.n_steps)
    return found.n_steps


def _load_optimizer(model: torch.nn.Module, optimizer: Any, found: Checkpoint) -> None:
    """Put the saved statistics back where the optimizer keeps them."""
    state: dict[str, dict[str, torch.Tensor | int]] = {}
    for key, value in (found.training_state or {}).items():
        _, statistic, name = key.split(".", 2)
        is_count = statistic == "step" and not value.is_floating_point()  # of an 8-bit optimizer
        state.setdefault(name, {})[statistic] = int(value) if is_count else value
    names = [name for name, _ in model.named_parameters()]
    optimizer.load_state_dict(
        {
            "state": {i: state[name] for i, name in enumerate(names)},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


def _differences(saved: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ, as `name: saved X, asked Y`."""
    lines = []
    for key in sorted(saved.keys() | asked.keys()):
        left, right = saved.get(key), asked.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: saved {left!r}, asked {right!r}")
    return lines
