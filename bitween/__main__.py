"""`python -m bitween` is the command `bitween`."""

from bitween.cli import main

main()
