"""Ties a test to the words of the claim that it holds to account."""

import re

import pytest

from vlm_course.claims import claims


def _truth(id_: str) -> str:
    rows = {row.id: row for row in claims(int(id_.partition("-")[0]))}
    return rows[id_].truth


@pytest.fixture
def says(request):
    """says(text, ...): each text stands in the corrected statement of the test's claim, so a wrong number there fails.

    A number must stand alone: "576" is not found in "1,576". Give `id` where a test has several marks.
    """
    ids = [mark.args[0] for mark in request.node.iter_markers("claim")]

    def check(*texts: object, id: str | None = None) -> None:
        (chosen,) = {id} if id else set(ids)
        assert chosen in ids, f"the test is marked with {ids}, not with {chosen}"
        truth = _truth(chosen)
        for text in map(str, texts):
            found = re.search(rf"(?<![\w.,]){re.escape(text)}(?![\w]|[.,]\d)", truth)
            assert found, f"claim {chosen} does not say {text!r}, which was computed here: {truth}"

    return check
