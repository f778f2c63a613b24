"""What the recipes share: batches whose order is a pure function of the epoch, exact resume, and the record of a run.

A run that was interrupted goes on as if it had not been: on one process, weights, losses and batches are equal bit for bit.
Lightning's checkpoint has the weights, the optimizer, the schedule and the counters; what it lacks is

- the place in the epoch             `Ordered`, whose position Lightning saves with its loops
- the random number generators       `Checkpoints.state_dict`
- a moment at which all these agree  `Checkpoints` saves between two steps, never inside one, inside a validation or inside
                                     an accumulation of gradients. SIGINT and SIGTERM wait for that moment
"""

from __future__ import annotations

import csv
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class Interrupted(Exception):
    """Training was asked to stop by a signal, has saved a checkpoint, and stopped."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step


class Ordered:
    """The batches of an epoch, in an order that is a pure function of the epoch; it knows its place in it.

    Args:
        length: batches per epoch.
        batch: (epoch, index) -> batch.
    """

    def __init__(self, length: int, batch: Callable[[int, int], Any]) -> None:
        self.length, self.batch = length, batch
        self.epoch, self.index = 0, -1
        self.resumed: tuple[int, int] | None = None
        self.sampler = self.batch_sampler = self  # where Lightning announces the epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        # The body runs at the first `next`, when Lightning has announced the epoch.
        epoch, start = self.resumed or (self.epoch, 0)
        self.resumed = None
        for k in range(start if epoch == self.epoch else 0, self.length):
            self.index = k
            yield self.batch(self.epoch, k)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "next": self.index + 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resumed = state["epoch"], state["next"]


class Checkpoints(Checkpoint):
    """Saves `last.ckpt` every so many steps, at the end of every epoch, and when a signal asks to stop.

    The signal is obeyed at the end of the running step (or of the validation that follows it), by `Interrupted`; a second
    one ends the process at once. Any other exception leaves `exception.ckpt`, to look at and not to resume from: it was
    taken in the middle of a step.

    Args:
        folder: where; None is the trainer's root directory.
        every_n_steps: optimizer steps between two checkpoints within an epoch.
    """

    def __init__(self, folder: str | None = None, every_n_steps: int = 500) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps is {every_n_steps}; it must be at least 1")
        self.folder, self.every_n_steps = folder, every_n_steps
        self.signum = 0
        self.saved_step = 0
        self.generators: dict[str, Any] | None = None
        self.places: list[dict[str, Any]] = []

    def path(self, trainer: Trainer, name: str = "last") -> Path:
        return Path(self.folder or trainer.default_root_dir) / f"{name}.ckpt"

    def save(self, trainer: Trainer, name: str = "last") -> None:
        """Write a checkpoint; the old one stays until the new one is complete. Called on all ranks."""
        path = self.path(trainer, name)
        part = path.with_suffix(".part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            if path.is_dir():  # sharded strategies write a folder
                shutil.rmtree(path)
            os.replace(part, path)
        self.saved_step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The random number generators, as plain Python and tensors: all that a weights-only load accepts."""
        name, keys, *rest = cast(Any, np.random.get_state())
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": random.getstate(),
            "numpy": [name, keys.tolist(), *rest],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generators = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.places = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning puts a loader back to its place only if it is made after the checkpoint is read; a schedule that asks for
        # `estimated_stepping_batches` has it made before.
        for loader, place in zip(cast(Any, trainer.fit_loop._combined_loader).flattened, self.places):
            if isinstance(loader, Ordered):
                loader.load_state_dict(place)
        self.places = []
        state, self.generators = self.generators, None
        if state is not None and trainer.world_size == 1:  # the checkpoint holds one rank's generators
            torch.set_rng_state(state["torch"].cpu())
            if len(state["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
            version, internal, gauss = state["python"]
            random.setstate((version, tuple(internal), gauss))
            name, keys, *rest = state["numpy"]
            np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        self.signum, self.saved_step = 0, trainer.global_step
        if threading.current_thread() is threading.main_thread():  # Lightning puts the old handlers back
            signal.signal(signal.SIGINT, self.on_signal)
            signal.signal(signal.SIGTERM, self.on_signal)

    def on_signal(self, signum: int, frame: Any) -> None:
        if self.signum:  # asked twice: now
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum

    def asked(self, trainer: Trainer) -> bool:
        """Whether to stop; all ranks give the same answer."""
        if trainer.world_size == 1:
            return bool(self.signum)
        asked = trainer.strategy.reduce_boolean_decision(bool(self.signum), all=False)
        self.signum = self.signum or (signal.SIGTERM if asked else 0)
        return asked

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate() or loop._num_ready_batches_reached():
            return  # gradients are half summed; or the epoch's end is to come, which saves
        if loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher)):
            return  # a run resumed here would miss the validation that is about to start
        asked = self.asked(trainer)
        if asked or trainer.global_step - self.saved_step >= self.every_n_steps:
            self.save(trainer)
        if asked:
            raise Interrupted(self.signum, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
        if self.asked(trainer):
            raise Interrupted(self.signum, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Interrupted) and trainer.world_size == 1 and trainer.training and trainer.global_step:
            self.save(trainer, "exception")


def one_cycle(optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.3) -> dict[str, Any]:
    """Lightning's record of a schedule: the learning rate rises from 1/25 to its whole and falls to nothing, along cosines.

    A pure function of the step, unlike `OneCycleLR`, whose checkpoint fixes how many steps there will ever be: a run resumed
    with more epochs follows the longer cycle from there.
    """

    def factor(step: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        if done < warmup:
            return 1 - 0.96 * (1 + math.cos(math.pi * done / warmup)) / 2
        return (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2

    return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}


class Metrics(Callback):
    """Writes `metrics.csv`: a row per training step, with what validation found in the row of the step it followed.

    A resumed run keeps the rows up to its checkpoint and goes on below them.

    Args:
        path: the file.
        echo: also print a line after a validation, every few seconds at most, for output that is not a terminal.
    """

    def __init__(self, path: Path, echo: bool = False) -> None:
        self.path, self.echo = path, echo
        self.rows: list[dict[str, Any]] = []
        self.echoed = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = read_csv(self.path) if self.path.exists() else []
        self.rows = [r for r in rows if int(r["step"]) <= trainer.global_step] if trainer.global_step else []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches  # which Lightning has divided it by
        # A tensor until it is written: a GPU is not waited for at each step.
        self.rows.append({"step": trainer.global_step, "epoch": trainer.current_epoch, "train_loss": loss})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.rows or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        found = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        self.rows[-1].update(found)
        self.write(trainer)
        if self.echo and trainer.is_global_zero and time.monotonic() - self.echoed > 3:
            self.echoed = time.monotonic()
            shown = {"loss": self.rows[-1]["train_loss"], **found}
            figures = "  ".join(f"{k} {float(v):.4g}" for k, v in shown.items())
            print(f"  epoch {trainer.current_epoch:3}  step {trainer.global_step:5}  {figures}", flush=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Write all rows; the file is never half written."""
        if not trainer.is_global_zero or not self.rows:
            return
        for row in self.rows:
            row.update({k: v.item() for k, v in row.items() if isinstance(v, torch.Tensor)})
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in self.rows for k in row)))
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(part, self.path)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; what is empty is left out."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
