"""`Contract`: what a function claims, and what it does not. What is declared is tested as declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

CAPABILITIES = ("double_backward", "forward_mode", "vmap", "compile", "autocast", "fake_tensors")


@dataclass(frozen=True)
class Contract:
    """What a function claims.

    A capability is None: it works or it raises, but is never silently wrong; True: it works, and raising is a failure; False:
    it is not there, and must raise when asked for.

    Attributes:
        double_backward: gradients of gradients.
        forward_mode: `torch.func.jvp`.
        vmap: `torch.func.vmap`, and with it per-sample gradients.
        compile: `torch.compile(fullgraph=True)`.
        autocast: runs under `torch.autocast`. None counts as True where the reference runs under it.
        fake_tensors: runs on meta and fake tensors.
        deterministic: two runs give the same bits.
        random: forward draws from the global random number generator (dropout); every run is then seeded alike.
        mutates: the names of inputs that forward writes to on purpose, or "cotangents" for a backward that writes over them.
        dtypes: the names of the dtypes that must work; None: those that the function takes, the others must raise.
        empty: takes tensors without elements.
        kinks: "exact": at a kink the derivative is the reference's; "any": either side will do, kinks are not judged.
    """

    double_backward: bool | None = None
    forward_mode: bool | None = None
    vmap: bool | None = None
    compile: bool | None = None
    autocast: bool | None = None
    fake_tensors: bool | None = None
    deterministic: bool = True
    random: bool = False
    mutates: tuple[str, ...] = ()
    dtypes: tuple[str, ...] | None = None
    empty: bool = True
    kinks: str = "exact"

    @classmethod
    def of(cls, given: Contract | Mapping[str, Any] | None) -> Contract:
        """A contract from what the caller gave.

        Raises:
            TypeError: it names something that is not in a contract, or has a value of another type.
        """
        if isinstance(given, Contract):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"verify: contract must be a Contract or a mapping, not {type(given).__name__} ({given!r})")
        known = {f.name: f.type for f in fields(cls)}
        values = dict(given or {})
        for name, value in values.items():
            if name not in known:
                raise TypeError(f"verify: contract has no {name!r}; it has {', '.join(known)}")
            if name in CAPABILITIES and value not in (None, True, False):
                raise TypeError(f"verify: contract[{name!r}] must be True, False or None, not {value!r}")
            if name in ("mutates", "dtypes") and value is not None:
                values[name] = (value,) if isinstance(value, str) else tuple(value)
        if values.get("kinks", "exact") not in ("exact", "any"):
            raise TypeError(f"verify: contract['kinks'] must be 'exact' or 'any', not {values['kinks']!r}")
        return cls(**values)

    def declared(self) -> dict[str, Any]:
        """What differs from the default."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
