# mLSTM of xLSTM, stabilised, as a recurrence. Beck et al. 2024, arXiv 2405.04517, eq. 19-27 and appendix A.

import psmc
from psmc.lang import exp, let, logsigmoid, maximum, outer, sqrt


@psmc.aggregator(
    inputs="q[K] k[K] v[V] igate fgate",
    state="m = -inf, C[K, V] = 0, n[K] = 0",
    associative=True,
)
class MlstmRecurrence:
    """C' = f C + i k vᵀ, n' = f n + i k, h = Cᵀq / max(|nᵀq|, 1), f = σ(fgate), i = exp(igate), kept relative to
    exp(m), the largest gate product so far. Beck et al. 2024, arXiv 2405.04517."""

    def recurrence(s, x):
        f = let("f", logsigmoid(x.fgate))
        m = maximum(f + s.m, x.igate)
        past = let("past", exp(f + s.m - m))
        new = let("new", exp(x.igate - m))
        k = new * x.k / sqrt(x.dims.K)
        return dict(m=m, C=past * s.C + outer(k, x.v), n=past * s.n + new * x.k / sqrt(x.dims.K))

    def output(s, x):
        return dict(h=(x.q @ s.C) / maximum(abs(x.q @ s.n), exp(-s.m)))
