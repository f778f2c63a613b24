"""bptoolkit: hand-written backward passes for PyTorch, proved right, swapped in, trained with."""

from bptoolkit import compress as compress
from bptoolkit import functional as functional
from bptoolkit import init as init
from bptoolkit import nn as nn
from bptoolkit import verify as verify
from bptoolkit.associative_scan import associative_scan as associative_scan  # the function hides the module of its name
from bptoolkit.calls import functional_calls as functional_calls
from bptoolkit.function import Rule as Rule
from bptoolkit.op import Op as Op
from bptoolkit.opaque import Opaque as Opaque
from bptoolkit.ops import OPS as OPS
from bptoolkit.ops.bptt import ARTBP as ARTBP
from bptoolkit.ops.bptt_plan import bptt_plan as bptt_plan
from bptoolkit.scan import Scan as Scan
from bptoolkit.scan import scan as scan  # likewise
from bptoolkit.swap import SwapReport as SwapReport
from bptoolkit.swap import swap as swap  # likewise
from bptoolkit.swap import unswap as unswap

__version__ = "0.1.0"
