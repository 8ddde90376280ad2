# A token bucket, which shapes traffic, as a recurrence. Turner 1986, "New directions in communications", IEEE Comm.
# Mag. 24(10); sums with a floor and a ceiling as a scan: Blelloch 1990, CMU-CS-90-190.

import psmc
from psmc.lang import maximum, minimum


@psmc.aggregator(inputs="rate in [0, inf), take in [0, inf), size in (0, inf)", state="s = 0", associative=True)
class TokenBucketRecurrence:
    """s' = max(min(s + rate, size) - take, 0): tokens flow in up to a size, and are taken while there are any.
    Turner 1986."""

    def recurrence(s, x):
        s.s = minimum(s.s + x.rate, x.size)
        s.s = maximum(s.s - x.take, 0)

    def output(s, x):
        return dict(y=s.s)
