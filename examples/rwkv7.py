# RWKV-7 (Goose). Peng et al. 2025, arXiv 2503.14456.
# kappa is the normalised removal key, a the in-context learning rate.

import psmc
from psmc.lang import const, exp, eye, outer, sigmoid


@psmc.aggregator(
    inputs="r[K] d[K] k[K] v[V] kappa[K] a[K] in [0, 1]",
    state="A[K, K] = eye, S[K, V] = 0",
    associative=True,
)
class Rwkv7:
    """S' = (diag(w) - (a κ) κᵀ) S + k vᵀ, o = rᵀS, w = exp(-exp(-1/2) σ(d)), state as [K, V].
    Peng et al. 2025, arXiv 2503.14456."""

    def let(x):
        return dict(w=exp(-exp(const(-0.5)) * sigmoid(x.d)))

    def lift(x):
        return dict(A=eye(x.dims.K) * x.w[:, None] - outer(x.a * x.kappa, x.kappa), S=outer(x.k, x.v))

    def combine(l, r):
        return dict(A=r.A @ l.A, S=r.A @ l.S + r.S)

    def output(s, x):
        return x.r @ s.S
