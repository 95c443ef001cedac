"""What a forward pass does, which units it has and what they cost in MACs."""
