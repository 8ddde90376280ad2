# Kimi delta attention, as a recurrence. Kimi Team 2025, arXiv 2510.26692, eq. 1.

import psmc
from psmc.lang import exp, outer, sqrt


@psmc.aggregator(
    inputs="q[K] k[K] v[V] beta in [0, 1], g[K] in (-inf, 0]",
    state="S[K, V] = 0",
    associative=True,
)
class KdaRecurrence:
    """S' = (I - β k kᵀ) diag(exp g) S + β k vᵀ, o = qᵀS / sqrt(K). Kimi Team 2025, arXiv 2510.26692."""

    def recurrence(s, x):
        s.S = exp(x.g)[:, None] * s.S
        s.S = s.S + outer(x.beta * x.k, x.v - x.k @ s.S)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
