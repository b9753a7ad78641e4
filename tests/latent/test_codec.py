"""Codecs: what diffusers itself gives, whatever the batch; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel

from tribute.config import CodecConfig, UNetConfig
from tribute.diffusion.sample import from_uint8
from tribute.errors import CheckpointError, ConfigError, TributeError
from tribute.models.codec import CodecFiles, check_codec_fits, find_codec, load_codec
from tribute.models.hub import WEIGHTS_NAME
from tribute.types import Images

SaveCodec = Callable[..., Path]


def found(folder: Path, **changes: object) -> CodecFiles:
    return find_codec(CodecConfig.parse({"path": str(folder), "factor": 2, **changes}, where="test"))


def test_vq_encodes_before_quantisation_and_decodes_after_it(codecs: dict[str, Path], photos: Images) -> None:
    pixels = from_uint8(photos)
    reference = VQModel.from_pretrained(codecs["vq"] / "vqvae").requires_grad_(False).eval()
    codec = load_codec(found(codecs["vq"]), batch_size=64)
    latents = codec.encode(pixels)
    assert latents.shape == (40, 3, 8, 8)
    with torch.inference_mode():
        expected = reference.encode(pixels).latents
        torch.testing.assert_close(latents, expected * 0.5, rtol=0, atol=0)
        torch.testing.assert_close(codec.decode(latents), reference.decode(expected).sample, rtol=0, atol=0)
        # It matters: what lies beside a code vector is drawn to it.
        plain = reference.decode(expected, force_not_quantize=True).sample
    assert (codec.decode(latents) - plain).abs().max() > 0.01


def test_kl_encodes_to_its_posterior(codecs: dict[str, Path], photos: Images) -> None:
    pixels = from_uint8(photos)
    reference = AutoencoderKL.from_pretrained(codecs["kl"] / "vae").eval()
    codec = load_codec(found(codecs["kl"]), batch_size=64)
    mean, log_variance = codec.encode(pixels).chunk(2, dim=1)
    with torch.no_grad():
        posterior = reference.encode(pixels).latent_dist
        torch.testing.assert_close(mean, posterior.mean * 0.8)
        torch.testing.assert_close(torch.exp(0.5 * log_variance), posterior.std * 0.8)
        torch.testing.assert_close(codec.decode(mean), reference.decode(posterior.mean).sample)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_the_batch_size_changes_nothing(codecs: dict[str, Path], photos: Images, kind: str) -> None:
    pixels = from_uint8(photos)
    one, three, all_at_once = (load_codec(found(codecs[kind]), batch_size=size) for size in (1, 3, 40))
    latents = all_at_once.encode(pixels)
    drawn = latents[:, :3]
    for other in (one, three):
        torch.testing.assert_close(other.encode(pixels), latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.decode(drawn), all_at_once.decode(drawn), rtol=0, atol=1e-5)


def test_a_codec_is_frozen_and_leaves_no_gradient(codecs: dict[str, Path], photos: Images) -> None:
    codec = load_codec(found(codecs["vq"]))
    assert not codec.model.training and not any(p.requires_grad for p in codec.model.parameters())
    assert not codec.encode(from_uint8(photos[:2]).requires_grad_()).requires_grad


def test_the_scaling_is_that_of_the_settings_then_of_the_codec_then_of_its_kind(
    save_codec: SaveCodec, codecs: dict[str, Path], tmp_path: Path
) -> None:
    assert found(codecs["vq"]).scaling_factor == 0.5
    assert found(codecs["vq"], scaling_factor=2.0).scaling_factor == 2.0
    for kind, expected in (("vq", 1.0), ("kl", 0.18215)):
        folder = save_codec(kind, tmp_path / kind)
        settings = json.loads((folder / "config.json").read_text())
        del settings["scaling_factor"]
        (folder / "config.json").write_text(json.dumps(settings))
        assert found(folder).scaling_factor == expected


def test_a_shifted_codec_decodes_what_it_encodes(save_codec: SaveCodec, photos: Images, tmp_path: Path) -> None:
    plain = load_codec(found(save_codec("kl", tmp_path / "plain")))
    shifted = load_codec(found(save_codec("kl", tmp_path / "shifted", shift_factor=0.3)))
    latents, moved = (codec.encode(from_uint8(photos[:4])) for codec in (plain, shifted))
    torch.testing.assert_close(moved[:, :3], latents[:, :3] - 0.3 * 0.8)
    torch.testing.assert_close(shifted.decode(moved[:, :3]), plain.decode(latents[:, :3]), rtol=0, atol=1e-5)


def test_the_fingerprint_is_of_content_not_of_place(
    save_codec: SaveCodec, codecs: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(codecs["vq"] / "vqvae", tmp_path / "copy")
    assert found(copy).fingerprint == found(codecs["vq"]).fingerprint
    others = [
        found(codecs["vq2"]),
        found(codecs["vq"], scaling_factor=1.0),
        found(save_codec("vq", tmp_path / "norm", norm_num_groups=2)),  # the same tensors, another network
    ]
    assert len({item.fingerprint for item in [found(codecs["vq"]), *others]}) == 4


@pytest.mark.parametrize("place", ["vqvae", "vae", "."])
def test_the_codec_is_found_where_pipelines_keep_it(save_codec: SaveCodec, tmp_path: Path, place: str) -> None:
    save_codec("vq", tmp_path / place)
    assert found(tmp_path).folder == tmp_path / place
    with pytest.raises(CheckpointError, match=r"config\.json .* first_stage"):
        found(tmp_path, subfolder="first_stage")


def test_a_codec_that_does_not_fit_the_network_is_refused_with_both_sizes(
    save_codec: SaveCodec, codecs: dict[str, Path], tmp_path: Path
) -> None:
    unet = UNetConfig(sample_size=8, in_channels=3)
    config = CodecConfig(path="x", factor=2)
    check_codec_fits(found(codecs["vq"]), config, unet)
    wrong = [
        (found(codecs["vq"]), config.replace(factor=4), unet, r"32x32 .* 3 channels and 16x16 .* 3 channels and 8x8"),
        (found(codecs["vq"]), config, unet.replace(in_channels=4), r"3 channels .* takes 4 channels"),
        (found(save_codec("vq", tmp_path, vq_embed_dim=5)), config, unet, "5 channels .* takes 3 channels"),
        (found(codecs["vq"]), config.replace(image_channels=1), unet, "images of 3 channels; .*image_channels 1"),
    ]
    for files, settings, network, message in wrong:
        with pytest.raises(ConfigError, match=message):
            check_codec_fits(files, settings, network)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS_NAME).rename(folder / "diffusion_pytorch_model.bin")


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()


def half_the_weights(folder: Path) -> None:
    content = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(content[: len(content) // 2])


def changed_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, "is a pickle.*use_safetensors=False.*save_pretrained.*--codec"),
        (without_weights, f"expected {WEIGHTS_NAME} .* found none"),
        (half_the_weights, "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json that is missing or damaged"),
        (changed_config(_class_name="UNet2DModel"), "expected a VQModel or a AutoencoderKL, found 'UNet2DModel'"),
        (changed_config(layers_per_block=2), "tensors of its weights are not those of its config.json"),
        (changed_config(latents_mean=[0.0] * 3), "latents_mean"),
        (shutil.rmtree, "found nothing there; give one by --codec PATH"),
    ],
)
def test_what_is_no_codec_is_refused(
    save_codec: SaveCodec, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = save_codec("vq", tmp_path / "codec")
    damage(folder)
    with pytest.raises(TributeError, match=f"(?s){message}"):
        load_codec(found(folder))


def test_a_hub_id_without_network_names_the_local_alternative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"CompVis/ldm-celebahq-256: .* hub could not be asked .* --codec PATH"):
        find_codec(CodecConfig(path="CompVis/ldm-celebahq-256", subfolder="vqvae"))
