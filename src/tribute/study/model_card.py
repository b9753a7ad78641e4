"""The section "Training-data credit" of a model card: who contributed what to a model, and what that means."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from tribute.errors import StoreError

MAX_NAME_LENGTH = 80

_CITATION = "Lin et al. (2025), [arXiv:2407.03153](https://arxiv.org/abs/2407.03153)"
_LIMITS = """\
- Credit is about this measured behavior of models made by this procedure. Another behavior gives other credit.
- It is not evidence that any image was copied from, or resembles, anyone's data, and it is not legal advice.
- Intervals cover the choice of coalitions and the noise of training; not the difference between the sparse models that
  were measured and the model of this card, for which the LDS is the evidence.
- Shares are of the sum of all credit; where it is small beside its noise, or credit has both signs, they say little."""


def model_card(run_dir: Path, *, title: str, usage: str | None = None) -> str:
    """A model card: front matter for the hub, how to load the model, and the credit found by a study.

    Args:
        run_dir: Run folder of a finished study.
        title: Name of the model.
        usage: Python that loads the model.
    """
    parts = ["---\nlibrary_name: diffusers\ntags:\n- diffusers\n- training-data-credit\n---", f"# {escape(title)}"]
    if usage:
        parts.append(f"```python\n{usage}\n```")
    return "\n\n".join([*parts, credit_section(run_dir)]) + "\n"


def credit_section(run_dir: Path) -> str:
    """The section "Training-data credit" in Markdown, from `summary.json` of a run folder.

    Raises:
        StoreError: The file is missing or is not one that this version wrote.
    """
    path = run_dir / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        names = [str(item["name"]) for item in summary["contributors"]]
        n_examples = [int(item["n_examples"]) for item in summary["contributors"]]
        tables = [_behavior(name, found, names, n_examples) for name, found in summary["behaviors"].items()]
        version = summary["provenance"]["tribute"]
    except FileNotFoundError as error:
        raise StoreError(
            f"--run: {run_dir} holds no summary.json; expected the run folder of a finished study, "
            "as `tribute run` writes"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise StoreError(f"{path} cannot be read as the summary of a study ({error}); run the study again") from error
    return "\n\n".join(
        [
            "## Training-data credit",
            f"Credit of the {len(names)} contributors of the training data, by the study "
            f"{escape(str(summary['name']))} of Tribute {escape(str(version))}.",
            *tables,
            "**Method.** Shapley values of the behavior over coalitions of contributors. The behavior of "
            f"a coalition is measured on a pruned model that is fine-tuned on its data alone (sparsified fine-tuning: "
            f"{_CITATION}).",
            f"**Limits.**\n\n{_LIMITS}",
        ]
    )


def escape(text: str) -> str:
    """Untrusted text as plain text in Markdown and HTML, on one line, of bounded length.

    All but letters, digits and spaces become character references, which no renderer takes for markup, a link or a
    cell of a table. Control and format characters, that may reorder what stands around them, become spaces.
    """
    plain = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text)
    plain = " ".join(plain.split())
    if len(plain) > MAX_NAME_LENGTH:
        plain = plain[: MAX_NAME_LENGTH - 1] + "\u2026"
    return "".join(char if char.isalnum() or char == " " else f"&#{ord(char)};" for char in plain) or "(no name)"


def _behavior(name: str, found: dict[str, Any], names: list[str], n_examples: list[int]) -> str:
    """Table and facts of one behavior, the contributor who improves it most first."""
    fitted = found["attributions"]["shapley"]
    values, shares, intervals = fitted["values"], fitted["shares"], fitted["intervals_95"]
    sign = 1 if found.get("higher_is_better", True) else -1
    rows = [
        f"| {escape(names[i])} | {n_examples[i]:,} | {_number(values[i])} | {_interval(intervals[i])} | "
        f"{'-' if shares[i] is None else f'{shares[i]:.1%}'} |"
        for i in np.argsort([-sign * value for value in values], kind="stable")
    ]
    facts = [
        f"v(nobody) = {_number(float(np.mean(found['v_empty'])))}, "
        f"v(everybody) = {_number(float(np.mean(found['v_grand'])))}",
        f"estimator {escape(fitted['estimator'])} on {fitted['n_coalitions']} coalitions",
        _lds(found),
    ]
    direction = "higher is better, so positive credit improves it"
    if sign < 0:
        direction = "lower is better, so negative credit improves it"
    table = ["| contributor | images | attribution | 95 % interval | share |", "|---|---:|---:|---:|---:|", *rows]
    notes = f"\n\n**Warning:** {escape_sentence(fitted['warning'])}" if fitted.get("warning") else ""
    return f"### {escape(name)} ({direction})\n\n" + "\n".join(table) + f"\n\n{'; '.join(facts)}.{notes}"


def escape_sentence(text: str) -> str:
    """A sentence of ours, which may be longer than a name."""
    return " ".join(escape(word) for word in text.split())


def _lds(found: dict[str, Any]) -> str:
    """How well the credit predicts retrained models."""
    score = found.get("lds", {}).get("shapley")
    if score is None or score["mean"] is None:
        return "not validated on retrained models"
    low, high = (100 * value for value in score["interval_95"])
    return (
        f"linear datamodeling score (LDS) x 100 on {found['n_test_coalitions']} retrained test coalitions: "
        f"{100 * score['mean']:.1f} ({low:.1f} to {high:.1f})"
    )


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _interval(bounds: list[float | None]) -> str:
    low, high = (_number(value) for value in bounds)
    return "-" if "-" in (low, high) else f"{low} to {high}"
