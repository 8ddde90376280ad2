# Segmented prefix sums, as a recurrence: a flag restarts the sum. Blelloch 1990, CMU-CS-90-190, §1.5.

import psmc
from psmc.lang import where


@psmc.aggregator(inputs="x, flag : int in [0, 1]", state="s = 0", associative=True)
class SegmentedSumRecurrence:
    """Running sum since the latest flag. Blelloch 1990, CMU-CS-90-190."""

    def recurrence(s, x):
        return dict(s=where(x.flag > 0, x.x, s.s + x.x))

    def output(s, x):
        return dict(y=s.s)
