"""Working through evaluations and saying how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from tribute import pulse
from tribute.store.records import ClaimedEvaluation, Store
from tribute.study.executors import Executor, always
from tribute.study.listener import Listener, duration_text
from tribute.study.value_function import Evaluation

ROLE_TITLES = {
    "empty": "end points",
    "grand": "end points",
    "fit": "fit",
    "loo": "leave one out",
    "test": "test",
}


SECONDS_BETWEEN_LOOKS = 5.0


def pause() -> None:
    """Let other processes work for a while."""
    pulse.beat()
    time.sleep(SECONDS_BETWEEN_LOOKS)


def work_through(
    executor: Executor,
    store: Store,
    study_id: int,
    evaluation_ids: Sequence[int],
    behavior_names: Sequence[str],
    listener: Listener,
    *,
    go_on: Callable[[], bool] = always,
    pause: Callable[[], None] = pause,
) -> None:
    """Measure every evaluation that is still to be measured, and wait for those that other processes have in hand.

    Args:
        executor: Measures.
        store: Holds them; those that failed stay failed, unless `Store.retry` brought them back.
        study_id: Their study.
        evaluation_ids: Their numbers.
        behavior_names: Those that are shown as they come.
        listener: Is told of every one.
        go_on: Asked before each one is begun; False leaves the rest for another time.
        pause: Called between two looks at what other processes have in hand.
    """
    n_total = len(evaluation_ids)
    n_before = store.counts(study_id, evaluation_ids=evaluation_ids)["finished"]
    if n_before:
        listener.message(f"{n_before} of {n_total} evaluations are done already")
    to_do = store.find(study_id, statuses=("pending", "running"), evaluation_ids=evaluation_ids)
    remaining: dict[str, int] = {}
    for item in to_do:
        remaining[item.spec.method] = remaining.get(item.spec.method, 0) + 1
    spent: dict[str, list[float]] = {}
    for item in store.find(study_id, statuses=("finished",), evaluation_ids=evaluation_ids):
        if item.spec.coalition_mask.any():  # nobody's model is not trained, so it tells nothing about the others
            spent.setdefault(item.spec.method, []).append(sum(item.seconds.values()))

    def on_done(claimed: ClaimedEvaluation, evaluation: Evaluation) -> None:
        method = claimed.spec.method
        remaining[method] = max(remaining.get(method, 0) - 1, 0)
        if claimed.spec.coalition_mask.any():
            spent.setdefault(method, []).append(sum(evaluation.seconds.values()))
        n_left = sum(remaining.values())
        left = ""
        if spent and n_left:
            rates = {name: float(np.mean(values)) for name, values in spent.items()}
            slowest = max(rates.values())
            seconds = sum(count * rates.get(name, slowest) for name, count in remaining.items())
            left = f"; about {duration_text(seconds / min(executor.n_workers, n_left))} left"
        values = ", ".join(f"{name} {evaluation.behaviors[name]:.3f}" for name in behavior_names)
        title = ROLE_TITLES.get(claimed.spec.role or "fit", claimed.spec.role)
        listener.progress("coalitions", n_total - n_left, n_total, f"{title}: {values}{left}")

    said = False
    while True:
        executor.run(store, study_id, evaluation_ids=evaluation_ids, on_done=on_done, go_on=go_on)
        counts = store.counts(study_id, evaluation_ids=evaluation_ids)
        if counts["running"] + counts["pending"] == 0 or not go_on():
            break
        if not said:
            listener.message(f"waiting for {counts['running']} evaluations that other processes have in hand")
            said = True
        pause()
    failed = store.find(study_id, statuses=("failed",), evaluation_ids=evaluation_ids)
    if failed:
        listener.message(
            f"{len(failed)} evaluations failed and are set aside, e.g. {failed[0].error}; run again to try them again"
        )
