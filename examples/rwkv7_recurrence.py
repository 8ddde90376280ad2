# RWKV-7 (Goose), as a recurrence. Peng et al. 2025, arXiv 2503.14456.

import psmc
from psmc.lang import const, exp, outer, sigmoid


@psmc.aggregator(inputs="r[K] d[K] k[K] v[V] kappa[K] a[K] in [0, 1]", state="S[K, V] = 0", associative=True)
class Rwkv7Recurrence:
    """S' = (diag(w) - (a κ) κᵀ) S + k vᵀ, o = rᵀS, w = exp(-exp(-1/2) σ(d)), state as [K, V].
    Peng et al. 2025, arXiv 2503.14456."""

    def let(x):
        return dict(w=exp(-exp(const(-0.5)) * sigmoid(x.d)))

    def recurrence(s, x):
        return dict(S=x.w[:, None] * s.S - outer(x.a * x.kappa, x.kappa @ s.S) + outer(x.k, x.v))

    def output(s, x):
        return x.r @ s.S
