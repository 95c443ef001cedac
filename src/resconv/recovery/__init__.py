"""Getting accuracy back: distillation, hints, BatchNorm statistics collected anew."""
