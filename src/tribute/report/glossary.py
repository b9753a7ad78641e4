"""The words and numbers of a report, each with its unit and its definition."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A word or a number that a report uses.

    Attributes:
        key: Its anchor.
        name: As people say it.
        unit: Of the number; empty for a word.
        definition: One to three sentences.
        short: Shown on hover, beside every such number.
    """

    key: str
    name: str
    unit: str
    definition: str
    short: str


_TERMS = (
    Term(
        "attribution",
        "Attribution (credit)",
        "the unit of the behavior",
        "How much of a measured behavior is owed to a contributor: the Shapley value, which is the average of what the "
        "contributor\u2019s examples add to all groups of others that they may join. The attributions of all "
        "contributors sum to v(everybody) less v(nobody).",
        "credit for the behavior, in its unit",
    ),
    Term(
        "behavior",
        "Behavior",
        "its own",
        "One number that is measured on the images a model generates, for example how much they resemble real ones. "
        "All credit of this report is credit for such a number.",
        "one number measured on generated images",
    ),
    Term(
        "ceiling",
        "Ceiling",
        "\u00d7 100, no unit",
        "How well one retraining predicts another one of the same coalitions with other random numbers, measured as "
        "the LDS is. Credit can exceed it only by being less noisy than a retraining.",
        "agreement of retrainings with each other, LDS times 100",
    ),
    Term(
        "coalition",
        "Coalition",
        "",
        "A group of contributors whose data a model is allowed to learn from, as if the others had never taken part.",
        "a group of contributors",
    ),
    Term(
        "contributor",
        "Contributor",
        "",
        "Someone who owns a part of the training examples and is credited for them.",
        "owner of a part of the training examples",
    ),
    Term(
        "device-hours",
        "Device time",
        "hours or minutes of one processor or GPU",
        "Time for which a device worked on the study, added up over all devices. Two devices for an hour are two "
        "device hours.",
        "time of one processor or GPU, added up",
    ),
    Term(
        "difference",
        "Difference of neighbours",
        "the unit of the behavior",
        "The attribution of a contributor less that of the one who follows in the ranking. Its interval takes into "
        "account that the errors of the two go together. Two are told apart where it excludes zero; each pair is "
        "judged by itself.",
        "credit of one less that of the next, in the unit of the behavior",
    ),
    Term(
        "empty",
        "v(nobody)",
        "the unit of the behavior",
        "The behavior of a network that has learned from nobody: its weights are random.",
        "behavior of an untrained network, in its unit",
    ),
    Term(
        "examples",
        "Examples",
        "number of training images",
        "The training images that a contributor owns.",
        "number of training images",
    ),
    Term(
        "fit-coalition",
        "Fit coalition",
        "",
        "A coalition whose behavior the attributions were computed from. Its model is made quickly, by sparsified "
        "fine-tuning.",
        "a coalition that the credit was computed from",
    ),
    Term(
        "grand",
        "v(everybody)",
        "the unit of the behavior",
        "The behavior of the model that has learned from all contributors, made by the same quick method as all "
        "others: the sparse model, fine-tuned on everybody\u2019s data.",
        "behavior with everybody\u2019s data, in its unit",
    ),
    Term(
        "interval",
        "95 % interval",
        "the unit of its number",
        "Of 100 repetitions of the study with other coalitions and other noise, about 95 would give an interval that "
        "holds the true number. Each interval is for one number by itself. It rests on a model of the behavior, and "
        "does not cover the difference between the quick models that were measured and the full model.",
        "found in a way that holds the true number 95 times of 100",
    ),
    Term(
        "kernel",
        "Attribution kernel",
        "",
        "One way to compute credit from measured coalitions: Shapley (the credit of this report), Shapley by least "
        "squares as published, datamodel (a linear model of coalitions), Banzhaf (all coalitions count alike), "
        "leave-one-out (loo: everybody but one).",
        "one way to compute credit",
    ),
    Term(
        "lds",
        "LDS (linear datamodeling score)",
        "\u00d7 100, no unit; 100 is perfect, 0 is chance",
        "The proof of the credit. Models are retrained from scratch for coalitions that the credit has not seen. The "
        "LDS is the rank correlation (Spearman) between what the credit predicts for them and what is measured.",
        "rank correlation of predicted and retrained models, times 100",
    ),
    Term(
        "loo-r2",
        "Leave-one-out R\u00b2",
        "no unit; 1 is perfect, 0 is no better than the mean",
        "The share of the variation between fit coalitions that the fit predicts when that coalition is left out. "
        "When it is low, intervals are unreliable.",
        "share of variation that the fit predicts",
    ),
    Term(
        "noise",
        "Effective noise",
        "the unit of the behavior",
        "Standard deviation of one measurement about the fitted model: noise of training and sampling, and what the "
        "model cannot describe.",
        "standard deviation of one measurement, in the unit of the behavior",
    ),
    Term(
        "payout",
        "Payout",
        "the currency of the budget",
        "The part of a budget that a stated rule assigns to a contributor by the credit. Amounts are rounded so that "
        "they sum to the budget exactly.",
        "part of the budget",
    ),
    Term(
        "pilot",
        "Pilot",
        "",
        "A few coalitions measured in both ways, by quick fine-tuning and by retraining, before the study: do the two "
        "agree?",
        "a few coalitions measured in both ways",
    ),
    Term(
        "pro-rata",
        "Pro rata",
        "percent",
        "The share of the training examples that a contributor owns: what everybody would get if only the number of "
        "images counted.",
        "share of the training examples, percent",
    ),
    Term(
        "rank",
        "Rank",
        "1 is best",
        "Place in the order of the attributions, from the contributor who improves the behavior most.",
        "place in the order of credit, 1 is best",
    ),
    Term(
        "rank-interval",
        "Possible ranks",
        "ranks, 1 is best",
        "First and last rank that a contributor may hold at the 95 % level, given the uncertainty of everybody\u2019s "
        "credit; for each contributor by itself.",
        "ranks that are possible at the 95 % level",
    ),
    Term(
        "share",
        "Share of the credit",
        "percent",
        "An attribution divided by the sum of all attributions. It can be negative, or above 100 %, where some "
        "contributors make the behavior worse.",
        "attribution divided by the sum of all, percent",
    ),
    Term(
        "sparse",
        "Sparse model",
        "",
        "The full model with a part of its network removed and then trained a little more. It is quicker, so that "
        "hundreds of coalitions can be measured.",
        "a smaller, quicker version of the full model",
    ),
    Term(
        "test-coalition",
        "Test coalition",
        "",
        "A coalition that the credit has not seen, and whose model is trained from scratch to check it.",
        "a coalition that checks the credit",
    ),
    Term(
        "training-seed",
        "Training seed",
        "",
        "The random numbers of one training. Training again with another seed gives a slightly different model.",
        "random numbers of one training",
    ),
    Term(
        "widest",
        "Widest interval",
        "percent of |v(everybody) \u2212 v(nobody)|",
        "Half the width of the widest 95 % interval among all contributors, in percent of what all of them add "
        "together.",
        "half the widest interval, percent of what all add together",
    ),
)

GLOSSARY = {term.key: term for term in _TERMS}

_BEHAVIORS = {
    "inception_score": ("Inception Score", "how recognisable and how varied the generated images are"),
    "fid": ("FID", "how far the generated images as a whole are from the real ones (Fr\u00e9chet distance)"),
    "kid": ("KID", "how far the generated images as a whole are from the real ones (kernel distance)"),
    "precision": ("Precision", "which part of the generated images looks like real ones"),
    "recall": ("Recall", "which part of the real images is like generated ones"),
    "entropy": ("Entropy", "how evenly the generated images spread over kinds of real images"),
    "diversity": ("Diversity", "how evenly the generated images spread over kinds of real images"),
    "vendi": ("Vendi score", "how many different images there are in effect"),
    "aesthetic_score": ("Aesthetic score", "how well people would rate the generated images, as a network predicts"),
}

KERNEL_NAMES = {
    "shapley": "Shapley (this report)",
    "shapley (least_squares)": "Shapley, as published",
    "datamodel": "Datamodel",
    "banzhaf": "Banzhaf",
    "loo": "Leave-one-out",
}


def behavior_words(name: str) -> tuple[str, str]:
    """What people call a behavior, and what it says of the images; names that are not known stay as they are."""
    plain, _, extractor = name.partition("@")
    base = re.sub(r"_p?\d+$", "", plain)
    if base not in _BEHAVIORS:
        return name, ""
    title, meaning = _BEHAVIORS[base]
    if number := re.search(r"_(p?)(\d+)$", plain):
        title += f", percentile {number[2]}" if number[1] else f", {number[2]} splits"
    return title + (f", seen by {extractor}" if extractor else ""), meaning


def glossary(keys: Iterable[str]) -> list[Term]:
    """Some of the terms, by name."""
    return sorted((GLOSSARY[key] for key in set(keys)), key=lambda term: term.name.casefold())
