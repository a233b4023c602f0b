"""Experts and routers: against the dense loop and transformers, and what must not change."""

import copy
import math
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from gptbook.architecture import SwiGLU
from gptbook.checkpoints import load_model, save_model
from gptbook.core import (FeedForward, GPTConfig, GPTModel, LossModel, Positions,
                          auxiliary_loss, clear_auxiliary_loss, replace_modules, set_seed)
from gptbook.inference import KVCache
from gptbook.less_memory import checkpoint_activations
from gptbook.moe import (MixtureOfExperts, balance_loss, check_router, expert_choices,
                         expert_load, moved_bias, route, router_z_loss, run_experts,
                         within_capacity)
from gptbook.runs import TrainConfig
from gptbook.training import train

from tiny_runs import DATA

CONFIG = GPTConfig(61, 32, 24, 2, 4)
SHAPES = [(1, 1, 1), (2, 1, 7), (4, 2, 1), (8, 2, 50), (8, 1, 64), (8, 8, 33), (16, 3, 200)]


def every(experts, x, chosen, weights):
    """Each expert on each token; nobody's column is cut off."""
    share = torch.zeros(len(x), len(experts) + 1, dtype=weights.dtype)
    share = share.scatter(1, chosen, weights)[:, :-1]
    answers = torch.stack([expert(x, None) for expert in experts], 1)
    return (answers * share[..., None]).sum(1)


def make(seed=0, config=CONFIG, **options):
    set_seed(seed)
    model = GPTModel(config, mlp=partial(MixtureOfExperts, **options))
    with torch.no_grad():  # large enough that a mistake shows
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def ids():
    set_seed(4)
    return torch.randint(61, (3, 20))


# Grouped execution ----------------------------------------------------------------
@pytest.mark.parametrize("n_experts, top_k, n", SHAPES)
@pytest.mark.parametrize("expert", [SwiGLU, FeedForward])
def test_grouped_equals_every_expert_on_every_token(n_experts, top_k, n, expert):
    set_seed(1)
    experts = nn.ModuleList(expert(CONFIG, 0) for _ in range(n_experts)).double()
    x = torch.randn(n, 24, dtype=torch.double, requires_grad=True)
    logits = torch.randn(n, n_experts, dtype=torch.double, requires_grad=True)
    grads = []
    for run in (run_experts, every):
        said = route(logits, top_k, normalise=False)
        chosen = said.chosen.clone()
        chosen[::5] = n_experts  # some ask nobody
        out = run(experts, x, chosen, said.weights)
        wanted = [x, logits, *experts.parameters()]
        grads.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for a, b in zip(*grads):
        assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_a_wrong_order_is_seen():
    """Negative control: answers put back in the sorted order, not in the text's."""
    set_seed(1)
    experts = nn.ModuleList(SwiGLU(CONFIG, 0) for _ in range(4))
    x, said = torch.randn(30, 24), route(torch.randn(30, 4), 1, normalise=False)
    order = said.chosen.flatten().argsort(stable=True)
    right = run_experts(experts, x, said.chosen, said.weights)
    with pytest.raises(AssertionError):
        assert_close(right[order], every(experts, x, said.chosen, said.weights))
    assert_close(right, every(experts, x, said.chosen, said.weights), atol=1e-6, rtol=0)


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    experts = nn.ModuleList(SwiGLU(CONFIG, 0) for _ in range(3))
    chosen = torch.zeros(5, 1, dtype=torch.long)
    run_experts(experts, torch.randn(5, 24), chosen, torch.ones(5, 1)).sum().backward()
    assert experts[0].fc_in.weight.grad.any()
    assert all(not p.grad.any() for p in experts[2].parameters())


def test_nobody_answers_exactly_zero():
    experts = nn.ModuleList(SwiGLU(CONFIG, 0) for _ in range(3))
    x, none = torch.randn(5, 24), torch.full((5, 2), 3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(run_experts(experts, x, none, torch.ones(5, 2)),
                               torch.zeros(5, 24))


# Oracles --------------------------------------------------------------------------
@pytest.mark.parametrize("n_experts, top_k", [(4, 2), (8, 2), (8, 3)])
def test_equals_mixtral(n_experts, top_k):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    config = GPTConfig(61, 32, 24, 1, 4, bias=False)
    set_seed(0)
    part = MixtureOfExperts(config, 0, n_experts, top_k).eval()
    theirs = mixtral.MixtralSparseMoeBlock(MixtralConfig(
        hidden_size=24, intermediate_size=part.experts[0].fc_in.out_features,
        num_local_experts=n_experts, num_experts_per_tok=top_k)).eval()
    theirs.load_state_dict({
        "gate.weight": part.router.weight,
        "experts.gate_up_proj": torch.stack(
            [torch.cat((e.fc_gate.weight, e.fc_in.weight)) for e in part.experts]),
        "experts.down_proj": torch.stack([e.fc_out.weight for e in part.experts])})
    x = 3 * torch.randn(3, 17, 24)
    mine, other = part(x, Positions(torch.arange(17)[None], True)), theirs(x)
    assert mine.abs().max() > 0.1
    assert_close(mine, other, atol=1e-6, rtol=1e-5)
    swapped = nn.ModuleList(reversed(part.experts))  # the control: other experts
    part.experts = swapped
    assert (part(x, Positions(torch.arange(17)[None], True)) - other).abs().max() > 1e-3


class Relu(nn.Module):
    """The expert of Switch."""

    def __init__(self, config, layer):
        super().__init__()
        self.fc_in = nn.Linear(config.emb_dim, 32, bias=False)
        self.fc_out = nn.Linear(32, config.emb_dim, bias=False)

    def forward(self, x, positions):
        return self.fc_out(self.fc_in(x).relu())


@pytest.mark.parametrize("places", [1, 2, 4, 16])
def test_equals_switch_with_its_capacity(places):
    switch = pytest.importorskip(
        "transformers.models.switch_transformers.modeling_switch_transformers")
    from transformers import SwitchTransformersConfig

    theirs = switch.SwitchTransformersSparseMLP(SwitchTransformersConfig(
        d_model=24, d_ff=32, num_experts=4, expert_capacity=places, dropout_rate=0.0))
    part = MixtureOfExperts(CONFIG, 0, 4, 1, Relu, capacity_factor=4 * places / 16)
    part.load_state_dict({
        name.replace("router.classifier", "router").replace("expert_", "")
        .replace(".wi.", ".fc_in.").replace(".wo.", ".fc_out."): value
        for name, value in theirs.state_dict().items()})
    x = torch.randn(1, 16, 24)
    mine = part.train()(x, Positions(torch.arange(16)[None], True))
    assert_close(mine, theirs.eval()(x), atol=1e-6, rtol=1e-5)  # it drops there too
    free = part.eval()(x, Positions(torch.arange(16)[None], True))
    assert torch.equal(mine, free) == (places == 16), "the capacity changed nothing"


@pytest.mark.parametrize("n_experts, top_k", [(4, 1), (8, 2), (8, 4)])
@pytest.mark.parametrize("padding", [0, 7])
def test_balance_loss_equals_transformers(n_experts, top_k, padding):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    set_seed(2)
    logits, mask = 2 * torch.randn(40, n_experts), torch.ones(2, 20)
    mask[:, :padding] = 0
    said = route(logits, top_k, normalise=False)
    hidden = said.chosen.masked_fill(mask.flatten()[:, None] == 0, n_experts)
    said = said._replace(chosen=hidden)
    theirs = mixtral.load_balancing_loss_func(
        (logits,), n_experts, top_k, mask if padding else None)
    assert_close(top_k * balance_loss(said), theirs)
    z = logits[mask.flatten() == 1].logsumexp(-1).square().mean()
    assert_close(router_z_loss(said), z)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_uniform_routing_costs_exactly_the_coefficient(top_k):
    part = MixtureOfExperts(CONFIG, 0, 4, top_k, balance=0.5, z_loss=0.0).train()
    nn.init.zeros_(part.router.weight)
    part(torch.randn(2, 8, 24), Positions(torch.arange(8)[None], True))
    # all probabilities are 1/4, whoever is chosen
    assert_close(part.aux_loss, torch.tensor(0.5), atol=0, rtol=1e-6)


def test_nobody_asked_costs_nothing():
    said = route(torch.randn(3, 4), 2, True)._replace(chosen=torch.full((3, 2), 4))
    assert balance_loss(said) == 0 and router_z_loss(said) == 0


def test_weights():
    logits = torch.randn(9, 5)
    mixtral = route(logits, 2, normalise=True)
    best = logits.topk(2)
    assert torch.equal(mixtral.chosen, best.indices)
    assert_close(mixtral.weights, best.values.softmax(-1))
    plain = route(logits, 2, normalise=False)
    assert_close(plain.weights, logits.softmax(-1).gather(1, best.indices))


# Capacity -------------------------------------------------------------------------
@pytest.mark.parametrize("n, top_k, n_experts, factor", [
    (10, 1, 4, 1.0), (64, 2, 8, 1.25), (7, 3, 5, 0.3), (1, 1, 8, 1.0), (50, 2, 2, 1.0)])
def test_capacity_equals_a_queue(n, top_k, n_experts, factor):
    set_seed(3)
    chosen = torch.stack([torch.randperm(n_experts)[:top_k] for _ in range(n)])
    if n > 5:
        chosen[3] = n_experts  # padding takes no place
    real = (chosen < n_experts).sum().item()
    places = -(-real * factor // n_experts)
    taken, expected = [0] * n_experts, chosen.clone()
    for t in range(n):
        for j in range(top_k):
            i = chosen[t, j].item()
            if i < n_experts:
                taken[i] += 1
                if taken[i] > places:
                    expected[t, j] = n_experts
    assert torch.equal(within_capacity(chosen, n_experts, factor), expected)
    assert within_capacity(chosen, n_experts, None) is chosen


def test_rounding_gives_no_place_away():
    assert math.ceil(1.1 * 50) == 56  # as a float has it
    all_want_one = torch.zeros(250, 1, dtype=torch.long)
    assert (within_capacity(all_want_one, 5, 1.1) == 0).sum() == 55


def test_capacity_is_causal():
    """What a later token wants changes nothing for an earlier one."""
    set_seed(0)
    chosen = torch.randint(4, (40, 1))
    other = chosen.clone()
    other[30:] = torch.randint(4, (10, 1))
    kept, others = (within_capacity(x, 4, 0.7) for x in (chosen, other))
    assert torch.equal(kept[:30], others[:30]) and not torch.equal(kept, others)


# The part in a model --------------------------------------------------------------
KINDS = {"mixtral": {}, "switch": dict(top_k=1, expert=FeedForward, capacity_factor=1.0),
         "bias": dict(bias_balanced=True, noise=0.1)}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_equals_full_and_rows_stand_alone(kind, ids):
    model = make(**KINDS[kind]).eval()
    full = model(ids)
    for chunk in (1, 3, 20):
        cache = KVCache(model)
        steps = [model(ids[:, t:t + chunk], cache=cache) for t in range(0, 20, chunk)]
        assert_close(torch.cat(steps, 1), full, atol=1e-5, rtol=1e-5)
    for row in range(3):
        assert_close(model(ids[row:row + 1])[0], full[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_capacity_at_inference_would_be_seen(ids):
    """Negative control."""
    class AlwaysFull(MixtureOfExperts):
        def admit(self, routing):
            return within_capacity(routing.chosen, len(self.experts), 1.0)

    set_seed(0)
    model = GPTModel(CONFIG, mlp=AlwaysFull).eval()
    for p in model.parameters():
        p.mul_(4)
    cache = KVCache(model)
    steps = [model(ids[:, t:t + 1], cache=cache) for t in range(20)]
    assert (torch.cat(steps, 1) - model(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_loss_and_no_token(kind, ids):
    options = {**KINDS[kind], "noise": 0.0}
    model = make(**options).train()
    where = torch.arange(20).expand(3, -1)
    model(ids, positions=where)
    alone = auxiliary_loss(model)
    model = make(**options).train()  # anew, for a bias would have moved
    wide = torch.cat((torch.zeros(3, 6, dtype=torch.long), ids), 1)
    padded = torch.cat((torch.full((3, 6), -1), where), 1)
    first = model(wide, positions=padded)[:, 6:]
    assert_close(auxiliary_loss(model), alone)
    wide[:, :6] = 7  # other padding
    assert_close(model(wide, positions=padded)[:, 6:], first)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_only_training_leaves_a_loss(kind, ids):
    model = make(**KINDS[kind]).eval()
    model(ids)
    assert auxiliary_loss(model) == 0.0
    model.train()
    loss = LossModel(model)(ids[:, :-1], ids[:, 1:])
    auxiliary = auxiliary_loss(model)
    assert 0 < auxiliary < loss
    loss.backward()  # without the auxiliary loss: the router learns from the text too
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    assert all(g.any() for n, g in grads.items() if "router" in n)


def test_one_normalised_weight_teaches_the_router_nothing():
    logits = torch.randn(9, 5, requires_grad=True)
    route(logits, 1, normalise=True).weights.square().sum().backward()
    assert logits.grad.abs().max() < 1e-6
    logits.grad = None
    route(logits, 1, normalise=False).weights.square().sum().backward()
    assert logits.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_keeps_the_auxiliary_gradient(kind, ids):
    grads, biases = [], []
    for again in (False, True):
        model = make(**KINDS[kind]).train()
        if again:
            checkpoint_activations(model)
        for _ in range(3):
            set_seed(9)  # noise
            model.zero_grad()
            loss = LossModel(model)(ids[:, :-1], ids[:, 1:])
            (loss + 10 * auxiliary_loss(model)).backward()
            clear_auxiliary_loss(model)
        grads.append({n: p.grad for n, p in model.named_parameters()})
        biases.append([b.clone() for n, b in model.named_buffers() if "bias" in n])
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(*biases))
    if kind == "bias":
        assert biases[0][0].any(), "the bias must have moved"


def test_the_auxiliary_gradient_is_there_at_all(ids):
    """Negative control of the test above."""
    grads = []
    for share in (0.0, 10.0):
        model = make().train()
        loss = LossModel(model)(ids[:, :-1], ids[:, 1:])
        (loss + share * auxiliary_loss(model)).backward()
        grads.append(model.blocks[0].mlp.router.weight.grad)
    assert not torch.allclose(*grads)


def test_names_shapes_and_first_weights():
    model = GPTModel(CONFIG, mlp=partial(MixtureOfExperts, n_experts=3))
    names = [n for n in model.state_dict() if n.startswith("blocks.0.mlp.")]
    linears = ("fc_gate", "fc_in", "fc_out")
    assert names == ["blocks.0.mlp.router.weight"] + [
        f"blocks.0.mlp.experts.{i}.{linear}.{what}"
        for i in range(3) for linear in linears for what in ("weight", "bias")]
    expert = model.blocks[0].mlp.experts[2]
    assert abs(expert.fc_in.weight.std() - 0.02) < 2e-3
    assert abs(expert.fc_out.weight.std() - 0.02 / 2) < 1e-3  # writes to the residual
    balanced = MixtureOfExperts(CONFIG, 0, bias_balanced=True)
    assert {"choice_bias", "load"} < set(balanced.state_dict())


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.update = base, nn.Parameter(torch.zeros_like(base.weight))

    def forward(self, x):
        return self.base(x) + F.linear(x, self.update)


@pytest.mark.parametrize("target", ["fc_in", "router"])
def test_transforms_reach_every_expert_and_the_router(target, ids):
    model = make().eval()
    before = model(ids)
    found = replace_modules(model, lambda n, m: n.endswith(target),
                            lambda n, m: Wrapped(m))
    assert len(found) == (16 if target == "fc_in" else 2)
    assert torch.equal(model(ids), before)
    model.train()
    (LossModel(model)(ids[:, :-1], ids[:, 1:]) + auxiliary_loss(model)).backward()
    updates = [m.update.grad for m in model.modules() if isinstance(m, Wrapped)]
    assert all(g is not None for g in updates) and any(g.any() for g in updates)


def test_autocast_routes_in_float32(ids):
    model = make().train()
    seen, part = [], model.blocks[0].mlp
    part.router.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    part.experts[0].fc_in.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = LossModel(model)(ids[:, :-1], ids[:, 1:])
        auxiliary = auxiliary_loss(model)
    (loss + auxiliary).backward()
    assert seen == [torch.float32, torch.bfloat16] and auxiliary.dtype == torch.float32
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, ids):
    model = make(bias_balanced=True).to(dtype).train()
    out = model(ids)
    assert out.dtype == dtype and auxiliary_loss(model).dtype in (
        torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_under_autocast(dtype, ids):
    model = make().to(dtype).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).isfinite().all()


def test_the_load_is_counted_to_the_last_token_in_bfloat16():
    part = MixtureOfExperts(CONFIG, 0, 4, 1, bias_balanced=True).bfloat16().train()
    nn.init.zeros_(part.router.weight)
    part.choice_bias[0] = 1.0  # all choose the first
    part(torch.randn(1, 1031, 24).bfloat16(), Positions(torch.arange(1031)[None], True))
    assert part.load.tolist() == [1031, 0, 0, 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_equals_plain(ids):
    options = dict(bias_balanced=True, capacity_factor=1.0, n_experts=3)
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        loss_model = LossModel(make(**options).train())
        if compiled:
            loss_model.compile(backend="aot_eager")
        for _ in range(2):
            loss_model.zero_grad()
            loss = loss_model(ids[:, :-1], ids[:, 1:])
            (loss + auxiliary_loss(loss_model)).backward()
            clear_auxiliary_loss(loss_model)
        results.append((loss, {n: p.grad for n, p in loss_model.named_parameters()}))
        bias = loss_model.model.blocks[1].mlp.choice_bias
        assert bias.any(), "the bias moves here as there"
    assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert_close(grad, results[1][1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_compiled_once_whatever_goes_where():
    """New loads compile nothing again, and no expert becomes a graph of its own."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    set_seed(0)
    counter = CompileCounterWithBackend("eager")
    model, counts = make().eval(), []
    model.compile(backend=counter)
    with torch.no_grad():
        for _ in range(12):
            model(torch.randint(61, (2, 20)))
            counts.append(counter.frame_count)
    assert counts[0] == counts[-1] <= 2 * (len(model.blocks) + 1), counts


def test_the_compiler_is_imported_by_nobody_who_does_not_compile():
    code = """import sys, torch, gptbook
from gptbook.core import GPTConfig, GPTModel
model = GPTModel(GPTConfig(61, 32, 24, 1, 4, recipe="mixtral"))
model(torch.zeros(1, 3).long())
print("torch._dynamo" in sys.modules)"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.strip() == "False", said.stderr


# Balance by a bias ----------------------------------------------------------------
def test_the_bias_moves_once_a_step_and_only_in_training(ids):
    model = make(bias_balanced=True, balance=0.0).train()
    part, biases = model.blocks[0].mlp, []
    for _ in range(3):
        (LossModel(model)(ids[:, :-1], ids[:, 1:]) + auxiliary_loss(model)).backward()
        model(ids)  # a second look in the same step moves nothing
        biases.append(part.choice_bias.clone())
        load = part.load.clone()
        clear_auxiliary_loss(model)
        model.eval()(ids)
        model.train()
        assert torch.equal(part.load, load)
    assert not biases[0].any()
    assert set(biases[1].unique().tolist()) <= {p for p in torch.tensor(
        [-1e-3, 0.0, 1e-3]).tolist()}
    assert not torch.equal(biases[1], biases[2])


def test_the_bias_changes_the_choice_and_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    bias = torch.tensor([-1.0, 0.0, 0.0])
    said = route(logits, 1, normalise=False, bias=bias)
    assert said.chosen.item() == 1
    assert_close(said.weights, logits.softmax(-1)[:, 1:2])
    assert torch.equal(moved_bias(torch.zeros(3), torch.tensor([5.0, 1.0, 3.0]), 0.5),
                       torch.tensor([-0.5, 0.5, 0.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run_that_was_never_stopped(kind, tmp_path, one_thread):
    config, finals = GPTConfig(37, 16, 16, 2, 2), []

    def run(steps, **more):
        return train(model, DATA, None, TrainConfig(8, save_every=3), progress=False,
                     callbacks=[lambda run: setattr(run, "stopping", run.step >= steps)],
                     **more)

    for stops in ((8,), (3, 8)):
        out = tmp_path / str(len(stops))
        for i, stop in enumerate(stops):
            model = make(config=config, **KINDS[kind])
            run(stop, out=out, resume=i > 0)
        finals.append(model.state_dict())
    assert all(torch.equal(a, finals[1][n]) for n, a in finals[0].items())
    if kind == "bias":
        assert finals[0]["blocks.0.mlp.choice_bias"].any()


def test_checkpoint_round_trip(ids, tmp_path):
    slot = partial(MixtureOfExperts, bias_balanced=True)
    model = make(bias_balanced=True).eval()
    model.blocks[0].mlp.choice_bias.copy_(torch.linspace(-0.1, 0.1, 8))
    save_model(tmp_path / "m.safetensors", model)
    again = load_model(tmp_path / "m.safetensors", mlp=slot).model.eval()
    assert torch.equal(again(ids), model(ids))
    again.blocks[0].mlp.choice_bias.zero_()
    assert not torch.equal(again(ids), model(ids)), "the bias counts"


# Noise, health and errors ---------------------------------------------------------
def test_noise_in_training_only_and_not_for_the_experts():
    part = MixtureOfExperts(CONFIG, 0, noise=0.5, balance=0.0).eval()
    x, where = torch.randn(2, 9, 24), Positions(torch.arange(9)[None], True)
    assert torch.equal(part(x, where), part(x, where))
    kept, seen = x.clone(), []
    for expert in part.experts:
        expert.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    part.train()
    a, b = part.route(x.flatten(0, 1)), part.route(x.flatten(0, 1))
    assert not torch.equal(a.logits, b.logits)
    part(x, where)
    rows = {tuple(row) for row in x.flatten(0, 1).tolist()}
    assert all(tuple(row) in rows for part in seen for row in part.tolist())
    assert torch.equal(x, kept), "the input is changed in place"


@torch.no_grad()
def test_expert_choices(ids):
    model = make(top_k=3).train()
    said = expert_choices(model, ids)
    assert list(said) == ["blocks.0.mlp", "blocks.1.mlp"] and model.training
    first = model.blocks[0]
    x = model.position_embedding(model.tok_emb(ids), Positions(torch.arange(20)[None]))
    x = x + first.attn(first.norm1(x), Positions(torch.arange(20)[None], True))
    logits = first.mlp.router(first.norm2(x)).flatten(0, 1)
    assert torch.equal(said["blocks.0.mlp"].chosen, logits.softmax(-1).topk(3).indices)
    assert expert_load(said["blocks.0.mlp"].chosen, 8).sum() == 180
    assert not first.mlp._forward_pre_hooks, "hooks must go"
    with pytest.raises(ValueError, match="no MixtureOfExperts"):
        expert_choices(GPTModel(CONFIG), ids)
    with pytest.raises(ValueError):
        expert_choices(model, ids + 61)
    assert not first.mlp._forward_pre_hooks


def test_expert_choices_leaves_every_mode_as_it_was(ids):
    model = make().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    expert_choices(model, ids)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("options, said", [
    (dict(balance=-1.0), "balance=-1.0"), (dict(balance=float("nan")), "balance=nan"),
    (dict(z_loss="0.1"), "z_loss='0.1'"), (dict(capacity_factor="2"), "capacity_factor='2'"),
    (dict(noise="x"), "noise='x'"),
    (dict(n_experts=0), "n_experts=0"), (dict(n_experts=2.0), "n_experts=2.0"),
    (dict(top_k=9), "top_k=9 is more than n_experts=8"), (dict(top_k=True), "top_k=True"),
    (dict(capacity_factor=0), "capacity_factor=0"), (dict(noise=1.0), "noise=1.0"),
    (dict(capacity_factor=float("nan")), "capacity_factor=nan"),
    (dict(top_k=1, normalise=True), "learns nothing")])
def test_impossible_numbers(options, said):
    with pytest.raises(ValueError, match=said):
        MixtureOfExperts(CONFIG, 0, **options)
    check_router(8, 2, True)


def test_a_model_can_be_copied_before_the_backward_pass(ids):
    model = make().train()
    loss = LossModel(model)(ids[:, :-1], ids[:, 1:])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert auxiliary_loss(twin) == 0.0, "the graph stays with the model"
        assert torch.equal(twin.eval()(ids), copy.deepcopy(model).eval()(ids))
    (loss + auxiliary_loss(model)).backward()
    assert model.blocks[0].mlp.router.weight.grad.any()


def test_a_model_can_be_copied_after_a_step(ids):
    model = make(bias_balanced=True).train()
    (LossModel(model)(ids[:, :-1], ids[:, 1:]) + auxiliary_loss(model)).backward()
    clear_auxiliary_loss(model)
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(ids), model.eval()(ids))
