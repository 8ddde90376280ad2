# Mamba (S6). Gu & Dao 2023, arXiv 2312.00752. D is a lane the compiler finds: no index sums over it.

import psmc
from psmc.lang import exp


@psmc.aggregator(
    inputs="x[D] dt[D] in (0, inf), B[N] C[N]",
    params="A[D, N] in (-inf, 0)",
    state="a[D, N] = 1, h[D, N] = 0",
    associative=True,
)
class Mamba:
    """Selective state space: h' = exp(dt A) h + dt B x, y = C h. Gu & Dao 2023, arXiv 2312.00752."""

    def lift(x):
        dt = x.dt[:, None]
        return dict(a=exp(dt * x.A), h=dt * x.B * x.x[:, None])

    def combine(l, r):
        return dict(a=l.a * r.a, h=r.a * l.h + r.h)

    def output(s, x):
        return dict(y=(x.C * s.h).sum(1))
