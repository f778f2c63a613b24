"""The picture of an error: small, of the right place, and the same place in words."""

from __future__ import annotations

import pytest
import torch

from bptoolkit.verify.picture import LEVELS, heat_map, where_wrong


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_heat_map_of_a_column():
    error = torch.zeros(3, 4)
    error[:, 1] = torch.tensor([1.0, 0.09, 9e-4])
    rows = heat_map(error).splitlines()
    drawn = [r.split("|")[1] for r in rows if "|" in r]
    assert drawn == [f" {LEVELS[-1]}  ", f" {LEVELS[-2]}  ", f" {LEVELS[-4]}  "]
    assert "column 1" in rows[-1]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (100, 200), (3, 5, 2, 90), (1000,)])
def test_heat_map_is_small_and_has_the_largest(shape):
    error = torch.full(shape, 1e-3)
    error.view(-1)[-1] = 1.0
    drawn = [r.split("|")[1] for r in heat_map(error, error).splitlines() if r.count("|") == 2]
    assert 1 <= len(drawn) <= 16 and all(len(r) <= 48 for r in drawn)
    assert drawn[-1][-1] == LEVELS[-1]


def test_heat_map_of_nothing_and_of_nan():
    assert "no elements" in heat_map(torch.zeros(0, 3))
    assert "0" in heat_map(torch.zeros(2, 2))
    assert LEVELS[-1] in heat_map(torch.tensor([[0.0, float("nan")]]))


def test_heat_map_does_not_call_rounding_wrong():
    want = normal(4, 6)
    got = want.bfloat16().double()
    got[2] = 0
    assert "wrong: row 2" in heat_map((got - want).abs(), want, torch.bfloat16)
    assert "wrong: everywhere" in heat_map((got - want).abs(), want, torch.float64)


@pytest.mark.parametrize(
    "mark, said",
    [
        (lambda m: m, "nowhere"),
        (lambda m: m.fill_(True), "everywhere"),
        (lambda m: m[16:32].fill_(True), "rows 16-31"),
        (lambda m: m[:, 0].fill_(True), "column 0 (the first)"),
        (lambda m: m[-1].fill_(True), "row 39 (the last)"),
        (lambda m: m[4, 2].fill_(True), "one element of 120, at (4, 2)"),
        (lambda m: m.fill_diagonal_(True), "part of rows 0-2"),
        (lambda m: m[10:12, 1:].fill_(True), "rows 10-11, columns 1-2 (all from 1 on)"),
        (lambda m: m[::2].fill_(True), "20 of 40 rows"),
    ],
)
def test_where_it_is_wrong(mark, said):
    mask = torch.zeros(40, 3, dtype=torch.bool)
    mark(mask)
    assert said in where_wrong(mask)
