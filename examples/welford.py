# Streaming mean and variance. Welford 1962; the pairwise form, Chan, Golub & LeVeque 1979, STAN-CS-79-773.

import psmc
from psmc.lang import let


@psmc.aggregator(inputs="x", state="n in (0, inf) = 0, mean = 0, m2 = 0", associative=True)
class Welford:
    """Mean and population variance of the tokens so far. Welford 1962; Chan, Golub & LeVeque 1979."""

    def lift(x):
        return dict(n=1, mean=x.x, m2=0)

    def combine(l, r):
        n = l.n + r.n
        delta = let("delta", r.mean - l.mean)
        return dict(n=n, mean=l.mean + delta * r.n / n, m2=l.m2 + r.m2 + delta**2 * l.n * r.n / n)

    def output(s, x):
        return dict(mu=s.mean, var=s.m2 / s.n)
