# RWKV-6 (Finch). Peng et al. 2024, arXiv 2404.05892, eq. 16-19:
# data-dependent decay and a bonus u for the current token.

import psmc
from psmc.lang import exp, outer


@psmc.aggregator(inputs="r[K] k[K] v[V] w[K]", params="u[K]", state="a[K] = 1, S[K, V] = 0", associative=True)
class Rwkv6:
    """S' = diag(exp(-exp w)) S + k vᵀ, o = rᵀ(S + diag(u) k vᵀ) with S before the token.
    Peng et al. 2024, arXiv 2404.05892."""

    def lift(x):
        return dict(a=exp(-exp(x.w)), S=outer(x.k, x.v))

    def combine(l, r):
        return dict(a=l.a * r.a, S=r.a[:, None] * l.S + r.S)

    def output(s, x, prev):
        return x.r @ (prev.S + outer(x.u * x.k, x.v))
