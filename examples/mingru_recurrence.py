# minGRU, as a recurrence. Feng et al. 2024, arXiv 2410.01201, §3.1.

import psmc
from psmc.lang import sigmoid


@psmc.aggregator(inputs="z, x", state="h = 0", associative=True)
class MingruRecurrence:
    """minGRU: h' = (1 - σ(z)) h + σ(z) x, x the candidate state h~. Feng et al. 2024, arXiv 2410.01201."""

    def recurrence(s, x):
        return dict(h=(1 - sigmoid(x.z)) * s.h + sigmoid(x.z) * x.x)

    def output(s, x):
        return dict(y=s.h)
