"""Tribute: credit the contributors of a diffusion model's training data."""

from __future__ import annotations

__version__ = "0.1.0"
