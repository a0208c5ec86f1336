"""The one error of the build, and how a cell is named in it."""


class BuildError(ValueError):
    """A chapter that cannot be built; the message names the chapter and the cell."""


def cell_name(cell, position: int) -> str:
    """`check_vision_projection` for a graded cell; `cell 7 "import torch"` for any other (positions start at 1)."""
    grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
    if grade_id:
        return f"cell {position} ({grade_id})"
    first_line = next((line.strip() for line in cell.source.splitlines() if line.strip()), "empty")
    return f'cell {position} ("{first_line[:60]}")'
