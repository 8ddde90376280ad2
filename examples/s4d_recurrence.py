# S4D, as a recurrence. Gu et al. 2022, arXiv 2206.11893.

import psmc
from psmc.lang import complex, exp, real


@psmc.aggregator(
    dims="D N",
    inputs="u[D]",
    params="log_dt[D] log_decay[D, N] frequency[D, N] C[D, N] : complex, skip[D]",
    state="h[D, N] : complex = 0",
    associative=True,
)
class S4dRecurrence:
    """h' = exp(dt A) h + (exp(dt A) - 1)/A u, y = 2 Re(C h) + skip u. Gu et al. 2022, arXiv 2206.11893."""

    def let(x):
        A = complex(-exp(x.log_decay), x.frequency)
        return dict(A=A, E=exp(exp(x.log_dt)[:, None] * A))

    def recurrence(s, x):
        return dict(h=x.E * s.h + (x.E - 1) / x.A * x.u[:, None])

    def output(s, x):
        return dict(y=2 * real(x.C * s.h).sum(1) + x.skip * x.u)
