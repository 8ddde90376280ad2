# A memory that forgets by row and by column, as a recurrence. No paper has it:
# GLA's gate (Yang et al. 2023, arXiv 2312.06635) on both sides, RWKV-6's bonus.

import psmc
from psmc.lang import exp, outer


@psmc.aggregator(
    inputs="q[K] k[K] v[V] g[K] in (-inf, 0] h[V] in (-inf, 0]",
    params="u[K]",
    state="S[K, V] = 0",
    associative=True,
)
class GridGateRecurrence:
    """S' = diag(exp g) S diag(exp h) + k vᵀ, o = qᵀ(S + diag(u) k vᵀ) with S before the token.
    GLA's gate (Yang et al. 2023, arXiv 2312.06635) on both sides, RWKV-6's bonus."""

    def recurrence(s, x):
        return dict(S=exp(x.g)[:, None] * s.S * exp(x.h)[None, :] + outer(x.k, x.v))

    def output(s, x, prev):
        return x.q @ (prev.S + outer(x.u * x.k, x.v))
