# Retention. Sun et al. 2023, arXiv 2307.08621. One decay per head; the xPos rotation of q and k stays outside.

import psmc
from psmc.lang import outer, sqrt


@psmc.aggregator(
    inputs="q[K] k[K] v[V]",
    params="gamma in (0, 1)",
    state="a = 1, S[K, V] = 0",
    associative=True,
)
class Retnet:
    """Retention: S' = γ S + k vᵀ, o = qᵀS / sqrt(K). Sun et al. 2023, arXiv 2307.08621, eq. 6."""

    def lift(x):
        return dict(a=x.gamma, S=outer(x.k, x.v))

    def combine(l, r):
        return dict(a=l.a * r.a, S=r.a * l.S + r.S)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
