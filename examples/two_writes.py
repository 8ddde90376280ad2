# A memory that each token writes to twice. No paper has it:
# RetNet's state (Sun et al. 2023, arXiv 2307.08621), written twice a token.

import psmc
from psmc.lang import outer, relu, sigmoid, sqrt


@psmc.aggregator(inputs="q[K] k[K] v[V] h[K] w[V] f", state="a = 1, S[K, V] = 0", associative=True)
class TwoWrites:
    """S' = σ(f) S + k vᵀ + (1 - σ(f)) relu(h) wᵀ, a fast and a slow association of one token, o = qᵀS / sqrt(K).
    RetNet's state (Sun et al. 2023, arXiv 2307.08621), written twice a token."""

    def lift(x):
        return dict(a=sigmoid(x.f), S=outer(x.k, x.v) + outer((1 - sigmoid(x.f)) * relu(x.h), x.w))

    def combine(l, r):
        return dict(a=l.a * r.a, S=r.a * l.S + r.S)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
