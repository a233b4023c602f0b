"""Settings, history, what is shown, and errors that name the layer or the cure."""
import json
import subprocess
import sys
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gptbook import runs, training
from gptbook.core import GPTModel, LossModel
from gptbook.runs import (
    History, NonFiniteError, OutOfMemory, TrainConfig, explain_memory, find_non_finite,
    peak_memory,
)
from gptbook.training import train
from tiny_runs import DATA, SIZES, a_model

CONFIG = TrainConfig(steps=12, learning_rate=3e-3)


@pytest.mark.parametrize("wrong", [
    dict(steps=0), dict(steps=2.5), dict(steps=True), dict(steps="9"), dict(seed=-1),
    dict(learning_rate=0), dict(learning_rate=math.nan), dict(learning_rate=math.inf),
    dict(weight_decay=-1), dict(clip_norm=0), dict(clip_norm=math.nan), dict(betas=(0.9,)),
    dict(betas=(0.9, 1.0)), dict(betas=(-0.1, 0.9)), dict(betas=("0.9", 0.9)),
    dict(steps_per_epoch=0), dict(learning_rate="fast"), dict(weight_decay=math.inf),
    dict(steps=None), dict(clip_norm=True),
    dict(validation_batches=0), dict(validate_every=0), dict(save_every=-3),
    dict(keep_epochs=0), dict(max_bad_steps=0),
])
def test_impossible_settings_are_named(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError) as error:
        TrainConfig(**wrong)
    assert f"{name}={value!r}" in str(error.value) and "must be" in str(error.value)


def test_settings_survive_json():
    config = TrainConfig(steps=7, betas=(0.8, 0.99), clip_norm=None)
    assert TrainConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_history_table_round_trip():
    history = History([dict(step=1, loss=0.1), dict(step=2, skipped=1, tokens=3)])
    again = History.from_table(history.table())
    assert again == history and type(again[1]["skipped"]) is int
    assert History.from_table(History().table()) == []


@pytest.mark.parametrize("seconds, left", [(59.7, "1:00"), (3.2, "0:03"), (125, "2:05")])
def test_time_left_has_no_sixtieth_second(capsys, seconds, left):
    r = training.begin_run(a_model(), DATA, TrainConfig(steps=2))
    r.step, r.history = 1, History([dict(
        step=1, loss=1.0, validation_loss=1.0, tokens=64, seconds=seconds)])
    runs.Progress(r)(r)
    assert f"{left} left" in capsys.readouterr().out


def test_the_first_line_says_what_the_bits_depend_on(capsys):
    train(a_model(), DATA, None, replace(CONFIG, steps=1, seed=7))
    first = capsys.readouterr().out.splitlines()[0]
    assert "seed 7" in first and torch.__version__ in first and "threads" in first


# numbers that are not finite ---------------------------------------------------------

@pytest.mark.parametrize("spoil, named", [
    (lambda m: m.blocks[1].mlp.fc_out.weight.data.fill_(math.inf), "weights blocks.1.mlp.fc_out"),
    (lambda m: m.norm.weight.data[0].fill_(math.nan), "weights norm.weight"),
    (lambda m: m.blocks[0].attn.W_value.weight.data.fill_(3e38), "output of blocks.0.attn.W_value"),
    (lambda m: m.blocks[1].norm2.register_forward_hook(lambda *a: a[2] * math.nan),
     "output of blocks.1"),
])
def test_the_first_bad_layer_is_named(spoil, named):
    model = a_model()
    spoil(model)
    assert named in find_non_finite(LossModel(model).train(), *DATA.batch(0, 0))


def test_a_bad_gradient_is_named_on_the_way_back():
    model = a_model()

    class Bad(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, g: g * math.nan)

    model.blocks[1].mlp.fc_in.register_forward_hook(lambda m, a, out: Bad.apply(out))
    found = find_non_finite(LossModel(model).train(), *DATA.batch(0, 0))
    assert found == "the gradient at the output of blocks.1.norm2", "what fc_in was given"


def test_looking_changes_nothing():
    model, before = a_model(), a_model()
    rng = torch.get_rng_state()
    assert find_non_finite(LossModel(model).train(), *DATA.batch(0, 0)) is None
    assert torch.equal(torch.get_rng_state(), rng) and model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), before.parameters()))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_hopeless_run_names_the_layer(tmp_path):
    model = a_model()
    model.blocks[1].attn.out_proj.weight.data.fill_(math.inf)
    with pytest.raises(NonFiniteError, match="weights blocks.1.attn.out_proj") as error:
        train(model, DATA, None, replace(CONFIG, max_bad_steps=2), out=tmp_path, progress=False)
    assert "2 steps in a row, 1 to 2" in str(error.value)


class Balance(torch.nn.Module):
    """A feed-forward whose auxiliary loss is not finite."""

    def __init__(self, config, layer):
        super().__init__()
        self.linear = torch.nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x, positions):
        self.aux_loss = self.linear.weight.sum() * math.inf
        return self.linear(x)


def test_an_auxiliary_loss_is_looked_at_and_cleared():
    torch.manual_seed(0)
    model = GPTModel(SIZES, mlp=Balance)
    assert find_non_finite(LossModel(model), *DATA.batch(0, 0)) == "the auxiliary loss"
    assert all(block.mlp.aux_loss is None for block in model.blocks)


def test_the_loss_itself_is_looked_at():
    class Bad(LossModel):
        def forward(self, *batch):
            return super().forward(*batch) * math.nan

    assert find_non_finite(Bad(a_model()), *DATA.batch(0, 0)) == "the loss"


# memory -----------------------------------------------------------------------------

def a_run():
    return training.begin_run(a_model(), DATA, CONFIG)


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    torch.OutOfMemoryError("CUDA out of memory.")])
def test_errors_about_memory_say_what_to_do(error):
    with pytest.raises(OutOfMemory, match="step 1 of 4 x 16 tokens on cpu") as told:
        with explain_memory(a_run(), DATA):
            raise error
    cures = ("Accumulate", "ChunkedLoss", "checkpoint_activations", "BFloat16", "smaller batch")
    places = [str(told.value).index(cure) for cure in cures]
    assert places == sorted(places) and told.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("memory"), KeyError(1)])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as told:
        with explain_memory(a_run(), DATA):
            raise error
    assert told.value is error


def test_peak_memory_is_that_of_the_process():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(100_000_000)  # 0.4 GB, touched
    assert 0.1 < before and peak_memory(torch.device("cpu")) >= 0.4
    del block


SCRIPT = """
import resource, sys, torch
sys.path.insert(0, {tests!r})
from test_runs import *
from tiny_runs import some_data
torch.set_num_threads(1)
data = some_data(100_000, 64, context_length=256)
model = a_model(context_length=256, emb_dim=64)
runs.use_kernel(model, "naive_attention")
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 150_000_000, resource.RLIM_INFINITY))
train(model, data, None, CONFIG, progress=False)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no limit of address space")
def test_a_process_with_too_little_memory(tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "OutOfMemory: no memory for step 1 of 64 x 256 tokens" in out.stderr.splitlines()[-1]
