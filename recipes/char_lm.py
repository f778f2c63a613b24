"""A character model of the Python standard library's own source.

Question  Does an LSTM with hand-written BPTT learn to predict source code, and how near do compressors come?
Command   bptoolkit fit char-lm --layers torch|bptoolkit
Time      4 min with torch's layers, 6 with bptoolkit's, on one CPU core
Expected  1.67 bits per character (xz 1.72); floor: the 5-gram's 1.90

Data      The .py files of the running Python's standard library, without tests, tables of encodings and generated files: about
          8 MB, the same for one version of Python; its sha256 is in versions.json. Files are sorted by path, and every tenth,
          from the sixth, is for validation. Printable ASCII and newline are themselves, every other byte is one further class.
Model     Embedding 64, LSTM 256, linear: 360 000 parameters.
Training  Truncated BPTT: the text is cut into `batch_size` streams that are read side by side, `window` characters a step. The
          hidden state is carried from a window to the next and gradients stop there. A window is a batch and optimisation is
          automatic, so that clipping, accumulation and precision are the Trainer's; the state is in every checkpoint.
          Adam, one cycle of the learning rate, one pass over the text.
Beside    zlib, bz2 and xz at their best, on the validation text alone, and a 5-gram with Witten-Bell smoothing counted on the
          training text: all on the same characters as the LSTM's.
"""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

import bptoolkit as bp
from bptoolkit.recipe import Floor, Recipe
from bptoolkit.recipes.compressors import bits_per_character
from bptoolkit.training import Ordered, one_cycle

SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings"}
SKIPPED |= {"site-packages", "dist-packages", "__pycache__"}
CHARACTERS = bytes([10, *range(32, 127)])  # their place is their class; the last class is every other byte
CLASSES = len(CHARACTERS) + 1
State = tuple[Tensor, Tensor]


@lru_cache(1)
def library_text() -> tuple[np.ndarray, np.ndarray]:
    """The standard library as classes: (training, validation), split by file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p.relative_to(root) for p in sorted(root.rglob("*.py"))]
    files = [f for f in files if not SKIPPED & set(f.parts) and not f.name.startswith("_sysconfigdata")]
    files = [f for f in files if not any(part.startswith("config-") for part in f.parts)]
    to_class = np.full(256, CLASSES - 1, np.uint8)
    to_class[list(CHARACTERS)] = np.arange(CLASSES - 1)
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, file in enumerate(files):
        parts[i % 10 == 5].append((root / file).read_bytes())
    train, val = (to_class[np.frombuffer(b"".join(p), np.uint8)] for p in parts)
    return train, val


class Model(nn.Module):
    def __init__(self, hidden: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, embedding)
        self.lstm = nn.LSTM(embedding, hidden)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        h, state = self.lstm(self.embedding(x), state)  # T B H
        return self.head(self.dropout(h)), state  # T B V


class CharLM(LightningModule):
    """The model and how it is trained.

    Args:
        layers: whose backward passes: "torch" or "bptoolkit".
        hidden: the LSTM's size.
        embedding: the size of a character's vector.
        dropout: between the LSTM and the last layer; one pass over the text does not overfit.
        lr: the highest learning rate of the cycle.
    """

    def __init__(
        self,
        layers: Literal["torch", "bptoolkit"] = "bptoolkit",
        hidden: int = 256,
        embedding: int = 64,
        dropout: float = 0.0,
        lr: float = 6e-3,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.lr = Model(hidden, embedding, dropout), nn.CrossEntropyLoss(), lr
        self.state: State | None = None  # of training; evaluation has its own. Not a buffer: DDP would broadcast it
        self.eval_state: State | None = None
        self.swapped = bp.swap(self, exclude=lambda _, m: isinstance(m, torch.nn.Dropout)) if layers == "bptoolkit" else None

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self.model(x, state)

    def window(self, batch: tuple[Tensor, Tensor], state: State | None) -> tuple[Tensor, State]:
        x, y = batch
        if state is not None:  # a checkpoint is read before the model is on its device
            state = (state[0].to(x.device), state[1].to(x.device))
        z, state = self(x, state)
        return self.loss(z.flatten(0, 1), y.flatten()), (state[0].detach(), state[1].detach())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss, self.state = self.window(batch, self.state if batch_idx else None)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, batch: tuple[Tensor, Tensor], batch_idx: int, stage: str) -> None:
        loss, self.eval_state = self.window(batch, self.eval_state if batch_idx else None)
        self.log(f"{stage}_bpc", loss / math.log(2), prog_bar=True, batch_size=batch[0].numel(), sync_dist=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, batch_idx, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, batch_idx, "test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hidden_state"] = self.state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.state = checkpoint["hidden_state"]

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        return {
            "optimizer": optimizer,
            "lr_scheduler": one_cycle(optimizer, int(self.trainer.estimated_stepping_batches), warmup=0.1),
        }


class LibraryText(LightningDataModule):
    """The text, in windows.

    Args:
        batch_size: streams read side by side, on one process.
        window: characters of each stream in one step.
        train_chars: use only the first so many characters to train; 0 is all.
        val_chars: and to validate.
        seed: of where in the text each epoch starts.
    """

    def __init__(self, batch_size: int = 32, window: int = 64, train_chars: int = 0, val_chars: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.window, self.seed = batch_size, window, seed
        self.train_chars, self.val_chars = train_chars, val_chars
        self.fingerprint = ""

    def setup(self, stage: str) -> None:
        if self.fingerprint:
            return
        train, val = library_text()
        self.fingerprint = hashlib.sha256(train.tobytes() + b"|" + val.tobytes()).hexdigest()
        train, val = train[: self.train_chars or None], val[: self.val_chars or None]
        self.train, self.val = (torch.tensor(t[: len(t) // self.batch_size * self.batch_size]) for t in (train, val))

    def windows(self, text: Tensor, train: bool) -> Ordered:
        """(x, y), each T B, y one character ahead of x. In training the text is first rotated by a draw from (seed, epoch)."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        B, T = self.batch_size, self.window
        streams = B * (ranks if train else 1)

        @lru_cache(1)
        def drawn(epoch: int) -> tuple[Tensor, Tensor]:
            y = text
            if train:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                y = y.roll(int(torch.randint(len(text), (), generator=generator)))
            L = len(y) // streams
            x, y = (t[: L * streams].reshape(streams, L).mT for t in (y.roll(1), y))  # L streams
            return (x[:, rank * B : (rank + 1) * B], y[:, rank * B : (rank + 1) * B]) if train else (x, y)

        def batch(epoch: int, k: int) -> tuple[Tensor, Tensor]:
            x, y = (t[k * T : (k + 1) * T].long() for t in drawn(epoch))
            return x, y  # T B

        L = len(text) // streams
        return Ordered(L // T if train else -(-L // T), batch)  # the last, shorter window is only evaluated

    def train_dataloader(self) -> Ordered:
        return self.windows(self.train, train=True)

    def val_dataloader(self) -> Ordered:
        return self.windows(self.val, train=False)

    def test_dataloader(self) -> Ordered:
        return self.windows(self.val, train=False)


def beside(data: LibraryText, folder: Path) -> dict[str, float]:
    """The compressors' bits per character; computed once, and kept in the run's folder."""
    path, key = folder / "compressors.json", f"{data.fingerprint} {len(data.train)} {len(data.val)}"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("text") != key:
        kept = {"text": key, "bits": bits_per_character(data.train.numpy(), data.val.numpy(), CLASSES)}
        path.write_text(json.dumps(kept, indent=2) + "\n")
    return kept["bits"]


RECIPE = Recipe(
    model=CharLM,
    data=LibraryText,
    floor=Floor("test_bpc", "LSTM", "5-gram", "bits per character", at_least=False),
    trainer={"max_epochs": 1, "gradient_clip_val": 1.0, "val_check_interval": 0.25, "limit_val_batches": 50},
    smoke={"data.train_chars": 200_000, "data.val_chars": 20_000},
    length=("data.train_chars", "data.val_chars"),
    threads=1,
    beside=beside,
)
