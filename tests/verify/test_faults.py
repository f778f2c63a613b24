"""A fixed, short sample of the evidence: planted faults are caught for the right property, correct twins raise no alarm.

`make evidence` runs all of it; its record has to be of the code that is here.
"""

from __future__ import annotations

import json

import pytest
from faults import FAULTS, TWINS
from faults.evidence import RECORD, code_hash, upper_bound

from bptoolkit import verify
from bptoolkit.verify.properties import PROPERTIES
from bptoolkit.verify.properties.values import VALUE_PROPERTIES

SAMPLE = sorted(FAULTS)[::6]
TWIN_SAMPLE = sorted(TWINS)[::9]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_fault_is_caught_for_the_right_property(name):
    fault = FAULTS[name]
    shared = fault.caught_by[0] in VALUE_PROPERTIES  # these eight are one search: an overflow moves the dtype and the values
    judged = list(VALUE_PROPERTIES) if shared else [fault.caught_by[0]]
    report = verify.check(
        fault.fn, fault.inputs, reference=fault.reference, contract=fault.contract, properties=judged, examples=0
    )
    assert {f.property for f in report.failures} & set(fault.caught_by), str(report)


@pytest.mark.parametrize("name", TWIN_SAMPLE)
def test_a_correct_twin_raises_no_alarm(name):
    twin = TWINS[name]
    report = verify.check(twin.fn, twin.inputs, reference=twin.reference, contract=twin.contract, quick=True)
    assert report.ok, str(report)


def test_the_corpus_is_large_enough_and_names_what_exists():
    assert len(FAULTS) >= 80 and len(TWINS) >= 20
    assert sum(bool(f.history) for f in FAULTS.values()) >= 20
    for fault in FAULTS.values():
        assert fault.caught_by and set(fault.caught_by) <= set(PROPERTIES), fault.name


@pytest.mark.skipif(not RECORD.exists(), reason="no evidence has been recorded yet: make evidence")
def test_the_evidence_is_of_this_code():
    assert json.loads(RECORD.read_text())["code"] == code_hash(), "run `make evidence` and commit what it writes"


def test_the_bound_on_a_rate():
    assert abs(upper_bound(0, 140) - 0.0212) < 1e-3  # Clopper-Pearson, 95 %
    assert upper_bound(1, 100) == pytest.approx(0.0466, abs=1e-3)
