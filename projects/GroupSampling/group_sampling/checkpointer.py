"""Checkpoints of a training: written atomically, continued from, or loaded for their weights."""

import difflib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from fvcore.common.checkpoint import Checkpointer

from .checkpoint import (
    UNDERSTOOD_FORMATS,
    CheckpointError,
    Description,
    convert_in_place,
    is_optional,
    read_checkpoint,
    refuse_partial_weights,
    resolve_weights,
)
from .config import ConfigError, changed_keys
from .errors import UserError, describe
from .files import atomic_file, open_regular, write_atomically

BEST_MODEL = "model_best"  # a checkpoint that no training continues from
_MAX_NAME_BYTES = 4096


def refuse_average() -> NoReturn:
    """Refuse to resume a training whose checkpoint has averaged weights (``SOLVER.EMA``) without the average.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "--resume: SOLVER.EMA.ENABLED: expected True, since the weights of the checkpoint are an average, got False; "
        "start a new run from them with MODEL.WEIGHTS and another OUTPUT_DIR"
    )


class CheckpointMixin(Checkpointer):
    """Mixed into fvcore's ``Checkpointer`` or a subclass of it; the class that does so sets ``naming``.

    Saving is atomic. Loading runs no code from the file (``weights_only``), accepts the names of either engine, and
    refuses a file of which no parameter fits the model, or, if the model is in eval mode, not all of them. A training
    can only be resumed by the engine that wrote it.
    """

    naming: str
    description = Description()  # set by the training
    saved_weights: Callable[[], AbstractContextManager] = nullcontext  # likewise: within it, the model has them
    _needs_state = False  # of the file: it continues a training

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth``, from which a training then resumes."""
        path = self.write(name, **kwargs)
        if path:
            self.tag_last_checkpoint(os.path.basename(path))

    def complete(self, start_iter: int, max_iter: int) -> None:
        """Write ``model_final.pth`` where a training was killed after its last checkpoint and before that file."""
        if start_iter == max_iter and not os.path.isfile(os.path.join(self.save_dir, "model_final.pth")):
            self.save("model_final", iteration=max_iter - 1)

    def write(self, name: str, **kwargs: Any) -> str:
        """Write ``<save_dir>/<name>.pth``; an interrupted one leaves the previous file as it was.

        Returns:
            Its path; "" if this process writes none.
        """
        if not self.save_dir or not self.save_to_disk:
            return ""
        with self.saved_weights():
            return self._write(name, **kwargs)

    def _write(self, name: str, **kwargs: Any) -> str:
        data = {"model": self.model.state_dict(), "engine": self.naming}
        if self.description.config:
            data.update(config=self.description.config, class_names=list(self.description.class_names))
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        with atomic_file(path, durable=True) as file:
            torch.save(data, file)
        return path

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, last_filename_basename.encode())

    def get_checkpoint_file(self) -> str:
        """The checkpoint that ``last_checkpoint`` names, to resume from.

        Raises:
            CheckpointError: it names no file of the folder.
        """
        pointer = os.path.join(self.save_dir, "last_checkpoint")
        try:
            with open_regular(pointer) as file:
                name = file.read(_MAX_NAME_BYTES).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"--resume: {pointer}: expected the name of a checkpoint: {describe(error)}"
            ) from error
        path = os.path.join(self.save_dir, name)
        if os.path.basename(name) != name or not os.path.isfile(path):
            raise CheckpointError(f"--resume: {pointer}: expected the name of a checkpoint beside it, got {name!r:.80}")
        return path

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().load(resolve_weights(path) if path else path, *args, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        resumes = resume and self.has_checkpoint()
        self._needs_state = resumes and bool(self.checkpointables)
        if resume and not resumes and self.checkpointables:
            self._refuse_to_start_again()
        try:
            extra = super().resume_or_load(path, resume=resume)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # of a state_dict that is none
            if not self._needs_state or isinstance(error, UserError):
                raise
            file, reason = self.get_checkpoint_file(), f"{type(error).__name__}: {error}"
            raise CheckpointError(f"--resume: {file}: the state of its training cannot be used: {reason}") from error
        if self._needs_state and "ema" in extra:
            refuse_average()
        if self._needs_state:
            for key, before, now in changed_keys(extra.get("config", ""), self.description.config):
                self.logger.warning(f"--resume: {key} was {before}, and is {now} from here on")
        return extra

    def _refuse_to_start_again(self) -> None:
        names = sorted(os.listdir(self.save_dir))
        found = [name for name in names if name.endswith(".pth") and name != f"{BEST_MODEL}.pth"]
        if found:
            raise ConfigError(
                f"--resume: {self.save_dir} has checkpoints, the last is {found[-1]}, but no file last_checkpoint. It "
                "names the one to continue from: write it again, or start a new run in another OUTPUT_DIR"
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = read_checkpoint(filename)
        if self._needs_state:
            # Weights convert between the engines, the state of an optimizer does not.
            engine = checkpoint.get("engine", self.naming)
            if engine != self.naming:
                raise ConfigError(
                    f"--resume: {filename} was written by the {engine} engine; resume with --engine {engine}, or start "
                    "a new run from it with MODEL.WEIGHTS and another OUTPUT_DIR"
                )
            absent = [key for key in ("iteration", *self.checkpointables) if key not in checkpoint]
            if absent or type(checkpoint["iteration"]) is not int:
                found = f"got no {absent[0]!r}" if absent else f"got the iteration {checkpoint['iteration']!r}"
                raise CheckpointError(
                    f"--resume: {filename}: expected the state of a training, {found}; start a new run from these "
                    "weights with MODEL.WEIGHTS and another OUTPUT_DIR"
                )
        model = checkpoint["model"]
        convert_in_place(model, self.naming, self.model)
        expected = self.model.state_dict()
        if not model.keys() & expected.keys():
            missing = [name for name in expected if not is_optional(name)]
            first = next(iter(model))
            near = difflib.get_close_matches(first, missing, n=1, cutoff=0.0)[0]
            raise CheckpointError(
                f"{filename}: none of its {len(model)} parameters (the first is {first!r}, nearest to {near!r}) "
                f"belongs to this model, which lacks all of its {len(missing)} ({', '.join(missing[:3])}, ...). "
                f"{UNDERSTOOD_FORMATS}"
            )
        refuse_partial_weights(model, self.model, file=filename)
        for name in sorted(model.keys() & expected.keys()):
            if not isinstance(model[name], type(expected[name])):
                found = type(model[name]).__name__
                raise CheckpointError(f"{filename}: expected {name} to be a tensor, got {found}")
            if not model[name].isfinite().all():
                raise CheckpointError(f"{filename}: expected finite weights, got NaN or infinity in {name}")
        return checkpoint
