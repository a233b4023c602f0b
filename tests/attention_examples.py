"""Masks, inputs and gradients that the tests of the attention kernels share."""

from dataclasses import dataclass

import torch

from gptbook.core import Positions, set_seed


@dataclass(frozen=True)
class All:
    def __call__(self, q_pos, k_pos):
        return (q_pos == q_pos) & (k_pos == k_pos)


@dataclass(frozen=True)
class Documents:
    length: int

    def __call__(self, q_pos, k_pos):
        return (q_pos >= k_pos) & (q_pos // self.length == k_pos // self.length)


def by_distance(q_pos, k_pos):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, 4, 1, 1)
    return -slopes * (q_pos - k_pos)


def example(B=2, H=4, K=2, Tq=37, Tk=37, D=8, dtype=torch.float64, aligned=True):
    set_seed(Tq + Tk)
    qkv = [torch.randn(B, n, T, D, dtype=dtype, requires_grad=True)
           for n, T in ((H, Tq), (K, Tk), (K, Tk))]
    q_pos, k_pos = (Positions(torch.arange(a, Tk)[None], aligned) for a in (Tk - Tq, 0))
    return qkv, dict(q_pos=q_pos, k_pos=k_pos)


def padded(T=12, pads=(4, 0)):
    index = torch.stack([(torch.arange(T) - n).clamp(min=-1) for n in pads])
    return dict(q_pos=Positions(index), k_pos=Positions(index))


def with_gradients(kernel, qkv, **where):
    out = kernel(*qkv, **where)
    up = torch.cos(3 * torch.arange(out.numel(), dtype=torch.float64)).bfloat16()
    up = up.to(out).view_as(out)  # the same numbers in every dtype
    return [out.detach(), *torch.autograd.grad(out, qkv, up)]
