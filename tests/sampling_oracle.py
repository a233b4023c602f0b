"""What a sampler means, in float64 and plain Python."""
import math

import numpy as np


def oracle_kept(logits, temperature=1.0, top_k=None, top_p=None):
    """{id: probability} by definition: temperature, top-k, top-p, the lower id first."""
    x = np.asarray(logits, dtype=np.float64)
    order = sorted((i for i in range(len(x)) if x[i] > -math.inf), key=lambda i: (-x[i], i))
    if temperature == 0:
        return {order[0]: 1.0}
    order = order[: top_k or len(order)]
    with np.errstate(over="ignore"):
        weights = np.exp((x[order] - x[order[0]]) / temperature)
    probs = weights / weights.sum()
    if top_p is not None and top_p < 1:
        n = int((np.cumsum(probs) - probs < top_p).sum())
        order, probs = order[:n], probs[:n] / probs[:n].sum()
    return dict(zip(order, probs))


def oracle_draw(kept, uniform):
    """The token in whose share of [0, 1) the number falls, ids in ascending order."""
    total = 0.0
    for i in sorted(kept):
        total += kept[i]
        if total > uniform:
            return i
    return max(i for i in kept if kept[i] > 0)
