"""Which items of the source lesson the chapters cover, by the ids that cells name in their metadata."""

from collections.abc import Iterable, Mapping, Sequence

from vlm_course.build.errors import cell_name

# Chapters that are declared finished: every item of theirs must be covered.
FINISHED = ("00", "01", "02", "03", "04", "05")


def covered_items(notebooks: Mapping[str, object]) -> dict[str, list[str]]:
    """For each id that a cell covers, the cells that do; `notebooks` maps slugs to notebooks."""
    covered: dict[str, list[str]] = {}
    for slug, notebook in notebooks.items():
        for position, cell in enumerate(notebook.cells, start=1):
            for item in cell.metadata.get("vlm_course", {}).get("covers", []):
                covered.setdefault(item, []).append(f"{slug}, {cell_name(cell, position)}")
    return covered


def coverage_problems(
    items: Sequence[dict], covered: Mapping[str, list[str]], finished: Iterable[str] = FINISHED
) -> list[str]:
    """Ids that the lesson does not have, and items of finished chapters that no cell covers."""
    known = {item["id"] for item in items}
    problems = [
        f"{cell}: the lesson has no item {item}" for item in sorted(set(covered) - known) for cell in covered[item]
    ]
    chapters = {int(number) for number in finished}
    missing = [item for item in items if item["chapter"] in chapters and item["id"] not in covered]
    return problems + [
        f"chapter {item['chapter']:02d} is declared finished, but no cell covers {item['id']} ({item['item']})"
        for item in missing
    ]


def coverage_table(items: Sequence[dict], covered: Mapping[str, list[str]]) -> str:
    """One line a chapter with its count, then what is still uncovered."""
    lines = []
    for chapter in sorted({item["chapter"] for item in items}):
        own = [item for item in items if item["chapter"] == chapter]
        missing = [item for item in own if item["id"] not in covered]
        lines.append(f"chapter {chapter:02d}: {len(own) - len(missing)} of {len(own)} items covered")
        lines += [f"    uncovered {item['id']}: {item['item']}" for item in missing]
    total = sum(item["id"] in covered for item in items)
    return "\n".join([*lines, f"all chapters: {total} of {len(items)}"])
