"""Pictures of a study: images of the full model, of the sparse one, and of models without the top contributors.

Image i starts from the same noise in every picture, so pictures can be compared place by place. They are made at the
end of `tribute run` and lie in `samples/` of the run folder, with `pictures.json` beside them. Reading them needs no
PyTorch; nothing that is there and still true is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tribute.config import fingerprint
from tribute.errors import StoreError
from tribute.files import sha256_of_file, write_whole
from tribute.games.coalitions import mask_from_idx
from tribute.store.records import ClaimedEvaluation, EvaluationSpec, Store
from tribute.study.outputs import credit_order, direction, image_grid_png
from tribute.types import Images

if TYPE_CHECKING:
    from tribute.models.checkpoint import Checkpoint
    from tribute.study.listener import Listener
    from tribute.study.results import BehaviorResult, StudyResult
    from tribute.study.session import StudySession
    from tribute.study.value_function import Evaluation

logger = logging.getLogger(__name__)

FOLDER = "samples"
FILE_NAME = "pictures.json"
SCHEMA = "tribute.pictures/1"
ROLE = "picture"
"""Role of the evaluations that are measured for a picture; attributions are not fitted to them."""
REMOVAL_DIST = "picture"
"""Stands where other evaluations name the law of their coalition. Without a law one would be taken for v(grand)."""
MAX_BEHAVIORS = 3
"""Pictures without the top contributors, each of which takes one more fine-tuning."""
N_COLUMNS = 8

TOP_RULE = (
    "the quarter of the contributors with the most credit, rounded up, at most half of them, and none without credit"
)
"""Who is left out of the pictures without the top contributors."""


@dataclass(frozen=True)
class Picture:
    """A grid of generated images.

    Attributes:
        kind: `full`, `sparse` or `without_top`.
        path: The PNG.
        caption: What it shows, without names of contributors.
        behavior: `without_top`: whose top contributors are left out; None otherwise.
        removed_idx: Contributors whose data the model was not fine-tuned on, the one with the most credit first.
        n_images: How many; image i starts from the same noise in every picture.
        columns: Images per row.
        behaviors: Measured behaviors of the model, by name, over all images of an evaluation; empty for `full`, which
            is not measured.
        sha256: Of the file.
        evaluation: Identity of the model's evaluation in the store; None for `full`.
        model_hash: Of the full model; else of the sparse model that was fine-tuned.
        source: SHA-256 of all that determines the picture.
    """

    kind: str
    path: Path
    caption: str
    behavior: str | None
    removed_idx: tuple[int, ...]
    n_images: int
    columns: int
    behaviors: dict[str, float] = field(repr=False)
    sha256: str = field(repr=False)
    evaluation: str | None = field(repr=False)
    model_hash: str = field(repr=False)
    source: str = field(repr=False)


def top_contributors(result: BehaviorResult) -> tuple[int, ...]:
    """Who is left out to show what they gave: see `TOP_RULE`; the one with the most credit first.

    None of a single contributor, and none where nobody's estimated credit is above zero.
    """
    credit = result.attributions["shapley"].values * direction(result)
    n_contributors = len(credit)
    n_top = min(-(-n_contributors // 4), n_contributors // 2)
    return tuple(int(i) for i in credit_order(result)[:n_top] if credit[i] > 0)


def file_name(behavior_name: str) -> str:
    """Name of the picture without a behavior's top contributors, for any file system.

    Behaviors are named after modules and extractors (`my.module:function`, `fid@inception`); where a name had to be
    changed, a hash of it keeps two apart.
    """
    plain = re.sub(r"[^a-z0-9._-]+", "_", behavior_name.lower()).strip("._")[:60]
    if plain != behavior_name:
        plain = f"{plain}-{hashlib.sha256(behavior_name.encode()).hexdigest()[:8]}"
    return f"without_top_{plain}.png"


def read_pictures(run_dir: Path) -> list[Picture]:
    """The pictures of a run folder, without those whose file is gone or is not the one that was recorded.

    Raises:
        StoreError: `pictures.json` cannot be read.
    """
    path = run_dir / FOLDER / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"expected the schema {SCHEMA}, found {content['schema']}")
        pictures = [_picture(item, path.parent) for item in content["pictures"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} cannot be read as the pictures of a study ({error!r}); remove it, and tribute run makes them again"
        ) from error
    return [picture for picture in pictures if _is_whole(picture)]


def _picture(values: dict[str, Any], folder: Path) -> Picture:
    """A picture from its record; its file lies in the folder itself."""
    values = dict(values)
    name = values.pop("file")
    if not isinstance(name, str) or name != Path(name).name:
        raise ValueError(f"expected the name of a file beside it, found {name!r}")
    values["removed_idx"] = tuple(int(i) for i in values["removed_idx"])
    return Picture(path=folder / name, **values)


def _is_whole(picture: Picture) -> bool:
    return picture.path.is_file() and sha256_of_file(picture.path) == picture.sha256


def make_pictures(
    session: StudySession,
    full: Checkpoint,
    sparse: Checkpoint,
    grand: EvaluationSpec,
    store: Store,
    study_id: int,
    result: StudyResult,
    listener: Listener,
    *,
    go_on_for: Callable[[Sequence[int]], Callable[[], bool]] = lambda evaluation_ids: lambda: True,
) -> list[Picture]:
    """Make the pictures of a study, or those of them that are not there; to be called on the process that leads.

    The coalition models are measured, too, as v(grand) is: their behaviors are recorded with the role `picture`. What
    cannot be made is told to the listener and left out.

    Args:
        session: The study's data, trainer and value functions, of the process that leads.
        full: The full model.
        sparse: The sparse model.
        grand: The evaluation of everybody; the others are measured as it is, but for the coalition.
        store: Holds the study.
        study_id: Its number there.
        result: Who the top contributors are.
        listener: Is told of every picture.
        go_on_for: Of evaluations, what is asked before each of them is begun.

    Raises:
        StoreError: A picture cannot be written, or the store does not answer.
    """
    n_images = min(session.config.pictures.n_images, session.sampling.n_samples)
    if n_images == 0:
        return []
    return _Maker(session, full, sparse, grand, store, study_id, result, listener, n_images, go_on_for).make()


class _Maker:
    """One call of `make_pictures`."""

    def __init__(
        self,
        session: StudySession,
        full: Checkpoint,
        sparse: Checkpoint,
        grand: EvaluationSpec,
        store: Store,
        study_id: int,
        result: StudyResult,
        listener: Listener,
        n_images: int,
        go_on_for: Callable[[Sequence[int]], Callable[[], bool]],
    ) -> None:
        self.session, self.full, self.sparse, self.grand = session, full, sparse, grand
        self.store, self.study_id, self.result, self.listener = store, study_id, result, listener
        self.n_images, self.go_on_for = n_images, go_on_for
        self.folder = self.session.config.run_dir / FOLDER
        self.before = self._pictures_before()
        self.done: list[Picture] = []
        self._reported = [item.name for item in result.behaviors]
        self.images: dict[str, Images] = {}  # of models that several pictures share, by evaluation

    def make(self) -> list[Picture]:
        """All pictures, each recorded as soon as it is there."""
        self._add(self._planned_full(), self._images_of_full)
        everybody = self._spec_without(())
        self._add(self._planned_sparse(everybody), lambda: self._measured_images(everybody), everybody)
        for item in self._shown_behaviors():
            removed = top_contributors(item)
            if not removed:
                self.listener.message(f"{item.name}: no picture without the top contributors, as nobody has credit")
                continue
            spec = self._spec_without(removed)
            planned = self._planned_without(item.name, removed, spec)
            self._add(planned, lambda spec=spec: self._measured_images(spec), spec)
        self._forget_others()
        return self.done

    def _pictures_before(self) -> dict[str, Picture]:
        try:
            return {picture.path.name: picture for picture in read_pictures(self.folder.parent)}
        except StoreError as error:
            logger.warning("Pictures are made anew: %s", error)
            return {}

    def _shown_behaviors(self) -> list[BehaviorResult]:
        """The first behaviors that describe all images together."""
        together = {behavior.name for behavior in self.session.worker.behaviors}
        return [item for item in self.result.behaviors if item.name in together][:MAX_BEHAVIORS]

    # What a picture will be, before it is made

    def _planned(self, kind: str, name: str, caption: str, **values: Any) -> Picture:
        identity: dict[str, Any] = {"n_images": self.n_images, "columns": N_COLUMNS, "schema": SCHEMA}
        identity["of"] = values["evaluation"] or values.pop("settings")
        return Picture(
            kind=kind,
            path=self.folder / name,
            caption=caption,
            n_images=self.n_images,
            columns=N_COLUMNS,
            sha256="",
            source=fingerprint(identity),
            behaviors={},
            **{"behavior": None, "removed_idx": ()} | values,
        )

    def _planned_full(self) -> Picture:
        worker, sampling = self.session.worker, self.session.sampling
        settings = worker.settings(sampling, train=None, start=self.full.model_hash, use_ema=sampling.use_ema)
        settings["sampling"].pop("n_samples")  # these images are its first, whatever their number
        settings.pop("behaviors")
        caption = f"The full model, trained on everyone: its first {self.n_images} images."
        return self._planned(
            "full", "full.png", caption, evaluation=None, model_hash=self.full.model_hash, settings=settings
        )

    def _planned_sparse(self, spec: EvaluationSpec) -> Picture:
        caption = "The sparse model fine-tuned on everyone, v(grand): the same noise, image by image."
        return self._planned(
            "sparse",
            "sparse.png",
            caption,
            evaluation=spec.identity,
            model_hash=self.sparse.model_hash,
        )

    def _planned_without(self, behavior_name: str, removed: tuple[int, ...], spec: EvaluationSpec) -> Picture:
        who = "contributor" if len(removed) == 1 else f"{len(removed)} contributors"
        return self._planned(
            "without_top",
            file_name(behavior_name),
            f"The sparse model fine-tuned without the {who} with the most credit for {behavior_name}: the same noise, "
            "image by image.",
            behavior=behavior_name,
            removed_idx=removed,
            evaluation=spec.identity,
            model_hash=self.sparse.model_hash,
        )

    def _spec_without(self, removed: Sequence[int]) -> EvaluationSpec:
        """The evaluation of the coalition without some contributors, measured as v(grand) is."""
        return replace(
            self.grand,
            coalition_mask=~mask_from_idx(removed, len(self.result.contributor_names)),
            removal_dist=REMOVAL_DIST,
            role=ROLE,
            priority=self.grand.priority + 100,
        )

    # Making it

    def _add(self, planned: Picture, make: Callable[[], Images | None], spec: EvaluationSpec | None = None) -> None:
        """Make a picture, unless it is there; then record it."""
        there = self.before.get(planned.path.name)
        if there is not None and there.source == planned.source:
            self._record(replace(planned, sha256=there.sha256, behaviors=there.behaviors))
            return
        images = make()
        if images is None:
            return
        behaviors = {} if spec is None else self._stored_behaviors(spec)
        content = image_grid_png(images[: self.n_images], n_columns=N_COLUMNS)
        picture = replace(planned, behaviors=behaviors, sha256=hashlib.sha256(content).hexdigest())
        self._write(picture.path, content)
        self._record(picture)
        self.listener.message(f"{FOLDER}/{picture.path.name}: {picture.caption}")

    def _record(self, picture: Picture) -> None:
        """Enter a picture that is there into `pictures.json` and the store."""
        self.done.append(picture)
        reached = {picture.path.name for picture in self.done}
        self._write_record([*self.done, *(it for name, it in self.before.items() if name not in reached)])
        self.store.record_artifact(
            self.study_id,
            "picture",
            f"{FOLDER}/{picture.path.name}",
            sha256=picture.sha256,
            meta={"kind": picture.kind, "behavior": picture.behavior, "evaluation": picture.evaluation}
            | {"removed_idx": list(picture.removed_idx), "n_images": picture.n_images},
        )

    def _images_of_full(self) -> Images:
        """By this process alone: the others wait."""
        from tribute.diffusion.sample import sample_images
        from tribute.models.checkpoint import build_model

        worker, sampling = self.session.worker, self.session.sampling
        return sample_images(
            build_model(self.full, use_ema=sampling.use_ema, device=worker.trainer.device),
            sampling,
            worker.preset.noise_schedule,
            image_idx=range(self.n_images),
            label_counts=worker.data.label_counts(self.grand.coalition_mask),
            decode=None if worker.latent_space is None else worker.latent_space.decode,
            runtime=worker.trainer.runtime.replace(compile=False),  # these few images are not worth compiling for
        )

    def _images_of(self, spec: EvaluationSpec) -> Images:
        """Of a model that was measured before: it is fine-tuned again, as its images were not kept."""
        return self.session.team.images(spec.method, np.array(spec.coalition_mask), opt_seed=spec.opt_seed)

    def _measured_images(self, spec: EvaluationSpec) -> Images | None:
        """Of a model that is measured and recorded; None where that fails."""
        from tribute.study.executors import SerialExecutor

        if spec.identity in self.images:
            return self.images[spec.identity]
        [evaluation_id] = self.store.add(self.study_id, [spec])
        self.store.retry(self.study_id, evaluation_ids=[evaluation_id])

        def keep(claimed: ClaimedEvaluation, evaluation: Evaluation) -> None:
            self.images[claimed.spec.identity] = evaluation.images[: self.n_images].copy()

        worker = self.session.worker
        executor = SerialExecutor(
            self.session.measure, definitions=worker.behavior_definitions(), provenance=worker.provenance()
        )
        ids = [evaluation_id]
        executor.run(self.store, self.study_id, evaluation_ids=ids, on_done=keep, go_on=self.go_on_for(ids))
        if spec.identity not in self.images:
            [stored] = self.store.find(self.study_id, evaluation_ids=[evaluation_id])
            if stored.status != "finished":
                reason = stored.error or "max_device_hours leaves no time, or another process is at it"
                n_missing = int((~spec.coalition_mask).sum())
                self.listener.message(f"no picture of the model without {n_missing} contributors: {reason}")
                return None
            self.images[spec.identity] = self._images_of(spec)[: self.n_images].copy()
        return self.images[spec.identity]

    def _stored_behaviors(self, spec: EvaluationSpec) -> dict[str, float]:
        """Reported behaviors of an evaluation; none where it is not finished."""
        ids = list(self.store.ids_of(self.study_id, [spec.identity]).values())
        found = self.store.find(self.study_id, statuses=("finished",), evaluation_ids=ids)
        return {name: found[0].behaviors[name] for name in self._reported} if found else {}

    def _write(self, path: Path, content: str | bytes) -> None:
        try:
            write_whole(path, content)
        except OSError as error:
            raise StoreError(
                f"{path} could not be written ({error}); make room and run the same command again, or set "
                "pictures: {n_images: 0}"
            ) from error

    def _write_record(self, pictures: Sequence[Picture]) -> None:
        items = []
        for picture in pictures:
            values = asdict(picture)
            path = values.pop("path")
            items.append({"kind": picture.kind, "file": path.name, **values})
        content = {"schema": SCHEMA, "rule": TOP_RULE, "pictures": items}
        self._write(self.folder / FILE_NAME, json.dumps(content, indent=1, allow_nan=False))

    def _forget_others(self) -> None:
        """Remove pictures of an earlier run that are true no longer."""
        reached = {picture.path.name for picture in self.done}
        self._write_record(self.done)
        for name, picture in self.before.items():
            if name not in reached:
                picture.path.unlink(missing_ok=True)
