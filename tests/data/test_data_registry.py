"""The named datasets, and the hub without network."""

from __future__ import annotations

import tomllib
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pytest

from tribute.data.registry import SOURCES
from tribute.data.sources import load_training_data
from tribute.errors import ConfigError, DataError

# Of CIFAR-100, in the order of their numbers (Krizhevsky 2009).
NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
FINE_CLASSES = NAMES.split()


def test_cifar20_is_the_published_choice_and_the_superclasses_are_what_they_say() -> None:
    assert len(FINE_CLASSES) == 100 and sorted(FINE_CLASSES) == FINE_CLASSES
    published = [FINE_CLASSES[i] for i in SOURCES["cifar20"].classes]
    assert published[:5] == ["lamp", "lawn_mower", "leopard", "lion", "lizard"] and len(set(published)) == 20
    true = [FINE_CLASSES[i] for i in SOURCES["cifar20-superclass"].classes]
    assert true[:5] == ["bear", "leopard", "lion", "tiger", "wolf"]
    assert true[5:10] == ["camel", "cattle", "chimpanzee", "elephant", "kangaroo"]
    assert true[10:15] == ["fox", "porcupine", "possum", "raccoon", "skunk"]
    assert true[15:] == ["hamster", "mouse", "rabbit", "shrew", "squirrel"]


def rows_of(n_classes: int, column: str) -> datasets.Dataset:
    """Two rows of each class, as the hub would give them, with the class in the colour."""
    import io

    from PIL import Image

    labels = list(range(n_classes)) * 2
    images = []
    for label in labels:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (label, 0, 0)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    names = FINE_CLASSES if n_classes == 100 else [str(i) for i in range(n_classes)]
    features = datasets.Features({"img": datasets.Image(), column: datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"img": images, column: labels}, features=features)


@pytest.mark.parametrize(
    ("dataset", "hub_id", "n_classes", "column"),
    [
        ("cifar2", "uoft-cs/cifar10", 10, "label"),
        ("cifar20", "uoft-cs/cifar100", 100, "fine_label"),
        ("cifar20-superclass", "uoft-cs/cifar100", 100, "fine_label"),
    ],
)
def test_classes_are_selected_and_numbered_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, hub_id: str, n_classes: int, column: str
) -> None:
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: asked.append((a, o)) or rows_of(n_classes, column))
    data = load_training_data(dataset, cache_dir=tmp_path)
    classes = SOURCES[dataset].classes
    assert asked == [((hub_id,), {"split": "train"})]
    assert data.n_examples == 2 * len(classes) and data.contributors.n_contributors == len(classes)
    assert [classes[label] for label in data.labels] == data.images[:, 0, 0, 0].tolist()
    few = load_training_data(dataset, cache_dir=tmp_path, max_examples=2)
    assert np.array_equal(few.images, data.images[:2])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("hub:someone/art", r"hf download someone/art .*--dataset parquet \(or folder\) --data_dir"),
        ("cifar", r"hf download uoft-cs/cifar10 .*--dataset cifar --data_dir DIR"),
    ],
)
def test_the_hub_without_network_names_the_local_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, message: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=rf"cannot be fetched \(.*\); without network, fetch it elsewhere.*{message}"):
        load_training_data(dataset, cache_dir=tmp_path, image_size=8)


def test_a_part_that_the_dataset_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows_of(2, "label")
    (tmp_path / "copy").mkdir()
    table.to_parquet(tmp_path / "copy" / "train.parquet")
    load = datasets.load_dataset
    # The same call on a local copy, so that the error is the one that `datasets` raises.
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda _, split: load(str(tmp_path / "copy"), split=split, cache_dir=str(tmp_path / "cache")),
    )
    with pytest.raises(DataError, match=r"hub:a/b: --split 'test' is not one of its parts"):
        load_training_data("hub:a/b", cache_dir=tmp_path, image_size=8, split="test")


def test_names_that_are_no_hub_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected hub:OWNER/NAME"):
        load_training_data("hub:art", cache_dir=tmp_path, image_size=8)
    with pytest.raises(ConfigError, match="comes from the hub"):
        load_training_data("hub:a/b", data_dir=tmp_path, image_size=8)


def test_every_dataset_says_where_it_comes_from_and_its_licence() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name, source in SOURCES.items():
        assert source.origin and source.licence
        assert f"| `{name}` |" in page


def test_rows_in_memory_are_known_by_all_of_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(100, "label")
    changed = rows.to_dict()
    changed["img"][100] = changed["img"][99]  # far from both ends, which is all that a summary would show
    other = datasets.Dataset.from_dict(changed, features=rows.features)
    red = []
    for answer in (rows, other, rows):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, answer=answer, **__: answer)
        red.append(load_training_data("hub:a/b", cache_dir=tmp_path, image_size=32).images[100, 0, 0, 0])
    assert red == [0, 99, 0]


def test_the_version_of_datasets_runs_no_scripts() -> None:
    """Up to `datasets` 3 a dataset could bring a script that would be run."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "datasets>=4.0" in project["dependencies"]
