"""What makes the arguments of a call: a shapes string, example arguments, a Hypothesis strategy, or an op's own cases.

A `Source` says which sizes there are to vary and makes the arguments for a `Point`. Elements come from a seed, never from a
search: what is searched, and shrunk, is structure.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from bptoolkit.cases import Draw
from bptoolkit.op import Op
from bptoolkit.shapes import Shapes
from bptoolkit.verify.layouts import VALUES
from bptoolkit.verify.point import Point

BASE = (3, 5, 4, 7)  # distinct small sizes, a letter each: a transposed matrix shows
SIZES = (1, 0, 2, 7, 16, 17, 33, 64, 65, 128, 129, 8, 15, 31, 32, 63, 127)
QUICK_SIZES = (1, 0, 17, 33, 129)
LEADING = ("3", "-", "0", "1", "2x3", "1x1", "3x0", "17", "2x1x2", "65", "129")
QUICK_LEADING = ("3", "-", "0", "1", "2x3", "17")
LONG = (257, 1025)  # past the larger blocks: each dimension once, the others small
REGIMES = tuple(VALUES)
MOST = 1 << 15  # elements of an argument: beyond, the largest sizes are taken back


class Arguments(NamedTuple):
    """The arguments of one call: `*args, **kwargs` flattened, and where the tensors to differentiate by are."""

    flat: list[Any]
    spec: Any
    where: tuple[int, ...]


class Source:
    """Makes the arguments of a call for a point.

    Attributes:
        names: of the tensors to differentiate by.
        sizes: letter -> the sizes it may have, simplest first.
        regimes: names in `layouts.VALUES`, simplest first; "given" for values that the caller chose.
        text: the `inputs=` of a call that makes the same source, for snippets; "" if it has no short form.
    """

    names: tuple[str, ...] = ()
    sizes: dict[str, Sequence[Any]] = {}  # noqa: RUF012
    regimes: tuple[str, ...] = REGIMES
    text = ""

    def make(self, point: Point) -> Arguments:
        """The arguments at a point, contiguous, of the point's dtype."""
        raise NotImplementedError

    def largest(self, point: Point) -> int:
        """The elements of the largest argument at a point."""
        return 0

    def long(self) -> list[tuple[str, Any]]:
        """(letter, size) beyond those of the other rows, the shorter ones first."""
        return [(k, str(n) if k.startswith("*") else n) for n in LONG for k in self.sizes if k != "case"]

    def squares(self) -> list[dict[str, Any]]:
        """Sizes that are worth a visit although more than one letter moves: all alike, as a transposition needs to hide."""
        letters = [k for k in self.sizes if not k.startswith("*") and k != "case"]
        return [dict.fromkeys(letters, n) for n in (3, 17)] if len(letters) > 1 else []


class FromShapes(Source):
    """`"x: *B I, w: O I -> *B O"`."""

    def __init__(self, text: str, quick: bool = False) -> None:
        if ":" not in text:
            raise ValueError(f"verify: {text!r} is not a shapes string; one looks like 'x: *B I, w: O I -> *B O'")
        self.shapes, self.text = Shapes(text), repr(text)
        self.names = tuple(name for name, _, _ in self.shapes.inputs)
        self.sizes = {}
        fixed = 0
        for name, lead, dims in self.shapes.inputs:
            if not name.isidentifier():
                raise ValueError(
                    f"verify: {name!r} in {text!r} is not a name; a shapes string looks like 'x: *B I, w: O I -> *B O'"
                )
            if lead:
                self.sizes.setdefault(lead, QUICK_LEADING if quick else LEADING)
            for d in dims:
                if not d.isdigit() and d not in self.sizes:
                    base = BASE[fixed % len(BASE)]
                    fixed += 1
                    self.sizes[d] = (base, *(s for s in (QUICK_SIZES if quick else SIZES) if s != base))

    def largest(self, point: Point) -> int:
        sizes = {k: _extent(v) for k, v in point.sizes}
        return max(
            math.prod(int(d) if d.isdigit() else sizes[d] for d in (*dims, *[lead][: bool(lead)]))
            for _, lead, dims in self.shapes.inputs
        )

    def make(self, point: Point) -> Arguments:
        sizes = dict(point.sizes)
        g = torch.Generator().manual_seed(point.seed)
        args = []
        for k, (_, lead, dims) in enumerate(self.shapes.inputs):
            leading = () if not lead or sizes[lead] == "-" else tuple(map(int, str(sizes[lead]).split("x")))
            shape = leading + tuple(int(d) if d.isdigit() else int(sizes[d]) for d in dims)
            t = VALUES[point.values](shape, g)
            if k and len(shape) > 1 and point.values in ("normal", "large", "small"):
                t = t * max(shape[-1], 1) ** -0.5  # a matrix that keeps what it multiplies at its size
            args.append(t.to(point.torch_dtype))
        flat, spec = tree_flatten((tuple(args), {}))
        return Arguments(flat, spec, tuple(range(len(args))))


class FromExamples(Source):
    """A tuple of example arguments. Equal sizes are one letter; which letters may vary is found by trying (`probe`)."""

    def __init__(self, examples: Sequence[Any], fn: Any, quick: bool = False) -> None:
        self.examples, self.quick = tuple(examples), quick
        flat, _ = tree_flatten((self.examples, {}))
        floats = [k for k, t in enumerate(flat) if isinstance(t, Tensor) and t.is_floating_point()]
        asked = [k for k in floats if flat[k].requires_grad]
        self.where = tuple(asked or floats)
        self.names = _names(fn, self.examples, flat, self.where)
        self.letters: dict[int, str] = {}
        self.sizes, self.regimes = {"case": (0,)}, ("given", *REGIMES)
        self.domain = {k: _domain(flat[k]) for k in floats}

    def probe(self, works: Callable[[Point], bool]) -> None:
        """Find the sizes that can be varied: those at which the reference (or the function) still runs."""
        flat, _ = tree_flatten((self.examples, {}))
        found: dict[int, tuple[str, Sequence[int]]] = {}
        for n in sorted({n for t in flat if isinstance(t, Tensor) for n in t.shape if n > 1})[:6]:
            letter = f"n{n}"
            self.letters = {n: letter}
            if not works(Point(sizes=((letter, n + 1),))):
                continue
            tried = [s for s in (QUICK_SIZES if self.quick else SIZES) if s != n]
            legal = [s for s in tried if s > 1 or works(Point(sizes=((letter, s),)))]
            found[n] = letter, (n, *legal)
        self.letters = {n: letter for n, (letter, _) in found.items()}
        self.sizes = dict(found.values()) or {"case": (0,)}

    def largest(self, point: Point) -> int:
        sizes = dict(point.sizes)
        tensors = [t for t in tree_flatten((self.examples, {}))[0] if isinstance(t, Tensor)]
        return max(math.prod(int(sizes.get(self.letters.get(n, ""), n)) for n in t.shape) for t in tensors)

    def make(self, point: Point) -> Arguments:
        sizes = dict(point.sizes)
        g = torch.Generator().manual_seed(point.seed)
        flat, spec = tree_flatten((self.examples, {}))
        made: list[Any] = []
        for k, t in enumerate(flat):
            if not isinstance(t, Tensor):
                made.append(t)
                continue
            t = t.detach()
            shape = tuple(int(sizes.get(self.letters.get(n, ""), n)) for n in t.shape)
            made.append(self._tensor(k, t, shape, point, g))
        return Arguments(made, spec, self.where)

    def _tensor(self, k: int, t: Tensor, shape: tuple[int, ...], point: Point, g: torch.Generator) -> Tensor:
        """One argument at a point: the example itself where the point says so, else of its kind."""
        same = shape == tuple(t.shape)
        if not t.is_floating_point():
            if same or t.numel() == 0:
                return t.clone() if same else t.new_zeros(shape)
            picked = torch.randint(t.numel(), shape, generator=g)  # only values that the example has: indices stay legal
            return t.reshape(-1)[picked.to(t.device)]
        if point.values == "given" and same and point.seed % 1000 == 0:
            return t.to(point.torch_dtype).contiguous().clone()
        if k not in self.where:
            return (t if same else VALUES["normal"](shape, g)).to(t.device, point.torch_dtype)
        regime = "normal" if point.values == "given" else point.values
        drawn = VALUES[regime](shape, g)
        if regime == "normal" and t.numel() and bool(t.isfinite().all()):
            drawn = drawn * (float(t.double().square().mean().sqrt()) or 1.0)
        return self.domain[k](drawn).to(t.device, point.torch_dtype)


class FromStrategy(Source):
    """A Hypothesis strategy of argument tuples: its examples, drawn once for a seed, smallest first."""

    def __init__(self, strategy: Any, fn: Any, seed: int, count: int) -> None:
        from hypothesis import HealthCheck, Phase, given, settings
        from hypothesis import seed as seeded

        drawn: list[tuple[Any, ...]] = []

        @seeded(seed)
        @settings(
            max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )
        @given(strategy)
        def collect(args: Any) -> None:
            drawn.append(tuple(args) if isinstance(args, (tuple, list)) else (args,))

        collect()
        flat = [(tree_flatten((d, {}))[0], d) for d in drawn]
        legal = [d for leaves, d in flat if any(isinstance(t, Tensor) and t.is_floating_point() for t in leaves)]
        if not legal:
            raise ValueError(
                f"verify: {strategy} gave nothing to differentiate by: no floating-point tensor in {len(drawn)} examples"
            )
        legal.sort(key=lambda d: sum(t.numel() for t in tree_flatten((d, {}))[0] if isinstance(t, Tensor)))
        counts = [sum(isinstance(t, Tensor) and t.is_floating_point() for t in tree_flatten((d, {}))[0]) for d in legal]
        common = max(set(counts), key=counts.count)
        self.drawn = [d for d, n in zip(legal, counts) if n == common]
        self.sizes, self.regimes = {"case": tuple(range(len(self.drawn)))}, ("given",)
        first, _ = tree_flatten((self.drawn[0], {}))
        where = tuple(k for k, t in enumerate(first) if isinstance(t, Tensor) and t.is_floating_point())
        self.names = _names(fn, self.drawn[0], first, where)

    def make(self, point: Point) -> Arguments:
        flat, spec = tree_flatten((self.drawn[int(dict(point.sizes)["case"])], {}))
        where = tuple(k for k, t in enumerate(flat) if isinstance(t, Tensor) and t.is_floating_point())
        for k in where:
            flat[k] = flat[k].detach().to(point.torch_dtype).clone(memory_format=torch.contiguous_format)
        return Arguments(flat, spec, where)


class FromOp(Source):
    """An op's own cases: sizes and options drawn from a number, small ones first."""

    def __init__(self, op: Op, seed: int, count: int) -> None:
        self.op, self.seed = op, seed
        self.sizes = {"case": tuple(range(count))}
        self.regimes = ("normal", "kinks", "large", "small", "shifted", "constant")
        self._parameters = tuple(inspect.signature(op.call).parameters)
        self.names = ()

    def names_at(self, point: Point) -> tuple[str, ...]:
        """Which tensors a case differentiates by depends on the case."""
        return self._made(point)[1]

    def make(self, point: Point) -> Arguments:
        return self._made(point)[0]

    def _made(self, point: Point) -> tuple[Arguments, tuple[str, ...]]:
        k = int(dict(point.sizes)["case"])
        random = Random(self.seed * 100_003 + k)
        draw = Draw(random, **rung(k), values=None if point.values == "normal" else VALUES[point.values], salt=point.seed)
        case = self.op.draw(draw)
        flat, spec = tree_flatten((case.args, case.kwargs))
        where = tuple(j for j, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad)
        names = _names(self.op.call, case.args, flat, where, case.kwargs)
        flat = [t.detach() if isinstance(t, Tensor) else t for t in flat]
        for j, t in enumerate(flat):
            if isinstance(t, Tensor) and t.is_floating_point():
                flat[j] = t.to(point.torch_dtype)
        return Arguments(flat, spec, where), names


def rung(k: int) -> dict[str, Any]:
    """How the k-th case of an op draws its sizes: small; then one size at a time zero, one, past a tile; then anything."""
    from bptoolkit.cases import SIZES as ANY

    if k < 3:
        return {"sizes": ((2, 3), (1, 2), (1, 2, 3, 5))[k]}
    if k < 18:
        return {"sizes": (2, 3), "force": {(k - 3) % 3: (0, 1, 17, 33, 65)[(k - 3) // 3]}}
    return {"sizes": ANY}


def _names(fn: Any, args: Sequence[Any], flat: Sequence[Any], where: Sequence[int], kwargs: Any = None) -> tuple[str, ...]:
    """What the function calls the tensors at these places of its flattened arguments, as far as that can be told."""
    try:
        parameters = [
            p.name for p in inspect.signature(fn).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    for k, value in enumerate(args):
        leaves = tree_flatten(value)[0]
        name = parameters[k] if k < len(parameters) and parameters[k] not in ("args", "ctx") else f"input{k}"
        names += [name] if len(leaves) == 1 else [f"{name}{j}" for j in range(len(leaves))]
    for name, value in (kwargs or {}).items():
        leaves = tree_flatten(value)[0]
        names += [name] if len(leaves) == 1 else [f"{name}{j}" for j in range(len(leaves))]
    assert len(names) == len(flat)
    return tuple(names[k] for k in where)


def _domain(t: Tensor) -> Callable[[Tensor], Tensor]:
    """What keeps drawn values where the example's are: in [0, 1], positive, or anywhere."""
    t = t.detach()
    if t.numel() > 1 and bool(t.isfinite().all()) and float(t.min()) >= 0:
        if float(t.max()) <= 1:
            return lambda drawn: drawn.abs().clamp(max=40).mul(-1).exp() if float(t.min()) > 0 else drawn.abs().clamp(max=1)
        return lambda drawn: drawn.abs() + (1e-3 if float(t.min()) > 0 else 0)
    return lambda drawn: drawn


def clamp(source: Source, point: Point) -> Point:
    """The point with its largest sizes taken back until no argument has more than `MOST` elements, nor all sizes multiplied
    more than its square: what a call computes can grow with all of them.
    """
    letters = [k for k in source.sizes if k != "case"]
    while letters:
        sizes = {k: _extent(dict(point.sizes)[k]) for k in letters}
        if source.largest(point) <= MOST and math.prod(max(n, 1) for n in sizes.values()) <= MOST**1.4:
            break
        large = max(letters, key=lambda k: sizes[k])
        if dict(point.sizes)[large] == source.sizes[large][0]:
            break
        point = point.having(large, source.sizes[large][0])
    return point


def is_long(point: Point) -> bool:
    """Whether a size is one of `LONG`."""
    return any(str(size) in map(str, LONG) for _, size in point.sizes)


def _extent(size: Any) -> int:
    """The elements of a size: of leading dimensions joined by x, their product."""
    return math.prod(int(n) for n in str(size).split("x") if n != "-")
