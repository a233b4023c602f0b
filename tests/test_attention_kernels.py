"""Attention kernels: which one PyTorch runs, flex_attention and Triton, against the formula."""

import ast
import os
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from attention_examples import All, Documents, by_distance, example, padded, with_gradients
from outside_parts import SlidingWindow

from gptbook import attention_kernels
from gptbook.attention_kernels import (
    flex, flex_blocks, sdpa_backend, triton_attention, triton_forward)
from gptbook.core import Causal, Positions, naive_attention, sdpa
from gptbook.flash import FlashAttention, Tiles

TRITON_TRIED = "3.9."  # the interpreter of 3.6 failed where the kernel was right on a GPU


# The kernels of PyTorch --------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(7), Documents(10)], ids=str)
@pytest.mark.parametrize("sizes", [dict(), dict(Tq=13, Tk=41), dict(K=4, Tq=1, Tk=9)], ids=str)
def test_flex_is_the_formula(mask, sizes):
    qkv, where = example(**sizes, dtype=torch.float32)
    qkv = [y.detach() for y in qkv]
    out = flex(*qkv, **where, mask=mask)
    assert_close(out, naive_attention(*qkv, **where, mask=mask), atol=1e-5, rtol=1e-5)
    other = naive_attention(*qkv, **where, mask=SlidingWindow(1))
    assert sizes.get("Tq") == 1 and mask != Causal() or not torch.allclose(out, other, atol=1e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_hides_padding():
    qkv, _ = example(2, 2, 2, 12, 12, dtype=torch.float32)
    qkv = [y.detach() for y in qkv]
    out = flex(*qkv, **padded(), mask=Causal())
    assert_close(out, naive_attention(*qkv, **padded(), mask=Causal()), atol=1e-5, rtol=1e-5)
    assert out[0, :, :4].eq(0).all()


@pytest.mark.parametrize("more", [dict(bias=by_distance), dict(dropout=0.1)],
                         ids=["bias", "dropout"])
def test_flex_refuses_what_it_cannot_do(more):
    qkv, where = example()
    with pytest.raises(ValueError, match="flex takes a mask"):
        flex(*qkv, **where, mask=Causal(), **more)


def test_flex_refuses_sizes_that_disagree():
    (q, k, v), where = example(Tq=5, Tk=9)
    for name in where:
        more = {**where, name: Positions(torch.arange(20)[None], True)}
        with pytest.raises(ValueError, match="20 positions"):  # it would use the first of them
            flex(q, k, v, **more, mask=Causal())
    with pytest.raises(ValueError, match="belong together"):
        flex(q, k, v[:, :, :3], **where, mask=Causal())


@pytest.mark.parametrize("sizes", [dict(Tq=0, Tk=0), dict(Tq=0, Tk=5), dict(B=0)], ids=str)
def test_flex_takes_empty_inputs(sizes):
    qkv, where = example(**sizes)
    out = flex(*qkv, **where, mask=Causal())
    assert_close(out, naive_attention(*qkv, **where, mask=Causal()))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float64, 1e-6)])
def test_flex_in_other_dtypes(dtype, tolerance):
    qkv, where = example(dtype=dtype)
    out = flex(*(y.detach() for y in qkv), **where, mask=SlidingWindow(7))
    right = naive_attention(*(y.detach().double() for y in qkv), **where, mask=SlidingWindow(7))
    assert out.dtype == dtype and (out - right).abs().max() < tolerance


def test_flex_blocks_hide_what_the_mask_hides():
    _, where = example(Tq=300, Tk=500)
    for mask in (Causal(), SlidingWindow(40), Documents(128)):
        seen = mask(where["q_pos"].index[0][:, None], where["k_pos"].index[0][None, :])
        seen = F.pad(seen, (0, 12, 0, 84)).unflatten(1, (4, 128)).unflatten(0, (3, 128))
        blocks = flex_blocks(1, **where, mask=mask).to_dense()[0, 0]
        assert torch.equal(blocks.bool(), seen.any(3).any(1))


def test_sdpa_backend_tells_the_kernels_apart():
    qkv, where = example(dtype=torch.float32)
    call = partial(sdpa, *(y.detach() for y in qkv), **where, mask=Causal())
    assert sdpa_backend(call) == "flash"
    with sdpa_kernel(SDPBackend.MATH):
        assert sdpa_backend(call) == "math"
    assert sdpa_backend(partial(call, dropout=0.1)) == "math"


def test_sdpa_backend_wants_an_attention():
    for call in (lambda: None, lambda: torch.ones(2) + 1):
        with pytest.raises(ValueError, match="no attention"):
            sdpa_backend(call)
    scores = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    assert sdpa_backend(lambda: F.scaled_dot_product_attention(scores, scores, scores)) == "flash"


def test_sdpa_backend_calls_once():
    calls = []
    x = torch.ones(1, 1, 2, 2)
    sdpa_backend(lambda: calls.append(F.scaled_dot_product_attention(x, x, x)))
    assert len(calls) == 1 and torch.equal(calls[0], x)


# Triton ------------------------------------------------------------------------------
@pytest.mark.parametrize("more, match", [
    (dict(mask=SlidingWindow(7)), "triangle"), (dict(bias=by_distance), "triangle"),
    (dict(dropout=0.1), "triangle"), (dict(q_pos=Positions(torch.arange(37)[None])), "triangle")])
def test_triton_attention_refuses_what_it_does_not_know(more, match):
    qkv, where = example(dtype=torch.float32)
    with pytest.raises(ValueError, match=match):
        triton_attention(*qkv, **{**where, "mask": Causal(), **more})


@pytest.mark.parametrize("sizes", [dict(dtype=torch.float64), dict(D=129)], ids=str)
def test_triton_attention_refuses_other_heads(sizes):
    qkv, where = example(**{"dtype": torch.float32, **sizes})
    with pytest.raises(ValueError, match="heads of up to 128"):
        triton_attention(*qkv, **where, mask=Causal())


def test_triton_refuses_tensors_that_do_not_belong_together():
    (q, k, v), where = example(dtype=torch.float32)
    for change in ((q, k, v[:, :, :9]), (q, k, v[:, :1]), (q, k[:1], v[:1]), (q, k, v[..., :4]),
                   (q[:, :3], k, v), (q, k[:, :0], v[:, :0])):
        with pytest.raises(ValueError, match="belong together"):
            triton_forward(*change)  # before it reads any memory
    with pytest.raises(ValueError, match="belong together"):
        triton_attention(q, k, v[:, :, :9], **where, mask=Causal())


def in_a_process(code, **env):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **env},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


INTERPRETED = """
import torch
from gptbook.core import Causal, Positions, naive_attention
from gptbook.attention_kernels import triton_attention, triton_forward
torch.set_num_threads(1)
torch.manual_seed(0)
for H, K, Tq, Tk, D, dtype, tolerance in [
        (2, 2, 70, 70, 16, torch.float32, 1e-5), (4, 2, 33, 70, 24, torch.float32, 1e-5),
        (2, 1, 1, 40, 64, torch.float32, 1e-5), (2, 1, 140, 140, 32, torch.float16, 4e-3)]:
    q, k, v = (torch.randn(2, n, T, D, dtype=dtype, requires_grad=True)
               for n, T in ((H, Tq), (K, Tk), (K, Tk)))
    where = dict(q_pos=Positions(torch.arange(Tk - Tq, Tk)[None], True),
                 k_pos=Positions(torch.arange(Tk)[None], True), mask=Causal())
    exact = [y.detach().double().requires_grad_() for y in (q, k, v)]
    out, right = triton_attention(q, k, v, **where), naive_attention(*exact, **where)
    up = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), up)
    wanted = torch.autograd.grad(right, exact, up.double())
    assert (out - right).abs().max() < tolerance, (H, Tq, (out - right).abs().max())
    for a, b in zip(grads, wanted):
        assert (a - b).abs().max() < tolerance * b.abs().max(), (H, Tq)
    full, lse = triton_forward(q, k, v, causal=False)
    kv = [y.repeat_interleave(H // K, 1) for y in exact[1:]]
    scores = exact[0] @ kv[0].mT / D**0.5
    assert (full - scores.softmax(-1) @ kv[1]).abs().max() < tolerance
    assert (lse - scores.logsumexp(-1, keepdim=True)).abs().max() < 10 * tolerance
    assert (full - right).abs().max() > 10 * tolerance or Tq == 1  # and it can fail
    mixed = triton_forward(q, k.to(torch.float16), v.to(torch.float16), causal=False)[0]
    assert mixed.dtype == dtype and (mixed - full).abs().max() < 2e-2
none = triton_forward(q[:, :, :0], k, v)[0]
assert none.shape == (2, 2, 0, 32)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gptbook.attention_kernels import triton_kernel
kernel = triton_kernel()
types = ["*bf16"] * 4 + ["*fp32"] + ["i32"] * 4 + ["fp32"] + ["constexpr"] * 5
fixed = dict(DIM=48, WIDTH=64, ROWS=128, COLUMNS=64, CAUSAL=True)
made = triton.compile(
    ASTSource(fn=kernel, signature=dict(zip(kernel.arg_names, types)), constexprs=fixed),
    target=GPUTarget("cuda", 90, 32))
assert "wgmma" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"]
"""


def test_triton_is_imported_by_one_function_only():
    tree = ast.parse(Path(attention_kernels.__file__).read_text())
    imports = {node.name: ast.unparse(node) for node in tree.body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))
               and "import triton" in ast.unparse(node)}
    outside = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert list(imports) == ["triton_kernel"]
    assert not any("triton" in ast.unparse(node) for node in outside)


def triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


@pytest.mark.skipif(not triton_version().startswith(TRITON_TRIED),
                    reason=f"tried with triton {TRITON_TRIED}*, here is {triton_version()}")
def test_triton_kernel_in_the_interpreter():
    in_a_process(INTERPRETED, TRITON_INTERPRET="1")


def test_triton_kernel_compiles_for_tensor_cores(tmp_path):
    pytest.importorskip("triton")
    in_a_process(COMPILED, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("H, K, Tq, Tk, D", [
    (4, 4, 128, 128, 64), (4, 2, 97, 97, 16), (2, 1, 33, 161, 80), (2, 2, 1, 50, 128)])
@pytest.mark.parametrize("causal", [True, False])
def test_triton_kernel_on_a_gpu(dtype, tolerance, H, K, Tq, Tk, D, causal):
    qkv, where = example(2, H, K, Tq, Tk, D, torch.float32)
    qkv = [y.detach().to("cuda", dtype).requires_grad_() for y in qkv]
    where = {name: y._replace(index=y.index.cuda()) for name, y in where.items()}
    mask = Causal() if causal else All()
    exact = [y.detach().double().requires_grad_() for y in qkv]
    ours = with_gradients(lambda *qkv, **where: FlashAttention.apply(
        *qkv, Tiles(**where), lambda q, k, v, tiles: triton_forward(q, k, v, causal)),
        qkv, **where, mask=mask)
    right = with_gradients(naive_attention, exact, **where, mask=mask)
    for a, b in zip(ours, right):
        assert (a - b).abs().max() < tolerance * max(1, b.abs().max())
