"""Compilation: the same numbers, clean names, no death in step one where no compiler works."""

import logging
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptbook.accumulation import Accumulate
from gptbook.checkpoints import load_model
from gptbook.compilation import compiled, why_not_compile
from gptbook.core import FeedForward, GPTConfig, GPTModel, LossModel, set_seed
from gptbook.data import TokenDataset
from gptbook.precision import BFloat16, Float16
from gptbook.runs import TrainConfig, use_kernel
from gptbook.training import Precision, compute_gradients, evaluate_loss, train

# torch's own compiler still uses it, once a process
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
ISOLATED = "isolate_recompiles" in torch.compile.__kwdefaults__


@pytest.fixture(autouse=True)
def new_process():
    """What one test compiled is unknown to the next."""
    torch._logging.set_logs(dynamo=logging.ERROR)
    torch._dynamo.reset()
    why_not_compile.cache_clear()
    yield
    torch._dynamo.reset()
    why_not_compile.cache_clear()


def tiny(seed=0, **sizes):
    set_seed(seed)
    sizes = dict(vocab_size=50, context_length=40, emb_dim=16, n_layers=1, n_heads=2) | sizes
    model = GPTModel(GPTConfig(**sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch_of(rows, width, seed=0, hidden=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (rows, width + 1), generator=g)
    targets = ids[:, 1:].clone()
    targets[:, :hidden] = -100
    return ids[:, :-1].contiguous(), targets


def ragged(batch_size=3):
    lengths = [7, 20, 12, 30, 9, 25, 16, 33, 11, 28, 14, 22] * 3
    ids = [i for n in lengths for i in [49, *(torch.arange(n) * 7 % 49).tolist()]] + [49]
    return TokenDataset(ids, 40, batch_size, document_end=49)


class Counting:
    """A backend that counts graphs made and run; `spoil` is added to what they give."""

    def __init__(self, spoil=0.0):
        self.made, self.ran, self.spoil = 0, 0, spoil

    def __call__(self, graph, inputs):
        self.made += 1

        def run(*args):
            self.ran += 1
            out = graph(*args)
            return tuple(x + self.spoil for x in out) if self.spoil else out

        return run


class OneToken(LossModel):
    def forward(self, input_ids, targets):
        logits = self.model.head(self.model.tok_emb(input_ids))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def loss_and_gradients(make, model, batch, gradients=compute_gradients, precision=None):
    model.zero_grad()
    loss, _ = gradients(make(model).train(), *batch, precision or Precision())
    return [torch.tensor(loss), *(p.grad.clone() for p in model.parameters())]


def check_equal(make, model, batch, *parts, rtol=1e-4, atol=1e-6):
    ours = loss_and_gradients(make, model, batch, *parts)
    theirs = loss_and_gradients(LossModel, model, batch, *parts)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# The same numbers --------------------------------------------------------------------
SHAPES = [(2, 9), (4, 16), (2, 40), (3, 17), (5, 2)]


def test_graph_gives_the_same_loss_and_gradients_for_all_shapes():
    model = tiny()
    loss_model = compiled(backend="aot_eager", dynamic=True)(model)
    for rows, width in SHAPES:
        batch = batch_of(rows, width, hidden=width // 3)
        check_equal(lambda model: loss_model, model, batch)


def test_sizes_of_one():
    model = tiny()
    loss_model = compiled(backend="eager", dynamic=True)(model)
    for rows, width in ((3, 9), (1, 9), (3, 1), (1, 1)):
        check_equal(lambda model: loss_model, model, batch_of(rows, width))


def test_comparison_sees_a_wrong_graph():
    spoilt = compiled(backend=Counting(spoil=1e-3))
    with pytest.raises(AssertionError):
        check_equal(spoilt, tiny(), batch_of(2, 9))
    check_equal(compiled(backend=Counting()), tiny(), batch_of(2, 9))


def test_batch_that_asks_nothing():
    model, (ids, targets) = tiny(), batch_of(2, 9, hidden=9)
    loss = compiled(backend="eager")(model)(ids, targets)
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("precision", [BFloat16, Float16])
@pytest.mark.parametrize("gradients", [compute_gradients, Accumulate(2, trim=False)],
                         ids=["whole", "pieces"])
def test_other_sockets(precision, gradients):
    model = tiny()
    ours, theirs = (loss_and_gradients(make, model, batch_of(4, 12, hidden=2), gradients,
                                       precision("cpu"))
                    for make in (compiled(backend="aot_eager"), LossModel))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6 * b.abs().max().item())


class Balanced(FeedForward):
    """Leaves an auxiliary loss, as a mixture of experts does."""

    aux_loss = None

    def forward(self, x, positions):
        out = super().forward(x, positions)
        self.aux_loss = out.float().pow(2).mean()
        return out


def test_auxiliary_loss_comes_out_with_its_gradient():
    set_seed(0)
    model = GPTModel(GPTConfig(50, 40, 16, 2, 2), mlp=Balanced)
    batch = batch_of(3, 10)
    found = []
    for make in (compiled(backend="aot_eager"), LossModel):
        model.zero_grad()
        both = compute_gradients(make(model).train(), *batch)
        found.append([torch.tensor(both), *(p.grad.clone() for p in model.parameters())])
        assert both[1] > 0 and model.blocks[0].mlp.aux_loss is None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_ten_steps_of_training():
    models = tiny(), tiny()
    makes = LossModel, compiled(backend="eager", dynamic=True)
    losses = [train(model, ragged(), None, TrainConfig(10, 3e-3), loss_model=make,
                    progress=False).column("loss")[1] for model, make in zip(models, makes)]
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-6, atol=0)
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_inductor_gives_the_same_loss_and_gradients():
    if why := why_not_compile("cpu"):
        pytest.skip(why)
    check_equal(compiled(), tiny(), batch_of(3, 16, hidden=2), rtol=2e-4, atol=2e-6)


def test_inductor_draws_its_own_dropout_reproducibly():
    if why := why_not_compile("cpu"):
        pytest.skip(why)
    drop = partial(F.dropout, p=0.5, training=True)
    fused, x = torch.compile(lambda x: drop(x) + 1), torch.ones(1000)

    def draw(f):
        torch.manual_seed(3)
        return f(x)

    assert torch.equal(draw(fused), draw(fused))
    assert not torch.equal(draw(fused), draw(lambda x: drop(x) + 1))
    assert set(draw(fused).tolist()) == {1.0, 3.0}


# Where nothing can be compiled -------------------------------------------------------
@pytest.fixture
def no_compiler():
    from torch._inductor import config

    with config.patch("cpp.cxx", ("no-such-compiler",)):
        yield


def test_without_a_compiler_the_run_goes_on(no_compiler, capsys):
    ours, theirs = tiny(), tiny()
    train(theirs, ragged(), None, TrainConfig(3), progress=False)
    train(ours, ragged(), None, TrainConfig(3), loss_model=compiled(), progress=False)
    said = capsys.readouterr().out
    assert re.fullmatch(r"torch\.compile does not work here, .*InvalidCxxCompiler.*\n", said)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_without_a_compiler_plain_torch_compile_dies(no_compiler):
    loss_model = LossModel(tiny())
    loss_model.compile()
    with pytest.raises(RuntimeError, match="InvalidCxxCompiler|No working C"):
        loss_model(*batch_of(2, 9))


def test_probe_runs_once_a_process(monkeypatch):
    calls, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: calls.append(k) or compile_(*a, **k))
    assert [why_not_compile("cpu", "eager") for _ in range(3)] == [None] * 3
    assert len(calls) == 1


def test_probe_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert why_not_compile("cpu", "aot_eager") is None
    assert torch.equal(before, torch.get_rng_state())


def test_device_that_is_not_there_is_a_reason():
    if torch.cuda.is_available():
        pytest.skip("it is there")
    assert why_not_compile("cuda", "eager")


def test_reason_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        def raises(x):
            raise RuntimeError("first\nsecond")
        return raises

    monkeypatch.setattr(torch, "compile", fail)
    assert why_not_compile("cpu", "some") == "RuntimeError: first"


def test_python_that_dynamo_does_not_know_is_a_reason(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("torch.compile is not supported on Python 4")

    monkeypatch.setattr(torch, "compile", refuse)
    loss_model = compiled()(tiny())
    assert "not supported on Python 4" in capsys.readouterr().out
    assert loss_model(*batch_of(2, 9)).isfinite()


def test_unknown_backend_is_an_error():
    with pytest.raises(RuntimeError, match="nonsense"):
        compiled(backend="nonsense")(tiny())


# Graphs ------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", ["sdpa", "naive_attention"])
def test_the_loss_is_one_graph(kernel):
    use_kernel(model := tiny(), kernel)
    compiled(backend="eager", fullgraph=True)(model)(*batch_of(2, 9))


def test_a_broken_graph_is_seen():
    class Warning(OneToken):
        def forward(self, input_ids, targets):
            loss = super().forward(input_ids, targets)
            return loss if loss.item() < 100 else loss / 2

    with pytest.raises(Exception, match="data-dependent|item|Data-dependent"):
        compiled(Warning, backend="eager", fullgraph=True)(tiny())(*batch_of(2, 9))


@pytest.mark.parametrize("dynamic, graphs", [(True, 1), (None, 2), (False, 8)])
def test_graphs_of_ragged_rows(dynamic, graphs):
    counting = Counting()
    loss_model = compiled(OneToken, backend=counting, dynamic=dynamic)(tiny())
    for width in range(2, 14):
        loss_model(*batch_of(3, width))
    assert counting.made == graphs
    assert counting.ran == (8 if dynamic is False else 12)


@pytest.mark.skipif(not ISOLATED, reason="this PyTorch does not know isolate_recompiles")
@pytest.mark.parametrize("isolated, graphs", [(True, 10), (False, 8)])
def test_each_model_has_its_own_limit(isolated, graphs):
    counting = Counting()
    options = {} if isolated else {"isolate_recompiles": False}
    for i in range(10):
        model = tiny(emb_dim=4 * (i + 1))
        compiled(OneToken, backend=counting, dynamic=False, **options)(model)(*batch_of(2, 9))
    assert counting.made == graphs


def test_validation_compiles_nothing():
    counting, model = Counting(), tiny()
    data = ragged()
    train(model, data, data, TrainConfig(6, validate_every=2), progress=False,
          loss_model=compiled(OneToken, backend=counting, dynamic=True))
    assert (counting.made, counting.ran) == (1, 6)


# Names -------------------------------------------------------------------------------
def test_checkpoints_have_the_models_names_and_resume_without_compiling(tmp_path):
    def run(make, stop=None, resume=False):
        model = tiny()

        def look(run):
            run.stopping = run.step == stop

        train(model, ragged(), None, TrainConfig(6), out=tmp_path, loss_model=make,
              callbacks=(look,), resume=resume, progress=False)
        return model

    run(compiled(OneToken, backend="eager", dynamic=True), stop=3)
    model = run(OneToken, resume=True)
    loaded = load_model(tmp_path / "best_model.safetensors").model
    assert loaded.state_dict().keys() == model.state_dict().keys() == tiny().state_dict().keys()
    assert evaluate_loss(loaded, ragged()) == evaluate_loss(model, ragged())


def test_the_wrapper_has_other_names():
    model = tiny()
    names = torch.compile(model, backend="eager").state_dict().keys()
    assert names != model.state_dict().keys()
    assert all(name.startswith("_orig_mod.") for name in names)
    assert isinstance(compiled(backend="eager")(model), LossModel)


def test_factory_builds_what_it_is_given():
    loss_model = compiled(OneToken, backend="eager")(model := tiny())
    assert type(loss_model) is OneToken and loss_model.model is model
    assert isinstance(loss_model, nn.Module) and loss_model.train().training
