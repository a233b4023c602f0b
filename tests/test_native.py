"""The native kernels: values against PyTorch in float64, bits against themselves."""

import ctypes
import os
import stat

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptbook import native
from gptbook.architecture import Rotary
from gptbook.core import GPTConfig, Positions
from gptbook.native import (
    SOURCE, Weight, bind, compile_library, library, native_linear, weight_of,
)
from gptbook.quantization import (
    Int4Linear, Int8Linear, dequantize_groups, pack_int4, quantize_groups, quantize_rows,
)

needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler here")


def forms(w):
    """{name: (as the kernels read it, the float64 weights that it means)}"""
    q, scale = quantize_rows(w)
    found = {"32": (Weight(0, w), w), "16": (Weight(1, w.bfloat16()), w.bfloat16()),
             "8": (Weight(2, q, scale.flatten()), q * scale)}
    if w.shape[1] % 32 == 0:
        fours, scales = quantize_groups(w)
        found["4"] = (Weight(3, pack_int4(fours), scales, group=32),
                      dequantize_groups(fours, scales))
    return {name: (weight, means.double()) for name, (weight, means) in found.items()}


def assert_product(got, x, means, bias=None):
    exact = F.linear(x.double(), means, bias)
    # a float32 sum of K products: some units in the last place of the sum of magnitudes
    bound = 4e-7 * F.linear(x.double().abs(), means.abs()) * max(1, x.shape[1] / 64) ** 0.5
    assert ((got - exact).abs() <= bound + 1e-6).all()


@needs_compiler
@pytest.mark.parametrize("K", [1, 7, 16, 31, 32, 64, 100, 384, 1056])
@pytest.mark.parametrize("N", [1, 3, 4, 9, 64])
@pytest.mark.parametrize("M", [1, 2, 4, 7, 8, 33])
def test_products_equal_float64(K, N, M):
    torch.manual_seed(0)
    x, w = torch.randn(M, K), torch.randn(N, K)
    for weight, means in forms(w).values():
        assert_product(native_linear(x, weight), x, means)


@needs_compiler
def test_the_bound_sees_a_wrong_product():
    x, w = torch.randn(3, 64), torch.randn(5, 64)
    wrong = w.clone()
    wrong[0, 0] += 1e-2
    with pytest.raises(AssertionError):
        assert_product(native_linear(x, Weight(0, wrong)), x, w.double())


@needs_compiler
@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx512f", "-mno-avx2", "-mno-fma")])
def test_processors_with_less_agree(monkeypatch, flags):
    if os.uname().machine != "x86_64":
        pytest.skip("these flags are for x86-64")
    other = ctypes.CDLL(str(compile_library(SOURCE, flags)))
    monkeypatch.setattr(native, "library", lambda: other)
    for K, N, M in [(64, 64, 1), (96, 7, 5), (50, 9, 4)]:
        x, w = torch.randn(M, K), torch.randn(N, K)
        for weight, means in forms(w).values():
            assert_product(native_linear(x, weight), x, means)


@needs_compiler
@pytest.mark.parametrize("form", ["32", "16", "8", "4"])
def test_a_row_is_its_own_bit_for_bit(form):
    x, w = torch.randn(33, 192), torch.randn(50, 192)
    weight = forms(w)[form][0]
    full = native_linear(x, weight)
    for M in (1, 2, 3, 4, 5, 8, 16, 32):
        for first in (0, 1, 33 - M):
            assert torch.equal(native_linear(x[first:first + M], weight), full[first:first + M])
    assert torch.equal(native_linear(x, weight, threads=2), full), "threads change a sum"


@needs_compiler
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_what_follows_a_product(activation):
    K, N, M, width = 64, 23, 6, 40
    x, w, bias = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    times, add, y = torch.randn(3, M, width)
    act = {None: lambda z: z, "silu": F.silu, "gelu": lambda z: F.gelu(z, approximate="tanh")}
    want = act[activation](F.linear(x, w, bias)) * times[:, :N] + add[:, :N]
    beyond = y[:, N:].clone()
    bind("linear", x, w, None, bias, times, add, y, M, K, N, width, 0, 0,
         native.ACTIVATIONS[activation], 1)()
    torch.testing.assert_close(y[:, :N], want, atol=1e-4, rtol=1e-5)
    assert torch.equal(y[:, N:], beyond), "it writes past its columns"
    bind("linear", x, w, None, bias, times, add, add, M, K, N, width, 0, 0,
         native.ACTIVATIONS[activation], 1)()
    assert torch.equal(add[:, :N], y[:, :N]), "y may be what is added"


@needs_compiler
def test_activations_of_extreme_numbers():
    x = torch.tensor([[-1e30, -200, -88, -30, -1, -1e-8, 0, 1e-8, 1, 30, 88, 200, 1e30]])
    eye = torch.eye(x.shape[1])
    for name, act in (("silu", F.silu), ("gelu", lambda z: F.gelu(z, approximate="tanh"))):
        for i in range(x.shape[1]):
            one = native_linear(x[:, i:i + 1], Weight(0, eye[:1, :1].contiguous()), name)
            torch.testing.assert_close(one, act(x[:, i:i + 1]), atol=1e-6, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("C", [1, 8, 33, 768])
def test_norms(C):
    x, weight, bias, y = torch.randn(5, C) * 3 + 100, torch.randn(C), torch.randn(C), torch.empty(5, C)
    bind("normalise", x, weight, bias, y, 5, C, 1e-5, 1)()
    exact = F.layer_norm(x.double(), (C,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(y, exact.float(), atol=1e-4, rtol=1e-4)
    bind("normalise", x, weight, None, y, 5, C, 1e-6, 0)()
    exact = F.rms_norm(x.double(), (C,), weight.double(), 1e-6)
    torch.testing.assert_close(y, exact.float(), atol=1e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations(interleaved):
    config = GPTConfig(9, 8, 64, 1, 4)
    rotary = Rotary(config, interleaved=interleaved)
    where = Positions(torch.tensor([[3, 0, 77, 5]]))
    x = torch.randn(4, 4 * 16 + 10)
    want = rotary(x[:, :64].view(1, 4, 4, 16).transpose(1, 2), where).transpose(1, 2)
    angle = rotary.angles(where)[0, 0]
    bind("rotate", x, angle.cos(), angle.sin(), 4, 4, 16, x.stride(0), int(interleaved))()
    torch.testing.assert_close(x[:, :64].reshape(1, 4, 4, 16), want, atol=1e-6, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("H, K, D", [(1, 1, 8), (4, 2, 16), (6, 2, 48), (8, 1, 64), (3, 3, 20)])
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_attention_over_unequal_rows(H, K, D, size):
    rows, S = 4, 37
    q, keys, values = torch.randn(rows, H, D) * size, *torch.randn(2, rows, K, S, D)
    row, count = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 5, 16, 37])
    values[2, :, 1:] = float("nan")  # never to be looked at
    keys[2, :, 1:] = float("nan")
    seen = (torch.arange(S) < count[:, None])[:, None, None]
    out = torch.empty(rows, H * D)
    bind("attend", q, keys, values, row, count, out, rows, H, H // K, S, D, H * D, D**-0.5, 1)()
    clean = [y.nan_to_num()[row].double() for y in (keys, values)]
    want = F.scaled_dot_product_attention(
        q[:, :, None].double(), *clean, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(out, want.float().flatten(1), atol=1e-5, rtol=1e-4)
    two = torch.empty_like(out)
    bind("attend", q, keys, values, row, count, two, rows, H, H // K, S, D, H * D, D**-0.5, 2)()
    assert torch.equal(out, two), "threads change a sum"


@needs_compiler
def test_store_writes_its_slots_and_no_others():
    keys, values = torch.zeros(2, 3, 2, 5, 4)
    k, v = torch.randn(2, 4, 8)
    row, slot = torch.tensor([0, 2, 2, 1]), torch.tensor([4, 0, 1, 3])
    bind("store", k, v, keys, values, row, slot, 4, 2, 5, 4, 8)()
    for y, held in ((k, keys), (v, values)):
        want = torch.zeros_like(held)
        want[row, :, slot] = y.view(4, 2, 4)
        assert torch.equal(held, want)


# What is read of a linear ------------------------------------------------------------
def test_weights_that_can_be_read():
    linear = nn.Linear(64, 5)
    q, scale = quantize_rows(linear.weight)
    fours, scales = quantize_groups(linear.weight)
    assert weight_of(linear).form == 0
    assert weight_of(linear.bfloat16()).form == 1
    assert weight_of(Int8Linear(q, scale, None)).form == 2
    four = weight_of(Int4Linear(pack_int4(fours), scales, None, 64, 32))
    assert (four.form, four.sizes) == (3, (5, 64))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_weights_that_cannot_be_read():
    w = torch.randn(5, 40)
    q, scale = quantize_rows(w)
    fours, scales = quantize_groups(w)  # 40 is no multiple of 32
    strided = nn.Linear(4, 4)
    strided.weight = nn.Parameter(torch.randn(4, 8)[:, ::2])
    for linear in (Doubled(4, 4), nn.Identity(), Int8Linear(q, scale, None, dynamic=True),
                   Int4Linear(pack_int4(fours), scales, None, 40, 32), nn.Linear(4, 4).double(),
                   strided, nn.Linear(4, 4, device="meta")):
        assert weight_of(linear) is None, linear


@needs_compiler
@pytest.mark.parametrize("x", [
    torch.randn(3, 5), torch.randn(4), torch.randn(2, 4).double(), torch.randn(1, 2, 4),
])
def test_inputs_that_do_not_fit_are_refused(x):
    with pytest.raises(ValueError, match="expected"):
        native_linear(x, Weight(0, torch.randn(2, 4)))


@needs_compiler
def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="gelu"):
        native_linear(torch.randn(1, 4), Weight(0, torch.randn(2, 4)), "relu")


@needs_compiler
def test_inputs_with_gaps_are_made_whole():
    x, w = torch.randn(6, 8)[::2, ::2], torch.randn(3, 4)
    torch.testing.assert_close(native_linear(x, Weight(0, w)), F.linear(x, w))
    assert native_linear(torch.randn(0, 4), Weight(0, w)).shape == (0, 3)


# The compiler ------------------------------------------------------------------------
@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    yield tmp_path / "gptbook" / "native"
    library.cache_clear()


def test_without_a_compiler_one_line_says_so(own_cache, monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert library() is None and library() is None
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == "", "texts go to stdout, remarks do not"


def test_it_can_be_switched_off(own_cache, monkeypatch, capsys):
    monkeypatch.setenv("GPTBOOK_NATIVE", "0")
    assert library() is None and capsys.readouterr() == ("", "")


@needs_compiler
def test_what_was_compiled_is_found_again(own_cache):
    path = compile_library("int one(void) { return 1; }")
    before = path.stat()
    assert compile_library("int one(void) { return 1; }").stat().st_ino == before.st_ino
    assert compile_library("int one(void) { return 2; }") != path
    assert [p.suffix for p in own_cache.iterdir()] == [".so", ".so"], "something was left behind"


@needs_compiler
def test_a_failing_compiler_says_why(own_cache):
    with pytest.raises(OSError, match="error"):
        compile_library("this is no C")
    assert list(own_cache.iterdir()) == []


@needs_compiler
def test_a_common_folder_that_a_group_can_write_is_no_hindrance(own_cache):
    """Where the usual mask is 002, other caches of the book lie in such a folder."""
    own_cache.parent.mkdir()
    own_cache.parent.chmod(0o775)
    assert compile_library("int one(void) { return 1; }").parent == own_cache
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700


@needs_compiler
def test_a_folder_that_others_can_write_is_refused(own_cache):
    own_cache.mkdir(parents=True)
    own_cache.chmod(0o777)
    with pytest.raises(PermissionError, match="others"):
        compile_library("int one(void) { return 1; }")
