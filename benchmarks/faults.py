"""Kill a study at seeded moments, run it again, and compare with one that nobody disturbed.

A moment is an event of a stage: a training step, a file that is opened, flushed, renamed or removed, a statement or
a commit in the store. A first run counts them; moments are drawn from all stages, and a process that comes to its
moment sends itself SIGKILL, within the writing of a file with half of it on the disk. Every study is then run again
until it is complete, and must end with the same evaluations and attributions, bit for bit, with nothing measured
twice but what was in flight.

    python -m benchmarks.faults                       # 20 moments, each its own study
    python -m benchmarks.faults --n_moments 60 --seed 1
    python -m benchmarks.faults --victim worker       # 20 workers of Ray, one after the other, in one run
    python -m benchmarks.faults --victim raylet       # Ray itself, in 20 studies: workers outlive it by some seconds
    python -m benchmarks.faults --victim ray_driver   # the driver of workers, 20 times in one study

With Ray only the stages in which it works are hit; a moment is then a number of claimed evaluations.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np

from tribute.seeding import numpy_stream

PRELOAD = [
    "tribute.study.run",
    "tribute.study.outputs",
    "tribute.diffusion.train",
    "tribute.models.pruning",
    "tribute.behaviors.classifier_training",
    "torch_pruning",
    "accelerate",
    "sklearn.datasets",
    "diffusers.models.unets.unet_2d",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "diffusers.schedulers.scheduling_ddpm",
    "matplotlib.backends.backend_agg",
    "filelock",
]
"""What a process of a study imports, once for all of them."""

STAGES = {
    "Data": 2,
    "Full model": 3,
    "Pruning": 2,
    "Sparse model": 3,
    "empty": 1,
    "grand": 1,
    "fit": 3,
    "loo": 1,
    "test": 2,
    "Attributions and LDS": 1,
    "Outputs": 1,
}
"""Stages of a study, and how many of 20 moments each has."""

PRESET = {
    "dataset": "digits",
    "unet": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8,
        "norm_num_groups": 2,
        "downsample_padding": 1,
    },
    "training": {
        "retrain": {"n_steps": 6, "batch_size": 8, "optimizer": {"lr": 1e-3}},
        "prune_fine_tune": {"n_steps": 4, "batch_size": 8, "optimizer": {"lr": 1e-3}},
        "gd": {"n_steps": 3, "batch_size": 8, "optimizer": {"lr": 1e-2}},
    },
    "sampling": {"n_samples": 12, "sampler": "dpm-solver++", "num_inference_steps": 2, "batch_size": 12},
}

STUDY = {
    "name": "killed",
    "dataset": "digits",
    "fit": {"n_coalitions": 14, "n_end_points": 1, "leave_one_out": True, "first_removal_seed": 300},
    "test": {"n_coalitions": 4, "opt_seeds": [1]},
    "ckpt_freq": 2,
    "n_threads": 1,
}
N_EVALUATIONS = 2 + 14 + 10 + 4

BEHAVIORS = """
import os
from pathlib import Path

def brightness(images):
    log = os.open(Path(__file__).with_name("measured.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, b"measured\\n")
    os.close(log)
    return float(images.mean())
"""


@dataclass(frozen=True)
class Moment:
    """An event of a stage, counted within one run from 1."""

    stage: str
    number: int


@dataclass(frozen=True)
class Place:
    """Where a study lives, with its preset, its behavior and its cache of classifiers.

    Attributes:
        root: A folder of its own.
        with_classifier: Measure FID, which needs the in-domain classifier, besides a behavior that needs nothing.
    """

    root: Path
    with_classifier: bool = False

    @property
    def run_dir(self) -> Path:
        return self.root / "runs" / str(STUDY["name"])

    def prepare(self) -> Place:
        """Write what the study reads."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "ink.py").write_text(BEHAVIORS)
        (self.root / "preset.yaml").write_text(json.dumps(PRESET))
        return self

    def settings(self) -> dict[str, Any]:
        """The study, in a form that another process can be given."""
        behaviors = ["ink:brightness", *(["fid"] if self.with_classifier else [])]
        return STUDY | {
            "preset": str(self.root / "preset.yaml"),
            "outdir": str(self.root / "runs"),
            "behaviors": behaviors,
        }


class Watch:
    """Counts the events of this process by stage, and kills it at a moment.

    Args:
        place: Only files in its folder count.
        moment: When to die; None lives.
    """

    def __init__(self, place: Place, moment: Moment | None) -> None:
        self.root = str(place.root)
        self.moment = moment
        self.stage = "Data"
        self.counts: Counter[str] = Counter()
        self.log = os.open(place.root / "log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._inside = False

    def note(self, *what: Any) -> None:
        """Add a line to the log, which outlives the process."""
        os.write(self.log, json.dumps(what).encode() + b"\n")

    def tick(self, last_words: Callable[[], Any] | None = None) -> None:
        """An event; where it is the moment, `last_words` is called and nothing after it."""
        self.counts[self.stage] += 1
        if self.moment == Moment(self.stage, self.counts[self.stage]):
            if last_words is not None:
                last_words()
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Listen from now on."""
        import safetensors.torch
        from sqlalchemy import Engine, event

        import tribute.study.models as models
        from tribute import pulse
        from tribute.store.records import Store
        from tribute.study.session import StudySession

        beat, fsync, save_file, write_bytes = pulse.beat, os.fsync, safetensors.torch.save_file, Path.write_bytes
        claim, measure, prune = Store.claim, StudySession.measure, models.prune_model

        def counted_beat() -> None:
            self.note("step", self.stage)
            self.tick()
            beat()

        def counted_fsync(descriptor: int) -> None:
            self.tick()
            fsync(descriptor)

        def counted_save(tensors: Any, path: Path, *rest: Any) -> None:
            self.tick(lambda: path.open("wb").write(b"half a file"))
            save_file(tensors, path, *rest)

        def counted_write(path: Path, content: bytes) -> int:
            if str(path).startswith(self.root):
                self.tick(lambda: write_bytes(path, content[: len(content) // 2]))
            return write_bytes(path, content)

        def counted_claim(store: Store, *arguments: Any, **options: Any) -> Any:
            claimed = claim(store, *arguments, **options)
            if claimed is not None:
                self.stage = claimed.spec.role or "fit"
            return claimed

        def counted_measure(session: StudySession, method: str, coalition_mask: Any, *, opt_seed: int) -> Any:
            self.note("measure", method, "".join(str(int(x)) for x in coalition_mask), opt_seed)
            return measure(session, method, coalition_mask, opt_seed=opt_seed)

        def counted_prune(*arguments: Any) -> Any:
            self.stage = "Pruning"
            try:
                return prune(*arguments)
            finally:
                self.stage = "Sparse model"

        pulse.beat, os.fsync, safetensors.torch.save_file = counted_beat, counted_fsync, counted_save
        Path.write_bytes = counted_write  # pyright: ignore[reportAttributeAccessIssue]
        Store.claim, StudySession.measure, models.prune_model = counted_claim, counted_measure, counted_prune  # pyright: ignore[reportAttributeAccessIssue]
        event.listen(Engine, "commit", lambda connection: self.tick())
        event.listen(Engine, "before_cursor_execute", self._on_statement)
        sys.addaudithook(self._on_audit)

    def _on_statement(self, connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.split(" ", 1)[0].upper() in ("INSERT", "UPDATE", "DELETE", "CREATE"):
            self.tick()

    def _on_audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Files of the study that are made, renamed or removed."""
        if name not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") or self._inside:
            return
        if name == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        if self.root in os.fspath(arguments[0] if isinstance(arguments[0], str | os.PathLike) else ""):
            self.tick()


class _Listener:
    """Tells the watch which stage it is."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def stage(self, title: str) -> None:
        self.watch.stage = title

    def message(self, text: str) -> None:
        self.watch.note("message", text)

    def progress(self, title: str, n_done: int, n_total: int, text: str) -> None:
        pass


def run_once(place: Place, moment: Moment | None) -> None:
    """Run a study in this process, to its end or to a moment; the events go to `counts.json`."""
    import dataclasses

    import torch

    import tribute.behaviors.classifier as classifier
    from tribute.config import StudyConfig
    from tribute.study.outputs import write_outputs
    from tribute.study.run import run_study

    torch.set_num_threads(1)
    os.environ["TRIBUTE_CACHE"] = str(place.root / "cache")
    sys.path.insert(0, str(place.root))
    recipe_for = classifier.recipe_for
    classifier.recipe_for = lambda shape, n: dataclasses.replace(recipe_for(shape, n), n_epochs=1, min_steps=12)
    watch = Watch(place, moment)
    watch.install()
    result = run_study(StudyConfig.parse(place.settings(), where="the study"), _Listener(watch))
    if result is not None:
        watch.stage = "Outputs"
        write_outputs(result)
    watch.stage = "Done"
    (place.root / "counts.json").write_text(json.dumps(watch.counts))


def run_in_child(context: ForkServerContext, place: Place, moment: Moment | None = None) -> int | None:
    """Run a study in a new process; its exit status, -9 where it was killed."""
    process = context.Process(target=run_once, args=(place, moment))
    process.start()
    process.join()
    return process.exitcode


def read_counts(place: Place) -> dict[str, int]:
    """Events of the last run that came to its end, by stage."""
    return json.loads((place.root / "counts.json").read_text())


def read_log(place: Place, what: str) -> list[tuple[Any, ...]]:
    """Lines of the log of all runs of a study: `step`, `measure` or `message`."""
    lines = [json.loads(line) for line in (place.root / "log.jsonl").read_text().splitlines()]
    return [tuple(rest) for kind, *rest in lines if kind == what]


def draw_moments(counts: Mapping[str, int], seed: int, *, n_moments: int = 20, in_a_row: bool = False) -> list[Moment]:
    """Moments over all stages, in their order.

    Args:
        counts: Events by stage.
        seed: Of the draw.
        n_moments: How many.
        in_a_row: They hit one study, one after the other; a run then has less left to do than the one before it.
    """
    stream = numpy_stream(seed, "moments of death")
    stages = list(STAGES)
    shares = np.array(list(STAGES.values())) * n_moments / sum(STAGES.values())
    bounds = np.round(np.cumsum(shares)).astype(int)
    moments = []
    for stage, n in zip(stages, np.diff(bounds, prepend=0), strict=True):
        n_events = counts[stage] // (int(n) if in_a_row and n else 1)
        moments += [Moment(stage, int(stream.integers(1, max(2, n_events + 1)))) for _ in range(n)]
    return moments


def check_store(place: Place) -> dict[str, str]:
    """What an independent reader says of the store: status by identity; empty where there is none yet.

    Raises:
        RuntimeError: SQLite's own check finds damage.
    """
    path = place.run_dir / "results.db"
    if not path.exists():
        return {}
    with sqlite3.connect(path) as connection:
        found = connection.execute("PRAGMA integrity_check").fetchall()
        if found != [("ok",)]:
            raise RuntimeError(f"integrity_check of {path}: {found}")
        has_table = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'evaluation'").fetchall()
        rows = connection.execute("SELECT identity, status FROM evaluation").fetchall() if has_table else []
    connection.close()
    return dict(rows)


@dataclass(frozen=True)
class Outcome:
    """All that must be the same.

    Attributes:
        evaluations: Status and behaviors by identity, which holds the hash of the sparse model, too.
        attributions: The table of attributions, as it was written.
    """

    evaluations: dict[str, tuple[str, dict[str, float]]]
    attributions: bytes


def read_outcome(place: Place) -> Outcome:
    """What a complete study ends with."""
    from tribute.store.records import Store

    with Store.open(place.run_dir / "results.db", create=False) as store:
        found = {item.spec.identity: (item.status, dict(item.behaviors)) for item in store.find()}
    return Outcome(found, (place.run_dir / "attributions.csv").read_bytes())


def tree(place: Place) -> set[str]:
    """Files of a study and its cache; what SQLite keeps beside an open database does not count."""
    return {
        str(path.relative_to(place.root))
        for folder in (place.root / "runs", place.root / "cache")
        for path in folder.rglob("*")
        if not path.name.endswith(("-wal", "-shm"))
    }


@dataclass(frozen=True)
class Harm:
    """What killing did to a study that was then run to its end.

    Attributes:
        n_kills: Kills that hit.
        n_in_flight: Of these, how many while a coalition was measured.
        differing: What is not as in the undisturbed study; empty when nothing is.
    """

    n_kills: int
    n_in_flight: int
    differing: list[str]


def kill_and_continue(
    context: ForkServerContext, place: Place, moments: list[Moment], undisturbed: Place, *, ckpt_freq: int = 2
) -> Harm:
    """Kill a study at each of the moments, one after the other, run it to its end, and compare."""
    differing = []
    n_in_flight = 0
    for moment in moments:
        n_before = len(read_log(place, "measure")) if (place.root / "log.jsonl").exists() else 0
        status = run_in_child(context, place, moment)
        if status != -signal.SIGKILL:
            differing.append(f"{moment}: expected a process that was killed, found status {status}")
            continue
        running = Counter(check_store(place).values())["running"]
        if running > 1:
            differing.append(f"{moment}: {running} evaluations are running")
        n_in_flight += running and len(read_log(place, "measure")) > n_before
    status = run_in_child(context, place)
    if status != 0:
        return Harm(len(moments), n_in_flight, [*differing, f"the last run ended with status {status}"])
    check_store(place)
    expected, found = read_outcome(undisturbed), read_outcome(place)
    for identity in expected.evaluations.keys() | found.evaluations.keys():
        left, right = expected.evaluations.get(identity), found.evaluations.get(identity)
        if left != right:
            differing.append(f"evaluation {identity[:12]}: expected {left}, found {right}")
    if expected.attributions != found.attributions:
        differing.append("attributions.csv")
    differing += [f"left behind: {name}" for name in sorted(tree(place) - tree(undisturbed))]
    differing += [f"missing: {name}" for name in sorted(tree(undisturbed) - tree(place))]
    n_measured, n_expected = len(read_log(place, "measure")), len(expected.evaluations) + n_in_flight
    if n_measured > n_expected:
        differing.append(f"{n_measured} coalitions measured, {n_expected} with those in flight")
    for stage in ("Full model", "Sparse model"):
        n_kills = sum(moment.stage == stage for moment in moments)
        n_steps, n_once = (Counter(read_log(p, "step"))[(stage,)] for p in (place, undisturbed))
        if n_steps > n_once + n_kills * ckpt_freq:
            differing.append(f"{stage}: {n_steps} steps, expected at most {n_once} and {n_kills} times {ckpt_freq}")
    return Harm(len(moments), n_in_flight, differing)


def run_with_ray(place: Place, victim: str, claims: list[int]) -> None:
    """Run a study with two workers of Ray, and kill when so many evaluations have been claimed.

    Args:
        place: Of the study.
        victim: `worker`, each time one that is at work; `raylet` or `ray_driver`, once.
        claims: Numbers of claims of this run.
    """
    from tribute.config import StudyConfig
    from tribute.study.outputs import write_outputs
    from tribute.study.ray_executor import RayExecutor
    from tribute.study.run import run_study

    os.environ["TRIBUTE_CACHE"] = str(place.root / "cache")
    sys.path.insert(0, str(place.root))
    n_claimed = 0
    hand_out = RayExecutor._hand_out

    def deadly_hand_out(executor: RayExecutor, worker: Any, claimed: Any) -> None:
        nonlocal n_claimed
        hand_out(executor, worker, claimed)
        n_claimed += 1
        if n_claimed in claims:
            pids = {"worker": worker.provenance["pid"], "ray_driver": os.getpid()}
            pid = raylet_of(os.getpid()) if victim == "raylet" else pids[victim]
            with (place.root / "kills.log").open("a") as log:
                log.write(f"{claimed.spec.role}\n")
            os.kill(pid, signal.SIGKILL)

    RayExecutor._hand_out = deadly_hand_out  # pyright: ignore[reportAttributeAccessIssue]
    settings = place.settings() | {"execution": {"executor": "ray", "workers": 2}}
    (place.root / "log.jsonl").touch()
    watch = Watch(place, None)
    result = run_study(StudyConfig.parse(settings, where="the study"), _Listener(watch))
    if result is not None:
        write_outputs(result)


def raylet_of(pid: int) -> int:
    """The raylet that a process started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        if head.endswith("(raylet") and int(rest.split()[1]) == pid:
            return int(path.parent.name)
    raise RuntimeError("this process has no raylet")


def draw_claims(victim: str, n_kills: int, seed: int) -> list[list[list[int]]]:
    """For each study, for each of its runs but the last: after how many claims to kill."""
    stream = numpy_stream(seed, "moments of death", victim)
    if victim == "worker":
        # Never two in a row: an evaluation whose worker dies three times is set aside, as it should be.
        claims = stream.choice(np.arange(2, 2 * n_kills + 12, 2), n_kills, replace=False)
        return [[sorted(int(n) for n in claims)]]
    if victim == "raylet":
        return [[[int(stream.integers(1, N_EVALUATIONS - 2))]] for _ in range(n_kills)]
    return [[[int(stream.integers(2, 6))] for _ in range(n_kills)]]  # two are in hand, the others are done


def kill_ray_and_continue(
    context: ForkServerContext, place: Place, victim: str, runs: list[list[int]], undisturbed: Place
) -> list[str]:
    """Kill parts of Ray, run the study to its end, and return what is not as in the undisturbed one."""
    runs = [*runs, []]  # to the end
    n_claims_lost = 0
    differing = []
    for number, claims in enumerate(runs):
        started = time.perf_counter()
        process = context.Process(target=run_with_ray, args=(place, victim, claims))
        process.start()
        process.join()
        statuses = Counter(check_store(place).values())
        n_claims_lost += len(claims) if victim == "worker" else 2  # of the two workers
        seconds = time.perf_counter() - started
        print(f"  run {number + 1}: status {process.exitcode}, {dict(statuses)} ({seconds:.0f} s)", flush=True)
    hit = Counter((place.root / "kills.log").read_text().splitlines())
    expected, found = read_outcome(undisturbed), read_outcome(place)
    if expected != found:
        differing.append("evaluations or attributions differ")
    n_measured = len((place.root / "measured.log").read_text().splitlines())
    if n_measured > N_EVALUATIONS + n_claims_lost:
        differing.append(f"{n_measured} measured, expected at most {N_EVALUATIONS} and {n_claims_lost} in flight")
    differing += [f"left behind: {name}" for name in sorted(tree(place) - tree(undisturbed))]
    print(f"{victim} killed {hit.total()} times {dict(hit)}; {n_measured} measurements for {N_EVALUATIONS} evaluations")
    return differing


def main() -> None:
    """Kill, continue, compare; one line for each moment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victim", choices=["driver", "worker", "raylet", "ray_driver"], default="driver")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with_classifier = arguments.victim == "driver"
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Place(Path(folder) / "undisturbed", with_classifier).prepare()
        if run_in_child(context, undisturbed) != 0:
            raise SystemExit("the undisturbed study did not come to its end")
        if arguments.victim != "driver":
            n_bad = 0
            for number, runs in enumerate(draw_claims(arguments.victim, arguments.n_moments, arguments.seed)):
                place = Place(Path(folder) / f"{arguments.victim}-{number}").prepare()
                differing = kill_ray_and_continue(context, place, arguments.victim, runs, undisturbed)
                n_bad += bool(differing)
                print("; ".join(differing) or "identical", flush=True)
            raise SystemExit(bool(n_bad))
        moments = draw_moments(read_counts(undisturbed), arguments.seed, n_moments=arguments.n_moments)
        n_bad = 0
        for number, moment in enumerate(moments):
            started = time.perf_counter()
            place = Place(Path(folder) / str(number), with_classifier=True).prepare()
            harm = kill_and_continue(context, place, [moment], undisturbed)
            n_bad += bool(harm.differing)
            verdict = "; ".join(harm.differing) or "identical"
            in_flight = ", a coalition in flight" if harm.n_in_flight else ""
            seconds = time.perf_counter() - started
            print(f"{moment.stage} event {moment.number}{in_flight}: {verdict} ({seconds:.1f} s)", flush=True)
        print(f"{len(moments) - n_bad} of {len(moments)} ended identical")
        raise SystemExit(bool(n_bad))


if __name__ == "__main__":
    main()
