"""What a sampler means, in float64, by sorting everything."""
import math

import numpy as np


def oracle_kept(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None):
    """{id: probability} by definition: temperature, top-k, top-p, min-p, typical; of equal
    ones the lower id first."""
    x = np.asarray(logits, dtype=np.float64)
    order = np.argsort(-x, kind="stable")
    order = order[x[order] > -math.inf]
    if temperature == 0:
        return {int(order[0]): 1.0}
    order = order[: top_k or len(order)]
    with np.errstate(over="ignore"):
        distance = (x[order[0]] - x[order]) / temperature
    weights = np.exp(-distance)
    if top_p is not None and top_p < 1:
        probs = weights / weights.sum()
        n = int((np.cumsum(probs) - probs < top_p).sum())
        order, weights, distance = order[:n], weights[:n], distance[:n]
    if min_p is not None:
        n = int((weights >= min_p).sum())
        order, weights, distance = order[:n], weights[:n], distance[:n]
    if typical_p is not None and typical_p < 1:
        probs = weights / weights.sum()
        surprise = distance - (probs * np.where(probs > 0, distance, 0)).sum()
        nearest = np.lexsort((order, np.abs(surprise)))
        nearest = nearest[probs[nearest] > 0]
        ahead = np.cumsum(probs[nearest]) - probs[nearest]
        nearest = nearest[ahead < typical_p]
        order, weights = order[nearest], weights[nearest]
    return dict(zip(order.tolist(), (weights / weights.sum()).tolist()))


def oracle_draw(kept, uniform):
    """The token in whose share of [0, 1) the number falls, ids in ascending order."""
    total = 0.0
    for i in sorted(kept):
        total += kept[i]
        if total > uniform:
            return i
    return max(i for i in kept if kept[i] > 0)
