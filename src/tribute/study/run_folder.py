"""The run folder of a study: its settings, which must stay what they are."""

from __future__ import annotations

from typing import Any

from tribute.config import StudyConfig
from tribute.errors import MixedResultsError, StoreError
from tribute.files import room_sentence, write_whole

_MAY_CHANGE = {
    "outdir",
    "codec",
    "n_threads",
    "estimator",
    "features.weights",
    "features.models",
    "features.revisions",
    "features.aesthetic_head",
    "features.batch_size",
    "fit.n_coalitions",
    "fit.until_interval",
    "fit.leave_one_out",
    "fit.n_end_points",
    "runtime.compile",
    "runtime.compile_backend",
    "runtime.channels_last",
    "runtime.gradient_checkpointing",
    "test.n_coalitions",
    "test.opt_seeds",
    "pilot.n_coalitions",
    "execution.executor",
    "execution.workers",
    "execution.gpus_per_worker",
    "execution.address",
    "execution.stall_seconds",
    "max_device_hours",
}
"""Settings under which a study can be continued: they add evaluations, or change how results are computed or read."""


def claim_run_dir(config: StudyConfig) -> None:
    """Write the resolved settings into the run folder, or compare them with those that are there."""
    path = config.run_dir / "config.yaml"
    if path.exists():
        saved = _flat(StudyConfig.from_yaml(path).model_dump(mode="json"))
        asked = _flat(config.model_dump(mode="json"))
        differing = [key for key in asked if key not in _MAY_CHANGE and saved.get(key) != asked[key]]
        if differing:
            lines = "; ".join(f"{key}: saved {saved.get(key)!r}, asked {asked[key]!r}" for key in differing)
            raise MixedResultsError(
                f"{config.run_dir} holds a study with other settings: {lines}. "
                "Restore them, or give the study another name to start afresh"
            )
    try:
        write_whole(path, config.to_yaml())
    except OSError as error:
        raise StoreError(
            f"the run folder {config.run_dir} is not writable ({error}; {room_sentence(config.run_dir)}); make room or "
            "set another outdir"
        ) from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names; a mapping with free keys stays one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("sampling", "weights", "models", "revisions"):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
