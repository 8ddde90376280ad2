# Waiting times of a queue with one server. Lindley 1952, "The theory of queues with a single server";
# as a max-plus scan, Greenberg, Lubachevsky & Mitrani 1991.

import psmc
from psmc.lang import maximum


@psmc.aggregator(inputs="service in [0, inf), gap in [0, inf)", state="f = 0, w = -inf", associative=True)
class Lindley:
    """w' = max(w + service - gap, 0): the work that an arrival finds, and adds to, is the map w -> max(w + f, w_0).
    Lindley 1952."""

    def lift(x):
        return dict(f=x.service - x.gap, w=0)

    def combine(l, r):
        return dict(f=l.f + r.f, w=maximum(l.w + r.f, r.w))

    def output(s, x):
        return dict(y=maximum(s.w, s.f))
