"""CLIP and BLIP image encoders: tiny random models in the Hugging Face format, on real images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tribute.behaviors.extractors import hugging_face, load_extractor
from tribute.behaviors.extractors.network import NetworkExtractor
from tribute.config import FeatureConfig
from tribute.errors import BehaviorError, ConfigError
from tribute.types import Images

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 50, "max_position_embeddings": 16}
MARKS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Folders of models: whole ones, image encoders alone, and one with pickled weights."""
    from transformers import (
        BlipConfig,
        BlipForQuestionAnswering,
        CLIPConfig,
        CLIPModel,
        CLIPVisionModelWithProjection,
    )

    root = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]), hugging_face._quiet():
        torch.manual_seed(0)
        vision = VISION | {"projection_dim": 12, "initializer_factor": 3.0}
        clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=12))
        clip.save_pretrained(root / "clip")
        encoder = CLIPVisionModelWithProjection.from_pretrained(root / "clip")
        encoder.save_pretrained(root / "clip encoder")
        vision = VISION | {"initializer_range": 0.2}
        blip = BlipForQuestionAnswering(
            BlipConfig(vision_config=vision, text_config=TEXT | MARKS | {"encoder_hidden_size": 16}, projection_dim=12)
        )
        blip.save_pretrained(root / "blip")
        blip.vision_model.save_pretrained(root / "blip encoder")
    pickled = root / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((root / "clip" / "config.json").read_bytes())
    torch.save(clip.state_dict(), pickled / "pytorch_model.bin")
    yield {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def images() -> Images:
    """Sixteen crops of real photographs, `(16, 40, 56, 3)`."""
    from sklearn.datasets import load_sample_images

    crops = [
        photo[row : row + 40, column : column + 56]
        for photo in load_sample_images().images
        for row in (0, 100, 200, 300)
        for column in (0, 300)
    ]
    return np.stack(crops)


def extractor_of(folder: Path, name: str, **settings: Any) -> NetworkExtractor:
    found = load_extractor(name, FeatureConfig(models={name: str(folder)}, **settings))
    assert isinstance(found, NetworkExtractor)
    return found


@pytest.mark.parametrize(("name", "width"), [("clip", 12), ("blip", 16)])
def test_row_i_is_of_image_i_whatever_the_batch(saved, images: Images, name: str, width: int) -> None:
    whole = extractor_of(saved[name], name).extract(images)
    assert whole.embeddings.shape == (16, width) and whole.probabilities is None
    assert whole.embeddings.std(axis=0).min() > 1e-3, "images must be told apart"
    small = extractor_of(saved[name], name, batch_size=3).extract(images[::-1])
    np.testing.assert_allclose(small.embeddings[::-1], whole.embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "blip"])
def test_an_encoder_alone_is_the_same_extractor(saved, images: Images, name: str) -> None:
    whole, alone = extractor_of(saved[name], name), extractor_of(saved[f"{name} encoder"], name)
    assert whole.fingerprint == alone.fingerprint
    np.testing.assert_array_equal(whole.extract(images).embeddings, alone.extract(images).embeddings)


@pytest.mark.parametrize("name", ["clip", "blip"])
def test_features_are_those_of_transformers_own_preparation(saved, images: Images, name: str) -> None:
    from transformers import (
        BlipForQuestionAnswering,
        BlipImageProcessorPil,
        CLIPImageProcessorPil,
        CLIPModel,
    )

    pictures = [Image.fromarray(image) for image in images]
    with hugging_face._quiet(), torch.inference_mode():
        if name == "clip":
            processor = CLIPImageProcessorPil(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_convert_rgb=True
            )
            pixels = processor(pictures, return_tensors="pt")["pixel_values"]
            expected = CLIPModel.from_pretrained(saved[name]).eval().get_image_features(pixels).pooler_output
        else:
            processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
            pixels = processor(pictures, return_tensors="pt")["pixel_values"]
            expected = BlipForQuestionAnswering.from_pretrained(saved[name]).eval().vision_model(pixels).pooler_output
    found = extractor_of(saved[name], name).extract(images).embeddings
    error = np.abs(found - expected.numpy()).max() / np.abs(expected.numpy()).max()
    assert error < 0.01


def test_grey_images_are_grey_colours(saved, images: Images) -> None:
    extractor, grey = extractor_of(saved["clip"], "clip"), images[..., :1]
    np.testing.assert_array_equal(
        extractor.extract(grey).embeddings, extractor.extract(grey.repeat(3, axis=3)).embeddings
    )


def test_other_weights_are_another_extractor(saved, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_bytes((saved["clip"] / "config.json").read_bytes())
    weights = load_file(saved["clip"] / "model.safetensors")
    weights["visual_projection.weight"][0, 0] += 1e-3
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert extractor_of(changed, "clip").fingerprint != extractor_of(saved["clip"], "clip").fingerprint


def test_pickled_weights_are_refused(saved) -> None:
    with pytest.raises(BehaviorError, match=r"'clip' cannot be loaded.*never unpickled"):
        extractor_of(saved["pickled"], "clip")


@pytest.mark.parametrize(("folder", "name"), [("blip", "clip"), ("clip", "blip")])
def test_a_model_of_another_kind_is_refused(saved, folder: str, name: str) -> None:
    with pytest.raises(BehaviorError, match=f"'{name}'.*--feature_models {name}=FOLDER"):
        extractor_of(saved[folder], name)


def test_incomplete_weights_are_refused(saved, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((saved["clip"] / "config.json").read_bytes())
    weights = load_file(saved["clip"] / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BehaviorError, match=r"lacks 1 weights.*visual_projection.*would be random"):
        extractor_of(tmp_path, "clip")


def test_the_hub_without_network_names_the_local_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPVisionModelWithProjection

    asked: dict[str, Any] = {}

    def offline(model: str, **options: Any) -> None:
        asked.update(options, model=model)
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(CLIPVisionModelWithProjection, "from_pretrained", offline)
    with pytest.raises(BehaviorError, match=r"couldn't connect.*Without network.*--feature_models clip=FOLDER"):
        load_extractor("clip", FeatureConfig())
    assert asked["model"] == "openai/clip-vit-large-patch14" and asked["use_safetensors"]
    assert len(asked["revision"]) == 40


@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
def test_a_model_of_the_hub_needs_a_commit(revision: str | None) -> None:
    revisions = {} if revision is None else {"clip": revision}
    with pytest.raises(ConfigError, match=r"40 digits of a commit.*someone/clip.*--feature_revisions clip=COMMIT"):
        load_extractor("clip", FeatureConfig(models={"clip": "someone/clip"}, revisions=revisions))


def test_without_transformers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, saved) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(BehaviorError, match=r"pip install 'tribute\[clip\]'"):
        extractor_of(saved["clip"], "clip")
