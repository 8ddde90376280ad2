# Prefix sums. Blelloch 1990, "Prefix sums and their applications", CMU-CS-90-190.

import psmc


@psmc.aggregator(inputs="x", state="s = 0", associative=True)
class Cumsum:
    """Running sum: s' = s + x. Blelloch 1990, CMU-CS-90-190."""

    def lift(x):
        return dict(s=x.x)

    def combine(l, r):
        return dict(s=l.s + r.s)

    def output(s, x):
        return dict(y=s.s)
