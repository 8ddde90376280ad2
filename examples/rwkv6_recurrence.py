# RWKV-6 (Finch), as a recurrence. Peng et al. 2024, arXiv 2404.05892, eq. 16-19.

import psmc
from psmc.lang import exp, outer


@psmc.aggregator(inputs="r[K] k[K] v[V] w[K]", params="u[K]", state="S[K, V] = 0", associative=True)
class Rwkv6Recurrence:
    """S' = diag(exp(-exp w)) S + k vᵀ, o = rᵀ(S + diag(u) k vᵀ) with S before the token.
    Peng et al. 2024, arXiv 2404.05892."""

    def recurrence(s, x):
        return dict(S=exp(-exp(x.w))[:, None] * s.S + outer(x.k, x.v))

    def output(s, x, prev):
        return x.r @ (prev.S + outer(x.u * x.k, x.v))
