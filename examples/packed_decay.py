# Gated linear attention over packed documents: a flag starts a new one. Yang et al. 2023, arXiv 2312.06635;
# segments within a scan, Blelloch 1990, CMU-CS-90-190, §1.5.

import psmc
from psmc.lang import exp, outer, sqrt, where


@psmc.aggregator(
    inputs="q[K], k[K], v[V], g[K] in (-inf, 0], first : int in [0, 1]",
    state="a[K] in [0, 1] = 1, S[K, V] = 0",
    associative=True,
)
class PackedDecay:
    """A decay of 0 forgets the document before. Yang et al. 2023, arXiv 2312.06635; Blelloch 1990."""

    def lift(x):
        return dict(a=where(x.first > 0, 0, exp(x.g)), S=outer(x.k, x.v))

    def combine(l, r):
        return dict(a=l.a * r.a, S=r.a[:, None] * l.S + r.S)

    def output(s, x):
        return dict(o=x.q @ s.S / sqrt(x.dims.K))
