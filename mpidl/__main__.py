"""`python -m mpidl` is `mpidl`."""

from mpidl.cli import main

main()
