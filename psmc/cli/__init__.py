"""The command line: one file a command, `app` holds the list of them, `console` all that is printed."""

from psmc.cli.app import main

__all__ = ["main"]
