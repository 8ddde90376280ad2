# Linear attention, feature map elu + 1. Katharopoulos et al. 2020, arXiv 2006.16236, eq. 16-20.

import psmc
from psmc.lang import exp, minimum, outer, relu


def phi(x):
    """elu(x) + 1."""
    return relu(x) + exp(minimum(x, 0))


@psmc.aggregator(inputs="q[K] k[K] v[V]", state="S[K, V] = 0, z[K] = 0", associative=True)
class LinearAttention:
    """S' = S + φ(k) vᵀ, z' = z + φ(k), o = φ(q)ᵀS / φ(q)ᵀz, φ = elu + 1.
    Katharopoulos et al. 2020, arXiv 2006.16236."""

    def lift(x):
        return dict(S=outer(phi(x.k), x.v), z=phi(x.k))

    def combine(l, r):
        return dict(S=l.S + r.S, z=l.z + r.z)

    def output(s, x):
        return (phi(x.q) @ s.S) / (phi(x.q) @ s.z)
