from __future__ import annotations

import ast
import errno
import json
import logging
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tribute.config import UNetConfig
from tribute.errors import CheckpointError
from tribute.files import sha256_of_file
from tribute.models.build import build_unet
from tribute.models.checkpoint import (
    build_model,
    ckpt_name,
    delete_older,
    list_checkpoints,
    load_checkpoint,
    load_last_intact,
    load_weights,
    save_checkpoint,
)
from tribute.seeding import numpy_stream

SOURCE = Path(__file__).parents[2] / "src" / "tribute"
FILES = ("unet.safetensors", "ema.safetensors", "training_state.safetensors", "pruning.json", "config.json")


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(4, 3, generator=generator),
        "layer.bias": torch.randn(3, generator=generator),
        "transposed": torch.randn(3, 4, generator=generator).T,
        "scalar": torch.tensor(float(seed)),
    }


def save(folder: Path, n_steps: int, **changes: Any) -> Path:
    arguments = {
        "unet": tensors(n_steps),
        "ema": tensors(n_steps + 100),
        "meta": {"seconds_train": 1.5, "names": ("é", 'quote"'), "none": None, "counts": {2: 0.1, 10: 1e300}},
        "pruning": {"version": 1, "widths": {"layer": [3, 4]}},
        "training_state": tensors(n_steps + 200),
    }
    return save_checkpoint(folder, n_steps=n_steps, **{**arguments, **changes})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def equal(left: dict[str, torch.Tensor] | None, right: dict[str, torch.Tensor]) -> bool:
    return left is not None and left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 30)
    assert path == tmp_path / "ckpt_steps_00000030"
    assert {item.name for item in path.iterdir()} == set(FILES)
    found = load_checkpoint(path, with_training_state=True)
    assert equal(found.unet, tensors(30))
    assert equal(found.ema, tensors(130))
    assert equal(found.training_state, tensors(230))
    assert found.pruning == {"version": 1, "widths": {"layer": [3, 4]}}
    assert found.n_steps == 30
    assert found.meta["names"] == ["é", 'quote"']
    assert load_checkpoint(path).training_state is None


def test_a_checkpoint_needs_neither_recipe_nor_training_state(tmp_path: Path) -> None:
    found = load_checkpoint(save(tmp_path, 1, pruning=None, training_state=None), with_training_state=True)
    assert found.pruning is None
    assert found.training_state is None


def test_the_identity_of_a_model_is_its_weights_and_recipe(tmp_path: Path) -> None:
    def model_hash(**changes: Any) -> str:
        return load_checkpoint(save(tmp_path, 5, **changes)).model_hash

    same = model_hash()
    assert model_hash(meta={}, training_state=None) == same
    assert len({same, model_hash(unet=tensors(6)), model_hash(ema=tensors(6)), model_hash(pruning=None)}) == 4


def test_the_last_checkpoint_below_a_folder_is_meant(tmp_path: Path) -> None:
    for n_steps in (200, 1_000, 30):
        save(tmp_path, n_steps)
    (tmp_path / "ckpt_steps_99").mkdir()
    (tmp_path / ".ckpt_steps_00002000.123.partial").mkdir()
    (tmp_path / "ckpt_steps_00003000.damaged").mkdir()
    (tmp_path / "ckpt_steps_00004000").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == [ckpt_name(n) for n in (30, 200, 1_000)]
    assert load_checkpoint(tmp_path).n_steps == 1_000
    assert list_checkpoints(tmp_path / "missing") == []


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    """Or does no harm: the name of the checksum in config.json may be hit, but then everything else is whole."""
    path = save(tmp_path, 3)
    whole = load_checkpoint(path, with_training_state=True)
    content = (path / name).read_bytes()
    stream = numpy_stream(0, "flipped bits", name)
    n_noticed = 0
    for position in [0, len(content) - 1, *stream.integers(len(content), size=60)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(stream.integers(8))
        (path / name).write_bytes(damaged)
        try:
            found = load_checkpoint(path, with_training_state=True)
        except CheckpointError as error:
            n_noticed += 1
            assert name in str(error)
        else:
            assert whole.meta.items() <= found.meta.items()
            assert equal(found.unet, whole.unet)
    assert n_noticed >= (62 if name != "config.json" else 58)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "a folder"])
def test_half_a_file_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 3)
    content = (path / name).read_bytes()
    (path / name).unlink()
    if damage == "a folder":
        (path / name).mkdir()
    elif damage != "missing":
        (path / name).write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path, with_training_state=True)


def test_a_file_that_cannot_be_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 3)

    def fail(_: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("tribute.models.checkpoint.sha256_of_file", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        load_checkpoint(path)


def test_damaged_training_state_does_not_matter_to_those_who_do_not_resume(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (path / "training_state.safetensors").write_bytes(b"x")
    assert load_checkpoint(path).n_steps == 3


def test_a_damaged_checkpoint_is_named_and_kept_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for n_steps in (10, 20, 30):
        save(tmp_path, n_steps)
    before = snapshot(tmp_path)
    damaged = tmp_path / ckpt_name(30) / "ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / ckpt_name(20) / "config.json").unlink()
    kept = snapshot(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = load_last_intact(tmp_path)
    assert found is not None
    assert found.n_steps == 10
    warnings = [record.getMessage() for record in caplog.records]
    assert "ckpt_steps_00000030/ema.safetensors is damaged" in warnings[0]
    assert "ckpt_steps_00000030.damaged" in warnings[0]
    assert "ckpt_steps_00000020/config.json is missing" in warnings[1]
    # Nothing is lost: every file is where it was, or aside.
    renamed = {name.replace(".damaged/", "/"): content for name, content in snapshot(tmp_path).items()}
    assert renamed == kept
    assert len(kept) == len(before) - 1

    # The same place can be damaged again; what was kept first stays.
    save(tmp_path, 30)
    (tmp_path / ckpt_name(30) / "unet.safetensors").write_bytes(b"")
    found = load_last_intact(tmp_path)
    assert found is not None
    assert found.n_steps == 10
    assert {path.name for path in tmp_path.iterdir()} == {
        "ckpt_steps_00000010",
        "ckpt_steps_00000020.damaged",
        "ckpt_steps_00000030.damaged",
        "ckpt_steps_00000030.damaged-2",
    }


def test_without_an_intact_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert load_last_intact(tmp_path / "missing") is None
    (save(tmp_path, 10) / "config.json").write_text("[]")
    assert load_last_intact(tmp_path) is None
    assert (tmp_path / "ckpt_steps_00000010.damaged" / "unet.safetensors").exists()


def test_a_newer_format_is_not_damage(tmp_path: Path) -> None:
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    meta = json.loads((path / "config.json").read_text())
    del meta["sha256"]
    (path / "config.json").write_text(json.dumps({**meta, "format_version": 99}))
    for load in (load_checkpoint, load_last_intact):
        with pytest.raises(CheckpointError, match=r"format 99.*upgrade"):
            load(tmp_path)
    assert path.is_dir()


def test_delete_older_keeps_everything_else(tmp_path: Path) -> None:
    for n_steps in (10, 20, 30):
        save(tmp_path, n_steps)
    shutil.copytree(tmp_path / ckpt_name(10), tmp_path / f"{ckpt_name(10)}.damaged")
    (tmp_path / "notes.txt").write_text("mine")
    delete_older(tmp_path, tmp_path / ckpt_name(20))
    assert {path.name for path in tmp_path.iterdir()} == {
        ckpt_name(20),
        ckpt_name(30),
        f"{ckpt_name(10)}.damaged",
        "notes.txt",
    }


def no_space(write_half: Callable[..., None]) -> Callable[..., None]:
    def save_file(values: dict[str, torch.Tensor], filename: Path) -> None:
        if filename.name == "ema.safetensors":
            filename.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_half(values, filename)

    return save_file


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    before = snapshot(tmp_path)
    monkeypatch.setattr("safetensors.torch.save_file", no_space(safetensors.torch.save_file))
    for n_steps in (10, 20):  # over an older one, and beside it
        with pytest.raises(CheckpointError, match=r"could not be written.*No space left.*--outdir"):
            save(tmp_path, n_steps, unet=tensors(99))
        assert snapshot(tmp_path) == before


def save_with_small_files(folder: Path) -> str:
    """Save one checkpoint that fits and one that does not, under the kernel's limit on the size of a file."""
    save(folder, 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_192, 8_192))
    try:
        save(folder, 20, ema={"large": torch.zeros(10_000)})
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


def test_a_refusal_of_the_kernel_leaves_what_was_there(tmp_path: Path, in_new_process: Callable[..., Any]) -> None:
    message = in_new_process(save_with_small_files, tmp_path)
    assert "ckpt_steps_00000020 could not be written" in message
    assert [path.name for path in tmp_path.iterdir()] == [ckpt_name(10)]
    assert load_checkpoint(tmp_path).n_steps == 10


def test_what_cannot_be_loaded_is_explained(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "unet.bin").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "half" / ckpt_name(3)).mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for name, expected in {
        "missing": r"no checkpoint at .*missing.*expected a folder ckpt_steps_",
        "empty": r"empty holds no checkpoint; expected a folder named like ckpt_steps_",
        "model.pt": r"model\.pt is a pickle, which can run code.*safetensors",
        "pickles": r"pickles \(unet\.bin, \.\.\.\), which can run code.*safetensors",
        "notes.txt": r"notes\.txt is a file; expected a checkpoint folder",
        "half": r"config\.json is missing or damaged",
        "other": r"config\.json is missing or damaged",
    }.items():
        with pytest.raises(CheckpointError, match=expected):
            load_checkpoint(tmp_path / name)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_in_the_place_of_weights_is_not_opened(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (path / "unet.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    meta = json.loads((path / "config.json").read_text())
    del meta["sha256"]
    meta["files"]["unet.safetensors"] = sha256_of_file(path / "unet.safetensors")
    (path / "config.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_architecture_are_refused(tmp_path: Path, unet_config: UNetConfig) -> None:
    model = build_unet(unet_config)
    wide = unet_config.replace(block_out_channels=(16, 16))
    weights = model.state_dict()
    path = save(tmp_path, 3, unet=weights, ema=weights, meta={"unet": wide.model_dump(mode="json")}, pruning=None)
    with pytest.raises(CheckpointError, match=r"another architecture.*expected \(.*\), found \("):
        build_model(load_checkpoint(path))
    with pytest.raises(CheckpointError, match=r"1 tensors differ.*conv_in\.bias.*found nothing"):
        load_weights(model, {k: v for k, v in weights.items() if k != "conv_in.bias"}, where=path)
    with pytest.raises(CheckpointError, match=r"expected nothing, found \(1,\)"):
        load_weights(model, {**weights, "extra": torch.zeros(1)}, where=path)


def test_a_model_comes_back_with_the_weights_asked_for(tmp_path: Path, unet_config: UNetConfig) -> None:
    raw, average = build_unet(unet_config, opt_seed=1).state_dict(), build_unet(unet_config, opt_seed=2).state_dict()
    meta = {"unet": unet_config.model_dump(mode="json")}
    checkpoint = load_checkpoint(save(tmp_path, 3, unet=raw, ema=average, meta=meta, pruning=None))
    model = build_model(checkpoint)
    assert equal(model.state_dict(), average)
    assert not model.training
    assert equal(build_model(checkpoint, use_ema=False).state_dict(), raw)


def calls(tree: ast.AST) -> set[str]:
    """Dotted names that a module calls, and keywords that are not switched off.

    `torch.load(..., weights_only=True)` builds tensors and runs nothing, so it is no such call.
    """
    made = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = {ast.unparse(node.func) for node in made if "weights_only=True" not in map(ast.unparse, node.keywords)}
    keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    return found | {node.arg for node in keywords if node.arg and ast.unparse(node.value) != "False"}


def imports(tree: ast.AST) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


UNSAFE_CALLS = {"torch.load", "torch.save", "tp.load", "tp.save", "tp.load_state_dict", "tp.state_dict", "allow_pickle"}
# Tensors that were read safely are handed to torch-fidelity, in memory, in the only form that it takes.
ALLOWED_CALLS = {"fidelity.py": {"torch.save"}}
UNSAFE_IMPORTS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def test_nothing_in_the_package_reads_or_writes_a_pickle() -> None:
    modules = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    assert len(modules) > 20
    for path, tree in modules.items():
        assert not calls(tree) & UNSAFE_CALLS - ALLOWED_CALLS.get(path.name, set()), path
        assert not imports(tree) & UNSAFE_IMPORTS, path
    assert not calls(ast.parse("torch.load(p, weights_only=True)")) & UNSAFE_CALLS
    unsafe = ast.parse("import pickle\ndef f(): torch.load(p, weights_only=False); np.load(p, allow_pickle=True)")
    assert calls(unsafe) & UNSAFE_CALLS == {"torch.load", "allow_pickle"}
    assert imports(unsafe) & UNSAFE_IMPORTS == {"pickle"}
