# Gated random feature attention, as a recurrence. Peng et al. 2021, arXiv 2103.02143, §3.2.

import psmc
from psmc.lang import outer, sigmoid


@psmc.aggregator(inputs="q[K] k[K] v[V] gate", state="S[K, V] = 0, z[K] = 0", associative=True)
class GatedRfaRecurrence:
    """S' = f S + (1-f) k vᵀ, z' = f z + (1-f) k, f = σ(gate), o = qᵀS / qᵀz. Peng et al. 2021, arXiv 2103.02143."""

    def let(x):
        return dict(f=sigmoid(x.gate))

    def recurrence(s, x):
        return dict(S=x.f * s.S + outer((1 - x.f) * x.k, x.v), z=x.f * s.z + (1 - x.f) * x.k)

    def output(s, x):
        return (x.q @ s.S) / (x.q @ s.z)
