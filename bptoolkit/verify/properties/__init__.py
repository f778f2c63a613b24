"""What must hold of a differentiable function, one property a function; each docstring says which mistakes it catches.

A property takes a `Trial` and returns None, or raises `Wrong` (it does not hold) or `NotApplicable` (it says nothing about this
call). `PROPERTIES` is in the order in which a report lists them.
"""

from __future__ import annotations

from collections.abc import Callable

import bptoolkit.verify.properties.numeric as numeric
import bptoolkit.verify.properties.state as state
import bptoolkit.verify.properties.storage as storage
import bptoolkit.verify.properties.tools as tools
import bptoolkit.verify.properties.transforms as transforms
from bptoolkit.verify.properties.values import VALUE_PROPERTIES
from bptoolkit.verify.trial import Trial

PROPERTIES: dict[str, Callable[[Trial], None]] = {
    **VALUE_PROPERTIES,
    **{
        f.__name__: f
        for f in (
            state.some_outputs_unused,
            storage.nothing_changed,
            state.backward_twice,
            state.interleaved_calls,
            storage.gradients_kept,
            storage.version_counter,
            storage.memory,
            state.deterministic,
            state.global_rng,
            numeric.linear_in_cotangent,
            numeric.finite_differences,
            transforms.double_backward,
            transforms.forward_mode,
            transforms.vmap,
            transforms.per_sample_gradients,
            tools.compile,
            tools.autocast,
            tools.fake_tensors,
            tools.devices,
            tools.checkpoint,
            tools.registration,
        )
    },
}
QUICK = tuple(p for p in PROPERTIES if p not in ("compile", "fake_tensors", "registration"))
"""What `quick=True` judges: all but what has to import Dynamo, which alone takes seconds."""
