"""Chapter 4's study: a rehearsal of a few steps, end to end."""

import pytest

from vlm_course.studies import study
from vlm_course.studies.common import run_study
from vlm_course.studies.results import load_results
from vlm_course.worlds.dialogs import KINDS


@pytest.mark.parametrize("variant", ["captions"])
def test_a_rehearsal_asks_every_kind_of_question(tmp_path, variant):
    plan = study("instruction-mix")
    one = type(plan)(**{**vars(plan), "variants": {variant: plan.variants[variant]}})
    run_study(one, seeds=1, out=tmp_path, scale=0.003, log=lambda _: None)
    results = load_results("instruction-mix", tmp_path)
    measures = {*KINDS, "count by size"}
    assert measures <= set(results.value(variant, "exam"))
    assert results.rehearsal
