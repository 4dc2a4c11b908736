"""`python -m metabook` is the command `metabook`: `torchrun -m metabook` needs it."""

from metabook.cli import main

if __name__ == "__main__":
    main()
