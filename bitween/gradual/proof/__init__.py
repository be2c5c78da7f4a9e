"""The statistics of the proof on held-out text."""
