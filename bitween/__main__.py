"""`python -m bitween` is the command `bitween`."""

from .cli import main

main()
