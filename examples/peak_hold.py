# A peak meter: the envelope of a signal, which falls by a factor. Giannoulis, Massberg & Reiss 2012,
# "Digital dynamic range compressor design", J. Audio Eng. Soc. 60(6), §3.

import psmc
from psmc.lang import maximum


@psmc.aggregator(inputs="x, a in [0, 1]", state="c in [0, 1] = 1, m in [0, inf) = 0", associative=True)
class PeakHold:
    """m' = max(a m, |x|): a running maximum that leaks. Giannoulis, Massberg & Reiss 2012."""

    def lift(x):
        return dict(c=x.a, m=abs(x.x))

    def combine(l, r):
        return dict(c=l.c * r.c, m=maximum(r.c * l.m, r.m))

    def output(s, x):
        return dict(y=s.m)
