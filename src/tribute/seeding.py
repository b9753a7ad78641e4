"""Independent random streams, named by what they are for.

A stream is identified by a root seed, a purpose and any number of ids. Two streams with
different names are independent, and a stream is the same whatever was drawn before it, so
results cannot depend on batch size, worker or order. Seeds are derived per item (image,
coalition, step), never per batch.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

StreamId = int | float | str | np.generic


def stream_seed(root_seed: int, purpose: str, *ids: StreamId) -> int:
    """Seed in [0, 2**63) of the stream `(root_seed, purpose, *ids)`.

    The name is hashed with SHA-256, with types and separators, so `("a", 1)` and
    `("a", "1")` name different streams. NumPy scalars count as the Python numbers they hold.
    """
    plain = [i.item() if isinstance(i, np.generic) else i for i in ids]  # their repr differs between NumPy versions
    name = "\x1f".join([repr(int(root_seed)), purpose, *(repr(i) for i in plain)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def numpy_stream(root_seed: int, purpose: str, *ids: StreamId) -> np.random.Generator:
    """NumPy generator of the stream `(root_seed, purpose, *ids)`."""
    return np.random.Generator(np.random.PCG64(stream_seed(root_seed, purpose, *ids)))


def torch_stream(root_seed: int, purpose: str, *ids: StreamId) -> torch.Generator:
    """CPU torch generator of the stream `(root_seed, purpose, *ids)`.

    Always on the CPU: the same numbers then serve every device.
    """
    import torch

    return torch.Generator().manual_seed(stream_seed(root_seed, purpose, *ids))
