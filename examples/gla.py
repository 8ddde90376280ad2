# Gated linear attention. Yang et al. 2023, arXiv 2312.06635.

import psmc
from psmc.lang import exp, outer, sqrt


@psmc.aggregator(inputs="q[K] k[K] v[V] g[K] in (-inf, 0]", state="a[K] = 1, S[K, V] = 0", associative=True)
class Gla:
    """Gated linear attention: S' = diag(exp g) S + k vᵀ, o = qᵀS / sqrt(K). Yang et al. 2023, arXiv 2312.06635."""

    def lift(x):
        return dict(a=exp(x.g), S=outer(x.k, x.v))

    def combine(l, r):
        return dict(a=l.a * r.a, S=r.a[:, None] * l.S + r.S)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
