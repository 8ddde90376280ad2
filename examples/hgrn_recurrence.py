# HGRN, its real form, as a recurrence. Qin et al. 2023, arXiv 2311.04823; Qin et al. 2024, arXiv 2404.07904, §2.

import psmc
from psmc.lang import sigmoid


@psmc.aggregator(inputs="fgate, x", params="gamma in [0, 1)", state="h = 0", associative=True)
class HgrnRecurrence:
    """h' = f h + (1 - f) x, f = γ + (1 - γ) σ(fgate), γ the layer's lower bound.
    Qin et al. 2023, arXiv 2311.04823."""

    def let(x):
        return dict(f=x.gamma + (1 - x.gamma) * sigmoid(x.fgate))

    def recurrence(s, x):
        return dict(h=x.f * s.h + (1 - x.f) * x.x)

    def output(s, x):
        return dict(y=s.h)
