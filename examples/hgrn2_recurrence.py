# HGRN2, as a recurrence. Qin et al. 2024, arXiv 2404.07904.

import psmc
from psmc.lang import exp, outer


@psmc.aggregator(inputs="q[K] v[V] g[K] in (-inf, 0]", state="S[K, V] = 0", associative=True)
class Hgrn2Recurrence:
    """S' = diag(f) S + (1 - f) vᵀ, o = qᵀS, f = exp(g), lower bound included. Qin et al. 2024, arXiv 2404.07904."""

    def recurrence(s, x):
        return dict(S=exp(x.g)[:, None] * s.S + outer(1 - exp(x.g), x.v))

    def output(s, x):
        return x.q @ s.S
