"""Parts that a reader might write: a local mask, a rotation, and no positions at all."""
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class SlidingWindow:
    """A local mask: its `window` makes the cache a ring."""

    window: int

    def __call__(self, q_pos, k_pos):
        return (q_pos >= k_pos) & (q_pos - k_pos < self.window)

    def is_causal(self, n_keys):
        return n_keys <= self.window


class Rotary(nn.Module):
    """A rotation of q and k by their positions."""

    def __init__(self, config):
        super().__init__()
        half = torch.arange(0, config.head_dim, 2) / config.head_dim
        self.register_buffer("frequency", 1e4**-half, persistent=False)

    def forward(self, x, positions):
        angle = positions.index[:, None, :, None] * self.frequency
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class NoPositions(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, x, positions):
        return x
