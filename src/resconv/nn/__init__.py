"""The training form: gates, and the algebra by which they fuse into ordinary layers."""
