# Linear recurrent unit. Orvieto et al. 2023, arXiv 2303.06349. The dense maps B and C stay outside:
# u is B x, h goes to C.

import psmc
from psmc.lang import complex, exp


@psmc.aggregator(
    inputs="u : complex",
    params="nu, theta, gamma",
    state="a : complex = 1, h : complex = 0",
    associative=True,
)
class Lru:
    """h' = λ h + exp(γ) u, λ = exp(-exp(ν) + i exp(θ)), all complex. Orvieto et al. 2023, arXiv 2303.06349."""

    def lift(x):
        return dict(a=exp(complex(-exp(x.nu), exp(x.theta))), h=exp(x.gamma) * x.u)

    def combine(l, r):
        return dict(a=l.a * r.a, h=r.a * l.h + r.h)

    def output(s, x):
        return dict(y=s.h)
