"""The benchmark for GPUs runs anywhere with tiny numbers; its figures need a GPU."""

from __future__ import annotations

import sys

import pytest

from benchmarks import gpu


def test_it_prints_speeds_with_and_without_compilation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--preset digits --n_steps 2 --batch_size 4 --n_samples 4 --num_inference_steps 2 --mixed_precision no"
    monkeypatch.setattr(sys, "argv", ["gpu", *flags.split(), "--backend", "eager", "--peak_tflops", "0.1"])
    gpu.main()
    rows = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| True", "| False"))
    ]
    assert [row[0] for row in rows] == ["| False", "| True"]
    assert all(float(speed) > 0 for row in rows for speed in row[1:4])
