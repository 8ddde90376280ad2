# Two coupled linear recurrences, as a recurrence. Blelloch 1990, CMU-CS-90-190, §1.4.

import psmc


@psmc.aggregator(inputs="a11 a12 a21 a22 b1 b2", state="h1 = 0, h2 = 0", associative=True)
class Affine2x2Recurrence:
    """h' = A h + b in the plane. Blelloch 1990, CMU-CS-90-190."""

    def recurrence(s, x):
        h1 = x.a11 * s.h1 + x.a12 * s.h2 + x.b1
        h2 = x.a21 * s.h1 + x.a22 * s.h2 + x.b2
        return dict(h1=h1, h2=h2)

    def output(s, x):
        return dict(y1=s.h1, y2=s.h2)
