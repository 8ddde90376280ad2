"""Diagnostics: one data type, one renderer, one catalogue of codes."""

from psmc.diagnostics.core import Diagnostic, Label, PsmcError, fail
from psmc.diagnostics.render import Style, render

__all__ = ["Diagnostic", "Label", "PsmcError", "Style", "fail", "render"]
