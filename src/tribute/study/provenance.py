"""Where a result comes from: versions, commit, device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "diffusers", "accelerate", "torch-pruning", "numpy", "scipy", "scikit-learn")
_EXTRAS = ("bitsandbytes", "deepspeed")


@cache
def environment() -> dict[str, Any]:
    """Versions and commit of this process, without importing a package for them; they do not change while it runs."""
    return {
        "tribute": importlib.metadata.version("tribute"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in (*_PACKAGES, *_installed(_EXTRAS))},
    }


def _installed(names: tuple[str, ...]) -> list[str]:
    """The packages that are there."""
    return [name for name in names if importlib.util.find_spec(name) is not None]


def provenance(device: str) -> dict[str, Any]:
    """Versions, commit, processor and threads, as plain JSON values."""
    import torch

    return {**environment(), "device": _device_name(device), "n_threads": torch.get_num_threads()}


def _commit() -> str | None:
    """The commit of the source checkout, with `+` where it has been changed; None outside one."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", str(folder.parent))
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _device_name(device: str) -> str:
    """The accelerator's name, or the processor's."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
