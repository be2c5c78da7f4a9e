"""Finished steps on disk, so that a stopped run goes on."""
