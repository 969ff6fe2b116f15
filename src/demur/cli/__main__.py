"""`python -m demur.cli` is the `demur` program."""

from demur.cli import main

main()
