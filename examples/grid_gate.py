# A memory that forgets by row and by column. No paper has it:
# GLA's gate (Yang et al. 2023, arXiv 2312.06635) on both sides, RWKV-6's bonus.

import psmc
from psmc.lang import exp, outer


@psmc.aggregator(
    inputs="q[K] k[K] v[V] g[K] in (-inf, 0] h[V] in (-inf, 0]",
    params="u[K]",
    state="a[K] = 1, b[V] = 1, S[K, V] = 0",
    associative=True,
)
class GridGate:
    """S' = diag(exp g) S diag(exp h) + k vᵀ, o = qᵀ(S + diag(u) k vᵀ) with S before the token.
    GLA's gate (Yang et al. 2023, arXiv 2312.06635) on both sides, RWKV-6's bonus."""

    def lift(x):
        return dict(a=exp(x.g), b=exp(x.h), S=outer(x.k, x.v))

    def combine(l, r):
        return dict(a=l.a * r.a, b=l.b * r.b, S=r.a[:, None] * l.S * r.b[None, :] + r.S)

    def output(s, x, prev):
        return x.q @ (prev.S + outer(x.u * x.k, x.v))
