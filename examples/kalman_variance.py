# The variance of a scalar Kalman filter: a Riccati equation, whose steps are fractional-linear. Kalman 1960;
# as a scan, Särkkä & García-Fernández 2021, arXiv 1905.13002.

import psmc
from psmc.lang import let


@psmc.aggregator(
    inputs="a, q in [0, inf), r in (0, inf)",
    state="A in [0, inf) = 1, C in [0, inf) = 0, P in [0, inf) = 0",
    associative=True,
)
class KalmanVariance:
    """M = a² P + q predicts, P' = M r / (M + r) corrects. An element is P -> (A P + P_0) / (C P + 1).
    Kalman 1960; Särkkä & García-Fernández 2021, arXiv 1905.13002."""

    def lift(x):
        return dict(A=x.a * x.a * x.r / (x.q + x.r), C=x.a * x.a / (x.q + x.r), P=x.q * x.r / (x.q + x.r))

    def combine(l, r):
        n = let("n", r.C * l.P + 1)
        return dict(A=(r.A * l.A + r.P * l.C) / n, C=(r.C * l.A + l.C) / n, P=(r.A * l.P + r.P) / n)

    def output(s, x):
        return dict(y=s.P)
