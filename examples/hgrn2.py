# HGRN2. Qin et al. 2024, arXiv 2404.07904: the forget gate, tied to the key as 1 - f, expands the state.

import psmc
from psmc.lang import exp, outer


@psmc.aggregator(inputs="q[K] v[V] g[K] in (-inf, 0]", state="a[K] = 1, S[K, V] = 0", associative=True)
class Hgrn2:
    """S' = diag(f) S + (1 - f) vᵀ, o = qᵀS, f = exp(g), lower bound included. Qin et al. 2024, arXiv 2404.07904."""

    def lift(x):
        return dict(a=exp(x.g), S=outer(1 - exp(x.g), x.v))

    def combine(l, r):
        return dict(a=l.a * r.a, S=r.a[:, None] * l.S + r.S)

    def output(s, x):
        return x.q @ s.S
