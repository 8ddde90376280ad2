# Retention, as a recurrence. Sun et al. 2023, arXiv 2307.08621.

import psmc
from psmc.lang import outer, sqrt


@psmc.aggregator(inputs="q[K] k[K] v[V]", params="gamma in (0, 1)", state="S[K, V] = 0", associative=True)
class RetnetRecurrence:
    """Retention: S' = γ S + k vᵀ, o = qᵀS / sqrt(K). Sun et al. 2023, arXiv 2307.08621, eq. 6."""

    def recurrence(s, x):
        return dict(S=x.gamma * s.S + outer(x.k, x.v))

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
