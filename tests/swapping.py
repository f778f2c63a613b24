"""What the tests of swap share."""

import bptoolkit as bp

LINEAR = bp.nn.Linear


def state(model):
    """Everything that a model's modules hold, and their classes."""
    return {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}


def same(before, after):
    assert list(before) == list(after)
    for name, (cls, held) in before.items():
        assert after[name][0] is cls, name
        assert list(held) == list(after[name][1]), name
        assert all(after[name][1][k] is v for k, v in held.items()), name
