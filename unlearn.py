"""The published command `unlearn.py`; the same as `tribute unlearn`."""

from tribute.cli import main

if __name__ == "__main__":
    main("unlearn")
