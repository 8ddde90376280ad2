# DeltaProduct with two steps a token, written out. Siems et al. 2025, arXiv 2502.10297, eq. 4.

import psmc
from psmc.lang import eye, outer, sqrt


@psmc.aggregator(
    dims="K V R=2",
    inputs="q[K] k[R, K] v[R, V] beta[R] in [0, 2]",
    state="A[K, K] = eye, S[K, V] = 0",
    associative=True,
)
class DeltaProduct:
    """S' = (I - β1 k1 k1ᵀ)((I - β0 k0 k0ᵀ) S + β0 k0 v0ᵀ) + β1 k1 v1ᵀ, o = qᵀS / sqrt(K).
    Siems et al. 2025, arXiv 2502.10297."""

    def let(x):
        return dict(c=x.k[1] @ x.k[0])

    def lift(x):
        first, second = x.beta[0] * x.k[0], x.beta[1] * x.k[1]
        crossed = second * x.c * x.beta[0]
        A = eye(x.dims.K) - outer(first, x.k[0]) - outer(second, x.k[1]) + outer(crossed, x.k[0])
        return dict(A=A, S=outer(first, x.v[0]) - outer(crossed, x.v[0]) + outer(second, x.v[1]))

    def combine(l, r):
        return dict(A=r.A @ l.A, S=r.A @ l.S + r.S)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
