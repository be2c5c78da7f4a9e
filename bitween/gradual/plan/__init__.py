"""Least damage within bytes: sizes, items, the frontier, and the descent along it."""
