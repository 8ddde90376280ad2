# A nonlinear RNN: it has one order, left to right. Elman 1990, "Finding structure in time".

import psmc
from psmc.lang import tanh


@psmc.aggregator(inputs="x[H]", params="W[H, H]", state="h[H] = 0", associative=False, order="left")
class Elman:
    """h' = tanh(W h + x), x the projected token. Elman 1990."""

    def lift(x):
        return dict(h=x.x)

    def combine(l, r, p):
        return dict(h=tanh(p.W @ l.h + r.h))

    def output(s, x):
        return dict(y=s.h)
