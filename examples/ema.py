# Exponential moving average with a constant decay. Brown 1956, "Exponential smoothing for predicting demand".

import psmc
from psmc.lang import const

DECAY = const(0.9)


@psmc.aggregator(inputs="x", state="a = 1, s = 0", associative=True)
class Ema:
    """Simple exponential smoothing: s' = decay s + (1 - decay) x. Brown 1956."""

    def lift(x):
        return dict(a=DECAY, s=(1 - DECAY) * x.x)

    def combine(l, r):
        return dict(a=l.a * r.a, s=r.a * l.s + r.s)

    def output(s, x):
        return dict(y=s.s)
