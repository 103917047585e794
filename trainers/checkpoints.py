"""
Checkpoints that are complete or absent, for any trainer of transformers, and bit-identical resumption of TRL's rollout
trainers.

A checkpoint counts once it holds the file `complete`, which is written last. Older checkpoints are deleted after that.
So a process killed at any moment leaves a complete checkpoint to continue from.
"""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints
from trl.trainer.utils import RepeatSampler

COMPLETE = "complete"


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    Return the newest complete checkpoint of a run.

    Args:
        output_dir (`str` or `os.PathLike`):
            The run's directory.

    Returns:
        `str` or `None`: Its folder.
    """
    complete = [folder for folder in sort_checkpoints(str(output_dir)) if (Path(folder) / COMPLETE).is_file()]
    return complete[-1] if complete else None


def shared_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    Return the checkpoint from which all processes of a run continue: the newest complete one of the first process.

    Args:
        output_dir (`str` or `os.PathLike`):
            The run's directory. Every process has to ask.

    Returns:
        `str` or `None`: Its folder.

    Raises:
        RuntimeError: On the host of another process it is not there, or not complete.
    """
    [checkpoint] = broadcast_object_list([last_checkpoint(output_dir)])
    if checkpoint and not all(gather_object([(Path(checkpoint) / COMPLETE).is_file()])):
        raise RuntimeError(
            f"the run continues from {checkpoint}, which is on the first host and not on all: share output_dir between "
            "hosts, or set save_on_each_node to true from the start"
        )
    return checkpoint


class CompleteCheckpoints:
    """A mixin that writes checkpoints which are complete or absent. It precedes the trainer among the bases."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Train, as [`~transformers.Trainer`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                The checkpoint to continue from, or `True` for the newest complete one, if there is one.
            **kwargs:
                As [`~transformers.Trainer.train`] takes them.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = shared_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # nothing is deleted before all is written
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # of a full disk
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise self.stopped(f"the checkpoint {folder} could not be written ({error})") from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / COMPLETE).touch()
            rotate_checkpoints(folder.parent, limit, self.state.best_model_checkpoint, use_mtime=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model, as [`~transformers.Trainer`] does, without TRL's copy of an adapter that is the reference.

        Args:
            output_dir (`str`, *optional*):
                The folder. Defaults to the run's.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # In checkpoints it stays: who resumes from one may not have the adapter that training began with
        leaves_out = not _internal_call and "ref" in getattr(model, "peft_config", {})
        if leaves_out:
            adapters = [name for name in model.peft_config if name != "ref"]
            model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=adapters)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            if leaves_out:
                del model.save_pretrained

    def stopped(self, what: str) -> RuntimeError:
        """
        Return the error to raise when training cannot go on.

        Args:
            what (`str`):
                What happened.

        Returns:
            `RuntimeError`: It says what happened, when, and where to continue.
        """
        checkpoint = last_checkpoint(self.args.output_dir)
        return RuntimeError(
            f"training stopped after {self.state.global_step} steps: {what}. "
            + (f"The last complete checkpoint is {checkpoint}" if checkpoint else "There is no complete checkpoint")
        )


class ContinuedRollouts:
    """
    A mixin for TRL's rollout trainers that resumes in the middle of a rollout's epochs and draws tasks in the order of
    an uninterrupted run.
    """

    def _get_train_sampler(self, dataset=None):
        return _OrderOfEpoch(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        unfinished = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        position = {"step": self._step, "micro_batches": self._buffered_inputs if unfinished else None}
        torch.save(position, self._position_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and (file := self._position_file(checkpoint)).is_file():
            position = torch.load(file, map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = position["step"], position["micro_batches"]

    def _position_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"rollout_{self.accelerator.process_index}.pt"


class _OrderOfEpoch(Sampler):
    """Order tasks by the seed and the epoch alone. TRL's sampler depends on the epochs drawn before, too."""

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]):
        self.sampler = sampler
        self.epoch = epoch

    def __iter__(self):
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch())
        return iter(self.sampler)

    def __len__(self):
        return len(self.sampler)
