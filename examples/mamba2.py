# Mamba-2 (SSD). Dao & Gu 2024, arXiv 2405.21060. Heads are lanes;
# B and C may have fewer (groups), repeated by the runtime.

import psmc
from psmc.lang import exp, outer


@psmc.aggregator(
    dims="N P",
    inputs="x[P] dt in (0, inf), B[N] C[N]",
    params="A in (-inf, 0), skip",
    state="a = 1, h[N, P] = 0",
    associative=True,
)
class Mamba2:
    """h' = exp(dt A) h + dt B xᵀ, y = Cᵀh + skip x, A and skip one number a head. Dao & Gu 2024, arXiv 2405.21060."""

    def lift(x):
        return dict(a=exp(x.dt * x.A), h=outer(x.dt * x.B, x.x))

    def combine(l, r):
        return dict(a=l.a * r.a, h=r.a * l.h + r.h)

    def output(s, x):
        return dict(y=x.C @ s.h + x.skip * x.x)
