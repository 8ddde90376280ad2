# Linear attention that forgets by channel of the value, as a recurrence. No paper has it:
# GLA (Yang et al. 2023, arXiv 2312.06635) with its gate on the value.

import psmc
from psmc.lang import exp, outer, sqrt


@psmc.aggregator(inputs="q[K] k[K] v[V] g[V] in (-inf, 0]", state="S[K, V] = 0", associative=True)
class ValueGateRecurrence:
    """S' = S diag(exp g) + k vᵀ with a gate for each channel of the value, o = qᵀS / sqrt(K).
    GLA (Yang et al. 2023, arXiv 2312.06635) with its gate on the value."""

    def recurrence(s, x):
        return dict(S=s.S * exp(x.g)[None, :] + outer(x.k, x.v))

    def output(s, x):
        return x.q @ s.S / sqrt(x.dims.K)
