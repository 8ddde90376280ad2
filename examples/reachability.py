# Who can have heard of it: reachability in a network whose edges come and go. Kempe, Kleinberg & Kumar 2002,
# "Connectivity and inference problems for temporal networks".

import psmc
from psmc.lang import eye, maximum


@psmc.aggregator(
    inputs="edge[N, N] in [0, 1], source[N] in [0, 1]",
    state="A[N, N] in [0, 1] = eye, r[N] in [0, 1] = 0",
    associative=True,
)
class Reachability:
    """Matrices over (max, *), which on 0 and 1 is (or, and). Kempe, Kleinberg & Kumar 2002."""

    def lift(x):
        return dict(A=maximum(eye(x.dims.N), x.edge.T), r=x.source)

    def combine(l, r):
        return dict(A=(r.A[:, :, None] * l.A[None, :, :]).max(1), r=maximum((r.A * l.r).max(1), r.r))

    def output(s, x):
        return dict(y=s.r)
