"""What a pilot found, and what follows from it: read and judged without PyTorch.

`tribute pilot` writes `pilot.json` into the run folder; `tribute run` and `tribute report` read it. The rules and their
reasons are in docs/planning.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from tribute.errors import StoreError
from tribute.files import write_whole
from tribute.games.lds import rank_correlation

FILE_NAME = "pilot.json"
FORMAT_VERSION = 1

Verdict = Literal["go", "more_coalitions", "more_images", "less_pruning", "more_steps"]

MIN_CORRELATION = 0.5
"""Sparsified fine-tuning must rank the coalitions at least so much as retraining does."""

MAX_NOISE = math.sqrt(0.5)
"""Standard deviation between training seeds over that between coalitions: half of the variance would be noise."""

MAX_SPARSE_GAP = 2.0
"""Between the sparse and the full model, over the standard deviation between retrained coalitions."""

TITLES: Mapping[Verdict, str] = {
    "go": "go",
    "more_coalitions": "undecided: more pilot coalitions",
    "more_images": "more images",
    "less_pruning": "less pruning",
    "more_steps": "more fine-tuning steps",
}


@dataclass(frozen=True)
class PilotBehavior:
    """What the pilot found for one behavior.

    Attributes:
        name: Of the behavior.
        higher_is_better: Its direction.
        sft: `(n_coalitions,)`, behaviors by sparsified fine-tuning.
        retrain: `(n_coalitions,)`, of the models retrained on the same coalitions.
        correlation: Spearman correlation of the two; NaN where one of them does not vary.
        interval: 95 % interval of it (Bonett and Wright 2000), from -1 to 1 with three coalitions.
        level_difference: Mean of `sft` less that of `retrain`.
        full: Of the full model as it is; None where the behavior compares with that very model.
        sparse: Of the sparse model as it is.
        sft_noise: Standard deviation between training seeds by sparsified fine-tuning, from one pair.
        retrain_noise: The same by retraining.
        verdict: The first rule that applies.
        sentences: The verdict in words, with the figures that led to it.
    """

    name: str
    higher_is_better: bool
    sft: tuple[float, ...]
    retrain: tuple[float, ...]
    correlation: float
    interval: tuple[float, float]
    level_difference: float
    full: float | None
    sparse: float | None
    sft_noise: float
    retrain_noise: float
    verdict: Verdict
    sentences: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.verdict == "go"

    @property
    def sft_spread(self) -> float:
        """Standard deviation between coalitions by sparsified fine-tuning."""
        return _sd(self.sft)

    @property
    def retrain_spread(self) -> float:
        """The same by retraining."""
        return _sd(self.retrain)


@dataclass(frozen=True)
class PilotResult:
    """What a pilot found.

    Attributes:
        study: Name of the study.
        coalition_masks: `(n_coalitions, n_contributors)` as 0/1 text, in the order of the values.
        behaviors: One result per behavior that the study reports.
        seconds: Median seconds of one evaluation, by method: `gd` and `retrain`.
    """

    study: str
    coalition_masks: tuple[str, ...]
    behaviors: tuple[PilotBehavior, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every behavior says go."""
        return bool(self.behaviors) and all(item.passed for item in self.behaviors)

    @property
    def n_coalitions(self) -> int:
        return len(self.coalition_masks)

    def write(self, run_dir: Path) -> Path:
        """Write it into the run folder; the file appears whole or not at all.

        Raises:
            StoreError: The folder is not writable.
        """
        path = run_dir / FILE_NAME
        content = {"format_version": FORMAT_VERSION, "passed": self.passed, **asdict(self)}
        try:
            write_whole(path, json.dumps(_without_nan(content), indent=1, allow_nan=False))
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written ({error}); the evaluations are safe in the store: make room and run the "
                "same command again"
            ) from error
        return path


def read_pilot(run_dir: Path) -> PilotResult | None:
    """What the pilot of a study found; None where there was none.

    Raises:
        StoreError: `pilot.json` cannot be read.
    """
    path = run_dir / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = int(values.pop("format_version"))
        if version > FORMAT_VERSION:
            raise StoreError(
                f"{path} has format {version}, this version reads up to {FORMAT_VERSION}; upgrade Tribute, or delete "
                "the file"
            )
        values.pop("passed")
        return PilotResult(
            study=values["study"],
            coalition_masks=tuple(values["coalition_masks"]),
            behaviors=tuple(_behavior(item) for item in values["behaviors"]),
            seconds=values["seconds"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} cannot be read as the result of a pilot ({error}); run tribute pilot again, which writes it anew"
        ) from error


def pilot_warning(run_dir: Path) -> str | None:
    """What to say before a study goes on without a pilot that passed; None where one did."""
    try:
        found = read_pilot(run_dir)
    except StoreError as error:
        return f"warning: {error}"
    if found is None:
        return (
            "warning: no pilot has shown yet that quick fine-tuning ranks coalitions as retraining does; tribute pilot "
            "tells on a few of them"
        )
    if found.passed:
        return None
    failed = "; ".join(f"{item.name}: {TITLES[item.verdict]}" for item in found.behaviors if not item.passed)
    return f"warning: the pilot did not pass ({failed}); tribute pilot says why"


def judge(
    name: str,
    sft: Sequence[float],
    retrain: Sequence[float],
    *,
    higher_is_better: bool,
    full: float | None,
    sparse: float | None,
    sft_pair: tuple[float, float],
    retrain_pair: tuple[float, float],
) -> PilotBehavior:
    """What the same coalitions by both methods say about one behavior.

    Args:
        name: Of the behavior.
        sft: `(n_coalitions,)`, by sparsified fine-tuning.
        retrain: `(n_coalitions,)`, by retraining.
        higher_is_better: Its direction.
        full: Of the full model as it is; None where the behavior compares with that very model.
        sparse: Of the sparse model as it is.
        sft_pair: The same coalition with two training seeds.
        retrain_pair: The same by retraining.
    """
    correlation = spearman(sft, retrain)
    interval = correlation_interval(correlation, len(sft))
    sft_noise, retrain_noise = (abs(a - b) / math.sqrt(2) for a, b in (sft_pair, retrain_pair))
    verdict, sentences = _verdict(
        correlation,
        interval,
        n_coalitions=len(sft),
        spreads={"sparsified fine-tuning": _sd(sft), "retraining": _sd(retrain)},
        noises={"sparsified fine-tuning": sft_noise, "retraining": retrain_noise},
        gap=None if full is None or sparse is None else sparse - full,
    )
    return PilotBehavior(
        name=name,
        higher_is_better=higher_is_better,
        sft=tuple(sft),
        retrain=tuple(retrain),
        correlation=correlation,
        interval=interval,
        level_difference=float(np.mean(sft) - np.mean(retrain)),
        full=full,
        sparse=sparse,
        sft_noise=sft_noise,
        retrain_noise=retrain_noise,
        verdict=verdict,
        sentences=tuple(sentences),
    )


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks, ties at their mean rank; NaN where one does not vary."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(rank_correlation(first, second))


def correlation_interval(correlation: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a Spearman correlation of `n` pairs, by Fisher's transformation.

    References:
        Bonett and Wright (2000), Psychometrika 65, eq. 3, for the variance (1 + r^2 / 2) / (n - 3).
    """
    if math.isnan(correlation) or n < 4:
        return -1.0, 1.0
    bounded = min(max(correlation, -0.999999), 0.999999)
    half = NormalDist().inv_cdf(0.5 + level / 2) * math.sqrt((1 + bounded**2 / 2) / (n - 3))
    return math.tanh(math.atanh(bounded) - half), math.tanh(math.atanh(bounded) + half)


def _verdict(
    correlation: float,
    interval: tuple[float, float],
    *,
    n_coalitions: int,
    spreads: Mapping[str, float],
    noises: Mapping[str, float],
    gap: float | None,
) -> tuple[Verdict, list[str]]:
    """The first rule that applies, and why; see docs/planning.md."""
    shown = (
        f"rank correlation {correlation:.2f} ({interval[0]:.2f} to {interval[1]:.2f}) over {n_coalitions} coalitions"
        if math.isfinite(correlation)
        else f"no rank correlation over {n_coalitions} coalitions, as one method gives them all the same value"
    )
    below = f"{shown} is below {MIN_CORRELATION:g}" if math.isfinite(correlation) else f"there is {shown}"
    retrain_spread = spreads["retraining"]
    if correlation >= MIN_CORRELATION and interval[0] > 0:
        sentences = [f"go: {shown} is at least {MIN_CORRELATION:g}, and its interval is above 0"]
        return "go", sentences + _level_sentences(gap, retrain_spread)
    if correlation >= MIN_CORRELATION:
        return "more_coalitions", [
            f"more pilot coalitions: {shown} is at least {MIN_CORRELATION:g}, but its interval includes 0, so it may "
            f"be chance; run the pilot again with --n_coalitions {2 * n_coalitions}, which keeps what is measured"
        ]
    found: list[tuple[Verdict, str]] = []
    for method, spread in spreads.items():
        # Retraining that tells no coalition from another leaves nothing to rank; fine-tuning that does so is too short.
        if noises[method] > MAX_NOISE * spread > 0 or (method == "retraining" and spread == 0):
            ratio = math.inf if spread == 0 else noises[method] / spread
            found.append(
                (
                    "more_images",
                    f"more images: {shown}; by {method}, training seeds alone move the behavior by "
                    f"{noises[method]:.3g}, {ratio:.2g} times the spread between coalitions ({spread:.3g}), "
                    f"where at most {MAX_NOISE:.2g} "
                    "leaves something to rank; raise sampling.n_samples, and where that does not help, train longer",
                )
            )
    if gap is not None and retrain_spread > 0 and abs(gap) > MAX_SPARSE_GAP * retrain_spread:
        found.append(
            (
                "less_pruning",
                f"less pruning: {shown}; the sparse model is {gap:+.3g} from the full one, "
                f"{abs(gap) / retrain_spread:.2g} times the spread between retrained coalitions, "
                f"where at most {MAX_SPARSE_GAP:g} is expected; lower "
                "prune.pruning_ratio, or raise sparse_model.n_steps",
            )
        )
    if not found:
        sft_spread = spreads["sparsified fine-tuning"]
        ratio = sft_spread / retrain_spread if retrain_spread else math.inf
        found.append(
            (
                "more_steps",
                f"more fine-tuning steps: {below}, though noise and pruning are within "
                f"bounds; coalitions differ {ratio:.2g} times as much by sparsified fine-tuning as by retraining; "
                "raise gd.n_steps, or gd.lr",
            )
        )
    return found[0][0], [sentence for _, sentence in found]


def _level_sentences(gap: float | None, retrain_spread: float) -> list[str]:
    """What to know beside a go."""
    if gap is None or not retrain_spread or abs(gap) <= MAX_SPARSE_GAP * retrain_spread:
        return []
    return [
        f"the sparse model is {gap:+.3g} from the full one, {abs(gap) / retrain_spread:.2g} times the spread between "
        "retrained coalitions: credit adds up to the behavior of the sparse model, not to that of the full one"
    ]


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _behavior(values: Mapping[str, Any]) -> PilotBehavior:
    """A behavior from JSON, where NaN is null."""
    changed: dict[str, Any] = {name: tuple(values[name]) for name in ("sft", "retrain", "interval", "sentences")}
    if values["correlation"] is None:
        changed["correlation"] = math.nan
    return PilotBehavior(**{**values, **changed})


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
