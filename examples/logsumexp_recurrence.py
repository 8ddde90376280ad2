# Running log-sum-exp, as a recurrence in the log semiring. Milakov & Gimelshein 2018, arXiv 1805.02867.

import psmc
from psmc.lang import logaddexp


@psmc.aggregator(inputs="x", state="s = -inf", associative=True)
class LogsumexpRecurrence:
    """y = log Σ exp(x) over the tokens so far, without overflow. Milakov & Gimelshein 2018, arXiv 1805.02867."""

    def recurrence(s, x):
        return dict(s=logaddexp(s.s, x.x))

    def output(s, x):
        return dict(y=s.s)
