# Gated DeltaNet, as a recurrence: decay, then the delta rule. Yang et al. 2024, arXiv 2412.06464, eq. 10.

import psmc
from psmc.lang import exp, outer, sqrt


@psmc.aggregator(
    inputs="q[K] k[K] v[V] beta in [0, 1], g in (-inf, 0]",
    state="S[K, V] = 0",
    associative=True,
)
class GatedDeltanetRecurrence:
    """S' = α (I - β k kᵀ) S + β k vᵀ, α = exp(g), o = qᵀS / sqrt(K). Yang et al. 2024, arXiv 2412.06464."""

    def recurrence(s, x):
        s.S = exp(x.g) * s.S
        s.S = s.S + outer(x.beta * x.k, x.v - x.k @ s.S)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
