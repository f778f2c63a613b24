"""The gate: every kernel at its shipped configurations, compiled ahead of time for parts that need not be here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import triton

from bptoolkit.triton_kernels import aot, cli, norms, spills
from bptoolkit.triton_kernels import layer_norm as file

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks/results/kernels.json"
PARTS = [(part, spec) for part in aot.TARGETS for m in aot.modules() for spec in aot.specs_for(m, part)]
NAMES = [f"{spec.label} @ {part}" for part, spec in PARTS]


@pytest.fixture(scope="module")
def record():
    """What was measured when the kernels last changed; for what has changed since, or under another Triton, it measures."""
    return cli.Record(RECORD)


@pytest.mark.parametrize("part, spec", PARTS, ids=NAMES)
def test_ahead_of_time(part, spec, record):
    """Compiles; no register spills, shared memory within the part's, loads of 16 bytes, a matrix instruction for a dot."""
    assert not aot.problems(spec, aot.TARGETS[part], record.usage(spec, part))


KNOWN = [(part, spec) for part, spec in PARTS if aot.TARGETS[part].arch in spills.OF_3_6.get(spec.label, {})]


def test_what_is_known_to_spill_is_there():
    assert len(KNOWN) == sum(len(of) for of in spills.OF_3_6.values())
    assert spills.known("softmax bf16 16384x4096", 100, "3.6.0") == 8
    assert not any(spills.known(*of) for of in (("softmax bf16 16384x4096", 100, "3.9.0"), ("softmax", 90, "3.6.0")))


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="of another Triton nothing is known to spill")
@pytest.mark.parametrize("part, spec", KNOWN, ids=[f"{spec.label} @ {part}" for part, spec in KNOWN])
def test_what_spills_costs_little(part, spec):
    """On NVIDIA's parts no store is in a loop, and what is loaded is not needed again: its last use. On AMD's nothing is in
    memory: vector registers do not spill."""
    target = aot.TARGETS[part]
    compiled = aot.compiled_for(spec, target)
    if target.backend == "hip":
        assert re.search(r"\.vgpr_spill_count: +0\n", compiled.asm["amdgcn"])
        return
    code = aot.cuobjdump(compiled.asm["cubin"], "-sass")
    lines = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code)]
    stores = [at for at, line in lines if re.search(r"\bSTL\b", line)]
    loads = re.findall(r"\bLDL[.\w]*", code)
    jumps = [(int(to[1], 16), at) for at, line in lines if (to := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", line))]
    assert stores and loads and any(to < at for to, at in jumps)
    assert not [at for at in stores for to, end in jumps if to <= at <= end]
    assert all(".LU" in load for load in loads)


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES)


def test_the_record_is_of_this_code():
    """If not: bptoolkit kernels --record benchmarks/results/kernels.json --markdown docs/kernels.md."""
    found = json.loads(RECORD.read_text())
    if found.pop("triton") != triton.__version__:
        pytest.skip("the record is of another Triton: everything was compiled above")
    assert list(found) == sorted(NAMES)
    stale = [name for name, (part, spec) in zip(NAMES, PARTS) if found[name]["key"] != aot.key(spec, aot.TARGETS[part])]
    assert not stale
    assert cli.table({name: entry for name, entry in found.items()}) in (ROOT / "docs/kernels.md").read_text()


@pytest.mark.parametrize("stem", [m.__name__.rpartition(".")[2] for m in aot.modules()])
def test_the_record_is_true(stem):
    """One compilation of each file again: another part each."""
    found = json.loads(RECORD.read_text())
    if found.pop("triton") != triton.__version__:
        pytest.skip("the record is of another Triton: everything was compiled above")
    stems = [m.__name__.rpartition(".")[2] for m in aot.modules()]
    k = stems.index(stem)
    part = list(aot.TARGETS)[k % len(aot.TARGETS)]
    target = aot.TARGETS[part]
    specs = aot.specs_for(aot.modules()[k], part)
    spec = specs[k % len(specs)]
    entry = {name: value for name, value in found[f"{spec.label} @ {part}"].items() if name != "key"}
    assert aot.compile_for(spec, target)._asdict() == entry


@pytest.mark.parametrize("part", aot.TARGETS)
def test_the_gate_sees_faults(part):
    """A tile that is too large for its registers, addresses of which nothing is known, too little shared memory, no dot."""
    target = aot.TARGETS[part]
    spec = next(s for s in file.specs(target.warp) if s.kernel is norms.backward_kernel)
    good = aot.compile_for(spec, target)
    large = spec._replace(constants={**spec.constants, "BM": 1, "BN": 32768}, warps=4)
    assert "spill" in str(aot.problems(large, target, aot.compile_for(large, target)))
    assert "16 bytes" in str(aot.problems(spec, target, aot.compile_for(spec._replace(aligned=()), target)))
    assert "shared memory" in str(aot.problems(spec, target._replace(shared=good.shared - 1), good))
    assert "tensor-core" in str(aot.problems(spec._replace(dot=True), target, good))


def test_the_key_follows_all_of_a_kernel(monkeypatch):
    """Its text, that of the functions it calls, a constant, the warps and the part."""
    target = aot.TARGETS["sm_90"]
    spec = file.specs(target.warp)[0]
    keys = {
        aot.key(s, t)
        for s, t in (
            (spec, target),
            (spec, aot.TARGETS["sm_80"]),
            (spec._replace(warps=8), target),
            (spec._replace(stages=2), target),
            (spec._replace(constants={**spec.constants, "BM": 2}), target),
            (spec._replace(aligned=()), target),
            (spec._replace(kernel=norms.backward_kernel), target),
        )
    }
    assert len(keys) == 7 and aot.key(spec, target) in keys


def test_the_command(tmp_path, capsys):
    """One part, recorded; a second run compiles nothing; what is not there is named; a kernel that spills is exit status 1."""
    record = tmp_path / "kernels.json"
    assert cli.main(["layer_norm", "--part", "sm_90", "--record", str(record)]) == 0
    assert "layer_norm bf16 64" in capsys.readouterr().out
    before = record.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "compile_for", lambda *a: pytest.fail("compiled again"))
        assert cli.main(["layer_norm", "--part", "sm_90", "--record", str(record)]) == 0
    assert record.read_text() == before
    assert cli.main(["nothing"]) == 2 and cli.main(["--part", "sm_1"]) == 2
    assert "there is no 'sm_1'; there are sm_80" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "compile_for", lambda *a: aot.Usage(255, 8, 0, 1, 1, 1, 0))
        assert cli.main(["layer_norm", "--part", "sm_90"]) == 1
    assert "registers spill (8)" in capsys.readouterr().out
