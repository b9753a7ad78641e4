"""The published command `prune.py`; the same as `tribute prune`."""

from tribute.cli import main

if __name__ == "__main__":
    main("prune")
