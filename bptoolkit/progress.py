"""One progress bar for a whole run: steps of all epochs, what is left, the loss and what validation found last."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunBar(ProgressBar):
    """The bar; it stands in the terminal while something runs, and leaves nothing behind."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: Progress | None = None
        self.enabled = True

    def disable(self) -> None:  # Lightning does on all ranks but the first
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def start(self, what: str, total: float) -> None:
        self.close()
        if self.enabled:
            columns = (
                TextColumn("  {task.description:10}"),
                BarColumn(30),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[figures]}"),
            )
            self.bar = Progress(*columns, transient=True)
            self.task = self.bar.add_task(what, total=None if total == float("inf") else total, figures="")
            self.bar.start()

    def show(self, trainer: Trainer, what: str, done: int) -> None:
        if self.bar is not None:
            found = {k.removeprefix("train_"): v for k, v in trainer.progress_bar_metrics.items()}
            figures = "  ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, float))
            self.bar.update(self.task, description=what, completed=done, figures=figures)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start("training", trainer.estimated_stepping_batches)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int):
        self.show(trainer, "training", trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.show(trainer, "validation", trainer.global_step)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start("test", sum(trainer.num_test_batches))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ):
        self.show(trainer, "test", batch_idx + 1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()
