# minGRU. Feng et al. 2024, "Were RNNs all we needed?", arXiv 2410.01201, §3.1.

import psmc
from psmc.lang import sigmoid


@psmc.aggregator(inputs="z, x", state="a = 1, h = 0", associative=True)
class Mingru:
    """minGRU: h' = (1 - σ(z)) h + σ(z) x, x the candidate state h~. Feng et al. 2024, arXiv 2410.01201."""

    def lift(x):
        return dict(a=1 - sigmoid(x.z), h=sigmoid(x.z) * x.x)

    def combine(l, r):
        return dict(a=l.a * r.a, h=r.a * l.h + r.h)

    def output(s, x):
        return dict(y=s.h)
