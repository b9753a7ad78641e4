"""Benchmarks of the estimators on games whose Shapley values are known. See README.md for the commands."""

from __future__ import annotations

import os

# Before numpy is first imported, here and in every worker: the processes are the parallelism.
for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")
