import psmc

kept = []


@psmc.aggregator(inputs="x", state="s=0", associative=True)
class Leak:
    def lift(x):
        kept.append(x.x)
        return dict(s=x.x)

    def combine(l, r):
        return dict(s=l.s + r.s * kept[0])
