"""Putting gates in and taking units out, exactly."""
