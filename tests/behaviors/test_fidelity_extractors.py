"""InceptionV3 and VGG16 of torch-fidelity, with a stand-in for that package, which needs torchvision."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tribute.behaviors.base import behavior_variant, get_behavior
from tribute.behaviors.extractors import fidelity, load_extractor
from tribute.behaviors.extractors.network import NetworkExtractor
from tribute.config import FeatureConfig
from tribute.errors import BehaviorError
from tribute.types import Images


class StandIn(torch.nn.Module):
    """Has the interface of torch-fidelity's extractors; means of pixels take the place of activations."""

    asked: tuple[str, list[str]]

    def __init__(self, name: str, layers: list[str], feature_extractor_weights_path: Any) -> None:
        super().__init__()
        type(self).asked = (name, layers)
        self.fc = torch.nn.Linear(3, 4, bias=False)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
        means = pixels.float().mean(dim=(2, 3)) / 255
        outputs = {"2048": means, "logits_unbiased": self.fc(means), "fc2_relu": self.fc(means).relu()}
        return tuple(outputs[layer] for layer in self.asked[1])


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("torch_fidelity")
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    for end, name in (("inceptionv3", "FeatureExtractorInceptionV3"), ("vgg16", "FeatureExtractorVGG16")):
        module = ModuleType(f"torch_fidelity.feature_extractor_{end}")
        setattr(module, name, StandIn)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.arange(12.0).reshape(4, 3)}, path)
    return path


@pytest.fixture
def images(digits: tuple[Images, np.ndarray]) -> Images:
    return digits[0][:20]


def loaded(name: str, path: Path, **settings: Any) -> NetworkExtractor:
    found = load_extractor(name, FeatureConfig(weights={name: path}, **settings))
    assert isinstance(found, NetworkExtractor)
    return found


@pytest.mark.usefixtures("torch_fidelity")
def test_inception_gives_pooled_activations_and_probabilities(images: Images, weights: Path) -> None:
    extractor = loaded("inception", weights, batch_size=7)
    assert StandIn.asked == ("inception", ["2048", "logits_unbiased"])
    found = extractor.extract(images)
    means = images.mean(axis=(1, 2)).repeat(3, axis=1) / 255
    np.testing.assert_allclose(found.embeddings, means, rtol=1e-5)
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
    expected = torch.from_numpy(means @ np.arange(12.0).reshape(4, 3).T).softmax(dim=1)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-4)


@pytest.mark.usefixtures("torch_fidelity")
def test_vgg16_gives_the_dense_layer_without_probabilities(images: Images, weights: Path) -> None:
    found = loaded("vgg16", weights).extract(images)
    assert StandIn.asked == ("vgg16", ["fc2_relu"])
    assert found.embeddings.shape == (20, 4) and found.probabilities is None


@pytest.mark.usefixtures("torch_fidelity")
def test_the_variant_names_network_weights_resizer_and_splits(weights: Path) -> None:
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    score, precision = get_behavior("inception_score_10@inception"), get_behavior("precision@vgg16")
    assert score.name == "inception_score_10@inception"
    assert behavior_variant(score, loaded("inception", weights)) == (
        f"inception {sha256[:12]}, TensorFlow 1 bilinear to 299x299; 10 splits"
    )
    assert behavior_variant(precision, loaded("vgg16", weights)) == (
        f"vgg16 {sha256[:12]}, TensorFlow 1 bilinear to 224x224; k = 3; at most 10000 real images"
    )


@pytest.mark.usefixtures("torch_fidelity")
def test_loading_leaves_the_global_random_state_alone(weights: Path) -> None:
    before = torch.get_rng_state()
    loaded("inception", weights)
    assert torch.equal(torch.get_rng_state(), before)


def explode() -> None:
    pytest.fail("code in a weights file was run")


class Bomb:
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return explode, ()


@pytest.mark.usefixtures("torch_fidelity")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": Bomb()}, "without running code"),
        ([torch.zeros(3)], "tensors by name, a state dict; found list"),
        ({"fc.weight": torch.zeros(2, 2)}, r"do not fit the network 'inception'.*6726825d\.pth"),
    ],
)
def test_weights_that_are_not_the_networks_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(BehaviorError, match=message):
        loaded("inception", tmp_path / "wrong.pth")


@pytest.mark.usefixtures("torch_fidelity")
def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BehaviorError, match=r"No weights at .*absent\.pth"):
        loaded("inception", tmp_path / "absent.pth")
    for name in ("half.safetensors", "half.pth"):
        (tmp_path / name).write_bytes(b"half a file")
        with pytest.raises(BehaviorError, match=f"{name} cannot be read"):
            loaded("inception", tmp_path / name)


@pytest.mark.parametrize(("name", "module"), fidelity._MODULES.items())
@pytest.mark.parametrize("damage", [None, RuntimeError("operator torchvision::nms does not exist")])
def test_without_the_packages_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, weights: Path, name: str, module: str, damage: Exception | None
) -> None:
    def broken(_: str) -> None:
        assert damage is not None
        raise damage

    if damage is None:
        monkeypatch.setitem(sys.modules, f"torch_fidelity.{module}", None)
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    else:
        monkeypatch.setattr(fidelity, "import_module", broken)
    install = rf"torch {torch.__version__.replace('+', '.')}.*pip install 'tribute\[fidelity\]' torchvision=="
    with pytest.raises(BehaviorError, match=f"'{name}' needs torch-fidelity.*{install}"):
        loaded(name, weights)


@pytest.mark.usefixtures("torch_fidelity")
def test_without_network_the_message_names_the_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(BehaviorError, match=r"not known.*weights-inception.*--feature_weights inception=PATH"):
        load_extractor("inception", FeatureConfig())


@pytest.mark.usefixtures("torch_fidelity")
def test_a_download_that_is_not_the_published_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").write_bytes(b"something else")
    with pytest.raises(BehaviorError, match="begins with 397923af; found"):
        load_extractor("vgg16", FeatureConfig())
