# HGRN, its real form. Qin et al. 2023, arXiv 2311.04823; the real form as in Qin et al. 2024, arXiv 2404.07904, §2.

import psmc
from psmc.lang import sigmoid


@psmc.aggregator(inputs="fgate, x", params="gamma in [0, 1)", state="a = 1, h = 0", associative=True)
class Hgrn:
    """h' = f h + (1 - f) x, f = γ + (1 - γ) σ(fgate), γ the layer's lower bound.
    Qin et al. 2023, arXiv 2311.04823."""

    def let(x):
        return dict(f=x.gamma + (1 - x.gamma) * sigmoid(x.fgate))

    def lift(x):
        return dict(a=x.f, h=(1 - x.f) * x.x)

    def combine(l, r):
        return dict(a=l.a * r.a, h=r.a * l.h + r.h)

    def output(s, x):
        return dict(y=s.h)
