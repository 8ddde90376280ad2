# RG-LRU, the recurrence of Griffin, as a recurrence. De et al. 2024, arXiv 2402.19427, eq. 1-4 (c = 8).

import psmc
from psmc.lang import exp, expm1, sigmoid, softplus, sqrt

C = 8


@psmc.aggregator(inputs="x, rgate, igate", params="Lambda", state="h = 0", associative=True)
class RgLruRecurrence:
    """h' = a h + sqrt(1 - a²) (σ(igate) x), a = exp(-8 softplus(Λ) σ(rgate)). De et al. 2024, arXiv 2402.19427."""

    def let(x):
        return dict(log_a=-C * softplus(x.Lambda) * sigmoid(x.rgate))

    def recurrence(s, x):
        return dict(h=exp(x.log_a) * s.h + sqrt(-expm1(2 * x.log_a)) * (sigmoid(x.igate) * x.x))

    def output(s, x):
        return dict(y=s.h)
