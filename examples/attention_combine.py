# Softmax attention as a rule that merges two chunks of tokens: the later chunk's tokens attend to both chunks' tokens.
# A one-layer, one-head aggregator of Transformer-PSM: Yau et al. 2025, arXiv 2506.10918, section 3.

import psmc
from psmc.lang import exp, let, maximum, sqrt


@psmc.aggregator(
    dims="N D",
    inputs="x[N, D]",
    params="query[D, D] key[D, D] value[D, D]",
    state="h[N, D] = 0",
    associative=False,
    order="tree",
)
class AttentionCombine:
    """The later chunk's tokens attend to both chunks' tokens; a prefix is what N tokens keep of all chunks before.
    Yau et al. 2025, arXiv 2506.10918."""

    def lift(x):
        return dict(h=x.x)

    def combine(l, r, p):
        q = let("q", r.h @ p.query)
        far = let("far", q @ (l.h @ p.key).T / sqrt(l.dims.D))
        near = let("near", q @ (r.h @ p.key).T / sqrt(l.dims.D))
        left = let("left", l.h @ p.value)
        right = let("right", r.h @ p.value)
        top = let("top", maximum(far.max(-1), near.max(-1)))
        total = let("total", exp(far - top[:, None]).sum(-1) + exp(near - top[:, None]).sum(-1))
        mixed = let("mixed", exp(far - top[:, None]) @ left + exp(near - top[:, None]) @ right)
        return dict(h=r.h + mixed / total[:, None])

    def output(s, x):
        return dict(o=s.h)
