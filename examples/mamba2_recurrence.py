# Mamba-2 (SSD), as a recurrence. Dao & Gu 2024, arXiv 2405.21060.

import psmc
from psmc.lang import exp, outer


@psmc.aggregator(
    dims="N P",
    inputs="x[P] dt in (0, inf), B[N] C[N]",
    params="A in (-inf, 0), skip",
    state="h[N, P] = 0",
    associative=True,
)
class Mamba2Recurrence:
    """h' = exp(dt A) h + dt B xᵀ, y = Cᵀh + skip x, A and skip one number a head. Dao & Gu 2024, arXiv 2405.21060."""

    def recurrence(s, x):
        return dict(h=exp(x.dt * x.A) * s.h + outer(x.dt * x.B, x.x))

    def output(s, x):
        return dict(y=x.C @ s.h + x.skip * x.x)
