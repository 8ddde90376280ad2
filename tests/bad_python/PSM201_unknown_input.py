import psmc
from psmc.lang import exp, outer


@psmc.aggregator(inputs="q[K] k[K] v[V] g[K] in (-inf, 0]", state="a[K]=1 S[K,V]=0", associative=True)
class GLA:
    def lift(x):
        return dict(a=exp(x.gate), S=outer(x.k, x.v))

    def combine(l, r):
        return dict(a=l.a * r.a, S=r.a[:, None] * l.S + r.S)

    def output(s, x):
        return x.q @ s.S
