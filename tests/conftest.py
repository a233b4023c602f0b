"""One thread for each worker, nothing from the network, no window: as in `make test`."""

import os

import pytest
from hypothesis import settings

for name, value in {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MPLBACKEND": "agg",
}.items():
    os.environ.setdefault(name, value)

# the same examples each time; HYPOTHESIS_PROFILE=search looks for others, and keeps what it finds
settings.register_profile("repeat", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.fixture
def one_thread():
    """Bits and timings that do not depend on the cores that are there."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wrap_embedding():
    """A function that puts a wrapper round a model's embedding, as a transform would."""
    from torch import nn

    from gptbook.core import replace_modules

    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x)

    return lambda model: replace_modules(
        model, lambda name, m: name == "tok_emb", lambda name, m: Wrapped(m))
