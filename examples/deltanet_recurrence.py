# DeltaNet, as a recurrence: write v where k reads. Yang et al. 2024, arXiv 2406.06484.

import psmc
from psmc.lang import outer, sqrt


@psmc.aggregator(inputs="q[K] k[K] v[V] beta in [0, 1]", state="S[K, V] = 0", associative=True)
class DeltanetRecurrence:
    """Delta rule: S' = (I - β k kᵀ) S + β k vᵀ, o = qᵀS / sqrt(K). Yang et al. 2024, arXiv 2406.06484."""

    def recurrence(s, x):
        return dict(S=s.S + outer(x.beta * x.k, x.v - x.k @ s.S))

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
