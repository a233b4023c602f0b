"""The model and the data of tests that train: small enough for hundreds of runs."""

from dataclasses import replace

import numpy as np
import torch

from gptbook.core import GPTConfig, GPTModel
from gptbook.data import TokenDataset

SIZES = GPTConfig(37, 16, 16, 2, 2, drop_rate=0.1)


def a_model(seed=0, **sizes):
    torch.manual_seed(seed)
    return GPTModel(replace(SIZES, **sizes))


def some_data(n=1000, batch_size=4, seed=0, context_length=16):
    ids = np.random.default_rng(seed).integers(0, 37, n)
    return TokenDataset(ids, context_length, batch_size)


DATA, HELD_OUT = some_data(), some_data(200, 3, seed=1)
