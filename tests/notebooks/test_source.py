"""A malformed source is refused, and the message names the cell."""

import pytest

from vlm_course.build.errors import BuildError
from vlm_course.build.source import parse_source

GOOD = """# %% [markdown] covers=["2-idea-1"]
# # A title

# %% locked="imports"
import math

# %% exercise="area" twin="vlm_course.patches.area" covers=["2-build-1"]
def area(side):
    ### BEGIN SOLUTION
    return side**2
    ### END SOLUTION

# %% check="area" points=4
assert area(3) == 9

# %% tags=["nbval-ignore-output"] folded=true
print(math.pi)
"""


def test_the_short_headers_become_nbgrader_metadata():
    title, imports, exercise, check, free = parse_source(GOOD, "02_x").cells
    assert title.metadata == {"vlm_course": {"covers": ["2-idea-1"]}} and title.source == "# A title"
    assert imports.metadata.nbgrader == {
        "grade_id": "imports", "grade": False, "solution": False, "locked": True, "task": False, "schema_version": 3,
    }  # fmt: skip
    assert exercise.metadata.nbgrader.grade_id == "area" and exercise.metadata.nbgrader.solution
    assert exercise.metadata.vlm_course.twin == ["vlm_course.patches.area"]
    assert check.metadata.nbgrader == {
        "grade_id": "check_area", "grade": True, "solution": False, "locked": True, "task": False, "schema_version": 3,
        "points": 4,
    }  # fmt: skip
    assert free.metadata == {"tags": ["nbval-ignore-output"], "jupyter": {"source_hidden": True}}


def test_cell_ids_are_stable_and_unique():
    ids = [cell.id for cell in parse_source(GOOD, "02_x").cells]
    assert ids == [cell.id for cell in parse_source(GOOD, "02_x").cells]
    assert len(set(ids)) == len(ids)
    longer = parse_source(GOOD.replace("# %% locked", "# %%\nmath = None\n\n# %% locked"), "02_x")
    assert [cell.id for cell in longer.cells if cell.source != "math = None"] == ids, (
        "a new cell must not rename the others"
    )
    twice = parse_source("# %%\nprint(1)\n\n# %%\nprint(1)\n", "02_x")
    assert twice.cells[0].id != twice.cells[1].id


@pytest.mark.parametrize(
    ("old", "new", "cell", "message"),
    [
        ('check="area" points=4', 'check="area"', "cell 4 (check_area)", "needs points"),
        ("points=4", "points=0", "cell 4 (check_area)", "needs points"),
        ("points=4", 'points="4"', "cell 4 (check_area)", "needs points"),
        ("    ### BEGIN SOLUTION\n", "", "cell 3 (area)", "END SOLUTION without its BEGIN"),
        ("    ### END SOLUTION\n", "", "cell 3 (area)", "BEGIN SOLUTION without its END"),
        ("    return side**2\n", "", "cell 3 (area)", "region is empty"),
        (
            "    ### BEGIN SOLUTION\n    return side**2\n    ### END SOLUTION",
            "    return side**2",
            "cell 3 (area)",
            "needs a region",
        ),
        ("### BEGIN SOLUTION", "# BEGIN SOLUTION", "cell 3 (area)", "not exactly a region marker"),
        (
            "print(math.pi)",
            "### BEGIN SOLUTION\nprint(math.pi)\n### END SOLUTION",
            'cell 5 ("### BEGIN SOLUTION")',
            "belongs in a cell with exercise=",
        ),
        (
            "import math",
            "### BEGIN HIDDEN TESTS\nimport math\n### END HIDDEN TESTS",
            "cell 2 (imports)",
            "belongs in a cell with check=",
        ),
        ('locked="imports"', 'locked="area"', "cell 3 (area)", "grade id area is taken by cell 2"),
        ('check="area"', 'check="volume"', "cell 4 (check_volume)", "there is no exercise volume above"),
        ('exercise="area"', 'exercise="Area"', "cell 3 (Area)", "not a lower-case name"),
        (
            'tags=["nbval-ignore-output"]',
            'tags=["raises-exception"]',
            'cell 5 ("print(math.pi)")',
            "not written by hand",
        ),
        ("folded=true", "solution=true", 'cell 5 ("print(math.pi)")', "unknown key solution"),
        ('locked="imports"', 'locked="imports" twin="a.b"', "cell 2 (imports)", "twin belongs on an exercise"),
        ('covers=["2-idea-1"]', 'covers="2-idea-1"', 'cell 1 ("# A title")', "must be a JSON list"),
        ('[markdown] covers=["2-idea-1"]', '[markdown] locked="title"', "cell 1 (title)", "belongs on a code cell"),
        ('check="area" points=4', 'check="area" exercise="b" points=4', "cell 4", "exclude each other"),
    ],
)
def test_malformed_cells_are_named(old, new, cell, message):
    assert GOOD.count(old) == 1
    with pytest.raises(BuildError) as caught:
        parse_source(GOOD.replace(old, new), "02_x")
    line = next(line for line in str(caught.value).splitlines() if message in line)
    assert line.startswith(f"02_x, {cell}")


def test_duplicate_grade_id_and_unchecked_exercise():
    exercise = GOOD[GOOD.index("# %% exercise") : GOOD.index("# %% check")]
    with pytest.raises(BuildError, match=r"02_x, cell 4 \(area\): the grade id area is taken by cell 3"):
        parse_source(GOOD.replace(exercise, exercise + exercise), "02_x")
    with pytest.raises(BuildError, match=r"cell 4 \(volume\): no cell checks the exercise volume"):
        parse_source(GOOD.replace(exercise, exercise + exercise.replace('"area"', '"volume"')), "02_x")


def test_all_problems_are_reported_together():
    with pytest.raises(BuildError) as caught:
        parse_source(GOOD.replace("points=4", "").replace("folded=true", "solution=true"), "02_x")
    assert len(str(caught.value).splitlines()) == 2
