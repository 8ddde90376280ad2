# Waiting times of a queue with one server, as a recurrence. Lindley 1952, "The theory of queues with a single server";
# as a max-plus scan, Greenberg, Lubachevsky & Mitrani 1991.

import psmc
from psmc.lang import relu


@psmc.aggregator(inputs="service in [0, inf), gap in [0, inf)", state="w = 0", associative=True)
class LindleyRecurrence:
    """w' = max(w + service - gap, 0): the wait of the next arrival. Lindley 1952."""

    def recurrence(s, x):
        return dict(w=relu(s.w + x.service - x.gap))

    def output(s, x):
        return dict(y=s.w)
