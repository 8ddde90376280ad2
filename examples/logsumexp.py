# Running log-sum-exp as a pair (maximum, scaled sum). Milakov & Gimelshein 2018, arXiv 1805.02867.

import psmc
from psmc.lang import exp, log, maximum


@psmc.aggregator(inputs="x", state="m = -inf, s = 0", associative=True)
class Logsumexp:
    """y = log Σ exp(x) over the tokens so far, without overflow. Milakov & Gimelshein 2018, arXiv 1805.02867."""

    def lift(x):
        return dict(m=x.x, s=1)

    def combine(l, r):
        m = maximum(l.m, r.m)
        return dict(m=m, s=l.s * exp(l.m - m) + r.s * exp(r.m - m))

    def output(s, x):
        return dict(y=s.m + log(s.s))
