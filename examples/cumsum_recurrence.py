# Prefix sums, as a recurrence. Blelloch 1990, CMU-CS-90-190.

import psmc


@psmc.aggregator(inputs="x", state="s = 0", associative=True)
class CumsumRecurrence:
    """Running sum: s' = s + x. Blelloch 1990, CMU-CS-90-190."""

    def recurrence(s, x):
        return dict(s=s.s + x.x)

    def output(s, x):
        return dict(y=s.s)
