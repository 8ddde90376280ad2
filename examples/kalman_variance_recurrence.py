# The variance of a scalar Kalman filter, as a recurrence: a Riccati equation, whose steps are fractional-linear.
# Kalman 1960; as a scan, Särkkä & García-Fernández 2021, arXiv 1905.13002.

import psmc
from psmc.lang import let


@psmc.aggregator(inputs="a, q in [0, inf), r in (0, inf)", state="P in [0, inf) = 0", associative=True)
class KalmanVarianceRecurrence:
    """M predicts, the gain K weighs the observation, P is what remains.
    Kalman 1960; Särkkä & García-Fernández 2021, arXiv 1905.13002."""

    def recurrence(s, x):
        M = let("M", x.a * s.P * x.a + x.q)
        K = let("K", M / (M + x.r))
        return dict(P=(1 - K) * M)

    def output(s, x):
        return dict(y=s.P)
