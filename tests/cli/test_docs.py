"""The documentation agrees with the code: flags, settings, defaults, commands, links."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from tribute.cli import COMMANDS, arguments, main
from tribute.cli.arguments import SourceArguments
from tribute.config import Preset, StudyConfig, TrainConfig, preset_names
from tribute.data.sources import DataRequest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLI_PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")

COMMAND_OF_SCRIPT = {"main.py": "train", "prune.py": "prune", "unlearn.py": "unlearn", "lds.py": "lds"}
SHARED_SECTIONS = {
    "Machine and output": arguments.CommonArguments,
    "Data": arguments.SourceArguments,
    "Coalition": arguments.RemovalArguments,
    "Training": arguments.PublishedTrainingArguments,
    "Features": arguments.FeatureArguments,
    "Runtime": arguments.RuntimeArguments,
}


def arguments_class(command: str) -> type[arguments.Arguments]:
    """The flags of a command."""
    module = importlib.import_module(f"tribute.cli.{command}_command")
    return getattr(module, f"{command.capitalize()}Arguments")


def section(title: str) -> str:
    """Text below a heading of the command-line page, up to the next heading."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", CLI_PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/cli.md has no section {title!r}"
    return found[1]


def documented(title: str) -> dict[str, str]:
    """Names and defaults in the three-column tables of a section."""
    rows = re.findall(r"^\| `(?:--)?([A-Za-z0-9_.]+)` \| ([^|]*) \| [^|]+ \|$", section(title), re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows), f"{title}: a name occurs twice"
    return dict(rows)


def shown(field: Any) -> str:
    """A field's default as the tables write it."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return f"`[{', '.join(str(item) for item in default)}]`"
    return f"`{default}`"


def own_defaults(model: type[BaseModel]) -> dict[str, str]:
    """Defaults of the fields that the class declares itself."""
    return {name: shown(model.model_fields[name]) for name in model.__annotations__ if name in model.model_fields}


def dotted_defaults(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Defaults of a settings model by dotted name; nested models are opened."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= dotted_defaults(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = shown(field)
    return found


@pytest.mark.parametrize("title", SHARED_SECTIONS)
def test_shared_flags_and_defaults_are_those_of_the_code(title: str) -> None:
    assert documented(title) == own_defaults(SHARED_SECTIONS[title])


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_and_defaults_of_a_command_are_those_of_the_code(command: str) -> None:
    flags = arguments_class(command)
    assert documented(f"tribute {command}") == own_defaults(flags)
    linked = [title for title, shared in SHARED_SECTIONS.items() if slug(title) in section(f"tribute {command}")]
    inherited = [title for title, shared in SHARED_SECTIONS.items() if issubclass(flags, shared)]
    assert linked == inherited


def test_study_keys_and_defaults_are_those_of_the_code() -> None:
    assert documented("Study file") == dotted_defaults(StudyConfig)


def test_preset_keys_and_defaults_are_those_of_the_code() -> None:
    expected = dotted_defaults(Preset)
    del expected["training"], expected["ckpt_freq"]
    expected |= dotted_defaults(TrainConfig, "training.METHOD.")
    found = documented("Presets")
    assert found.pop("ckpt_freq.METHOD")
    assert found == expected


def test_settings_in_examples_are_valid() -> None:
    blocks = [text for page in PAGES for text in code_blocks(page, "yaml")]
    assert blocks
    for text in blocks:
        StudyConfig.parse(yaml.safe_load(text), where="documentation")


def code_blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def documented_commands(page: Path) -> Iterator[list[str]]:
    """Every `python SCRIPT ...` and `tribute COMMAND ...` of a page, as bash passes them on."""
    stubs = "say() { printf '%s\\n' \"$(printf '%s\\x1f' \"$@\")\"; }\n"
    stubs += (
        'python() { say python "$@"; }; tribute() { say tribute "$@"; }; make() { :; }; pip() { :; }; hf() { :; }\n'
    )
    for block in code_blocks(page, "sh"):
        if re.search(r"\b(python \w+\.py|tribute )", block):
            done = subprocess.run(["bash", "-euc", stubs + block], capture_output=True, text=True, check=True)
            seen = set()
            for line in done.stdout.splitlines():
                alike = re.sub(r"\d+", "0", line)
                if alike not in seen:
                    seen.add(alike)
                    yield line.split("\x1f")[:-1]


@pytest.mark.skipif(shutil.which("bash") is None, reason="the documentation's commands are for bash")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_have_valid_flags(page: Path) -> None:
    for program, name, *argv in documented_commands(page):
        command = COMMAND_OF_SCRIPT[name] if program == "python" else name
        parsed = arguments.parse(arguments_class(command), argv, prog=name, description="")
        assert isinstance(parsed, arguments_class(command))


@pytest.mark.skipif(shutil.which("bash") is None, reason="the documentation's commands are for bash")
def test_the_commands_of_the_documentation_are_found() -> None:
    found = [(program, name) for page in PAGES for program, name, *_ in documented_commands(page)]
    assert {("python", script) for script in COMMAND_OF_SCRIPT} <= set(found)
    assert ("tribute", "run") in found


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_commands_in_the_comments_of_examples_run_as_far_as_their_settings(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags are known, and what needs neither data nor network succeeds."""
    commands = re.findall(r"^#   tribute (\w+) (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert ("run", f"examples/{path.name}") in commands
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("used the network"))
    for command, flags in commands:
        parsed = arguments.parse(arguments_class(command), shlex.split(flags), prog=command, description="")
        if command == "run":
            main("run", [*shlex.split(flags), "--dry_run"])
            settings = yaml.safe_load(capsys.readouterr().out)
            assert settings["study"]["name"] == yaml.safe_load(path.read_text(encoding="utf-8"))["name"]
        else:
            assert isinstance(parsed, SourceArguments)
            source = parsed.source()
            size = source.image_size or parsed.load_preset(source.dataset).image_size
            assert DataRequest(**{**dict(source), "image_size": size}).rule.image_size == size


@pytest.mark.parametrize("name", ["cifar20", "celeba"])
def test_the_large_examples_compute_in_the_precision_that_their_cost_supposes(name: str) -> None:
    preset = StudyConfig.from_yaml(ROOT / "examples" / f"{name}.yaml").load_preset()
    assert {training.mixed_precision for training in preset.training.values()} == {"bf16"}
    assert preset.sampling.mixed_precision == "bf16"


def test_every_preset_has_its_line() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \| [^|]+ \|$", section("Presets"), re.MULTILINE)
    assert listed == preset_names()


def test_python_examples_import_what_exists() -> None:
    blocks = [text for page in PAGES for text in code_blocks(page, "python")]
    assert blocks
    for text in blocks:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def slug(heading: str) -> str:
    """Anchor of a heading, as GitHub makes it."""
    return "#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        if not linked.exists():
            broken.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            if f"#{anchor}" not in [slug(heading) for heading in headings]:
                broken.append(target)
    assert broken == []
