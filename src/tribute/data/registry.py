"""The datasets that can be named. One more is a description here, not a copy of anything."""

from __future__ import annotations

from dataclasses import dataclass

from tribute.data import embedded
from tribute.data.folder import FOLDER_COLUMN
from tribute.errors import ConfigError

HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class Source:
    """A dataset that can be named.

    Attributes:
        description: What the images are, in one line.
        origin: Who made them, and where they are to be had.
        licence: What is known of the terms of use.
        image_shape: Height, width, channels as published; None for images of the user's.
        hub: Its place on the Hugging Face hub, for use without `data_dir`; None if there is none to rely on.
        layout: `embedded`, `folder`, `parquet`, `hub`, or `any`: a local folder or Parquet, or the hub.
        image_columns: Columns that may hold the images, in the order in which they are looked for.
        label_columns: The same for the class.
        contributor_column: Names the owners; None: the contributors are the classes.
        classes: Numbers of the classes that are kept, in their new order; all if empty.
        metadata_files: Names that a folder's table has besides the usual ones.
        file_columns: Columns of that table that may name the file.
        partitions: Values of `--contributors`; the first is the usual one.
    """

    description: str
    origin: str
    licence: str
    image_shape: tuple[int, int, int] | None = None
    hub: str | None = None
    layout: str = "any"
    image_columns: tuple[str, ...] = ("img", "image")
    label_columns: tuple[str, ...] = ("label", FOLDER_COLUMN)
    contributor_column: str | None = None
    classes: tuple[int, ...] = ()
    metadata_files: tuple[str, ...] = ()
    file_columns: tuple[str, ...] = ("file_name",)
    partitions: tuple[str, ...] = ("class",)


_CIFAR = "Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images"
_CIFAR_LICENCE = "none stated; the author asks to be cited, and the photographs come from the web"


def _cifar10(description: str, classes: tuple[int, ...] = ()) -> Source:
    return Source(description, _CIFAR, _CIFAR_LICENCE, (32, 32, 3), hub="uoft-cs/cifar10", classes=classes)


def _cifar100(description: str, classes: tuple[int, ...] = ()) -> Source:
    labels = ("fine_label", "label", FOLDER_COLUMN)
    shape = (32, 32, 3)
    return Source(
        description, _CIFAR, _CIFAR_LICENCE, shape, hub="uoft-cs/cifar100", label_columns=labels, classes=classes
    )


# Fine classes of CIFAR-100 are numbered by the alphabet, superclasses are groups of five by meaning. The published
# code keeps four runs of numbers and calls them by the names of four superclasses, which they are not: among them are
# lamp, lawn mower, lizard, orange and pear. `cifar20` is what it computes, `cifar20-superclass` what it says.
_CIFAR20_PUBLISHED = (*range(40, 45), *range(55, 60), *range(60, 65), *range(80, 85))
_CIFAR20_SUPERCLASSES = (
    *(3, 42, 43, 88, 97),  # large carnivores: bear, leopard, lion, tiger, wolf
    *(15, 19, 21, 31, 38),  # large omnivores and herbivores: camel, cattle, chimpanzee, elephant, kangaroo
    *(34, 63, 64, 66, 75),  # medium-sized mammals: fox, porcupine, possum, raccoon, skunk
    *(36, 50, 65, 74, 80),  # small mammals: hamster, mouse, rabbit, shrew, squirrel
)

SOURCES: dict[str, Source] = {
    "digits": Source(
        "1,797 scans of handwritten digits, 8x8, grey",
        "Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI; shipped with scikit-learn",
        "CC BY 4.0 (UCI)",
        embedded.IMAGE_SHAPE,
        layout="embedded",
        partitions=("class", "vendors"),
    ),
    "cifar": _cifar10("CIFAR-10: 50,000 photographs of ten classes, 32x32, RGB"),
    "cifar2": _cifar10("CIFAR-2: automobile and horse of CIFAR-10, as in the published code", classes=(1, 7)),
    "cifar100": _cifar100("CIFAR-100: 50,000 photographs of 100 classes, 32x32, RGB"),
    "cifar20": _cifar100("CIFAR-20: the 20 classes of CIFAR-100 that the published code keeps", _CIFAR20_PUBLISHED),
    "cifar20-superclass": _cifar100(
        "the 20 classes of four superclasses of CIFAR-100: large carnivores, large omnivores and herbivores, "
        "medium-sized mammals, small mammals",
        _CIFAR20_SUPERCLASSES,
    ),
    "mnist": Source(
        "60,000 handwritten digits, 28x28, grey",
        "LeCun, Cortes and Burges (1998), after NIST",
        "none stated by the authors; copies on the hub say MIT",
        (28, 28, 1),
        hub="ylecun/mnist",
        image_columns=("image", "img"),
    ),
    "celeba": Source(
        "CelebA-HQ: 30,000 portraits of celebrities, 256x256; the contributors are the celebrities",
        "Karras et al. (2018), from CelebA of Liu et al. (2015); identities on request from the authors of CelebA",
        "non-commercial research only, no redistribution",
        (256, 256, 3),
        image_columns=("image", "img"),
        label_columns=("celeb", "label", FOLDER_COLUMN),
        contributor_column="celeb",
        metadata_files=("labels.csv",),
        file_columns=("filename", "file_name"),
    ),
    "artbench": Source(
        "ArtBench-10: 50,000 paintings of ten styles, 256x256; the contributors are the artists",
        "Liao et al. (2022), from WikiArt, Ukiyo-e.org and The Surrealism Website",
        "fair use as its authors see it; rights in single works vary",
        (256, 256, 3),
        image_columns=("image", "img"),
        label_columns=("style", "label", FOLDER_COLUMN),
        contributor_column="artist",
    ),
    "folder": Source("a folder of your images, with sub-folders or a table", "yours", "yours", layout="folder"),
    "parquet": Source("your Parquet files", "yours", "yours", layout="parquet"),
}
"""What `--dataset` may name, besides `hub:OWNER/NAME`."""

_HUB = Source("a dataset of the Hugging Face hub", "see its page", "see its page", layout="hub")


def find_source(dataset: str) -> Source:
    """The source called `dataset`.

    Raises:
        ConfigError: There is none of this name.
    """
    if dataset.startswith(HUB_PREFIX):
        return _HUB
    if dataset not in SOURCES:
        raise ConfigError(
            f"--dataset {dataset!r} is unknown; expected one of {', '.join(SOURCES)}, or {HUB_PREFIX}OWNER/NAME"
        )
    return SOURCES[dataset]
