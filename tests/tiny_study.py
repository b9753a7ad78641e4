"""What the tests of studies share: the recipe of the smallest study, and a listener that keeps what it hears."""

from __future__ import annotations

TINY_PRESET = {
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


class SilentListener:
    """Keeps what a study reports."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.messages: list[str] = []
        self.n_evaluations = 0
        self.interrupt_after = interrupt_after

    def stage(self, title: str) -> None:
        self.messages.append(title)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def progress(self, title: str, n_done: int, n_total: int, text: str) -> None:
        if title == "coalitions":
            self.n_evaluations += 1
            if self.n_evaluations == self.interrupt_after:
                raise KeyboardInterrupt
