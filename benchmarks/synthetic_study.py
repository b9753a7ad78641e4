"""A study that no network ever measured: settings, run folder and store, filled from games with known credit.

Every command that only reads can run on it, also half done. Nothing here needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tribute.config import StudyConfig
from tribute.files import write_whole
from tribute.seeding import numpy_stream
from tribute.store.records import EvaluationSpec, FinishedEvaluation, Store, Study
from tribute.study.evaluations import plan_evaluations
from tribute.study.record import StudyRecord, by_role
from tribute.types import Behaviors, CoalitionMasks

PROVENANCE = {
    "tribute": "0.1.0",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "python": "3.11.9",
    "platform": "Linux-6.1-x86_64",
    "versions": {"torch": "2.13.0", "numpy": "2.4.0", "diffusers": "0.35.0"},
    "device": "a processor that was made up",
    "n_threads": 1,
    "n_processes": 1,
}


@dataclass(frozen=True)
class SyntheticBehavior:
    """A behavior that adds up over contributors and levels off with their number.

    Attributes:
        name: Under which it is stored.
        credit: `(n_contributors,)`, what each adds.
        v_empty: Its value without anybody.
        noise: Standard deviation of one measurement, as a share of that over coalitions of half the contributors.
        curvature: 0 adds up; 1 is strongly saturating in the share of the contributors that are present.
        unit: Of the behavior.
        higher_is_better: Its direction.
    """

    name: str
    credit: npt.NDArray[np.float64]
    v_empty: float = 1.0
    noise: float = 0.2
    curvature: float = 0.2
    unit: str = ""
    higher_is_better: bool = True

    def value(self, masks: CoalitionMasks) -> Behaviors:
        """Without noise, `(n_coalitions,)`."""
        present = masks.mean(axis=-1)
        shape = 1.0 + self.curvature * (1.0 - present)
        return self.v_empty + (masks @ self.credit) * shape

    def measured(self, spec: EvaluationSpec, noise_sd: float) -> float:
        """One measurement; the same evaluation gives the same number."""
        draw = numpy_stream(spec.opt_seed, "synthetic study", self.name, spec.identity).standard_normal()
        return float(self.value(spec.coalition_mask[None])[0] + noise_sd * draw)

    def noise_sd(self) -> float:
        """Standard deviation of the noise, in the unit of the behavior."""
        n = len(self.credit)
        masks = numpy_stream(0, "synthetic spread", n).random((400, n)) < 0.5
        return self.noise * float(self.value(masks).std())


def random_credit(n_contributors: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Credit as contributors of different sizes have it: many small, a few large, some below zero; it sums to 2."""
    draws = numpy_stream(seed, "synthetic credit", n_contributors).lognormal(0.0, 0.9, n_contributors)
    draws[:: max(2, n_contributors // 3)] *= -0.3
    return 2.0 * draws / draws.sum()


def two_behaviors(n_contributors: int, seed: int = 0, *, noise: float = 0.2) -> list[SyntheticBehavior]:
    """An Inception Score, of which more is better, and an FID, of which less is."""
    return [
        SyntheticBehavior("inception_score", 1.5 * random_credit(n_contributors, seed), 1.2, noise=noise),
        SyntheticBehavior(
            "fid", -40 * random_credit(n_contributors, seed + 1), 95.0, noise=noise, higher_is_better=False
        ),
    ]


def write_synthetic_study(
    folder: Path,
    behaviors: Sequence[SyntheticBehavior],
    *,
    contributor_names: Sequence[str] | None = None,
    n_fit: int = 48,
    n_test: int = 12,
    opt_seeds: tuple[int, ...] = (42, 43),
    n_finished: int | None = None,
    n_failed: int = 0,
    name: str = "synthetic",
    leave_one_out: bool = False,
    estimator: str = "auto",
) -> Path:
    """Write the settings of a study, its run folder and its store.

    Args:
        folder: Holds `STUDY.yaml` and `runs/`.
        behaviors: What is measured.
        contributor_names: By default `contributor 1`, ...
        n_fit: Fit coalitions.
        n_test: Test coalitions, each retrained with every one of `opt_seeds`.
        opt_seeds: Training seeds of the test coalitions.
        n_finished: How many of the evaluations are finished, in the order of the plan; None: all.
        n_failed: How many of those that are not finished have failed.
        name: Of the study.
        leave_one_out: Whether the coalitions without one contributor are measured, too.
        estimator: Of Shapley values.

    Returns:
        Path of the settings.
    """
    n = len(behaviors[0].credit)
    names = tuple(contributor_names or (f"contributor {i + 1}" for i in range(n)))
    n_examples = tuple(int(x) for x in numpy_stream(0, "synthetic examples", n).integers(20, 400, n))
    config = StudyConfig.parse(
        {
            "name": name,
            "dataset": "digits",
            "outdir": str(folder / "runs"),
            "behaviors": [item.name for item in behaviors],
            "fit": {"n_coalitions": n_fit, "leave_one_out": leave_one_out},
            "test": {"n_coalitions": n_test, "opt_seeds": list(opt_seeds)},
            "estimator": estimator,
        },
        where="synthetic study",
    )
    specs = list(plan_evaluations(config, n, {"gd": {"synthetic": True}, "retrain": {"synthetic": True}}))
    record = StudyRecord(
        name=config.name,
        dataset=config.dataset,
        contributor_names=names,
        n_examples=n_examples,
        fingerprint="0" * 64,
        behaviors=tuple(item.name for item in behaviors),
        evaluations=by_role(specs),
        models={
            "full": {"n_steps": 1000, "seconds_train": 420.0, "n_processes": 1},
            "sparse": {
                "n_steps": 500,
                "seconds_train": 150.0,
                "n_processes": 1,
                "n_parameters": {"before": 1000, "after": 400},
            },
        },
        classifier_accuracy=0.97,
        provenance=PROVENANCE,
    )
    write_whole(config.run_dir / "config.yaml", config.to_yaml())
    record.write(config.run_dir)
    study_path = folder / "STUDY.yaml"
    write_whole(study_path, config.to_yaml())
    noises = {item.name: item.noise_sd() for item in behaviors}
    definitions = {
        item.name: {"unit": item.unit, "higher_is_better": item.higher_is_better, "variant": "synthetic"}
        for item in behaviors
    }
    finished = [
        FinishedEvaluation(
            spec,
            {item.name: item.measured(spec, noises[item.name]) for item in behaviors},
            {"train": 3.0 if spec.method == "gd" else 20.0, "sample": 1.5, "measure": 0.25},
            {"device": PROVENANCE["device"]},
            definitions,
        )
        for spec in specs[:n_finished]
    ]
    with Store.open(config.db_url) as store:
        study = Study(config.name, config.dataset, names, n_examples, record.fingerprint)
        store.add_finished({study: finished})
        study_id = record.study_id(store)
        store.add(study_id, specs)
        for _ in range(n_failed):
            claimed = store.claim(study_id)
            assert claimed is not None, "nothing is left that could fail"
            store.fail(claimed, "the loss became NaN")
    return study_path
