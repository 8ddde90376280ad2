# Linear attention, feature map elu + 1, as a recurrence. Katharopoulos et al. 2020, arXiv 2006.16236, eq. 16-20.

import psmc
from psmc.lang import exp, minimum, outer, relu


def phi(x):
    """elu(x) + 1."""
    return relu(x) + exp(minimum(x, 0))


@psmc.aggregator(inputs="q[K] k[K] v[V]", state="S[K, V] = 0, z[K] = 0", associative=True)
class LinearAttentionRecurrence:
    """S' = S + φ(k) vᵀ, z' = z + φ(k), o = φ(q)ᵀS / φ(q)ᵀz, φ = elu + 1.
    Katharopoulos et al. 2020, arXiv 2006.16236."""

    def recurrence(s, x):
        return dict(S=s.S + outer(phi(x.k), x.v), z=s.z + phi(x.k))

    def output(s, x):
        return (phi(x.q) @ s.S) / (phi(x.q) @ s.z)
