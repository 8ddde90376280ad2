# A token bucket, which shapes traffic. Turner 1986, "New directions in communications", IEEE Comm. Mag. 24(10);
# sums with a floor and a ceiling as a scan: Blelloch 1990, CMU-CS-90-190.

import psmc
from psmc.lang import maximum, minimum


@psmc.aggregator(
    inputs="rate in [0, inf), take in [0, inf), size in (0, inf)",
    state="b = 0, hi = inf, s = -inf",
    associative=True,
)
class TokenBucket:
    """s' = max(min(s + rate, size) - take, 0): tokens flow in up to a size, and are taken while there are any.
    An element is the map s -> max(min(s + b, hi), s_0). Turner 1986."""

    def lift(x):
        return dict(b=x.rate - x.take, hi=x.size - x.take, s=0)

    def combine(l, r):
        return dict(
            b=l.b + r.b,
            hi=minimum(l.hi + r.b, r.hi),
            s=maximum(minimum(l.s + r.b, r.hi), r.s),
        )

    def output(s, x):
        return dict(y=maximum(minimum(s.b, s.hi), s.s))
