"""The command line: one command a file."""

from __future__ import annotations

import importlib

from bitween.cli.app import app, main

__all__ = ["app", "main"]

COMMANDS = ("quantize", "analyze", "plan", "evaluate", "export", "report", "info")  # in the order of the help

for _name in COMMANDS:
    importlib.import_module(f"{__name__}.{_name}")
