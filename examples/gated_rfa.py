# Gated random feature attention. Peng et al. 2021, arXiv 2103.02143, §3.2.
# q and k are the random features φ(q), φ(k).

import psmc
from psmc.lang import outer, sigmoid


@psmc.aggregator(inputs="q[K] k[K] v[V] gate", state="a = 1, S[K, V] = 0, z[K] = 0", associative=True)
class GatedRfa:
    """S' = f S + (1-f) k vᵀ, z' = f z + (1-f) k, f = σ(gate), o = qᵀS / qᵀz. Peng et al. 2021, arXiv 2103.02143."""

    def let(x):
        return dict(f=sigmoid(x.gate))

    def lift(x):
        return dict(a=x.f, S=outer((1 - x.f) * x.k, x.v), z=(1 - x.f) * x.k)

    def combine(l, r):
        return dict(a=l.a * r.a, S=r.a * l.S + r.S, z=r.a * l.z + r.z)

    def output(s, x):
        return (x.q @ s.S) / (x.q @ s.z)
