"""Which units go, and when: sparse training and planning."""
