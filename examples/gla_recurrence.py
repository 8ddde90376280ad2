# Gated linear attention, as a recurrence. Yang et al. 2023, arXiv 2312.06635.

import psmc
from psmc.lang import exp, outer, sqrt


@psmc.aggregator(inputs="q[K] k[K] v[V] g[K] in (-inf, 0]", state="S[K, V] = 0", associative=True)
class GlaRecurrence:
    """Gated linear attention: S' = diag(exp g) S + k vᵀ, o = qᵀS / sqrt(K). Yang et al. 2023, arXiv 2312.06635."""

    def recurrence(s, x):
        return dict(S=exp(x.g)[:, None] * s.S + outer(x.k, x.v))

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
