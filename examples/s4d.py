# S4D: diagonal state space model, zero-order hold, B = 1. Gu et al. 2022, arXiv 2206.11893.

import psmc
from psmc.lang import complex, exp, real


@psmc.aggregator(
    dims="D N",
    inputs="u[D]",
    params="log_dt[D] log_decay[D, N] frequency[D, N] C[D, N] : complex, skip[D]",
    state="a[D, N] : complex = 1, h[D, N] : complex = 0",
    associative=True,
)
class S4d:
    """h' = exp(dt A) h + (exp(dt A) - 1)/A u, y = 2 Re(C h) + skip u. Gu et al. 2022, arXiv 2206.11893."""

    def let(x):
        return dict(A=complex(-exp(x.log_decay), x.frequency))

    def lift(x):
        a = exp(exp(x.log_dt)[:, None] * x.A)
        return dict(a=a, h=(a - 1) / x.A * x.u[:, None])

    def combine(l, r):
        return dict(a=l.a * r.a, h=r.a * l.h + r.h)

    def output(s, x):
        return dict(y=2 * real(x.C * s.h).sum(1) + x.skip * x.u)
