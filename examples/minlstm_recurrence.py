# minLSTM with normalised gates, as a recurrence. Feng et al. 2024, arXiv 2410.01201, §3.2.

import psmc
from psmc.lang import let, sigmoid


@psmc.aggregator(inputs="fgate, igate, x", state="h = 0", associative=True)
class MinlstmRecurrence:
    """minLSTM: h' = f/(f+i) h + i/(f+i) x, f = σ(fgate), i = σ(igate). Feng et al. 2024, arXiv 2410.01201."""

    def recurrence(s, x):
        f = let("f", sigmoid(x.fgate))
        i = let("i", sigmoid(x.igate))
        return dict(h=f / (f + i) * s.h + i / (f + i) * x.x)

    def output(s, x):
        return dict(y=s.h)
