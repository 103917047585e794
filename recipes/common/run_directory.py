"""
Give every run an output directory of its own: resume it after an interruption, and keep other runs out.

Not covered: checkpoints, which are the trainers' (`trainers/checkpoints.py`).
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer

from trainers.checkpoints import shared_checkpoint

# Settings that came later than the first records: the contents of files that people edit
CONTENTS = {"dataset_sha256", "eval_dataset_sha256", "extra_tests_sha256"}


class RunDirectory:
    """
    Output directory of one run: one stage with one set of fields and of input files.

    The same command resumes an interrupted run and skips a finished one. Another command is refused, unless the first
    left nothing but its record. A run whose result was removed counts as unfinished.

    Args:
        path (`str`):
            The directory. Created if it does not exist.
        stage (`str`):
            The stage's name.
        settings (`dict`):
            The fields that were set, as [`parse_settings`](arguments.py) returns them, and `NAME_sha256` of files whose
            content counts.
        result (`str`, *optional*, defaults to `"*.safetensors"`):
            Name or pattern of the file that a finished run leaves.

    Raises:
        SystemExit: The directory holds another run, or unrelated files.
    """

    def __init__(self, path: str, stage: str, settings: dict, result: str = "*.safetensors"):
        self.path = Path(path)
        self.record = self.path / "run.json"
        self.run = json.loads(json.dumps({"stage": stage, "settings": settings}, default=str))
        self.finished: bool = _on_main_process(lambda: self._check(result))

    def _check(self, result: str) -> bool:
        """Refuse a directory that is not this run's. Return whether the run has finished."""
        finished = False
        if self.record.is_file():
            found = json.loads(self.record.read_text())
            finished = found.pop("finished", False) and any(self.path.glob(result))
            for name in CONTENTS & self.run["settings"].keys():  # earlier records do not have them
                found.setdefault("settings", {}).setdefault(name, self.run["settings"][name])
            if found != self.run and not self._has_only_its_record():
                raise SystemExit(
                    f"output_dir {self.path} holds another run ({_difference(found, self.run)}): {self._advice}"
                )
        elif self.path.is_dir() and not self._has_only_its_record():
            raise SystemExit(f"output_dir {self.path} holds files and no {self.record.name}: {self._advice}")
        return finished

    @property
    def _advice(self) -> str:
        return "choose another output_dir, or remove this one if it is not needed"

    def _has_only_its_record(self) -> bool:
        return {path.name for path in self.path.iterdir()} <= {self.record.name, _draft(self.record).name}

    def start(self) -> str | None:
        """
        Claim the directory until this process ends.

        Returns:
            `str` or `None`: The checkpoint to resume from, if there is one.

        Raises:
            SystemExit: Another run has claimed it, or the checkpoint is not on all hosts.
        """
        _on_main_process(self._claim)
        try:
            return shared_checkpoint(self.path)
        except RuntimeError as error:
            raise SystemExit(f"output_dir: {error}") from None

    def _claim(self) -> None:
        if self.record.is_file():
            self._lock()
        self._write(self.run)
        self._lock()

    def _lock(self) -> None:
        self._locked = (
            self.record.open()
        )  # the lock lasts until the file is closed, at the latest when the process ends
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"output_dir {self.path} is in use by another process: wait for it, or choose another output_dir"
            ) from None
        except OSError:
            pass  # a file system without locks

    def save(self, trainer: Trainer) -> None:
        """
        Save a finished training, record that the run has finished, and end the process group.

        Args:
            trainer ([`~transformers.Trainer`]):
                The trainer.
        """
        trainer.save_state()  # before the adapter: where there is an adapter there is its log
        trainer.save_model()
        self.finish()
        trainer.accelerator.end_training()  # a thread of gloo that still runs can end a process by SIGABRT

    def finish(self) -> None:
        """Record that the run has finished."""
        if PartialState().is_main_process:
            self._write({**self.run, "finished": True})

    def _write(self, run: dict) -> None:
        write_whole(self.record, json.dumps(run, indent=2) + "\n")


def _on_main_process(decide: Callable[[], Any]) -> Any:
    """Return in every process what the first one decides, or stop every process: other hosts may lack its disk."""
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [decide(), None]
        except SystemExit as error:
            outcome = [None, str(error)]
    value, refusal = broadcast_object_list(outcome)
    if refusal is not None:
        raise SystemExit(refusal)
    return value


def write_whole(path: Path, text: str) -> None:
    """
    Write a file atomically: it is complete or absent. Missing parent directories are created.

    Args:
        path (`Path`):
            The file.
        text (`str`):
            Its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path)
    draft.write_text(text)
    os.replace(draft, path)


def file_sha256(path: str | Path) -> str:
    """
    Return the hash by which a run knows the content of a file that it reads.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `str`: SHA-256 of its content.
    """
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _draft(path: Path) -> Path:
    return path.with_suffix(".draft")


def _difference(found: dict, wanted: dict) -> str:
    if found.get("stage") != wanted["stage"]:
        return f"of the stage {found.get('stage')!r}"
    old, new = found.get("settings", {}), wanted["settings"]
    different = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    name = min(different, key=lambda name: name.endswith("_sha256"))  # a field that somebody wrote says more
    if name.endswith("_sha256") and name in old and name in new:
        return f"its {name.removesuffix('_sha256')} had different content"
    before, now = (repr(settings[name]) if name in settings else "none" for settings in (old, new))
    return f"with {name} {before} where this one has {now}"
