"""The published command `lds.py`; the same as `tribute lds`."""

from tribute.cli import main

if __name__ == "__main__":
    main("lds")
