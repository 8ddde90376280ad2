# Mamba (S6), as a recurrence. Gu & Dao 2023, arXiv 2312.00752.

import psmc
from psmc.lang import exp


@psmc.aggregator(
    inputs="x[D] dt[D] in (0, inf), B[N] C[N]",
    params="A[D, N] in (-inf, 0)",
    state="h[D, N] = 0",
    associative=True,
)
class MambaRecurrence:
    """Selective state space: h' = exp(dt A) h + dt B x, y = C h. Gu & Dao 2023, arXiv 2312.00752."""

    def recurrence(s, x):
        dt = x.dt[:, None]
        return dict(h=exp(dt * x.A) * s.h + dt * x.B * x.x[:, None])

    def output(s, x):
        return dict(y=(x.C * s.h).sum(1))
