# Exponential moving average with a constant decay, as a recurrence. Brown 1956.

import psmc
from psmc.lang import const

DECAY = const(0.9)


@psmc.aggregator(inputs="x", state="s = 0", associative=True)
class EmaRecurrence:
    """Simple exponential smoothing: s' = decay s + (1 - decay) x. Brown 1956."""

    def recurrence(s, x):
        return dict(s=DECAY * s.s + (1 - DECAY) * x.x)

    def output(s, x):
        return dict(y=s.s)
