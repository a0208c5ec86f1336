"""Make the outputs of a notebook the same bytes on every run: no addresses, dates, random ids."""

import copy
import hashlib
import json
import re
import tempfile
from pathlib import Path

from vlm_course.build.errors import cell_name
from vlm_course.build.execute import error_of

WIDGETS = "application/vnd.jupyter.widget-state+json"
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,16}\b(?=>| |,|\)|$)", re.MULTILINE)
UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
KERNEL_FILE = re.compile(r"/tmp/ipykernel_\d+/\d+\.py")
SVG_ID = re.compile(r'(?<=\bid=")[A-Za-z]+[0-9a-f]{10}(?=")')
SVG_DATE = re.compile(r"<dc:date>[^<]*</dc:date>")
IMAGE = re.compile(r'<img [^>]*src="(data:image/[^"]+)"[^>]*>')
SHOWN_ABOVE = (
    "<p>The picture above is the first one. Run the cells of this chapter: the next ones appear here and follow the "
    "controls.</p>"
)


def normalise(notebook, slug: str):
    """A copy of an executed notebook in which nothing depends on the run, the process or the clock."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata["language_info"].pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.pop("transient", None)
            output.update(_constant(output))
    if "widgets" in notebook.metadata:
        notebook.metadata.widgets = _constant(notebook.metadata.widgets)
        _shorten(notebook)
    return _rename_ids(notebook, slug)


def output_problems(notebook, slug: str, root: Path) -> list[str]:
    """What a solved notebook must not show: errors, stderr (nbgrader gives 0 for it), paths of this machine."""
    places = {str(root), str(Path.home()), tempfile.gettempdir()} - {"/"}
    problems = []
    for position, cell in enumerate(notebook.cells, start=1):
        name, error = f"{slug}, {cell_name(cell, position)}", error_of(cell)
        if error is not None and problems and error.ename == "NameError":
            continue  # most often what the first failure left undefined
        if error is not None:
            problems.append(f"{name}: the solved notebook stops with {error.ename}: {error.evalue}")
            continue
        for output in cell.get("outputs", []):
            text = output.get("text", "") + "".join(v for v in output.get("data", {}).values() if isinstance(v, str))
            if output.get("name") == "stderr":
                problems.append(f"{name}: writes to stderr: {output.text.strip()[:300]}")
            problems += [
                f"{name}: prints the path {place} of this machine" for place in sorted(places) if f"{place}/" in text
            ]
    return problems


def _constant(value):
    """The same JSON value without addresses, temporary files and random SVG ids in its strings."""
    if isinstance(value, dict):
        return {key: _constant(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_constant(entry) for entry in value]
    if not isinstance(value, str):
        return value
    value = ADDRESS.sub("0x0", KERNEL_FILE.sub("<cell>", value))
    return _svg(value) if "<svg" in value else value


def _svg(text: str) -> str:
    """Matplotlib draws its ids at random; number them in the order of their first use."""
    text = SVG_DATE.sub("<dc:date></dc:date>", text)
    for number, old in enumerate(dict.fromkeys(SVG_ID.findall(text))):
        text = re.sub(rf"\b{old}\b", f"{old[:-10]}{number:010d}", text)
    return text


def _shorten(notebook) -> None:
    """Leave out of the stored widgets what a reader has without them.

    A picture that an output holds, too, is stored there alone: outputs are shown everywhere, widgets only where they
    run. Of layouts and styles, what is not set is what every reader of widgets takes for granted.
    """
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    for model in notebook.metadata.widgets.get(WIDGETS, {}).get("state", {}).values():
        state = model.get("state", {})
        for image in IMAGE.finditer(str(state.get("value", ""))):
            if image[1] in outputs:
                state["value"] = state["value"].replace(image[0], SHOWN_ABOVE)
        if model.get("model_name", "").endswith(("LayoutModel", "StyleModel")):
            model["state"] = {key: value for key, value in state.items() if value is not None}


def _rename_ids(notebook, slug: str):
    """Give widget models, which refer to each other, and UUIDs in outputs new names in the order of their first use."""
    import nbformat

    state = notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    for model in state.values():
        if "msg_id" in model.get("state", {}):
            model["state"]["msg_id"] = ""
    text = json.dumps(notebook)
    shown = json.dumps([state, *(cell.get("outputs", []) for cell in notebook.cells)])
    for number, old in enumerate(dict.fromkeys([*state, *UUID.findall(shown)])):
        new = hashlib.sha256(f"{slug} {number}".encode()).hexdigest()[:32]
        if "-" in old:
            new = "-".join((new[:8], new[8:12], new[12:16], new[16:20], new[20:]))
        text = text.replace(old, new)
    return nbformat.from_dict(json.loads(text))


def keep_times(new, old) -> None:
    """In cells whose output is not compared, keep the old output where only its numbers differ: times, in other words.

    So a rebuild on one machine gives the same bytes; `--measure` takes the new times.
    """
    before = {cell.id: cell for cell in old.cells}
    for cell in new.cells:
        earlier = before.get(cell.id)
        if "nbval-ignore-output" not in cell.metadata.get("tags", ()) or earlier is None:
            continue
        if earlier.source == cell.source and _without_numbers(earlier.outputs) == _without_numbers(cell.outputs):
            cell.outputs = earlier.outputs


def _without_numbers(outputs) -> str:
    return re.sub(r"\s*[-+]?\d+(\.\d+)?(e[-+]?\d+)?", " #", json.dumps(outputs, sort_keys=True))
