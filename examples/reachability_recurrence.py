# Who can have heard of it: reachability in a network whose edges come and go, as a recurrence. Kempe, Kleinberg &
# Kumar 2002, "Connectivity and inference problems for temporal networks".

import psmc
from psmc.lang import maximum


@psmc.aggregator(
    inputs="edge[N, N] in [0, 1], source[N] in [0, 1]",
    state="r[N] in [0, 1] = 0",
    associative=True,
)
class ReachabilityRecurrence:
    """Or and and, as max and * of 0 and 1. Kempe, Kleinberg & Kumar 2002."""

    def recurrence(s, x):
        return dict(r=maximum(maximum(s.r, (x.edge * s.r[:, None]).max(0)), x.source))

    def output(s, x):
        return dict(y=s.r)
