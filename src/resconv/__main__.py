"""``python -m resconv``, which is what torchrun starts: ``torchrun -m resconv compress ...``."""

from .cli import main

if __name__ == "__main__":
    main()
