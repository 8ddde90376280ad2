"""`python -m psmc` is `psmc`."""

from psmc.cli import main

main()
