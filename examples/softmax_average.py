# Streaming softmax average. Milakov & Gimelshein 2018, arXiv 1805.02867; Rabe & Staats 2021, arXiv 2112.05682.

import psmc
from psmc.lang import exp, maximum


@psmc.aggregator(inputs="score value", state="m = -inf, u = 0, w = 0", associative=True)
class SoftmaxAverage:
    """The average of the values so far, weighted by softmax(scores). Milakov & Gimelshein 2018, arXiv 1805.02867."""

    def lift(x):
        return dict(m=x.score, u=1, w=x.value)

    def combine(l, r):
        m = maximum(l.m, r.m)
        u = l.u * exp(l.m - m) + r.u * exp(r.m - m)
        w = l.w * exp(l.m - m) + r.w * exp(r.m - m)
        return dict(m=m, u=u, w=w)

    def output(s, x):
        return dict(y=s.w / s.u)
