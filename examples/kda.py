# Kimi delta attention. Kimi Team 2025, arXiv 2510.26692, eq. 1: a decay per channel, then the delta rule.

import psmc
from psmc.lang import exp, eye, outer, sqrt


@psmc.aggregator(
    inputs="q[K] k[K] v[V] beta in [0, 1], g[K] in (-inf, 0]",
    state="A[K, K] = eye, S[K, V] = 0",
    associative=True,
)
class Kda:
    """S' = (I - β k kᵀ) diag(exp g) S + β k vᵀ, o = qᵀS / sqrt(K). Kimi Team 2025, arXiv 2510.26692."""

    def lift(x):
        return dict(A=(eye(x.dims.K) - outer(x.beta * x.k, x.k)) * exp(x.g), S=outer(x.beta * x.k, x.v))

    def combine(l, r):
        return dict(A=r.A @ l.A, S=r.A @ l.S + r.S)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
