# A nonlinear RNN, as a recurrence: nothing to lift, so it says 'no' and runs from the left. Elman 1990.

import psmc
from psmc.lang import tanh


@psmc.aggregator(inputs="x[H]", params="W[H, H]", state="h[H] = 0", associative=False, order="left")
class ElmanRecurrence:
    """h' = tanh(W h + x), x the projected token. Elman 1990."""

    def recurrence(s, x):
        return dict(h=tanh(x.W @ s.h + x.x))

    def output(s, x):
        return dict(y=s.h)
