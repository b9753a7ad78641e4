"""How well, and how soon, the in-domain classifier tells the classes of a dataset apart.

    python -m benchmarks.classifier --data_dir FOLDER_WITH_CIFAR10_PARQUET --image_size 32

prints the held-out accuracy (a fifth of `train*.parquet`), the accuracy on `test*.parquet`, the seconds of training,
and the images per second of a feature pass. Processor seconds divided by threads say what a quiet machine needs, as
waiting for a busy one is not in them.

Measured by one thread of an AMD EPYC processor with AVX-512 bfloat16 instructions, beside other work: at 32x32 held out
85.31 %, test 85.71 %, 807 processor seconds; at 16x16 80.99 %, 80.37 %, 281 seconds. Features of 541 and 2,374
images per second and core. docs/method.md has the table.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch

from tribute.behaviors.classifier import ClassifierExtractor, train_or_load_classifier
from tribute.data.sources import load_training_data
from tribute.types import Images


def main() -> None:
    """Train once, and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with train*.parquet and test*.parquet")
    parser.add_argument("--dataset", default="cifar")
    parser.add_argument("--image_size", type=int, default=32, help="pixels to which images are averaged, or repeated")
    parser.add_argument("--max_examples", type=int, default=None)
    parser.add_argument("--n_threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.n_threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    data = load_training_data(args.dataset, data_dir=args.data_dir, max_examples=args.max_examples)
    images = resized(data.reference_images, args.image_size)
    wall, processor = time.monotonic(), time.process_time()
    classifier = train_or_load_classifier(
        images, data.reference_labels, label_names=data.label_names, cache_dir=None, seed=args.seed
    )
    wall, processor = time.monotonic() - wall, (time.process_time() - processor) / args.n_threads
    print(f"{len(images)} images of {args.image_size}x{args.image_size}")
    print(f"held-out accuracy {classifier.held_out_accuracy:.2%} on {classifier.n_held_out} images")
    print(f"{wall:.0f} s; processor time / {args.n_threads} threads: {processor:.0f} s")
    print_test_accuracy(classifier, args)

    start = time.process_time()
    classifier.extract(images[:5000])
    rate = min(5000, len(images)) / (time.process_time() - start) * args.n_threads
    print(f"features: {rate:.0f} images per second, by processor time")


def print_test_accuracy(classifier: ClassifierExtractor, args: argparse.Namespace) -> None:
    """Accuracy on the dataset's own test part, if it is there."""
    files = sorted(args.data_dir.glob("test*.parquet"))
    if len(files) != 1:
        return
    test = load_training_data(args.dataset, data_dir=files[0])
    found = classifier.extract(resized(test.reference_images, args.image_size)).probabilities
    if found is not None:
        accuracy = (found.argmax(axis=1) == test.reference_labels).mean()
        print(f"test accuracy {accuracy:.2%} on {len(test.reference_labels)} images")


def resized(images: Images, side: int) -> Images:
    """Square images averaged down, or pixels repeated, to `side`, which must divide or be divided by their own."""
    found = images.shape[1]
    if found == side:
        return images
    if side > found:
        return np.repeat(np.repeat(images, side // found, axis=1), side // found, axis=2)
    factor = found // side
    blocks = np.asarray(images).reshape(len(images), side, factor, side, factor, images.shape[3])
    return np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)


if __name__ == "__main__":
    main()
