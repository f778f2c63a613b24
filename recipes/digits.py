"""A small convolutional network on scikit-learn's handwritten digits.

Question  Do hand-written backward passes train a CNN as torch's do?
Command   bptoolkit fit digits --layers torch|bptoolkit
Time      15 s on one CPU core
Expected  99.4 % or more of 360 test digits right; floor 98.5 %

Data      1797 images of 8×8 pixels in 10 classes, which come with scikit-learn; split 1437 / 360, stratified, always the same.
          Each time a training image is seen it is shifted by up to one pixel each way.
Model     2 convolutions (24 and 48 channels), ReLU, max pooling, dropout, one linear layer: 18 346 parameters.
Training  AdamW, one cycle of the learning rate, 30 epochs of batches of 64.
Note      The test digits are also what validation looks at after each epoch. Nothing is chosen by it: no early stopping, no
          best checkpoint. One digit is 0.28 points, so differences below 1 point say nothing.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

import bptoolkit as bp
from bptoolkit.recipe import Floor, Recipe
from bptoolkit.training import Ordered, one_cycle


def model(width: int = 24, dropout: float = 0.3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),  # B W 8 8
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),  # B 2W 8 8
        nn.ReLU(),
        nn.MaxPool2d(2),  # B 2W 4 4
        nn.Flatten(),  # B 32W
        nn.Dropout(dropout),
        nn.Linear(32 * width, 10),  # B 10
    )


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by -1, 0 or 1 pixels in both directions, zeros moving in."""
    B, _, H, W = x.shape
    down, right = torch.randint(0, 3, (2, B, 1), generator=generator)
    rows, columns = down + torch.arange(H), right + torch.arange(W)  # B H, B W
    padded = F.pad(x, (1, 1, 1, 1))[:, 0]
    return padded[torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]  # B 1 H W


class Digits(LightningModule):
    """The network and how it is trained.

    Args:
        layers: whose backward passes: "torch" or "bptoolkit".
        width: channels of the first convolution.
        dropout: share dropped before the last layer.
        lr: the highest learning rate of the cycle.
        weight_decay: AdamW's.
    """

    def __init__(
        self,
        layers: Literal["torch", "bptoolkit"] = "bptoolkit",
        width: int = 24,
        dropout: float = 0.3,
        lr: float = 4e-3,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__()
        self.model, self.loss = model(width, dropout), nn.CrossEntropyLoss()
        self.lr, self.weight_decay = lr, weight_decay
        self.swapped = bp.swap(self, exclude=lambda _, m: isinstance(m, torch.nn.Dropout)) if layers == "bptoolkit" else None

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        x, y = batch
        z = self(x)
        self.log(f"{stage}_loss", self.loss(z, y), batch_size=len(y), sync_dist=True)
        right = (z.argmax(1) == y).double().mean()
        self.log(f"{stage}_acc", 100 * right, prog_bar=True, batch_size=len(y), sync_dist=True)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.evaluate(batch, "test")

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)
        return {"optimizer": optimizer, "lr_scheduler": one_cycle(optimizer, int(self.trainer.estimated_stepping_batches))}


class DigitsData(LightningDataModule):
    """The digits, in batches.

    Args:
        batch_size: of one process.
        seed: of the order of the training batches.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed
        self.fingerprint = ""

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        self.fingerprint = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
        split = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
        train_x, test_x = (torch.tensor(p, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for p in split[:2])
        train_y, test_y = (torch.tensor(y, dtype=torch.int64) for y in split[2:])
        self.train, self.test = (train_x, train_y), (test_x, test_y)

    def batches(self, x: Tensor, y: Tensor, train: bool) -> Ordered:
        """One process's batches; in training each epoch has its own order and shifts, drawn from (seed, epoch)."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        size, mine = self.batch_size, slice(rank, len(x) // ranks * ranks, ranks)  # as many on every rank

        @lru_cache(1)
        def drawn(epoch: int) -> tuple[Tensor, Tensor]:
            if not train:
                return x[mine], y[mine]
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(x), generator=generator)
            return shifted(x[order], generator)[mine], y[order][mine]

        def batch(epoch: int, k: int) -> tuple[Tensor, Tensor]:
            xs, ys = drawn(epoch)
            return xs[k * size : (k + 1) * size], ys[k * size : (k + 1) * size]

        return Ordered(-(-len(y[mine]) // size), batch)

    def train_dataloader(self) -> Ordered:
        return self.batches(*self.train, train=True)

    def val_dataloader(self) -> Ordered:
        return self.batches(*self.test, train=False)

    def test_dataloader(self) -> Ordered:
        return self.batches(*self.test, train=False)


RECIPE = Recipe(
    model=Digits,
    data=DigitsData,
    floor=Floor("test_acc", "test accuracy", 98.5, "%"),
    trainer={"max_epochs": 30},
    smoke={"trainer.max_epochs": 3},
    threads=1,  # a step is 5 ms: a second thread would only be waited for
)
