# Segmented prefix sums: a flag restarts the sum. Blelloch 1990, CMU-CS-90-190, §1.5.

import psmc
from psmc.lang import maximum, where


@psmc.aggregator(inputs="x, flag : int in [0, 1]", state="f : int in [0, 1] = 0, s = 0", associative=True)
class SegmentedSum:
    """Running sum since the latest flag. Blelloch 1990, CMU-CS-90-190."""

    def lift(x):
        return dict(f=x.flag, s=x.x)

    def combine(l, r):
        return dict(f=maximum(l.f, r.f), s=where(r.f > 0, r.s, l.s + r.s))

    def output(s, x):
        return dict(y=s.s)
