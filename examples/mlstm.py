# mLSTM of xLSTM, stabilised. Beck et al. 2024, arXiv 2405.04517, eq. 19-27 and appendix A.

import psmc
from psmc.lang import exp, let, logsigmoid, maximum, sqrt


@psmc.aggregator(
    inputs="q[K] k[K] v[V] igate fgate",
    state="f = 0, m = -inf, C[K, V] = 0, n[K] = 0",
    associative=True,
)
class Mlstm:
    """C' = f C + i k vᵀ, n' = f n + i k, h = Cᵀq / max(|nᵀq|, 1), f = σ(fgate), i = exp(igate), kept relative to
    exp(m), the largest gate product so far. Beck et al. 2024, arXiv 2405.04517."""

    def lift(x):
        k = x.k / sqrt(x.dims.K)
        return dict(f=logsigmoid(x.fgate), m=x.igate, C=k[:, None] * x.v, n=x.k / sqrt(x.dims.K))

    def combine(l, r):
        m = maximum(l.m + r.f, r.m)
        past = let("past", exp(l.m + r.f - m))
        new = let("new", exp(r.m - m))
        return dict(f=l.f + r.f, m=m, C=past * l.C + new * r.C, n=past * l.n + new * r.n)

    def output(s, x):
        return dict(h=(x.q @ s.C) / maximum(abs(x.q @ s.n), exp(-s.m)))
