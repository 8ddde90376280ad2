# Gated DeltaNet. Yang et al. 2024, arXiv 2412.06464, eq. 10.

import psmc
from psmc.lang import exp, eye, outer, sqrt


@psmc.aggregator(
    inputs="q[K] k[K] v[V] beta in [0, 1], g in (-inf, 0]",
    state="A[K, K] = eye, S[K, V] = 0",
    associative=True,
)
class GatedDeltanet:
    """S' = α (I - β k kᵀ) S + β k vᵀ, α = exp(g), o = qᵀS / sqrt(K). Yang et al. 2024, arXiv 2412.06464."""

    def lift(x):
        return dict(A=exp(x.g) * (eye(x.dims.K) - outer(x.beta * x.k, x.k)), S=outer(x.beta * x.k, x.v))

    def combine(l, r):
        return dict(A=r.A @ l.A, S=r.A @ l.S + r.S)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
