# minLSTM with normalised gates. Feng et al. 2024, arXiv 2410.01201, §3.2.

import psmc
from psmc.lang import sigmoid


@psmc.aggregator(inputs="fgate, igate, x", state="a = 1, h = 0", associative=True)
class Minlstm:
    """minLSTM: h' = f/(f+i) h + i/(f+i) x, f = σ(fgate), i = σ(igate). Feng et al. 2024, arXiv 2410.01201."""

    def let(x):
        return dict(total=sigmoid(x.fgate) + sigmoid(x.igate))

    def lift(x):
        return dict(a=sigmoid(x.fgate) / x.total, h=sigmoid(x.igate) / x.total * x.x)

    def combine(l, r):
        return dict(a=l.a * r.a, h=r.a * l.h + r.h)

    def output(s, x):
        return dict(y=s.h)
