"""Let torch.compile into bptoolkit's recurrent modules.

Dynamo refuses every instance of nn.RNN, nn.GRU and nn.LSTM (`torch._dynamo.config.allow_rnn` is off). bptoolkit's are instances
too, so that a model that asks `isinstance(self.rnn, nn.LSTM)` goes on as before; but the loop over time in their forward is one
opaque node. So the refusal is lifted while Dynamo wraps one of ours; torch's own stay refused.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn


def admit_recurrent_modules() -> None:
    """Call once, after torch._dynamo has been imported."""
    from torch._dynamo import config
    from torch._dynamo.variables.builder import VariableBuilder

    wrap = VariableBuilder.wrap_module

    @wraps(wrap)
    def wrap_module(self: Any, value: nn.Module) -> Any:
        if isinstance(value, nn.RNNBase) and any(c.__module__.startswith("bptoolkit.") for c in type(value).__mro__):
            with config.patch(allow_rnn=True):
                return wrap(self, value)
        return wrap(self, value)

    VariableBuilder.wrap_module = wrap_module  # type: ignore[method-assign]
