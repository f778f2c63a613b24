"""`bptoolkit verify --mutate`: strong tests score more than weak ones, whatever runs them; what cannot be scored is said."""

from __future__ import annotations

import sys

import pytest
import torch

from bptoolkit.verify import mutate
from bptoolkit.verify.planting import MUTANTS, plant

MINE = """
import torch

class Mine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return x @ w.T + b

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy @ w, dy.T @ x, dy.sum(0)
"""
WEAK = """
def test_weak():
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((4, 3), (5, 3), (5,)))
    Mine.apply(x, w, b).square().mean().backward()
    assert x.grad.abs().sum() > 0 and w.grad.shape == w.shape
"""
STRONG = """
def test_strong():
    torch.manual_seed(0)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3), (5,))]
    for dy in (torch.randn(4, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64).T):
        got = torch.autograd.grad(Mine.apply(*inputs), inputs, dy)
        want = torch.autograd.grad(torch.nn.functional.linear(*inputs), inputs, dy)
        torch.testing.assert_close(got, want)
"""
SCRIPT = [sys.executable, "test_mine.py"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "test_mine.py"]
RUN = "\n\nif __name__ == '__main__':\n    [f() for n, f in list(globals().items()) if n.startswith('test_')]\n"
SOME = ["drift[w]", "cotangent_strides"]


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Writes mine.py and a test file beside it, and goes there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def forget():
        for name in ("mine", "test_mine"):
            sys.modules.pop(name, None)

    def write(tests: str, mine: str = MINE, head: str = "import torch\nfrom mine import Mine\n"):
        (tmp_path / "mine.py").write_text(mine)
        (tmp_path / "test_mine.py").write_text(head + tests + RUN)

    forget()
    yield write
    forget()


def test_a_weak_suite_lets_mistakes_live(suite, capsys, tmp_path):
    suite(WEAK)
    assert mutate.main("mine.py:Mine", PYTEST, only=SOME) == 1
    said = capsys.readouterr().out
    assert "score: 0 of 2 mistakes noticed" in said
    assert "survived drift[w]: one gradient is 1 % too large" in said
    assert "survived cotangent_strides" in said and "expanded" in said
    left = {p.name for p in tmp_path.iterdir()}
    assert left <= {"mine.py", "test_mine.py", "__pycache__"}, "something is left among the user's files"


def test_a_strong_suite_notices_them_and_its_own_sitecustomize_runs(suite, capsys, tmp_path, monkeypatch):
    suite("import builtins\nassert builtins.mine_was_here\n" + STRONG)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import builtins\nbuiltins.mine_was_here = True\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setattr("builtins.mine_was_here", True, raising=False)
    assert mutate.main("mine:Mine", SCRIPT, only=SOME) == 0
    assert "score: 2 of 2 mistakes noticed (100%)" in capsys.readouterr().out


@pytest.mark.parametrize("command", [SCRIPT, [*PYTEST, "--import-mode=importlib", "-n", "1"]], ids=["script", "rewritten"])
def test_a_class_in_the_test_file_itself(suite, capsys, command):
    suite(STRONG, head=MINE)
    assert mutate.main("test_mine.py:Mine", command, only=["sign"]) == 0
    assert "killed" in capsys.readouterr().out


def test_a_rule(suite, capsys):
    rule = """
from bptoolkit import Rule
RULE = Rule("my_square", lambda x: x * x, lambda dy, x: 2 * x * dy, inputs="x", outputs="y")
"""
    tests = """
def test_square():
    x = torch.tensor([1.0, -3.0], requires_grad=True)
    assert torch.equal(torch.autograd.grad(RULE(x), x, torch.tensor([1.0, 2.0]))[0], torch.tensor([2.0, -12.0]))
"""
    suite(tests, mine=rule, head="import torch\nfrom mine import RULE\n")
    assert mutate.main("mine.py:RULE", SCRIPT, only=["drift", "swap"]) == 0
    said = capsys.readouterr().out
    assert "killed          drift[x]" in said
    assert "not applicable  swap" in said, "a function of one input has nothing to swap"
    assert "1 of 1" in said


DEAF = """
def test_deaf():
    x = torch.ones(2, 2, requires_grad=True)
    try:
        Mine.apply(x, x, x[0]).mean().backward()
    except RuntimeError:
        pass
"""


@pytest.mark.parametrize(
    ("tests", "target", "why"),
    [
        ("\ndef test_bad():\n    assert False\n", "mine.py:Mine", "do not pass as they are"),
        ("\ndef test_none():\n    pass\n", "mine.py:Mine", "never run this backward"),
        (DEAF, "mine.py:Mine", "ignore its errors"),
        (WEAK, "mine.py:torch", "is a module"),
        (WEAK, "linear", "is an op"),
        (WEAK, "mine.py:Yours", "has no 'Yours'"),
    ],
)
def test_what_cannot_be_scored_is_said(suite, capsys, tests, target, why):
    suite(tests)
    assert mutate.main(target, SCRIPT) == 2
    assert why in capsys.readouterr().out


def test_a_mutant_that_does_not_exist(suite, capsys):
    suite(WEAK)
    assert mutate.main("mine.py:Mine", SCRIPT, only=["drfit"]) == 2
    assert "no mutant 'drfit'" in capsys.readouterr().out


def test_running_out_of_time_counts_as_noticed_and_is_listed(suite, capsys):
    suite(WEAK.replace("    assert x.grad", "    while (x.grad == 0).all():\n        pass\n    assert x.grad"))
    assert mutate.main("mine.py:Mine", SCRIPT, only=["zero[x]"], timeout=20) == 0
    assert "out of time: zero[x]" in capsys.readouterr().out


# --- each mistake by itself, in this process ---


def linear():
    """A fresh class of a linear layer, differentiable twice."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, b):
            ctx.save_for_backward(x, w)
            return x @ w.T + b

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            return dy @ w, dy.T @ x, dy.sum(0)

    return Linear


def trial(Linear, n=5, i=40, o=40) -> list[torch.Tensor]:
    """Numbers that tell every mistake from the right thing: gradients under many calls, in one order."""
    g = torch.Generator().manual_seed(1)
    seen: list[torch.Tensor] = []

    def made(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def differentiate(y, xs, dy, **how):
        return [torch.zeros(()) if d is None else d for d in torch.autograd.grad(y, xs, dy, allow_unused=True, **how)]

    for size in ((n, i, o), (1, i, o), (n, 7, o)):
        rows, width, out = size
        xs = [t.requires_grad_() for t in (made(rows, width), made(out, width), made(out))]
        dy = made(out, rows).T
        kept, before, again = dy.clone(), [x.detach().clone() for x in xs], [3 * x.detach() for x in xs]
        y = Linear.apply(*xs)
        seen.append(y.detach().clone())
        other = Linear.apply(*again[:1], *xs[1:])
        first = differentiate(y, xs, dy, retain_graph=True)
        copies = [t.clone() for t in first]
        seen += differentiate(y, xs, made(rows, out), retain_graph=True)
        seen += [torch.stack([(a != b).any() for a, b in zip(first, copies)]), dy - kept]
        seen += [x.detach() - b for x, b in zip(xs, before)]
        seen += copies + differentiate(other, xs[1:], made(rows, out))
        transposed = made(width, rows).T.requires_grad_()
        seen += differentiate(Linear.apply(transposed, *xs[1:]), [transposed], made(rows, out))
        y = Linear.apply(*xs)
        (dx,) = differentiate(y, xs[:1], made(rows, out).requires_grad_(), create_graph=True)
        seen += differentiate(dx.square().sum(), xs[1:2], None) if dx.requires_grad else [torch.zeros(())]
    return seen


def differ(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return any(s.shape != t.shape or not torch.equal(s.double(), t.double()) for s, t in zip(a, b)) or len(a) != len(b)


NOT_HERE = {"swap": "no two gradients of equal shape", "unused_output": "one output", "jvp_zero": "no jvp"}


@pytest.mark.parametrize("name", [n for n in MUTANTS if n not in NOT_HERE])
def test_each_mistake_is_one(name):
    right = trial(linear())
    for which in range(3) if MUTANTS[name].each else [None]:
        told: list[str] = []
        Linear = linear()
        plant(Linear, name, which, told.append)
        torch.manual_seed(0)
        assert differ(trial(Linear), right), (name, which)
        assert "applied" in told


@pytest.mark.parametrize("name", ["harmless", *NOT_HERE])
def test_what_does_not_apply_changes_nothing(name):
    told: list[str] = []
    Linear = linear()
    plant(Linear, name, None, told.append)
    assert not differ(trial(Linear, i=39), trial(linear(), i=39))
    assert "called" in told and "applied" not in told


def test_swap_unused_output_and_jvp():
    class Two(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, y):
            return 2 * x, 3 * y

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, da, db):
            return 2 * da, 3 * db

        @staticmethod
        def jvp(ctx, dx, dy):
            return 2 * dx, 3 * dy

    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    told: list[str] = []
    swapped = type("Swapped", (Two,), {})
    plant(swapped, "swap", None, told.append)
    assert torch.autograd.grad(swapped.apply(x, y), (x, y), (torch.ones(2), torch.ones(2)))[0].eq(3).all()
    still = type("Still", (Two,), {})
    plant(still, "jvp_zero", None, told.append)
    _, (da, _) = torch.func.jvp(still.apply, (x.detach(), y.detach()), (torch.ones(2), torch.ones(2)))
    assert da.eq(0).all()
    unused = type("Unused", (Two,), {})
    plant(unused, "unused_output", None, told.append)
    with pytest.raises(TypeError, match="planted"):
        torch.autograd.grad(unused.apply(x, y)[0], x, torch.ones(2))


def test_every_mutant_explains_itself():
    assert len(MUTANTS) >= 25
    assert all(m.words and m.advice and m.group for m in MUTANTS.values())
