# DeltaNet. Yang et al. 2024, arXiv 2406.06484. The dense A is what the algebra says; no kernel ever forms it.

import psmc
from psmc.lang import eye, outer, sqrt


@psmc.aggregator(inputs="q[K] k[K] v[V] beta in [0, 1]", state="A[K, K] = eye, S[K, V] = 0", associative=True)
class Deltanet:
    """Delta rule: S' = (I - β k kᵀ) S + β k vᵀ, o = qᵀS / sqrt(K). Yang et al. 2024, arXiv 2406.06484."""

    def lift(x):
        return dict(A=eye(x.dims.K) - outer(x.beta * x.k, x.k), S=outer(x.beta * x.k, x.v))

    def combine(l, r):
        return dict(A=r.A @ l.A, S=r.A @ l.S + r.S)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
