"""Plots kept beside a study as Optuna artifacts, for the dashboard."""

from __future__ import annotations

import json
import mimetypes
import uuid
from pathlib import Path

from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState


class Gallery:
    """Pictures beside the studies of one sweep and their trials, as artifacts that the dashboard shows.

    A picture hangs once, however often it is brought: its id follows from its study, trial and file name.
    """

    def __init__(self, storage: BaseStorage, sweep_name: str, folder: Path) -> None:
        """`folder` is where the files are kept; it is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        self.storage = storage
        self.store = FileSystemArtifactStore(folder)
        self._sweep = sweep_name

    def studies(self) -> dict[str, dict[str, str]]:
        """Every study of the sweep by name, with its attributes: sweep, part, workload and mode."""
        return {
            study.study_name: dict(study.user_attrs)
            for study in self.storage.get_all_studies()
            if study.user_attrs.get("sweep") == self._sweep
        }

    def trials_without(self, study_name: str, file_name: str) -> dict[int, str]:
        """Point key by trial number, of the complete trials at which no picture of that name hangs."""
        study_id = self.storage.get_study_id_from_name(study_name)
        hanging = self.storage.get_study_system_attrs(study_id)
        found = self.storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        return {
            trial.number: str(trial.user_attrs.get("point_key"))
            for trial in found
            if _attribute_and_id(study_name, file_name, trial)[0] not in hanging
        }

    def hang(self, study_name: str, picture: Path, trial: int | None = None) -> None:
        """Copy a picture beside the study, or its trial of that number; one of its name is replaced."""
        study_id = self.storage.get_study_id_from_name(study_name)
        whose = None if trial is None else self.storage.get_all_trials(study_id, deepcopy=False)[trial]
        key, artifact_id = _attribute_and_id(study_name, picture.name, whose)
        with picture.open("rb") as file:
            self.store.write(artifact_id, file)
        if key not in self.storage.get_study_system_attrs(study_id):
            kind = mimetypes.guess_type(picture.name)[0]
            record = {"artifact_id": artifact_id, "filename": picture.name, "mimetype": kind}
            self.storage.set_study_system_attr(study_id, key, json.dumps({**record, "encoding": None}))


def _attribute_and_id(study_name: str, file_name: str, trial: FrozenTrial | None) -> tuple[str, str]:
    """The attribute of the study that lists a picture of it, or of its trial, and the picture's id.

    `optuna.artifacts.upload_artifact` writes an attribute of the trial, which Optuna refuses once the trial
    has ended, and pictures are drawn after that; the dashboard reads this one as well.
    """
    number = None if trial is None else trial.number
    artifact_id = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{study_name}/{number}/{file_name}"))
    if trial is None:
        return f"artifacts:{artifact_id}", artifact_id
    return f"dashboard:artifacts:{trial._trial_id}:{artifact_id}", artifact_id
