# Linear recurrent unit, as a recurrence. Orvieto et al. 2023, arXiv 2303.06349.

import psmc
from psmc.lang import complex, exp


@psmc.aggregator(inputs="u : complex", params="nu, theta, gamma", state="h : complex = 0", associative=True)
class LruRecurrence:
    """h' = λ h + exp(γ) u, λ = exp(-exp(ν) + i exp(θ)), all complex. Orvieto et al. 2023, arXiv 2303.06349."""

    def recurrence(s, x):
        return dict(h=exp(complex(-exp(x.nu), exp(x.theta))) * s.h + exp(x.gamma) * x.u)

    def output(s, x):
        return dict(y=s.h)
