# A peak meter: the envelope of a signal, which falls by a factor, as a recurrence. Giannoulis, Massberg & Reiss 2012,
# "Digital dynamic range compressor design", J. Audio Eng. Soc. 60(6), §3.

import psmc
from psmc.lang import maximum


@psmc.aggregator(inputs="x, a in [0, 1]", state="m in [0, inf) = 0", associative=True)
class PeakHoldRecurrence:
    """m' = max(a m, |x|): a running maximum that leaks. Giannoulis, Massberg & Reiss 2012."""

    def recurrence(s, x):
        return dict(m=maximum(x.a * s.m, abs(x.x)))

    def output(s, x):
        return dict(y=s.m)
