"""Warm workers of Ray, on this machine or on a cluster. The only file that imports Ray; it is imported when asked for.

Only the driver, which is the process that runs the study, touches the store: it claims one evaluation per idle worker
by priority, records what comes back, and extends the leases meanwhile. A worker has what a serial run has (data,
extractors, models, value functions), and its settings must equal the driver's, or it is refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from tribute import pulse
from tribute.config import ExecutionConfig, Preset, StudyConfig
from tribute.errors import ConfigError, MixedResultsError, StoreError, TributeError
from tribute.models.checkpoint import Checkpoint
from tribute.store.records import ClaimedEvaluation, Store
from tribute.study.executors import MAX_ATTEMPTS, Ledger, Measure, always, seconds_between_beats
from tribute.study.session import StudySession
from tribute.study.value_function import Evaluation

logger = logging.getLogger(__name__)

SECONDS_PER_TICK = 1.0
SECONDS_BETWEEN_LOOKS = 10.0
SECONDS_FOR_A_PLACE = 60.0
MAX_DEATHS_IN_SET_UP = 3


class Assignment(Protocol):
    """What a worker is told once; it travels to it."""

    def set_up(self) -> tuple[Measure, dict[str, Any]]:
        """The value functions of this process, and the provenance of their results."""
        ...


@dataclass(frozen=True)
class Measured:
    """An evaluation on its way back, without its images.

    Attributes:
        behaviors: Value by behavior name.
        seconds: By stage.
        n_steps: Optimizer updates.
        failure: Why there is no result; None where there is one.
        messages: What the library logged meanwhile.
    """

    behaviors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    n_steps: int = 0
    failure: str | None = None
    messages: tuple[str, ...] = ()


class StudyWorker:
    """A process of Ray that measures; `watch` answers from a thread of its own while another one measures."""

    def __init__(self) -> None:
        self._measure: Measure | None = None
        self._busy = False
        self._messages: list[str] = []

    def prepare(self, folder: str, sys_path: Sequence[str]) -> None:
        """Stand where the driver stands, as far as this machine has it, before anything of the driver's is read."""
        if Path(folder).is_dir():
            os.chdir(folder)
        sys.path.extend(path for path in sys_path if path not in sys.path and Path(path).exists())

    def set_up(self, assignment: Assignment) -> dict[str, Any]:
        """Set up once what serves every coalition.

        Returns:
            Provenance of this worker's results.
        """
        handler = _Collector(self._messages)
        library = logging.getLogger("tribute")
        library.addHandler(handler)
        library.setLevel(logging.WARNING)
        library.propagate = False
        self._measure, provenance = assignment.set_up()
        return {**provenance, "executor": "ray", "host": platform.node(), "pid": os.getpid()}

    def measure(self, method: str, coalition: bytes, n_contributors: int, opt_seed: int) -> Measured:
        """v(S); what a user can repair comes back as a failure, anything else is raised."""
        assert self._measure is not None
        mask = np.frombuffer(coalition, dtype=np.bool_, count=n_contributors).copy()
        pulse.beat()
        self._busy = True
        try:
            evaluation = self._measure(method, mask, opt_seed=opt_seed)
            return Measured(evaluation.behaviors, evaluation.seconds, evaluation.n_steps, None, self._said())
        except TributeError as error:
            return Measured(failure=str(error), messages=self._said())
        finally:
            self._busy = False

    @ray.method(concurrency_group="watch")
    def watch(self) -> tuple[bool, float]:
        """Whether it measures, and the seconds since its last step."""
        return self._busy, pulse.seconds_since_beat()

    def _said(self) -> tuple[str, ...]:
        said = tuple(self._messages)
        self._messages.clear()
        return said


class _Collector(logging.Handler):
    """Keeps messages for the way back."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@dataclass(eq=False)
class _Worker:
    """What the driver knows of a worker.

    Attributes:
        number: Which of the study's workers it is, from 1.
        actor: Ray's handle.
        ready: Resolves to its provenance; None once it has.
        provenance: Of its results.
        task: What it measures: the future result, and the claim; None while it is idle.
        looked: When it was last asked how it is.
        answer: Of that question; None when it has been answered.
    """

    number: int
    actor: Any
    ready: Any
    started: float
    provenance: dict[str, Any] = field(default_factory=dict)
    task: tuple[Any, ClaimedEvaluation] | None = None
    looked: float = 0.0
    answer: Any = None

    def __str__(self) -> str:
        where = f", process {self.provenance['pid']} on {self.provenance['host']}" if self.provenance else ""
        return f"worker {self.number}{where}"


class RayExecutor:
    """Measures with warm workers of Ray; the driver alone touches the store.

    A worker that dies or hangs costs one attempt of the evaluation that it had in hand, and is replaced.

    Args:
        assignment: What every worker is told.
        definitions: Unit, direction and variant of the behaviors, stored with every value.
        execution: How many workers, where, and when one hangs.
        n_threads: CPU threads of each worker; None: its share of the cores.
        namespace: Under which the workers are known to Ray.
        on_message: Is told what a user should know.
        max_attempts: How often an evaluation that fails is tried in all.
        seconds_between_looks: Between two questions to a busy worker how it is.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        definitions: Mapping[str, Mapping[str, Any]],
        execution: ExecutionConfig,
        n_threads: int | None = None,
        namespace: str = "tribute",
        on_message: Callable[[str], None] = logger.info,
        max_attempts: int = MAX_ATTEMPTS,
        seconds_between_looks: float = SECONDS_BETWEEN_LOOKS,
    ) -> None:
        self.assignment = assignment
        self.definitions = definitions
        self.execution = execution
        self.n_threads = n_threads
        self.namespace = namespace
        self.on_message = on_message
        self.max_attempts = max_attempts
        self.seconds_between_looks = seconds_between_looks
        self._workers: list[_Worker] = []
        self._assignment_ref: Any = None
        self._options: dict[str, Any] = {}
        self._node_id = ""
        self._owns_ray = False
        self._n_deaths_in_set_up = 0
        self._said_no_place = False

    # The interface of executors

    @property
    def n_workers(self) -> int:
        """As many at a time as the settings ask for."""
        return self.execution.workers

    def run(
        self,
        store: Store,
        study_id: int,
        *,
        evaluation_ids: Sequence[int] | None = None,
        on_done: Callable[[ClaimedEvaluation, Evaluation], None],
        go_on: Callable[[], bool] = always,
    ) -> int:
        """Work until nothing is claimable; an interruption gives what is in hand back.

        Raises:
            TributeError: Ray has ended, or workers cannot be set up; what was in hand can be claimed again.
        """
        counts = store.counts(study_id, evaluation_ids=evaluation_ids)
        if counts["pending"] + counts["running"] == 0:
            return 0
        ledger = Ledger(store, study_id, evaluation_ids, definitions=self.definitions, max_attempts=self.max_attempts)
        try:
            with _ray_errors():
                self._start()
                return self._work(ledger, on_done, go_on)
        except BaseException:
            self._abandon(ledger)
            raise

    def close(self) -> None:
        """End the workers and, where it was started here, Ray."""
        for worker in self._workers:
            self._kill(worker)
        self._workers = []
        self._assignment_ref = None
        if self._owns_ray:
            self._owns_ray = False
            with _signals_kept():
                ray.shutdown()

    # The loop

    def _work(
        self, ledger: Ledger, on_done: Callable[[ClaimedEvaluation, Evaluation], None], go_on: Callable[[], bool]
    ) -> int:
        n_done = 0
        ends = False
        extended = time.monotonic()
        while True:
            pulse.beat()
            idle = [worker for worker in self._workers if worker.ready is None and worker.task is None]
            nothing_left = False
            for worker in idle:
                ends = ends or not go_on()
                claimed = None if ends else ledger.claim()
                if claimed is None:
                    nothing_left = True
                    break
                self._hand_out(worker, claimed)
            busy = [worker for worker in self._workers if worker.task is not None]
            if not busy and nothing_left:
                return n_done
            for ref in self._wait():
                n_done += self._receive(ref, ledger, on_done)
            now = time.monotonic()
            self._look_after(ledger, now)
            claims = [worker.task[1] for worker in self._workers if worker.task is not None]
            if claims and now - extended > min(map(seconds_between_beats, claims)):
                extended = now
                ledger.store.heartbeat_all(claims)  # a result of one that is lost is refused when it comes

    def _wait(self) -> list[Any]:
        """What is there of results, set-ups and answers; waits a moment for the first."""
        refs = [ref for w in self._workers for ref in (w.ready, w.answer, w.task and w.task[0]) if ref is not None]
        done, _ = ray.wait(refs, num_returns=1, timeout=SECONDS_PER_TICK)
        if done:  # whatever else is there by now
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return done

    def _receive(
        self, ref: ray.ObjectRef[Any], ledger: Ledger, on_done: Callable[[ClaimedEvaluation, Evaluation], None]
    ) -> int:
        """Take one thing that came in; the number of evaluations that it finished."""
        worker = next((w for w in self._workers if ref in (w.ready, w.answer, w.task and w.task[0])), None)
        if worker is None:  # of a worker that was replaced meanwhile
            return 0
        try:
            found: Any = ray.get(ref)
        except RayTaskError as error:  # what user code, or a bug, raised there
            raise _cause(error) from error
        except (RayActorError, OutOfMemoryError) as error:  # the latter where Ray ended it to save the machine's memory
            self._check_ray_lives(error)
            self._bury(worker, ledger, error)
            return 0
        if ref == worker.ready:
            share = self._options["num_gpus"]
            worker.ready, worker.provenance = None, {**found, **({"gpus_per_worker": share} if share else {})}
            self._n_deaths_in_set_up = 0
        elif ref == worker.answer:
            worker.answer = None
            is_busy, seconds = found
            if worker.task is not None and is_busy and seconds > self.execution.stall_seconds:
                self._replace_hanging(worker, ledger, seconds)
        elif worker.task is not None:
            claimed = worker.task[1]
            is_recorded = self._record(worker, claimed, found, ledger)
            worker.task = None  # only now: what interrupts the recording gives the evaluation back
            if is_recorded:
                on_done(claimed, _without_images(found))
                return 1
        return 0

    def _record(self, worker: _Worker, claimed: ClaimedEvaluation, measured: Measured, ledger: Ledger) -> bool:
        for text in measured.messages:
            logger.warning("%s: %s", worker, text)
        if measured.failure is not None:
            ledger.fail(claimed, measured.failure)
            return False
        return ledger.finish(claimed, _without_images(measured), worker.provenance)

    def _look_after(self, ledger: Ledger, now: float) -> None:
        """Ask busy workers how they are; replace those that do not answer; say when there is no room for one."""
        for worker in list(self._workers):
            if worker.answer is not None:
                if worker.task is not None and now - worker.looked > self.execution.stall_seconds:
                    self._replace_hanging(worker, ledger, now - worker.looked)
            elif worker.task is not None and now - worker.looked > self.seconds_between_looks:
                worker.looked = now
                worker.answer = worker.actor.watch.remote()
        waiting = [worker for worker in self._workers if worker.ready is not None]
        if any(now - worker.started > SECONDS_FOR_A_PLACE for worker in waiting) and not self._said_no_place:
            self._said_no_place = True
            free = ray.available_resources()
            self.on_message(
                f"{len(waiting)} of {len(self._workers)} workers are not set up after {SECONDS_FOR_A_PLACE:.0f} s: the "
                f"machine is slow, or has no room for them. Each needs {self._options['num_cpus']} CPUs and "
                f"{self._options['num_gpus']:g} GPUs; free are {free.get('CPU', 0):g} and {free.get('GPU', 0):g} "
                "(execution.workers, gpus_per_worker, n_threads)"
            )

    def _hand_out(self, worker: _Worker, claimed: ClaimedEvaluation) -> None:
        spec = claimed.spec
        mask = np.ascontiguousarray(spec.coalition_mask)
        worker.looked = time.monotonic()
        worker.task = (worker.actor.measure.remote(spec.method, mask.tobytes(), len(mask), spec.opt_seed), claimed)

    # Workers that end

    def _bury(self, worker: _Worker, ledger: Ledger, error: RayError) -> None:
        """Replace a worker that died; what it had in hand counts as an attempt."""
        if worker.ready is not None:
            self._n_deaths_in_set_up += 1
            if self._n_deaths_in_set_up >= MAX_DEATHS_IN_SET_UP:
                raise TributeError(
                    f"{self._n_deaths_in_set_up} workers in a row died while they were set up. Ray says: {error}. "
                    "Look at the memory of the machine, and that tribute is installed on every one, in this version; "
                    "then run again"
                ) from error
        logger.warning("%s died; another one takes its place", worker)
        self._replace(worker, ledger, f"the worker died ({worker}), as one does that is killed for its memory")

    def _replace_hanging(self, worker: _Worker, ledger: Ledger, seconds: float) -> None:
        """End a worker that makes no step; what it had in hand counts as an attempt."""
        logger.warning("%s hangs: no step for %.0f s; another one takes its place", worker, seconds)
        limit = self.execution.stall_seconds
        reason = f"the worker hung ({worker}): no step for {seconds:.0f} s, allowed are {limit:.0f}"
        self._replace(worker, ledger, reason)

    def _replace(self, worker: _Worker, ledger: Ledger, reason: str) -> None:
        """Another worker in its place; what it had in hand fails for a reason."""
        self._kill(worker)  # also one that Ray could not reach: it may live, and hold its share of the machine
        if worker.task is not None:
            ledger.fail(worker.task[1], reason)
        self._workers[self._workers.index(worker)] = self._new_worker(worker.number)

    def _kill(self, worker: _Worker) -> None:
        with suppress(RayError, ValueError):  # it is dead already, or Ray is
            ray.kill(worker.actor)

    def _abandon(self, ledger: Ledger) -> None:
        """Give back what is in hand, and end those who have it."""
        busy = [worker for worker in self._workers if worker.task is not None]
        with suppress(StoreError):  # it is gone; the claims of this process can be had once it has ended
            for worker in busy:
                if worker.task is not None:
                    ledger.release(worker.task[1])
        for worker in busy:
            worker.task = None
        if ray.is_initialized():
            for worker in busy:
                self._kill(worker)
        self._workers = [worker for worker in self._workers if worker not in busy]

    def _check_ray_lives(self, error: RayError) -> None:
        """Tell the death of a worker from that of Ray itself."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if self._node_id and self._node_id not in alive:
            raise _ray_ended(error)

    # The beginning

    def _start(self) -> None:
        """Start Ray or join it, and start workers, where that is still to be done."""
        execution = self.execution
        if not ray.is_initialized():
            self._workers = []
            self._connect()
        if len(self._workers) == execution.workers:
            return
        through_client = (execution.address or "").startswith("ray://")
        self._node_id = "" if through_client else ray.get_runtime_context().get_node_id()
        resources = ray.cluster_resources()
        n_cores = int(resources.get("CPU", 1))
        n_threads = self.n_threads or max(1, n_cores // execution.workers)
        if self.n_threads is None:
            self.on_message(
                f"{execution.workers} workers with {n_threads} CPU threads each; the last digits of results depend on "
                "this number: set n_threads for the same digits with any number of workers"
            )
        default = 1.0 if resources.get("GPU", 0) >= 1 else 0.0
        gpus = default if execution.gpus_per_worker is None else execution.gpus_per_worker
        self._options = {"num_cpus": n_threads, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        if self._assignment_ref is None:
            assignment = self.assignment
            if isinstance(assignment, StudyAssignment):
                assignment = assignment.with_threads(n_threads)
            self._assignment_ref = ray.put(assignment)
        taken = {worker.number for worker in self._workers}
        self._workers += [self._new_worker(i) for i in range(1, execution.workers + 1) if i not in taken]

    def _connect(self) -> None:
        """Start Ray on this machine, or connect to the cluster at `execution.address`."""
        address = self.execution.address
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": self.namespace}
        with _signals_kept():
            try:
                if address is None:
                    n_cpus = max(os.cpu_count() or 1, self.execution.workers * (self.n_threads or 1))
                    ray.init(address="local", num_cpus=n_cpus, include_dashboard=False, **quiet)
                else:
                    ray.init(address=address, **quiet)
            except (ConnectionError, ValueError, RuntimeError, ImportError, RayError, TimeoutError) as error:
                where = "on this machine" if address is None else f"at {address}"
                raise ConfigError(
                    f"execution.address: Ray {where} cannot be had ({error}). Expected none, which starts Ray here, "
                    "auto, HOST:6379 or ray://HOST:10001 of a cluster that runs. A cluster with a token needs "
                    "RAY_AUTH_MODE=token here, too (docs/clusters.md)"
                ) from error
        self._owns_ray = True

    def _new_worker(self, number: int) -> _Worker:
        make_remote: Any = ray.remote
        actor = make_remote(concurrency_groups={"watch": 1})(StudyWorker).options(**self._options).remote()
        actor.prepare.remote(str(Path.cwd()), [str(Path(path).absolute()) for path in sys.path if path])
        return _Worker(number, actor, actor.set_up.remote(self._assignment_ref), time.monotonic())


def _without_images(measured: Measured) -> Evaluation:
    """What came back, as an evaluation."""
    no_images = np.zeros((0, 0, 0, 0), dtype=np.uint8)
    return Evaluation(measured.behaviors, measured.seconds, measured.n_steps, no_images)


# A study for workers


@dataclass(frozen=True)
class ShippedModel:
    """A checkpoint on its way to workers, which need not see the folder of the driver."""

    path: str
    meta: dict[str, Any]
    pruning: dict[str, Any] | None
    unet: bytes = field(repr=False)
    ema: bytes = field(repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ShippedModel:
        """Its weights as safetensors, without the state of its training."""
        from safetensors.torch import save

        unet, ema = (
            save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
            for tensors in (checkpoint.unet, checkpoint.ema)
        )
        return cls(str(checkpoint.path), checkpoint.meta, checkpoint.pruning, unet, ema)

    def unpack(self) -> Checkpoint:
        """The checkpoint, in memory."""
        from safetensors.torch import load

        return Checkpoint(Path(self.path), self.meta, load(self.unet), load(self.ema), self.pruning)


@dataclass(frozen=True)
class StudyAssignment:
    """A study as its workers are told.

    Attributes:
        config: The study.
        preset: Its recipe.
        full: Trained on everybody.
        sparse: Pruned and fine-tuned on everybody.
        settings: Of the driver, by method; a worker's must equal them.
        definitions: Of the driver's behaviors; a worker's must equal them.
        modules: Source of the user's modules with behaviors, by name.
    """

    config: StudyConfig
    preset: Preset
    full: ShippedModel
    sparse: ShippedModel
    settings: dict[str, Any]
    definitions: dict[str, Any]
    modules: dict[str, str]

    @classmethod
    def of(cls, session: StudySession, full: Checkpoint, sparse: Checkpoint) -> StudyAssignment:
        """What the workers must know of the driver's session."""
        return cls(
            session.config,
            session.preset,
            ShippedModel.of(full),
            ShippedModel.of(sparse),
            session.settings,
            session.worker.behavior_definitions(),
            user_modules(session.config.behaviors),
        )

    def with_threads(self, n_threads: int) -> StudyAssignment:
        """The same for workers of so many threads."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return StudyAssignment(**{**values, "config": self.config.replace(n_threads=n_threads)})

    def set_up(self) -> tuple[Measure, dict[str, Any]]:
        """A session like the driver's.

        Raises:
            MixedResultsError: It would measure something else; the message says what differs.
        """
        provide_modules(self.modules)
        session = StudySession(self.config, self.preset)
        session.use_models(self.full.unpack(), self.sparse.unpack())
        check_same(
            {"settings": self.settings, "behaviors": self.definitions},
            {"settings": session.settings, "behaviors": session.worker.behavior_definitions()},
        )
        return session.measure, session.worker.provenance()


def check_same(driver: Mapping[str, Any], worker: Mapping[str, Any]) -> None:
    """Refuse a worker that would measure something else than the driver.

    Raises:
        MixedResultsError: The message names what differs and the remedy.
    """
    ours, theirs = _flat(driver), _flat(worker)
    differing = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if not differing:
        return
    shown = "; ".join(f"{key}: {ours.get(key)!r} here, {theirs.get(key)!r} there" for key in differing[:4])
    if any(key.endswith(".data") for key in differing):
        remedy = "Put the same training data on every machine, with the same names of owners"
    else:
        remedy = (
            "Install the same version of tribute on every machine, and let them share the cache folder "
            "(TRIBUTE_CACHE), where the trained classifier is, or copy it"
        )
    raise MixedResultsError(f"the worker on {platform.node()} would measure something else: {shown}. {remedy}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def user_modules(behaviors: Sequence[str]) -> dict[str, str]:
    """Source by name of the modules of `module:function` behaviors that are one file and not an installed package."""
    found: dict[str, str] = {}
    for name in {behavior.partition(":")[0] for behavior in behaviors if ":" in behavior}:
        module = sys.modules.get(name)
        file = Path(getattr(module, "__file__", None) or "")
        if module is None or "." in name or hasattr(module, "__path__") or file.suffix != ".py":
            continue
        if not {"site-packages", "dist-packages"} & set(file.parts):
            found[name] = inspect.getsource(module)
    return found


def provide_modules(modules: Mapping[str, str]) -> None:
    """Make the driver's modules importable here; one that is here already must be the same.

    Raises:
        MixedResultsError: This machine has another module of that name.
    """
    missing = {}
    for name, source in modules.items():
        spec = importlib.util.find_spec(name)
        if spec is None:
            missing[name] = source
        elif spec.origin is None or Path(spec.origin).read_text() != source:
            raise MixedResultsError(
                f"the module {name!r}, which has a behavior, is another one on {platform.node()} ({spec.origin}) than "
                "where the study runs. Make them the same, or remove it there: the driver's is then used"
            )
    if missing:
        folder = Path(tempfile.mkdtemp(prefix="tribute-modules-"))
        for name, source in missing.items():
            (folder / f"{name}.py").write_text(source)
        sys.path.append(str(folder))
        importlib.invalidate_caches()


# Ray's own failures


def _ray_ended(error: BaseException) -> TributeError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return TributeError(
        f"Ray has ended or cannot be reached ({first}). What was in hand was given back; run the same command again to "
        "continue where it stopped"
    )


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Turn the end of Ray itself into an error that says how to go on."""
    try:
        yield
    except (RayError, ConnectionError) as error:
        raise _ray_ended(error) from error


def _cause(error: RayTaskError) -> BaseException:
    """What was raised in a worker."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray sets a handler for SIGTERM that ends the process; ours stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
