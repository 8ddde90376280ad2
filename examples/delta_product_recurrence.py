# DeltaProduct with two steps a token, as a recurrence of micro-steps. Siems et al. 2025, arXiv 2502.10297, eq. 4.

import psmc
from psmc.lang import outer, sqrt


@psmc.aggregator(
    dims="K V R=2",
    inputs="q[K] k[R, K] v[R, V] beta[R] in [0, 2]",
    state="S[K, V] = 0",
    associative=True,
)
class DeltaProductRecurrence:
    """R delta rules a token, one after the other, o = qᵀS / sqrt(K). Siems et al. 2025, arXiv 2502.10297."""

    def recurrence(s, x):
        for t in x.dims.R:
            s.S = s.S + outer(x.beta[t] * x.k[t], x.v[t] - x.k[t] @ s.S)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
