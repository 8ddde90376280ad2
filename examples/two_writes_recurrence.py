# A memory that each token writes to twice, as a recurrence. No paper has it:
# RetNet's state (Sun et al. 2023, arXiv 2307.08621), written twice a token.

import psmc
from psmc.lang import outer, relu, sigmoid, sqrt


@psmc.aggregator(inputs="q[K] k[K] v[V] h[K] w[V] f", state="S[K, V] = 0", associative=True)
class TwoWritesRecurrence:
    """S' = σ(f) S + k vᵀ + (1 - σ(f)) relu(h) wᵀ, a fast and a slow association of one token, o = qᵀS / sqrt(K).
    RetNet's state (Sun et al. 2023, arXiv 2307.08621), written twice a token."""

    def recurrence(s, x):
        s.S = sigmoid(x.f) * s.S + outer(x.k, x.v)
        s.S = s.S + outer((1 - sigmoid(x.f)) * relu(x.h), x.w)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
