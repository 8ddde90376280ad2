"""The oracle: an interpreter of the IR and the plain sequential fold. The one meaning that all else is held to."""

from psmc.reference.evaluate import Env, evaluate, run
from psmc.reference.fold import fold

__all__ = ["Env", "evaluate", "fold", "run"]
