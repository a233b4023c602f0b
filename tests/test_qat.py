"""Fake quantizers against PyTorch's, prepared against stored, converted against quantize."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import DATA, HELD_OUT, a_model, some_data
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

import gptbook.moe  # noqa: F401
import gptbook.recipes  # noqa: F401
from gptbook.checkpoints import load_model, load_state, save_model
from gptbook.core import LossModel, innermost, replace_modules
from gptbook.decoder import Decoder
from gptbook.precision import BFloat16
from gptbook.pruning import mask_of, prune
from gptbook.qat import (
    FakeQuantEmbedding, FakeQuantLinear, Observer, StaticInt8Linear, convert, fake_quantize,
    fake_tokens, fake_weight, freeze_after, freeze_observers, observers, prepare_qat,
    stored_layer, straight_through,
)
from gptbook.quantization import (
    SCHEMES, Int4Linear, Int8Embedding, Int8Linear, quantize, quantize_rows, quantize_tokens,
)
from gptbook.runs import TrainConfig
from gptbook.training import train

ALL = (*SCHEMES, "int8_static")
IDS = torch.randint(0, 37, (3, 16), generator=torch.manual_seed(0))


def prepared(scheme="int8", model=None, watched=True, **options):
    """A model in eval mode that is prepared; static scales have seen something."""
    model = model or a_model()
    prepare_qat(model, scheme, **options)
    if scheme == "int8_static" and watched:
        model.train()
        with torch.no_grad():
            for seed in range(3):
                model(torch.randint(0, 37, (4, 16), generator=torch.manual_seed(seed)))
    return model.eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids)


def same_state(a, b):
    mine, its = a.state_dict(), b.state_dict()
    return [*mine] == [*its] and all(
        mine[k].dtype == its[k].dtype and torch.equal(mine[k], its[k]) for k in mine)


# One number and many ------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_straight_through_has_the_value_of_one_and_the_slope_of_the_other(dtype):
    x = (torch.randn(50, dtype=torch.double) * 1e4).to(dtype).requires_grad_()
    value = torch.randn(50, dtype=torch.double).to(dtype).requires_grad_()
    y = straight_through(x, value)
    assert torch.equal(y, value), "exactly"
    assert not torch.equal(x + (value - x).detach(), value), "the usual line is not exact"
    upstream = torch.randn(50).to(dtype)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream) and value.grad is None


@pytest.mark.parametrize("most", [1, 3, 7, 127])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 200)])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_fake_quantize_is_torchs_per_channel(most, shape, power_of_two):
    torch.manual_seed(most + shape[0])
    scale = torch.rand(shape[0]) * 3 / most + 1e-3
    if power_of_two:  # dividing is exact, so that halves are true ties
        scale = 2.0 ** scale.log2().round()
        x = torch.randint(-6 * most, 6 * most, shape) * 0.5 * scale[:, None]
    else:
        x = torch.randn(shape)
        near = (x / scale[:, None] % 1 - 0.5).abs() < 1e-3  # torch multiplies by 1 / s
        x = torch.where(near, x + 0.1 * scale[:, None], x)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = fake_quantize(ours, scale[:, None], most)
    zero = torch.zeros(shape[0], dtype=torch.int32)
    oracle = torch.fake_quantize_per_channel_affine(theirs, scale, zero, 0, -most, most)
    torch.testing.assert_close(y, oracle, rtol=1e-6, atol=0)
    upstream = torch.randn(shape)
    y.backward(upstream)
    oracle.backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)
    if shape[0] == 64:
        assert (ours.grad == 0).any() and (ours.grad != 0).any(), "both regions are tested"


def test_fake_quantize_is_torchs_per_tensor():
    torch.manual_seed(0)
    ours = (3 * torch.randn(4, 7, 9)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    y, scale = fake_quantize(ours, torch.tensor(0.0625), 31), 0.0625
    oracle = torch.fake_quantize_per_tensor_affine(theirs, scale, 0, -31, 31)
    assert torch.equal(y, oracle)
    (y.sin().sum().backward(), oracle.sin().sum().backward())
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("shape", [(1, 2), (5, 32), (8, 33), (3, 100)])
@pytest.mark.parametrize("bits, group", [(8, None), (4, None), (2, None), (4, 32), (3, 16), (2, 8)])
def test_fake_weight_is_the_nearest_point_of_a_grid_of_its_own(shape, bits, group):
    weight = torch.randn(shape, generator=torch.manual_seed(1)).requires_grad_()
    fake = fake_weight(weight, bits, group)
    most = 2 ** (bits - 1) - 1
    for row, its in zip(weight.detach().double(), fake.detach().double()):
        for a in range(0, len(row), group or len(row)):
            part, mine = (t[a:a + (group or len(row))] for t in (row, its))
            scale = part.abs().max() / most
            grid = torch.arange(-most, most + 1) * scale  # brute force over all points
            nearest = grid[(part[:, None] - grid).abs().argmin(1)]
            torch.testing.assert_close(mine, nearest, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close((mine - part).abs().max() <= scale / 2 + 1e-6,
                                       torch.tensor(True))
    upstream = torch.randn(shape)
    fake.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_a_row_of_the_table_is_rounded_like_a_token():
    table = torch.randn(50, 12)
    rows, tokens = quantize_rows(table), quantize_tokens(table)
    assert all(map(torch.equal, rows, tokens))


def test_one_outlier_touches_no_other_token():
    x = torch.randn(2, 6, 32)
    y = x.clone()
    y[1, 3, 5] = 1e4
    a, b = fake_tokens(x), fake_tokens(y)
    changed = (a != b).any(-1)
    assert changed.nonzero().tolist() == [[1, 3]]


# Layers -------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits, group, inputs", [
    (8, None, None), (8, None, "tokens"), (8, None, "watch"), (4, 32, None), (3, 32, None),
    (2, 8, None), (4, None, None)])
@pytest.mark.parametrize("shape", [(1, 2), (24, 33), (17, 100)])
def test_a_layer_simulates_what_it_stores(shape, bits, group, inputs, bias):
    torch.manual_seed(shape[1])
    N, K = shape
    base, x = nn.Linear(K, N, bias=bias), torch.randn(2, 5, K)
    grid = {None: None, "tokens": fake_tokens, "watch": Observer()}[inputs]
    layer = FakeQuantLinear(base, bits, group, grid)
    simulated = layer(x)
    stored = stored_layer(layer)
    kinds = {None: Int4Linear if group else Int8Linear, "tokens": Int8Linear,
             "watch": StaticInt8Linear}
    assert type(stored) is kinds[inputs]
    # one layer: the same products, added in another order
    torch.testing.assert_close(simulated, stored(x), atol=2e-6 * K**0.5, rtol=1e-5)
    layer.eval()
    with torch.no_grad():
        assert torch.equal(layer(x), stored(x)), "in evaluation it is the stored layer"
        one = layer(x[0, 0])
        torch.testing.assert_close(one, layer(x)[0, 0])
    assert not torch.allclose(F.linear(x, base.weight, base.bias), stored(x), atol=1e-5)


@pytest.mark.parametrize("scheme", ALL)
def test_gradients_are_those_of_a_linear_with_rounded_numbers(scheme):
    torch.manual_seed(0)
    base, x = nn.Linear(20, 9), torch.randn(7, 20, requires_grad=True)
    group = 8 if scheme == "int4" else None
    inputs = {"int8_dynamic": fake_tokens, "int8_static": Observer()}.get(scheme)
    layer, upstream = FakeQuantLinear(base, 4 if group else 8, group, inputs), torch.randn(7, 9)
    layer(x).backward(upstream)
    with torch.no_grad():
        x_hat = x if inputs is None else layer.eval().inputs(x)
        W_hat = fake_weight(base.weight, 4 if group else 8, group)
    torch.testing.assert_close(base.weight.grad, upstream.T @ x_hat)
    torch.testing.assert_close(base.bias.grad, upstream.sum(0))
    torch.testing.assert_close(x.grad, upstream @ W_hat)
    assert not torch.allclose(base.weight.grad, upstream.T @ x.detach(), atol=1e-6) or (
        inputs is None)


def test_the_table_trains_only_the_rows_that_were_read():
    table = FakeQuantEmbedding(nn.Embedding(11, 6))
    out = table(torch.tensor([[3, 5, 3]]))
    stored = Int8Embedding(*quantize_rows(table.base.weight.detach()))
    assert torch.equal(out, stored(torch.tensor([[3, 5, 3]])))
    out.sum().backward()
    due = torch.zeros(11, 6)
    due[3], due[5] = 2, 1
    assert torch.equal(table.base.weight.grad, due)


# Observers ----------------------------------------------------------------------------
def test_an_observer_averages_as_torchs_does():
    theirs = FakeQuantize(MovingAverageMinMaxObserver, quant_min=-127, quant_max=127,
                          dtype=torch.qint8, qscheme=torch.per_tensor_symmetric,
                          averaging_constant=0.1)
    mine = Observer(memory=0.9)
    for seed in range(20):
        half = torch.randn(6, 5, generator=torch.manual_seed(seed))
        x = torch.cat((half, -half))  # they watch both ends apart
        torch.testing.assert_close(mine(x), theirs(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.amax / 127, theirs.scale[0])


def test_an_observer_moves_in_training_only_and_until_frozen():
    observer, x = Observer(memory=0.5), torch.tensor([1.0, -4.0])
    assert torch.equal(observer.eval()(x), x), "it has seen nothing"
    assert observer.amax == 0
    observer.train()(x)
    assert observer.amax == 4
    observer(3 * x)
    assert observer.amax == 8
    observer.eval()(100 * x)
    assert observer.amax == 8
    observer.train()(torch.tensor([torch.nan, 1]))
    observer(torch.tensor([torch.inf, 1]))
    assert observer.amax == 8, "a step that is skipped teaches nothing"
    assert freeze_observers(observer) == 1
    observer(100 * x)
    assert observer.amax == 8
    assert observer(torch.tensor([100.0])) == 8, "cut off"


def test_an_observer_lets_no_gradient_through_what_it_cut_off():
    observer = Observer()
    observer(torch.tensor([2.0]))
    freeze_observers(observer)
    x = torch.tensor([1.0, 2.0, 2.1, -5.0], requires_grad=True)
    observer(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_freezing_needs_observers_that_have_seen_something():
    with pytest.raises(ValueError, match="no observer"):
        freeze_observers(a_model())
    model = prepared("int8_static", watched=False)
    with pytest.raises(ValueError, match="blocks.0.attn.W_query.inputs.* has seen no input"):
        freeze_observers(model)
    with pytest.raises(ValueError, match="has seen no input"):
        convert(model)
    assert model.transforms[0][0] == "qat" and isinstance(model.head, FakeQuantLinear)


def test_an_observer_that_would_never_move_or_never_freeze():
    for memory in (1.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="memory="):
            Observer(memory)
    for step in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match="step="):
            freeze_after(step)


# Whole models -------------------------------------------------------------------------
RECIPES = {
    "gpt2": {}, "untied": dict(tied=False), "llama": dict(recipe="llama", n_kv_heads=1),
    "mistral": dict(recipe="mistral", options=dict(window=5)), "mixtral": dict(recipe="mixtral"),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_converted_is_quantize_of_the_same_weights(name, scheme):
    model = a_model(**RECIPES[name])
    quantize(expected := copy.deepcopy(model).eval(), scheme)
    float_logits = logits(model.eval())
    names = prepare_qat(model, scheme)
    before = logits(model)
    assert convert(model) == names
    assert same_state(model, expected) and model.transforms == expected.transforms
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(before, logits(model)), "prepared in evaluation is converted"
    assert not torch.equal(float_logits, before), "it rounds"
    kinds = (FakeQuantLinear, FakeQuantEmbedding, Observer)
    assert not any(isinstance(m, kinds) for m in model.modules())


def test_the_comparison_sees_one_weight_that_differs():
    """The negative control of the test above."""
    model = a_model()
    quantize(expected := copy.deepcopy(model).eval())
    prepare_qat(model)
    with torch.no_grad():
        innermost(model.head).weight[3, 4] += 0.1
    convert(model)
    assert not same_state(model, expected)


@pytest.mark.parametrize("order", ["pruned, prepared", "prepared, pruned"])
@pytest.mark.parametrize("scheme", ALL)
def test_pruned_and_prepared_in_either_order(scheme, order, tmp_path):
    """The file of the converted model loads: its masks are gone, or have their names."""
    model, keep = a_model(), ("fc_out",)
    if order == "pruned, prepared":
        prune(model, 0.5)
    model = prepared(scheme, model, keep=keep)
    if order == "prepared, pruned":
        prune(model, 0.5)
    before = logits(model)
    for name in ("prepared", "converted"):
        loaded = load_model(save_model(tmp_path / f"{name}.safetensors", model)).model
        assert torch.equal(logits(loaded), before), name
        assert loaded.transforms == model.transforms
        if name == "prepared":
            convert(model)
    kept = [name for name, m in model.named_modules() if mask_of(m) is not None]
    assert len(kept) == 2 and all(name.endswith("fc_out") for name in kept)
    (entry,) = [options for name, options in model.transforms if name == "prune"]
    assert sorted(entry["modules"]) == sorted(kept)


def test_a_refused_conversion_leaves_the_names_of_masks():
    model = prepared("int8")
    prune(model, 0.5)
    transforms = copy.deepcopy(model.transforms)
    with torch.no_grad():
        innermost(model.head).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        convert(model)
    assert model.transforms == transforms and isinstance(model.head, FakeQuantLinear)


@pytest.mark.parametrize("scheme", ALL)
def test_after_training_too(scheme):
    model = prepared(scheme, watched=False)
    history = train(model, DATA, HELD_OUT, TrainConfig(4, 1e-2, validate_every=2),
                    callbacks=(freeze_after(3),) * (scheme == "int8_static"), progress=False)
    assert all(torch.isfinite(torch.tensor(history.column("validation_loss")[1])))
    floats = a_model()
    assert not torch.equal(floats.tok_emb.weight, innermost(model.tok_emb).weight)
    floats.load_state_dict({k.replace(".base", ""): v for k, v in model.state_dict().items()
                            if ".inputs." not in k})
    before = logits(model)
    convert(model)
    assert torch.equal(logits(model), before)
    if scheme != "int8_static":
        quantize(floats.eval(), scheme)
        assert same_state(model, floats)
    assert innermost(model.head).weight_q is innermost(model.tok_emb).weight_q, "tied"


@pytest.mark.parametrize("scheme", ALL)
def test_every_parameter_gets_a_gradient_and_none_is_new(scheme):
    model = a_model()
    before = {id(p) for p in model.parameters()}
    names = prepare_qat(model, scheme)
    assert {id(p) for p in model.parameters()} == before
    assert innermost(model.head).weight is innermost(model.tok_emb).weight
    assert len(names) == 2 * 6 + 3  # two blocks, two tables, the head
    LossModel(model.train())(IDS, IDS).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_without_the_straight_through_line_matrices_get_none():
    """The negative control: what forgets it is seen by the check above."""
    model = a_model()

    class Forgetful(FakeQuantLinear):
        def forward(self, x):
            q, scale = quantize_rows(self.base.weight)
            return F.linear(x, q * scale, self.base.bias)

    replace_modules(model, lambda n, m: n.endswith("fc_in"), lambda n, m: Forgetful(m))
    LossModel(model.train())(IDS, IDS).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == [f"blocks.{i}.mlp.fc_in.base.weight" for i in (0, 1)]


def test_training_sees_the_rounding():
    """Two bits: training with it in place ends lower than rounding afterwards."""
    config = TrainConfig(150, 1e-2, weight_decay=0.0)
    small = some_data(65, 4)  # so little that it is learnt by heart
    plain, aware = a_model(drop_rate=0.0), a_model(drop_rate=0.0)
    prepare_qat(aware, "int4", bits=2, group=8)
    for model in (plain, aware):
        train(model, small, None, config, progress=False)
    prepare_qat(plain, "int4", bits=2, group=8)
    batch = small.batch(0, 0)
    with torch.no_grad():
        late, early = (LossModel(m.eval())(*batch).item() for m in (plain, aware))
    assert early < 0.8 * late, (early, late)


def test_keep_and_group_are_those_of_quantize():
    for options in (dict(keep=("head",)), dict(keep=("fc_out",)), dict(scheme="int4", group=8),
                    dict(scheme="int4", keep=("blocks.0.attn.W_key",))):
        model = a_model()
        quantize(expected := copy.deepcopy(model).eval(), **options)
        prepare_qat(model.eval(), **options)
        convert(model)
        assert same_state(model, expected) and model.transforms == expected.transforms


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_are_simulated_and_not_stored(bits):
    model = prepared("int4", bits=bits)
    four = prepared("int4")
    assert not torch.equal(logits(model), logits(four))
    with pytest.raises(ValueError, match=f"bits={bits}"):
        convert(model)
    used = stored_layer(model.blocks[0].mlp.fc_in)
    largest = used.dequantize().abs().amax() / used.scale.amax()
    assert largest.round() == 2 ** (bits - 1) - 1
    assert prepared("int4", bits=4).transforms == four.transforms


# Files and resumed runs ---------------------------------------------------------------
@pytest.mark.parametrize("scheme, options", [
    *((scheme, {}) for scheme in ALL), ("int4", dict(bits=2, group=8)), ("int8", dict(keep=("head",)))])
def test_prepared_and_converted_models_are_saved_and_loaded(tmp_path, scheme, options):
    model = prepared(scheme, **options)
    if scheme == "int8_static":
        freeze_observers(model)
    loaded = load_model(save_model(tmp_path / "a.safetensors", model)).model
    assert same_state(loaded, model) and loaded.transforms == model.transforms
    assert torch.equal(logits(loaded), logits(model))
    assert innermost(loaded.head).weight is innermost(loaded.tok_emb).weight
    if "bits" not in options:
        convert(model), convert(loaded)
        assert same_state(loaded, model)
        again = load_model(save_model(tmp_path / "b.safetensors", model)).model
        assert same_state(again, model) and torch.equal(logits(again), logits(model))
        assert again.transforms == model.transforms


@pytest.mark.parametrize("scheme", ALL)
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, scheme, one_thread):
    def run(out, steps_before=None, **more):
        def stop(run):
            run.stopping = run.step == steps_before

        model = a_model()
        prepare_qat(model, scheme)
        freeze = (freeze_after(2),) * (scheme == "int8_static")
        train(model, DATA, HELD_OUT, config, out=out, callbacks=(*freeze, stop),
              progress=False, **more)
        return model

    config = TrainConfig(5, 1e-2, validate_every=3, save_every=2)
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", steps_before=3)
    resumed = run(tmp_path / "cut", resume=True)
    assert same_state(resumed, whole)
    mine, its = (load_state(tmp_path / name / "state") for name in ("cut", "whole"))
    for a, b in zip(mine["optimizer"]["state"].values(), its["optimizer"]["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
    if scheme == "int8_static":
        assert all(o.frozen for o in observers(resumed).values())


def test_a_run_is_not_resumed_with_another_scheme(tmp_path):
    for scheme, resume in (("int8", False), ("int4", True)):
        prepare_qat(model := a_model(), scheme)
        go = lambda: train(model, DATA, None, TrainConfig(2), out=tmp_path, resume=resume,
                           progress=False)
        if resume:
            with pytest.raises(ValueError, match="cannot resume: transforms"):
                go()
        else:
            go()


# With others --------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("stored", [False, True])
def test_a_decoder_writes_what_the_model_says(scheme, stored):
    model = prepared(scheme)
    if stored:
        convert(model)
    reader = Decoder(model, max_batch=3)
    for start, end in ((0, 7), (7, 8), (8, 16)):
        last = reader.read(IDS[:, start:end])
        full = logits(model, IDS[:, :end])[:, -1]
        torch.testing.assert_close(last, full, atol=1e-5, rtol=0)
        assert torch.equal(last.argmax(-1), full.argmax(-1))


def test_before_it_has_seen_anything_a_static_model_rounds_weights_only():
    static, plain = prepared("int8_static", watched=False), prepared("int8")
    torch.testing.assert_close(logits(static), logits(plain), atol=1e-6, rtol=0)


def test_static_rows_do_not_know_their_neighbours():
    model = prepared("int8_static")
    layer = stored_layer(model.blocks[0].mlp.fc_in)
    x = torch.randn(6, 5, 16)
    for rows in ([0], [3, 1], [5, 4, 3, 2, 1, 0]):
        assert torch.equal(layer(x[rows]), layer(x)[rows])


def test_it_trains_in_bfloat16():
    model = prepared("int8_dynamic")
    before = copy.deepcopy(model.state_dict())
    history = train(model, DATA, None, TrainConfig(2, 1e-2), precision=BFloat16("cpu"),
                    progress=False)
    assert not any(row.get("skipped") for row in history)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and not torch.equal(p, before[name]), name


@pytest.mark.parametrize("bits, group", [(8, None), (4, 8)])
def test_a_layer_compiles_to_the_same_gradients(bits, group):
    layer = FakeQuantLinear(nn.Linear(16, 8), bits, group)
    twin, x = copy.deepcopy(layer), torch.randn(3, 16)
    layer(x).square().sum().backward()
    torch.compile(twin, backend="eager")(x).square().sum().backward()
    torch.testing.assert_close(layer.base.weight.grad, twin.base.weight.grad)


# What bad input gets ------------------------------------------------------------------
def test_what_is_refused_changes_nothing():
    model = a_model()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    refused = [
        (dict(scheme="int5"), "unknown scheme 'int5'; known: int8, int8_dynamic, int4, int8_static"),
        (dict(bits=1), "bits=1 must be a whole number from 2 to 8"),
        (dict(scheme="int4", bits=5), "bits=5 must be a whole number from 2 to 4"),
        (dict(bits=2.0), "bits=2.0"), (dict(keep=("nothing",)), "keep='nothing'"),
        (dict(keep="head"), "keep='head'"), (dict(scheme="int4", group=1), "group=1"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            prepare_qat(model, **options)
    with pytest.raises(ValueError, match="not prepared"):
        convert(model)
    assert model.transforms == [] and [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_preparing_twice_or_after_quantizing_is_refused():
    model = prepared()
    with pytest.raises(ValueError, match="prepared already"):
        prepare_qat(model, "int4")
    convert(model)
    with pytest.raises(ValueError, match="already"):
        prepare_qat(model)
    with pytest.raises(ValueError, match="not prepared"):
        convert(model)


@pytest.mark.parametrize("scheme", ALL)
def test_a_failed_conversion_leaves_the_model_prepared(scheme):
    model = prepared(scheme)
    before = logits(model)
    kinds, transforms = [type(m) for m in model.modules()], copy.deepcopy(model.transforms)
    weight = innermost(model.blocks[1].mlp.fc_out).weight
    value = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="fc_out.*NaN"):
        convert(model)
    with torch.no_grad():
        weight[0, 0] = value
    assert [type(m) for m in model.modules()] == kinds and model.transforms == transforms
    assert torch.equal(logits(model), before)
    if scheme == "int8_static":
        assert not any(o.frozen for o in observers(model).values())
    convert(model)
    assert torch.equal(logits(model), before)


def test_static_scales_cut_off_what_the_dynamic_ones_keep():
    torch.manual_seed(0)
    layer = FakeQuantLinear(nn.Linear(8, 4), inputs=Observer())
    layer(torch.randn(20, 8))
    x = 100 * torch.randn(5, 8)
    static = stored_layer(layer)(x)
    dynamic = Int8Linear(*quantize_rows(layer.base.weight), layer.base.bias, dynamic=True)(x)
    truth = layer.base(x)
    assert (static - truth).norm() > 20 * (dynamic - truth).norm()
    held = layer.inputs.amax
    torch.testing.assert_close(static, stored_layer(layer)(x.clamp(-held, held)))
