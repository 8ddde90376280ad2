# First-order linear recurrence. Blelloch 1990, §1.4; Martin & Cundy 2018, arXiv 1709.04057.

import psmc


@psmc.aggregator(state="a = 1, h = 0", associative=True)
class LinearRecurrence:
    """h' = a h + b, with the pairs (a, b) as inputs. Blelloch 1990; Martin & Cundy 2018, arXiv 1709.04057."""

    def combine(l, r):
        return dict(a=l.a * r.a, h=r.a * l.h + r.h)

    def output(s, x):
        return dict(y=s.h)
