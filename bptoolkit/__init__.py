"""bptoolkit: hand-written backward passes for PyTorch, proved right, swapped in, trained with."""

from bptoolkit.op import Op as Op
from bptoolkit.ops import OPS as OPS

__version__ = "0.1.0"
