"""Cross entropy of a linear layer, in chunks of rows. For the maths see the op of this name.

A chunk       a = x Wᵀ + b by BLAS; one kernel makes ℓ of each row and, where a gradient is wanted, overwrites a by da;
              dx = da W, dW += daᵀ x by BLAS, db += Σ da
A row         one program walks over it twice: for the largest t, which is at least t_k, and Σ_{c≠k} e^(t_c − m); then for da,
              last blocks first, as they are still in the cache. Its am ≥ C elements leave room for access by 16 bytes
True class    1 − p_k is Σ_{c≠k} e^(t_c − m) / Σ_c e^(t_c − m), and log p_k comes from the same sums: nothing cancels as p_k → 1
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops import linear_cross_entropy as op
from bptoolkit.ops.cross_entropy import at_index
from bptoolkit.ops.reduction import share
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import Kernel, computed_in_float32, dense
from bptoolkit.triton_kernels.operator import operator

BLOCK = 4096  # elements of a row at a time
PER_WARP = 512  # of them
CHUNK, LEAST, MOST = 1 << 26, 2048, 4096  # logits in a chunk; rows in one, between these two as many as columns of W
TILE = 128  # they are a multiple of it
ALIGN = 64  # rows of logits begin at a multiple of so many elements


@triton.jit
def cap(a, softcap):
    """t = s tanh(a / s); the series where the quotient would cancel."""
    x = a / softcap
    E = tl.exp(-2 * tl.abs(x))
    x2 = x * x
    series = tl.abs(x) * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    t = tl.where(tl.abs(x) < 0.25, series, (1 - E) / (1 + E))
    return softcap * tl.where(x < 0, -t, t)


@triton.jit
def cap_slope(a, softcap):
    """1 − tanh²(a / s), without the difference."""
    E = tl.exp(-2 * tl.abs(a / softcap))
    return 4 * E / ((1 + E) * (1 + E))


@triton.jit
def log1p(y):
    """For y ≥ 0: the rounding of 1 + y is put right by the quotient."""
    u = 1 + y
    return tl.where(u == 1, y, tl.log(u) * (y / tl.where(u == 1, 1, u - 1)))


@triton.jit(do_not_specialize=["ignore"])
def rows_kernel(
    a, k, v, total, d, l, am, C, ignore, keep, flat, z_loss, softcap, BN: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    a += r * am
    n = tl.arange(0, BN)  # BN
    kr = tl.load(k + r)
    if kr == ignore:
        tl.store(l + r, 0.0)
        if GRADIENT:
            for at in range(0, C, BN):
                tl.store(a + at + n, tl.zeros((BN,), a.dtype.element_ty), at + n < am)
    else:
        known = (kr >= 0) & (kr < C)  # another class makes its row NaN, and is not read
        vk = tl.where(known, 1.0, float("nan"))
        if v is not None:
            vk = tl.load(v + kr, known, other=float("nan"))
        tk = tl.load(a + kr, known, other=0.0).to(tl.float32)
        if softcap is not None:
            tk = cap(tk, softcap)
        finite = tk > float("-inf")
        t0 = tl.where(finite, tk, 0.0)
        m = tl.where(finite, tk, -3.0e38)
        S = tl.zeros((BN,), tl.float32)  # sums to Σ_{c≠k} e^(t_c − m)
        T = tl.zeros((BN,), tl.float32)  # sums to Σ_{c≠k} v_c (t_c − t0)
        for at in range(0, C, BN):
            others = (at + n < C) & (at + n != kr)
            t = tl.load(a + at + n, at + n < am, other=0.0).to(tl.float32)  # BN
            if softcap is not None:
                t = cap(t, softcap)
            t = tl.where(others, t, float("-inf"))
            top = tl.maximum(m, tl.max(t, 0))
            S = S * tl.exp(m - top) + tl.exp(t - top)
            m = top
            if flat is not None:
                u = tl.where(others, t - t0, 0.0)
                if v is not None:
                    u *= tl.load(v + at + n, at + n < am, other=0.0)
                T += u
        so = tl.sum(S, 0)
        ek = tl.exp(tk - m)
        s = so + ek
        y = so / ek
        nll = tl.where(y < 1, log1p(tl.where(y < 1, y, 0.0)), tl.log(s) + (m - tk))  # −log p_k
        z = m + tl.log(s)
        L = keep * vk * nll
        if flat is not None:
            V = C + 0.0
            if v is not None:
                V = tl.load(total)
            L += flat * (V * tl.where(finite, nll, z) - tl.sum(T, 0))
        if z_loss is not None:
            L += z_loss * vk * z * z
        tl.store(l + r, L)
        if GRADIENT:
            g = 1.0
            if d is not None:
                g = tl.load(d + r)
            hit = keep * vk * g
            base = 0.0  # da_c = p_c (hit + base) − flat g v_c, less hit at k
            if flat is not None:
                base += flat * V * g
            if z_loss is not None:
                base += 2 * z_loss * vk * z * g
            rs = 1 / s
            rest = hit * (so * rs)
            tl.debug_barrier()  # all of a row has been read before some of it is overwritten
            for block in range(0, tl.cdiv(C, BN)):
                at = (tl.cdiv(C, BN) - 1 - block) * BN
                room = at + n < am
                t = tl.load(a + at + n, room, other=0.0).to(tl.float32)  # BN
                if softcap is not None:
                    slope = cap_slope(t, softcap)
                    t = cap(t, softcap)
                p = tl.exp(t - m) * rs
                da = tl.where(at + n == kr, p * base - rest, p * (hit + base))
                if flat is not None:
                    u = flat * g
                    if v is not None:
                        u *= tl.load(v + at + n, room, other=0.0)
                    da -= u
                if softcap is not None:
                    da *= slope
                tl.store(a + at + n, da.to(a.dtype.element_ty), room)


def tile(C: int) -> tuple[int, int]:
    """BN and the number of warps, for rows of C elements."""
    BN = min(max(triton.next_power_of_2(C), 32), BLOCK)
    return BN, max(BN // PER_WARP, 1)


def most_rows(C: int, I: int) -> int:
    """Rows in a chunk at most: for I of them the logits take what W takes."""
    return max(CHUNK // C, min(max(I, LEAST), MOST))


def chunk_of(N: int, C: int, I: int) -> int:
    """Rows in a chunk: all chunks but the last are alike."""
    count = triton.cdiv(N, most_rows(C, I))
    return min(N, triton.cdiv(triton.cdiv(N, count), TILE) * TILE)


def unit(t: Tensor) -> Tensor:
    """A matrix that BLAS takes as it is."""
    return t if 1 in t.stride() else t.contiguous()


def add_product(sum: Tensor, da: Tensor, x: Tensor, beta: int) -> None:
    """sum = beta sum + daᵀ x, in sum's dtype."""
    if sum.dtype == da.dtype:
        sum.addmm_(da.mT, x, beta=beta)
    elif da.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(da.device) >= (8, 0):
        torch.addmm(sum, da.mT, x, out_dtype=sum.dtype, beta=beta, out=sum)
    else:  # of matrices that are upcast, which costs memory
        sum.addmm_(da.mT.to(sum.dtype), x.to(sum.dtype), beta=beta)


def _launch(
    d: Tensor | None,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    v: Tensor | None,
    k: Tensor,
    ignore: int,
    smoothing: float,
    z_loss: float,
    softcap: float | None,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ℓ of the rows, and the gradients of Σ d ℓ, or of Σ ℓ."""
    (N, I), C = x.shape, w.shape[0]
    l, gx, gw, gb = _fake(d, x, w, b, v, k, ignore, smoothing, z_loss, softcap, need)
    gb.zero_()
    if not N:
        return l, gx, gw.zero_(), gb
    R, (BN, warps) = chunk_of(N, C, I), tile(C)
    x, w, k, d, am = unit(x), unit(w), k.contiguous(), dense(d), triton.cdiv(C, ALIGN) * ALIGN
    a = torch.empty(R, am, dtype=x.dtype, device=x.device)[:, :C]
    v = None if v is None else torch.nn.functional.pad(v.float(), (0, am - C))
    total = None if v is None else v.sum()
    flat, z_loss_, write = smoothing / C if smoothing else None, z_loss or None, any(need)
    options = (am, C, ignore, 1 - smoothing, flat, z_loss_, softcap, BN, write)
    for at in range(0, N, R):
        part = slice(at, min(at + R, N))
        x1, a1 = x[part], a[: min(R, N - at)]
        if b is None:
            torch.mm(x1, w.mT, out=a1)
        else:
            torch.addmm(b, x1, w.mT, out=a1)
        rows = (a1, k[part], v, total, None if d is None else d[part], l[part])
        rows_kernel[(len(a1),)](*rows, *options, num_warps=warps, enable_fp_fusion=True)
        if need[0]:
            torch.mm(a1, w, out=gx[part])
        if need[1]:
            add_product(gw, a1, x1, int(at > 0))
        if need[2]:
            gb += torch.sum(a1, 0, dtype=torch.float32)
    return l, gx, gw, gb


def _fake(d, x, w, b, v, k, ignore, smoothing, z_loss, softcap, need):
    (N, I), C = x.shape, w.shape[0]
    l = torch.empty(N, dtype=torch.float32, device=x.device)
    gx = torch.empty((N, I) if need[0] else (0,), dtype=x.dtype, device=x.device)
    gw = torch.empty((C, I) if need[1] else (0,), dtype=sum_dtype(x, w), device=x.device)
    gb = torch.empty(C if need[2] else 0, dtype=torch.float32, device=x.device)
    return l, gx, gw, gb


def sum_dtype(x: Tensor, w: Tensor) -> torch.dtype:
    """gw's: float32, unless bfloat16, which has its range, rounds one product and no sum."""
    return w.dtype if w.dtype == torch.bfloat16 and x.shape[0] <= most_rows(*w.shape) else torch.float32


def _flops(d, x, w, b, v, k, ignore, smoothing, z_loss, softcap, need, *, out_shape=None):
    return 2 * x[0] * x[1] * w[0] * (1 + need[0] + need[1])


ROWS = operator("triton_linear_cross_entropy", _launch, _fake, flops=_flops)


def forward(x, w, b, v, k, ignore, reduction, smoothing, full, z_loss, softcap):
    l, *_ = ROWS(None, x, w, b, v, k, ignore, smoothing, z_loss, softcap, [False] * 3)
    _, _, vk = at_index(x, v, k, ignore)  # N
    return op.finish(l, vk.sum(), x, reduction, full)


def backward(dl, x, w, b, v, k, l, ignore, reduction, smoothing, z_loss, softcap, need):
    if need.v:
        return op.RULE.backward(dl, x, w, b, v, k, l, ignore, reduction, smoothing, z_loss, softcap, need)
    _, _, vk = at_index(x, v, k, ignore)  # N
    d = share(dl, vk.sum(), reduction).expand(k.shape)  # N: dℓ, but for ignored rows, whose da is 0
    _, *gradients = ROWS(d, x, w, b, v, k, ignore, smoothing, z_loss, softcap, list(need[:3]))
    return *(g.to(t.dtype) if n else None for g, t, n in zip(gradients, (x, w, b), need)), None, None


def forward_fused(x, w, b, v, k, ignore, reduction, smoothing, full, z_loss, softcap, wanted):
    l, gx, gw, gb = ROWS(None, x, w, b, v, k, ignore, smoothing, z_loss, softcap, [i in wanted for i in "xwb"])
    _, _, vk = at_index(x, v, k, ignore)  # N
    return op.finish(l, vk.sum(), x, reduction, full), gx, gw, gb


def unsupported(x: Tensor, w: Tensor, b: Tensor | None, v: Tensor | None, k: Tensor, *options: object) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)
FUSED = Kernel(forward_fused, op.FUSED.backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernel at the shipped configurations: few classes, a vocabulary; the loss alone; with all the options."""
    every = []
    for t in ("bf16", "fp32"):
        for C in (1000, BLOCK):
            BN, warps = tile(C)
            for label, gradient, options in (("loss", False, False), ("gradient", True, False), ("all options", True, True)):
                pointers = {"a": f"*{t}", "k": "*i64", "l": "*fp32"}
                numbers = {"am": "i32", "C": "i32", "ignore": "i32", "keep": "fp32"}
                constants = {"BN": BN, "GRADIENT": gradient}
                more = dict.fromkeys(("flat", "z_loss", "softcap"), "fp32")
                if options:
                    pointers |= {"v": "*fp32", "total": "*fp32", "d": "*fp32"}
                    numbers |= more
                else:
                    constants |= dict.fromkeys(("v", "total", "d", *more))
                name = f"linear_cross_entropy {label} {t} {C}"
                aligned = (*pointers, "am")
                every.append(Spec(name, rows_kernel, pointers | numbers, constants, aligned, warps))
    return every
