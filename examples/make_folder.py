"""Write part of CIFAR-10 as a folder of images that twelve invented contributors own, for `examples/folder.yaml`.

    python examples/make_folder.py --data_dir DATA/cifar10 --to contributors

`--data_dir` has `train*.parquet` in the Hugging Face layout. The folder then holds `images/*` (the files as they are in
the Parquet) and `metadata.csv` with the columns `file_name`, `artist` and `label`. Who owns what is always the same:
parts are unequal, from a hundredth to a quarter, and every contributor has a taste for some classes.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet

from tribute.seeding import numpy_stream

SHARES = {
    "Aurelia Marsh": 0.25,
    "Bo Lindqvist": 0.17,
    "Casa Quiroga, S.L.": 0.13,
    "Dilnoza Yusupova": 0.10,
    "Estudio Ñandú": 0.09,
    "Farouk & Daughters": 0.07,
    "Gwen O'Hara": 0.06,
    "Hikaru 光": 0.05,
    "Ioana Popescu": 0.03,
    "Jomo Pictures": 0.025,
    "Kestrel Archive": 0.015,
    "Lumi Niemi": 0.01,
}
"""Share of the images that each contributor owns."""

SUFFIXES = {b"\x89P": "png", b"\xff\xd8": "jpg"}
"""By the first two bytes of a file, the same in every PNG and in every JPEG."""


def main() -> None:
    """Read the flags, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with train*.parquet.")
    parser.add_argument("--to", type=Path, required=True, help="Folder to create.")
    parser.add_argument("--n_images", type=int, default=10_000, help="First images of the dataset to take.")
    arguments = parser.parse_args()

    shards = sorted(arguments.data_dir.glob("train*.parquet"))
    if not shards:
        parser.error(f"--data_dir {arguments.data_dir}: expected train*.parquet, found none")
    if arguments.to.exists():
        parser.error(f"--to {arguments.to}: exists already; remove it, or name another folder")
    table = pyarrow.parquet.read_table(shards[0]).slice(0, arguments.n_images)
    labels = table.column("label").to_numpy()
    owners = draw_owners(labels)
    (arguments.to / "images").mkdir(parents=True)
    with (arguments.to / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_name", "artist", "label"])
        for row, (record, label, owner) in enumerate(zip(table.column("img"), labels, owners, strict=True)):
            content = record.as_py()["bytes"]
            name = f"images/{row:05d}.{SUFFIXES[content[:2]]}"
            (arguments.to / name).write_bytes(content)
            writer.writerow([name, owner, f"class {label}"])
    for name, count in zip(*np.unique(owners, return_counts=True), strict=True):
        print(f"{count:6d}  {name}")
    print(f"wrote {len(owners):,} images to {arguments.to}")


def draw_owners(labels: np.ndarray) -> list[str]:
    """Name of the owner of each image: sizes by `SHARES`, classes by a Dirichlet mix of each contributor's own."""
    names = list(SHARES)
    sizes = np.floor(np.array(list(SHARES.values())) * len(labels)).astype(int)
    sizes[0] += len(labels) - sizes.sum()
    owners = np.full(len(labels), -1)
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        stream = numpy_stream(0, "examples/owners", name)
        taste = stream.dirichlet(np.full(labels.max() + 1, 2.0))
        free = np.flatnonzero(owners < 0)
        keys = np.log(taste[labels[free]]) + stream.gumbel(size=len(free))
        owners[free[np.argsort(-keys, kind="stable")[:size]]] = i
    return [names[i] for i in owners]


if __name__ == "__main__":
    main()
