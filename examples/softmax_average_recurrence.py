# Streaming softmax average, as a recurrence. Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3.

import psmc
from psmc.lang import exp, maximum


@psmc.aggregator(inputs="score value", state="m = -inf, u = 0, w = 0", associative=True)
class SoftmaxAverageRecurrence:
    """The average of the values so far, weighted by softmax(scores). Milakov & Gimelshein 2018, arXiv 1805.02867."""

    def recurrence(s, x):
        m = maximum(s.m, x.score)
        u = exp(s.m - m) * s.u + exp(x.score - m)
        w = exp(s.m - m) * s.w + exp(x.score - m) * x.value
        return dict(m=m, u=u, w=w)

    def output(s, x):
        return dict(y=s.w / s.u)
