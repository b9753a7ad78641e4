"""The published command `main.py`; the same as `tribute train`."""

from tribute.cli import main

if __name__ == "__main__":
    main("train")
