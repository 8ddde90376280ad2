# Two coupled linear recurrences: h' = A h + b with A 2x2, in scalars. Blelloch 1990, CMU-CS-90-190, §1.4.

import psmc


@psmc.aggregator(state="a11 = 1, a12 = 0, a21 = 0, a22 = 1, b1 = 0, b2 = 0", associative=True)
class Affine2x2:
    """h' = A h + b in the plane; the elements (A, b) are the inputs. Blelloch 1990, CMU-CS-90-190."""

    def combine(l, r):
        return dict(
            a11=r.a11 * l.a11 + r.a12 * l.a21,
            a12=r.a11 * l.a12 + r.a12 * l.a22,
            a21=r.a21 * l.a11 + r.a22 * l.a21,
            a22=r.a21 * l.a12 + r.a22 * l.a22,
            b1=r.a11 * l.b1 + r.a12 * l.b2 + r.b1,
            b2=r.a21 * l.b1 + r.a22 * l.b2 + r.b2,
        )

    def output(s, x):
        return dict(y1=s.b1, y2=s.b2)
