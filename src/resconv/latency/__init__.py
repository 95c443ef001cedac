"""Milliseconds on this machine."""
