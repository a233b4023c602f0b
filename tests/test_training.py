"""Training: AdamW and clipping against torch, token-weighted means, exact resume after
kills and Ctrl-C, non-finite steps, errors before anything is written."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from gptbook import runs, training
from gptbook.checkpoints import CheckpointError, load_model, load_state, save_state
from gptbook.core import GPTConfig, GPTModel, LossModel
from gptbook.precision import precision_for
from gptbook.runs import KERNELS, NonFiniteError, TrainConfig, kernels_of, use_kernel
from gptbook.training import (
    compute_gradients, evaluate_loss, evaluating, make_optimizer, parameter_groups, show_samples,
    train,
)
from tiny_runs import DATA, HELD_OUT, SIZES, a_model, some_data

CONFIG = TrainConfig(steps=12, learning_rate=3e-3, validate_every=4, save_every=3)


pytestmark = pytest.mark.usefixtures("one_thread")


run = partial(train, data=DATA, validation=HELD_OUT, config=CONFIG, progress=False)
half = lambda step: 1 / (1 + step)  # a schedule that shows when it is off by one
NUMBERS = ("loss", "validation_loss", "gradient_norm", "learning_rate", "tokens", "skipped")


def assert_same_run(model, history, other, other_history):
    """State first, then history: equal losses can hide different weights."""
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), f"{name} differs"
    assert_same_history(history, other_history)


def assert_same_history(history, other):
    assert len(history) == len(other)
    for name in NUMBERS:
        assert history.column(name) == other.column(name), f"{name} differs"


def assert_same_state(a, b):
    """Everything in a saved state but timings, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "seconds":
                assert_same_state(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_state(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
    else:
        assert a == b


def assert_differ(a, b):
    with pytest.raises(AssertionError):
        assert_same_state(a, b)


# settings -------------------------------------------------------------------------

# optimiser --------------------------------------------------------------------------

def adamw_by_hand(theta, grads, lr, betas, decay, eps=1e-8):
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate(grads, start=1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        theta = theta * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + eps)
    return theta


@pytest.mark.parametrize("lr, betas, decay", [
    (1e-3, (0.9, 0.95), 0.1), (0.1, (0.0, 0.5), 0.0), (1e-2, (0.9, 0.999), 1.0)])
def test_optimizer_is_adamw(lr, betas, decay):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    start = [p.detach().clone() for p in model.parameters()]
    grads = [[torch.randn_like(p) for p in model.parameters()] for _ in range(25)]
    config = TrainConfig(learning_rate=lr, betas=betas, weight_decay=decay)
    optimizer = make_optimizer(model, config)
    for step in grads:
        for p, g in zip(model.parameters(), step):
            p.grad = g.clone()
        optimizer.step()
    for i, (p, wd) in enumerate(zip(model.parameters(), (decay, 0.0))):
        ours = adamw_by_hand(start[i], [g[i] for g in grads], lr, betas, wd)
        torch.testing.assert_close(p.data, ours, rtol=0, atol=1e-7)


def test_groups_hold_each_parameter_once():
    model = a_model()
    matrices, others = parameter_groups(model, 0.3)
    assert matrices["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in matrices["params"])
    assert all(p.dim() == 1 for p in others["params"])
    ids = [id(p) for g in (matrices, others) for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())  # tied: once
    assert id(model.head.weight) in ids and len(set(ids)) == len(ids)


def test_norms_and_biases_are_many_tensors_and_few_numbers():
    model = GPTModel(GPTConfig(2048, 192, 192, 4, 4))
    matrices, others = (g["params"] for g in parameter_groups(model, 0.1))
    assert len(others) > len(matrices)
    assert sum(p.numel() for p in others) < 0.01 * sum(p.numel() for p in model.parameters())


def test_frozen_parameters_stay_out():
    model = a_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model, 0.1)
    model.blocks[0].norm1.bias.requires_grad_(True)
    (group,) = parameter_groups(model, 0.1)
    assert [p.shape for p in group["params"]] == [(16,)]
    before = deepcopy(model.state_dict())
    run(model)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"blocks.0.norm1.bias"}


def test_one_step_by_hand():
    """One step of `train` equals gradients, joint clipping and AdamW written out."""
    model = a_model(drop_rate=0.0)
    theirs = deepcopy(model)
    config = TrainConfig(steps=1, learning_rate=0.01, clip_norm=0.3, seed=5)
    history = train(model, DATA, None, config, progress=False)
    loss = LossModel(theirs.train())(*DATA.batch(5, 0))
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
    assert history[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert history[0]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert norm > 0.3
    for p, q in zip(theirs.parameters(), model.parameters()):
        wd = 0.1 if p.dim() >= 2 else 0.0
        hand = adamw_by_hand(p.data, [p.grad * 0.3 / norm], 0.01, (0.9, 0.95), wd)
        torch.testing.assert_close(q.data, hand, rtol=0, atol=2e-6)


def test_losses_equal_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=37, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    ours = a_model(drop_rate=0.0)
    sd, new = theirs.transformer.state_dict(), {}
    for kind in ("weight", "bias"):
        new[f"norm.{kind}"] = sd[f"ln_f.{kind}"]
        for i in range(2):
            for a, b in (("norm1", "ln_1"), ("norm2", "ln_2"), ("attn.out_proj", "attn.c_proj"),
                         ("mlp.fc_in", "mlp.c_fc"), ("mlp.fc_out", "mlp.c_proj")):
                new[f"blocks.{i}.{a}.{kind}"] = sd[f"h.{i}.{b}.{kind}"].t()
            for n, part in zip(("query", "key", "value"),
                               sd[f"h.{i}.attn.c_attn.{kind}"].chunk(3, -1)):
                new[f"blocks.{i}.attn.W_{n}.{kind}"] = part.t()
    new |= {"tok_emb.weight": sd["wte.weight"], "head.weight": sd["wte.weight"],
            "position_embedding.table.weight": sd["wpe.weight"]}
    ours.load_state_dict(new)
    history = train(ours, DATA, None, TrainConfig(20), progress=False)
    adamw = torch.optim.AdamW([
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ], lr=1e-3, betas=(0.9, 0.95))
    for step, ours_loss in enumerate(history.column("loss")[1]):
        x, y = DATA.batch(0, step)
        loss = nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        assert ours_loss == pytest.approx(loss.item(), abs=5e-5)
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()


# measuring --------------------------------------------------------------------------

def test_a_frozen_part_sleeps_on_after_it_was_measured():
    model = a_model().train()
    model.blocks[0].eval()  # as one freezes a part
    modes = [part.training for part in model.modules()]
    assert {*modes} == {True, False}
    evaluate_loss(model, DATA, batches=1)
    assert [part.training for part in model.modules()] == modes
    with pytest.raises(ZeroDivisionError), evaluating(model) as device:
        assert not any(part.training for part in model.modules()) and device.type == "cpu"
        1 / 0
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("n, batch_size", [(17, 1), (100, 2), (161, 7), (200, 64)])
def test_evaluate_is_a_mean_over_tokens(n, batch_size):
    data, model = some_data(n, batch_size, seed=2), a_model()
    model.train()
    logits = []
    with torch.no_grad():
        model.eval()
        for start in range(0, n - 1, 16):
            ids = torch.tensor(data.ids[start : start + 17])
            logits.append(nn.functional.cross_entropy(
                model(ids[None, :-1])[0], ids[1:], reduction="sum"))
        model.train()
    truth = sum(logits).item() / (n - 1)
    assert evaluate_loss(model, data) == pytest.approx(truth, abs=1e-5)
    assert model.training, "the mode comes back"
    first = evaluate_loss(model, data, batches=1)
    assert first == pytest.approx(sum(logits[:batch_size]).item() / min(n - 1, 16 * batch_size), abs=1e-5)


def test_evaluate_draws_no_random_numbers():
    model = a_model()
    before = torch.get_rng_state()
    assert evaluate_loss(model, HELD_OUT) == evaluate_loss(model, HELD_OUT)
    assert torch.equal(torch.get_rng_state(), before)


class WithAuxiliary(nn.Module):
    """A feed-forward that asks for small weights, as a router would."""

    def __init__(self, config, layer):
        super().__init__()
        self.linear = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x, positions):
        self.aux_loss = 0.01 * self.linear.weight.square().sum()
        return self.linear(x)


def test_auxiliary_loss_is_added_and_reported_apart():
    torch.manual_seed(0)
    model = GPTModel(replace(SIZES, drop_rate=0.0), mlp=WithAuxiliary)
    wanted = sum(0.01 * b.mlp.linear.weight.square().sum().item() for b in model.blocks)
    plain = LossModel(model)(*DATA.batch(0, 0)).item()
    grad = 2 * 0.01 * model.blocks[0].mlp.linear.weight.detach()
    loss, auxiliary = compute_gradients(LossModel(model), *DATA.batch(0, 0))
    with_auxiliary = model.blocks[0].mlp.linear.weight.grad.clone()
    assert loss == pytest.approx(plain) and auxiliary == pytest.approx(wanted)
    assert all(block.mlp.aux_loss is None for block in model.blocks), "cleared"
    model.zero_grad()
    LossModel(model)(*DATA.batch(0, 0)).backward()
    torch.testing.assert_close(with_auxiliary - grad, model.blocks[0].mlp.linear.weight.grad)
    history = train(model, DATA, None, TrainConfig(2), progress=False)
    assert history[0]["auxiliary_loss"] == pytest.approx(wanted)
    assert history[0]["loss"] == pytest.approx(plain)


# the loop ---------------------------------------------------------------------------

def test_a_run_repeats_bit_for_bit():
    results = []
    for _ in range(3):
        torch.manual_seed(random.randrange(10**6))  # what came before must not matter
        model = a_model()
        torch.rand(random.randrange(50))
        results.append((model, run(model)))
    for other in results[1:]:
        assert_same_run(*results[0], *other)
    seeded = a_model()
    history = run(seeded, config=replace(CONFIG, seed=1))
    assert history.column("loss") != results[0][1].column("loss")


def test_gradients_from_before_do_not_reach_the_first_step():
    model, fresh = a_model(), a_model()
    compute_gradients(LossModel(model), *DATA.batch(1, 7))
    assert_same_run(fresh, run(fresh), model, run(model))


def test_schedule_counts_updates_and_multiplies_the_rate():
    history = run(a_model(), schedule=half)
    assert history.column("learning_rate")[1] == [3e-3 * half(s) for s in range(12)]


def test_learning_rate_zero_changes_nothing():
    model, before = a_model(), a_model()
    run(model, schedule=lambda step: 0.0)
    assert all(map(torch.equal, model.parameters(), before.parameters()))


def test_history_and_log_and_files(tmp_path):
    config = replace(CONFIG, steps_per_epoch=2, keep_epochs=3)
    seen, model = [], a_model()
    history = run(model, config=config, out=tmp_path, callbacks=[lambda r: seen.append(r.step)])
    assert seen == list(range(1, 13)) and not model.training
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log == list(history)
    assert history.column("validation_loss")[0] == [4, 8, 12]
    epochs = sorted(p.name for p in tmp_path.glob("checkpoint_epoch_*"))
    assert epochs == [f"checkpoint_epoch_{n}.safetensors" for n in (4, 5, 6)]
    last = load_model(tmp_path / "checkpoint_epoch_6.safetensors")
    assert all(map(torch.equal, last.model.parameters(), model.parameters()))
    best = load_model(tmp_path / "best_model.safetensors")
    steps, losses = history.column("validation_loss")
    assert best.info["validation_loss"] == min(losses)
    assert best.info["step"] == steps[losses.index(min(losses))]
    assert best.info["epoch"] == best.info["step"] / 2
    assert evaluate_loss(best.model, HELD_OUT) == pytest.approx(min(losses), abs=1e-6)
    assert best.info["training"]["learning_rate"] == 3e-3


def test_best_model_is_the_best_not_the_last(tmp_path):
    worse = lambda step: 1.0 if step < 4 else -30.0  # after step 4 it climbs
    history = run(a_model(), out=tmp_path, schedule=worse)
    assert load_model(tmp_path / "best_model.safetensors").info["step"] == 4
    assert history.column("validation_loss")[1][-1] > history.column("validation_loss")[1][0]


def test_without_validation_the_last_is_kept(tmp_path):
    model = a_model()
    run(model, validation=None, out=tmp_path)
    best = load_model(tmp_path / "best_model.safetensors")
    assert best.info["step"] == 12 and best.info["validation_loss"] is None
    assert all(map(torch.equal, best.model.parameters(), model.parameters()))


def test_callbacks_and_samples_do_not_disturb_the_run(capsys):
    model, plain = a_model(), a_model()
    noisy = show_samples(lambda m: f"{torch.rand(1).item():.0e} {m.training}", every=5)
    assert_same_run(plain, run(plain), model, run(model, callbacks=[noisy]))
    out = capsys.readouterr().out
    assert [f"step {n}: " in out for n in (5, 10, 12)] == [True] * 3 and "True" not in out


def test_progress_lines_without_a_terminal(capsys):
    run(a_model(), progress=True)
    out = capsys.readouterr().out
    assert "step 4 of 12: loss" in out and "validation" in out and "tokens/s" in out
    assert "step 12 of 12" in out and "left" in out


def test_callback_may_stop_the_run(capsys):
    def stop(r):
        r.stopping = r.step == 5
    assert len(run(a_model(), callbacks=[stop])) == 5
    assert "stopped after step 5 of 12" in capsys.readouterr().out


# resume -----------------------------------------------------------------------------

def with_kernel(model, name):
    use_kernel(model, name)
    return model


def precision(name):
    return precision_for(name, torch.device("cpu"))


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_ctrl_c_saves_and_resume_is_bit_identical(tmp_path, capsys, stop_at, name):
    options = dict(schedule=half, precision=precision(name), resume_command="gptbook train --resume")
    whole = a_model()
    straight = run(whole, out=tmp_path / "whole", **options)

    def press(r):
        if r.step == stop_at - 1:
            signal.raise_signal(signal.SIGINT)

    def press_at_once(step):  # before the first callback there is the first schedule call
        return half(step)

    if stop_at == 1:  # the signal comes while the step runs
        def press_at_once(step, fired=[]):
            if not fired and (tmp_path / "run").exists():
                fired.append(1)
                signal.raise_signal(signal.SIGINT)
            return half(step)
    stopped = a_model()
    before = signal.getsignal(signal.SIGINT)
    first = run(stopped, out=tmp_path / "run", callbacks=[press], **{**options, "schedule": press_at_once})
    assert signal.getsignal(signal.SIGINT) is before, "handlers come back"
    assert len(first) == stop_at
    assert "go on with: gptbook train --resume" in capsys.readouterr().out
    other = a_model(seed=9)
    resumed = run(other, out=tmp_path / "run", resume=True, **options)
    assert_same_state(load_state(tmp_path / "whole/state"), load_state(tmp_path / "run/state"))
    assert_same_run(whole, straight, other, resumed)
    for file in ("best_model", "checkpoint_epoch_1"):
        if (tmp_path / "whole" / f"{file}.safetensors").exists():
            a, b = (load_model(tmp_path / d / f"{file}.safetensors") for d in ("whole", "run"))
            assert a.info == b.info
            assert all(map(torch.equal, a.model.parameters(), b.model.parameters()))


def test_resume_of_a_finished_run_is_a_no_op(tmp_path):
    history = run(a_model(), out=tmp_path)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    other = a_model(seed=3)
    assert run(other, out=tmp_path, resume=True) == history
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == files


@pytest.mark.parametrize("part", ["model", "optimizer", "rng"])
def test_negative_control_each_part_of_the_state_counts(tmp_path, part):
    straight = run(whole := a_model())
    stop = lambda r: setattr(r, "stopping", r.step == 5)
    run(a_model(), out=tmp_path / "a", callbacks=[stop])
    state = load_state(tmp_path / "a/state")
    fresh = runs.run_state(training.begin_run(a_model(seed=4), DATA, CONFIG))
    save_state(tmp_path / "b/state", 5, {**state, part: fresh[part]})
    resumed = run(other := a_model(), out=tmp_path / "b", resume=True)
    with pytest.raises(AssertionError):
        assert_same_run(whole, straight, other, resumed)


CHILD = """
import sys, torch, json
sys.path.insert(0, {tests!r})
import test_training as t
torch.set_num_threads(1)
slow = lambda run: (t.time.sleep(0.01), print(run.step, flush=True))
config = t.replace(t.CONFIG, steps=40, save_every=2, validate_every=5)
t.run(t.a_model(), config=config, out=sys.argv[1], schedule=t.half, callbacks=[slow],
      resume=len(sys.argv) > 2)
"""


def start(folder, *resume):
    code = CHILD.format(tests=os.path.dirname(__file__))
    return subprocess.Popen([sys.executable, "-c", code, str(folder), *resume],
                            stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kills", [2])
def test_sigkill_anywhere_then_resume_is_bit_identical(tmp_path, kills):
    """Each kill comes at a random instant after the first save; the full count runs by
    `make reliability`."""
    config = replace(CONFIG, steps=40, save_every=2, validate_every=5)
    whole = a_model()
    straight = run(whole, config=config, out=tmp_path / "whole", schedule=half)
    rng, folder, done = random.Random(7), tmp_path / "run", 0
    for kill in range(kills):
        child = start(folder, *(["resume"] if kill else []))
        target = max(4, done + 4) + rng.randrange(8)
        for line in child.stdout:
            done = int(line)
            if done >= target:
                time.sleep(rng.random() * 0.03)  # also between steps and in a save
                break
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL and done < 40
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 99')  # the half line that a kill can leave
    resumed = run(other := a_model(seed=5), config=config, out=folder, schedule=half, resume=True)
    assert_same_state(load_state(tmp_path / "whole/state"), load_state(folder / "state"))
    assert_same_run(whole, straight, other, resumed)
    assert [json.loads(l)["step"] for l in (folder / "log.jsonl").open()] == list(range(1, 41))


@pytest.mark.parametrize("change, named", [
    (dict(config=replace(CONFIG, learning_rate=1e-2)), "learning_rate is 0.01"),
    (dict(config=replace(CONFIG, seed=3)), "seed is 3"),
    (dict(model=lambda: a_model(n_layers=3)), "'n_layers': 3"),
    (dict(data=some_data(seed=8)), "data"),
    (dict(schedule=half), "schedule"),
    (dict(precision=precision("bfloat16")), "precision is bfloat16"),
])
def test_resume_of_another_run_is_refused(tmp_path, change, named):
    run(a_model(), out=tmp_path, callbacks=[lambda r: setattr(r, "stopping", r.step == 4)])
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    change = dict(change)
    model = change.pop("model", a_model)()
    with pytest.raises(ValueError, match="cannot resume") as error:
        run(model, **{**change, "out": tmp_path, "resume": True})
    assert named in str(error.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


def test_resume_takes_over_the_kernel(tmp_path):
    """Which kernel computes is chosen by a clock: the continuation uses the saved one."""
    straight = run(whole := with_kernel(a_model(drop_rate=0.0), "naive_attention"))
    stop = lambda r: setattr(r, "stopping", r.step == 5)
    run(with_kernel(a_model(drop_rate=0.0), "naive_attention"), out=tmp_path, callbacks=[stop])
    other = a_model(drop_rate=0.0)
    resumed = run(other, out=tmp_path, resume=True)
    assert kernels_of(other) == ["naive_attention"]
    assert_same_run(whole, straight, other, resumed)


def test_an_existing_run_is_not_overwritten(tmp_path):
    run(a_model(), out=tmp_path)
    with pytest.raises(ValueError, match="holds a run already"):
        run(a_model(), out=tmp_path)


# what goes wrong ---------------------------------------------------------------------

class Faulty:
    """Makes the gradient of some steps non-finite, or the loss."""

    def __init__(self, monkeypatch, steps, value=math.nan, where="gradient"):
        self.steps, self.calls = set(steps), 0
        real = training.compute_gradients

        def gradients(loss_model, *batch):
            loss, auxiliary = real(loss_model, *batch)
            self.calls += 1
            if self.calls in self.steps and where == "gradient":
                next(loss_model.parameters()).grad[0, 0] = value
            return (value if self.calls in self.steps and where == "loss" else loss), auxiliary

        monkeypatch.setitem(train.__kwdefaults__, "gradients", gradients)


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_step_touches_nothing(monkeypatch, value, where):
    Faulty(monkeypatch, [3, 7, 8], value, where)
    snapshots = {}

    def look(r):
        snapshots[r.step] = deepcopy((r.model.state_dict(), r.optimizer.state_dict()["state"]))

    history = run(a_model(), schedule=half, callbacks=[look])
    for bad in (3, 7, 8):
        assert_same_state(snapshots[bad], snapshots[bad - 1])
        assert history[bad - 1]["skipped"] == 1
    for good in (4, 6, 9):
        assert_differ(snapshots[good], snapshots[good - 1])
    assert history.column("skipped")[0] == [3, 7, 8]
    rates = [history[i]["learning_rate"] for i in range(12) if i + 1 not in (3, 7, 8)]
    assert rates == [3e-3 * half(s) for s in range(9)], "the schedule counts updates only"
    assert json.dumps(history, allow_nan=False)


def test_random_faults_at_five_percent(monkeypatch):
    bad = random.Random(0).sample(range(1, 101), 5)
    Faulty(monkeypatch, bad)
    model = a_model()
    history = run(model, config=replace(CONFIG, steps=100))
    assert history.column("skipped")[0] == sorted(bad)
    assert all(p.isfinite().all() for p in model.parameters())


def test_many_in_a_row_stop_with_the_last_good_state_saved(monkeypatch, tmp_path):
    config = replace(CONFIG, steps=30, max_bad_steps=4)
    Faulty(monkeypatch, [2, 3, 4, *range(8, 30)])
    good = {}
    look = lambda r: good.update({r.step: deepcopy(r.model.state_dict())})
    with pytest.raises(NonFiniteError, match=r"4 steps in a row, 8 to 11") as error:
        run(a_model(), config=config, out=tmp_path, callbacks=[look])
    assert str(tmp_path) in str(error.value) and "learning rate" in str(error.value)
    state = load_state(tmp_path / "state")
    assert state["counters"]["step"] == 11 and state["counters"]["skipped"] == 7
    assert_same_state(dict(state["model"]), dict(good[7]))
    monkeypatch.undo()  # the fault is mended: the run can go on
    history = run(a_model(), config=config, out=tmp_path, resume=True)
    assert len(history) == 30 and len(history.column("skipped")[0]) == 7


@pytest.mark.parametrize("arguments, named", [
    (dict(data=some_data(context_length=32)), ("32 tokens", "16 positions")),
    (dict(tokenizer=type("T", (), {"n_vocab": 99})()), ("99 tokens", "37")),
    (dict(resume=True), ("out",)),
])
def test_errors_come_before_anything_is_written(tmp_path, arguments, named):
    if "resume" not in arguments:
        arguments = {**arguments, "out": tmp_path / "new"}
    with pytest.raises(ValueError) as error:
        run(a_model(), **arguments)
    assert all(word in str(error.value) for word in named)
    assert not (tmp_path / "new").exists()


def test_resume_from_nothing_and_unwritable_folder(tmp_path):
    with pytest.raises(CheckpointError):
        run(a_model(), out=tmp_path / "none", resume=True)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="file"):
        run(a_model(), out=tmp_path / "file")


def test_a_failed_save_keeps_the_earlier_one(monkeypatch, tmp_path):
    def full(r):
        if r.step == 5:
            monkeypatch.setattr("gptbook.atomic_files._write", no_space)

    def no_space(*args):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space"):
        run(a_model(), out=tmp_path, callbacks=[full])
    monkeypatch.undo()
    assert load_state(tmp_path / "state")["counters"]["step"] == 3
    whole = a_model()
    straight = run(whole)
    assert_same_run(whole, straight, other := a_model(), run(other, out=tmp_path, resume=True))


# how long, how exact ------------------------------------------------------------------

@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_kernels_train_alike(name):
    histories = [run(with_kernel(a_model(drop_rate=0.0), kernel), precision=precision(name))
                 for kernel in KERNELS]
    a, b = (torch.tensor(h.column("loss")[1]) for h in histories)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 if name == "float32" else 0.03)




# what a second reader found ------------------------------------------------------------

def test_killed_before_its_first_save_a_run_may_begin_again(tmp_path):
    (tmp_path / "state" / "save_000000_step_2.tmp").mkdir(parents=True)  # what a kill leaves
    straight = run(whole := a_model())
    assert_same_run(whole, straight, other := a_model(), run(other, out=tmp_path))


def test_a_refused_resume_changes_nothing(tmp_path):
    stop = lambda r: setattr(r, "stopping", r.step == 5)
    run(with_kernel(a_model(), "naive_attention"), out=tmp_path, callbacks=[stop])
    other = a_model(seed=3)
    before, kernels = deepcopy(other.state_dict()), kernels_of(other)
    three = lambda model, config: torch.optim.AdamW(
        [{"params": [p]} for p in model.parameters()], config.learning_rate)
    for change in (dict(optimizer=three), dict(config=replace(CONFIG, seed=8))):
        with pytest.raises(ValueError, match="cannot resume"):
            run(other, out=tmp_path, resume=True, **change)
        assert_same_state(dict(before), dict(other.state_dict()))
        assert kernels_of(other) == kernels


class DrawingLoss(LossModel):
    """A loss that draws a number when it is made."""

    def __init__(self, model):
        super().__init__(model)
        self.drawn = torch.rand(3)


def test_a_loss_that_draws_does_not_disturb_the_resumed_run(tmp_path):
    straight = run(whole := a_model(), loss_model=DrawingLoss)
    stop = lambda r: setattr(r, "stopping", r.step == 5)
    run(a_model(), loss_model=DrawingLoss, out=tmp_path, callbacks=[stop])
    other = a_model(seed=2)
    resumed = run(other, loss_model=DrawingLoss, out=tmp_path, resume=True)
    assert_same_run(whole, straight, other, resumed)


class Watching(LossModel):
    """Counts its calls in either mode; what it says is a little off."""

    calls = []

    def forward(self, input_ids, targets, positions=None):
        self.calls.append(self.training)
        return super().forward(input_ids, targets, positions) + 1.0


def test_validation_asks_the_loss_of_the_run():
    Watching.calls.clear()
    model = a_model(drop_rate=0.0)
    history = run(model, loss_model=Watching)
    assert Watching.calls.count(True) == 12 and Watching.calls.count(False) > 0
    last = history.column("validation_loss")[1][-1]
    assert last == pytest.approx(evaluate_loss(model, HELD_OUT) + 1.0, abs=1e-5)


class Forgetful:
    def __call__(self, run):
        pass

    def state_dict(self):
        return {}


def test_a_part_that_cannot_be_restored_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="no load_state_dict"):
        run(a_model(), out=tmp_path / "new", callbacks=[Forgetful()])
    assert not (tmp_path / "new").exists()
