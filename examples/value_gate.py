# Linear attention that forgets by channel of the value. No paper has it:
# GLA (Yang et al. 2023, arXiv 2312.06635) with its gate on the value.

import psmc
from psmc.lang import exp, outer, sqrt


@psmc.aggregator(inputs="q[K] k[K] v[V] g[V] in (-inf, 0]", state="a[V] = 1, S[K, V] = 0", associative=True)
class ValueGate:
    """S' = S diag(exp g) + k vᵀ with a gate for each channel of the value, o = qᵀS / sqrt(K).
    GLA (Yang et al. 2023, arXiv 2312.06635) with its gate on the value."""

    def lift(x):
        return dict(a=exp(x.g), S=outer(x.k, x.v))

    def combine(l, r):
        return dict(a=l.a * r.a, S=l.S * r.a[None, :] + r.S)

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
