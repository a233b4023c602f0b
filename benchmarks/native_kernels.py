"""One row times a matrix: PyTorch's kernels and the native ones, as a share of the bandwidth.

    python benchmarks/native_kernels.py           # about two minutes on one core
    python benchmarks/native_kernels.py --quick   # two shapes, writes nothing

For each shape there are so many copies of the matrix that none is in a cache when its turn
comes. The kernels take turns over all copies; a figure is the fastest of the turns. Shares are
of the bandwidth that gptbook.roofline measures in the same run.
"""
import argparse
import functools
from time import perf_counter

import torch
import torch.nn.functional as F
from results_file import record
from tqdm import tqdm

from gptbook.native import Weight, bind
from gptbook.quantization import pack_int4, quantize_groups, quantize_rows
from gptbook.roofline import bandwidth

SHAPES = [(384, 1152), (384, 1536), (1536, 384), (384, 4096),
          (768, 2304), (768, 3072), (3072, 768), (768, 50257)]  # (K, N)


def forms(w):
    """{name: how the weights lie}"""
    q, scale = quantize_rows(w)
    fours, scales = quantize_groups(w)
    return {"native, 32 bits": Weight(0, w), "native, 16 bits": Weight(1, w.bfloat16()),
            "native, 8 bits": Weight(2, q, scale.flatten()),
            "native, 4 bits": Weight(3, pack_int4(fours), scales, group=32)}


def native_calls(w, x, threads):
    """Calls that are bound beforehand, as the decoder makes them."""
    y, (N, K) = torch.empty(len(x), len(w)), w.shape
    return {name: bind("linear", x, f.data, f.scale, None, None, None, y, len(x), K, N, N,
                       f.form, f.group, 0, threads) for name, f in forms(w).items()}


def torch_calls(w, x):
    """PyTorch's own, private ones as far as this build has them."""
    half, x_half = w.bfloat16(), x.bfloat16()
    q, scale = quantize_rows(w)
    x_q = x.mul(31).round().to(torch.int8)
    calls = {"F.linear, 32 bits": functools.partial(F.linear, x, w),
             "F.linear, 16 bits": functools.partial(F.linear, x_half, half)}
    tries = {
        "oneDNN sorted, 32 bits": lambda: functools.partial(
            torch.ops.mkldnn._linear_pointwise, x,
            torch.ops.mkldnn._reorder_linear_weight(w, 1), None, "none", [], ""),
        "oneDNN sorted, 16 bits": lambda: functools.partial(
            torch.ops.mkldnn._linear_pointwise, x_half,
            torch.ops.mkldnn._reorder_linear_weight(half, 1), None, "none", [], ""),
        "_int_mm, 8 bits": lambda: functools.partial(torch._int_mm, x_q, q.T),
        "FBGEMM, 8 bits": lambda: functools.partial(
            torch.ops.quantized.linear_dynamic, x, torch.ops.quantized.linear_prepack(
                torch._make_per_channel_quantized_tensor(
                    q, scale.flatten().double(), torch.zeros(len(q), dtype=torch.long), 0),
                None), False),
    }
    for name, make in tries.items():
        try:
            calls[name] = make()
            calls[name]()
        except (AttributeError, RuntimeError):
            calls.pop(name, None)
    return calls


def fastest(kernels: dict, rounds: int) -> dict:
    """{name: microseconds a product}, the kernels in turn over all copies."""
    best = dict.fromkeys(kernels, float("inf"))
    for _ in range(rounds):
        for name, calls in kernels.items():
            start = perf_counter()
            for call in calls:
                call()
            best[name] = min(best[name], 1e6 * (perf_counter() - start) / len(calls))
    return best


def measure(K, N, rows, threads, rounds, with_torch=True):
    x = torch.randn(rows, K)
    copies = [0.02 * torch.randn(N, K) for _ in range(max(1, int(96e6 / (4 * K * N))))]
    kernels = {}
    for w in copies:
        found = {**(torch_calls(w, x) if with_torch else {}), **native_calls(w, x, threads)}
        for name, call in found.items():
            kernels.setdefault(name, []).append(call)
    return fastest({n: c for n, c in kernels.items() if len(c) == len(copies)}, rounds)


BYTES = {"32 bits": 4, "16 bits": 2, "8 bits": 1, "4 bits": 0.625}  # a scale for 32 columns


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, not stored")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    shapes, rounds = (SHAPES[:2], 2) if options.quick else (SHAPES, options.rounds)
    shares, eight, speeds = {}, {}, {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        speeds[threads] = bandwidth()
        table = shares.setdefault(str(threads), {})
        for K, N in tqdm(shapes, desc=f"{threads} threads"):
            for name, us in measure(K, N, 1, threads, rounds).items():
                size = K * N * BYTES[name.split(", ")[1]]
                table.setdefault(name, {})[f"{K} to {N}"] = round(
                    1e6 * size / us / speeds[threads], 3)
            if threads == 1:
                one = measure(K, N, 1, 1, rounds, with_torch=False)
                many = measure(K, N, 8, 1, rounds, with_torch=False)
                for name in one:
                    eight.setdefault(name.split(", ")[1], []).append(many[name] / one[name])
    gains = {"torch": [], "native": []}
    for shape in shares["1"]["F.linear, 32 bits"]:
        seconds = {n: BYTES[n.split(", ")[1]] / row[shape] for n, row in shares["1"].items()}
        full = seconds["F.linear, 32 bits"]
        best = min((s for n, s in seconds.items() if n in ("FBGEMM, 8 bits", "_int_mm, 8 bits")),
                   default=full)
        gains["torch"].append(full / best)
        gains["native"].append(full / seconds["native, 8 bits"])
    middle = lambda values: round(sorted(values)[len(values) // 2], 2)
    figures = {
        "share_of_bandwidth": shares,
        "bandwidth_GBs": {str(t): round(s / 1e9, 1) for t, s in speeds.items()},
        "gain_8_bits": {name: middle(values) for name, values in gains.items()},
        "batch_8_costs": {name: middle(values) for name, values in eight.items()},
    }
    print(figures)
    if not options.quick:
        print(record("native_kernels", figures))


if __name__ == "__main__":
    main()
