import psmc


@psmc.aggregator(inputs=["x"], state="s=0", associative=True)
class Sum:
    def lift(x):
        return dict(s=x.x)

    def combine(l, r):
        return dict(s=l.s + r.s)
