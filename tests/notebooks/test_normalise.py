"""Outputs that depend on the process, the clock or chance become constant; all others stay."""

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from vlm_course.build.normalise import SHOWN_ABOVE, WIDGETS, keep_times, normalise, output_problems
from vlm_course.build.source import NOTEBOOK_METADATA


def notebook(outputs, **metadata):
    return new_notebook(cells=[new_code_cell("x", outputs=outputs, id="a")], metadata={**NOTEBOOK_METADATA, **metadata})


def printed(text):
    return normalise(notebook([new_output("stream", name="stdout", text=text)]), "00_x").cells[0].outputs[0].text


def test_addresses_go_and_other_hexadecimal_numbers_stay():
    assert printed("<function f at 0x7f12ab34cd56>") == "<function f at 0x0>"
    assert printed("0xff 0x1F, mask 640x480") == "0xff 0x1F, mask 640x480"


def test_svg_ids_are_numbered_and_references_follow():
    def drawn(ident):
        svg = f'<svg><path id="{ident}"/><use href="#{ident}"/><dc:date>{ident}</dc:date><g id="axes_1"/></svg>'
        out = new_output("display_data", data={"image/svg+xml": svg})
        return normalise(notebook([out]), "00_x").cells[0].outputs[0].data["image/svg+xml"]

    assert drawn("mab12cd34ef") == drawn("m0123456789")
    assert drawn("mab12cd34ef").count("m0000000000") == 2 and 'id="axes_1"' in drawn("mab12cd34ef")


def test_widget_models_are_renamed_wherever_they_are_mentioned():
    def built(first, second):
        view = new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": second}})
        models = {
            first: {"state": {"value": f'<object at 0x7f{first[:8]}> <svg><g id="p{first[:10]}"/></svg>'}},
            second: {"state": {"children": [f"IPY_MODEL_{first}"], "msg_id": first}},
        }
        return normalise(notebook([view], widgets={WIDGETS: {"state": models}}), "00_x")

    a, b = built("1" * 32, "2" * 32), built("e" * 32, "f" * 32)
    assert a == b
    state = a.metadata.widgets[WIDGETS]["state"]
    slider, box = state
    assert state[box].state.children == [f"IPY_MODEL_{slider}"]
    assert a.cells[0].outputs[0].data["application/vnd.jupyter.widget-view+json"].model_id == box


def test_a_picture_is_stored_once_and_stays_where_it_is_seen_without_widgets():
    def image(data):
        return f'<img alt="a slider &gt; a star" src="data:image/webp;base64,{data}">'

    first, later = image("AAAA"), image("BBBB")
    models = {
        "1" * 32: {"model_name": "HTMLModel", "state": {"value": first, "layout": None}},
        "2" * 32: {"model_name": "HTMLModel", "state": {"value": later}},
        "3" * 32: {"model_name": "LayoutModel", "state": {"_model_name": "LayoutModel", "width": "auto", "top": None}},
    }
    out = new_output("display_data", data={"text/html": first, "text/plain": "Figure: a star"})
    made = normalise(notebook([out], widgets={WIDGETS: {"state": models}}), "00_x")
    assert made.cells[0].outputs[0].data["text/html"] == first
    shown, moved, layout = made.metadata.widgets[WIDGETS]["state"].values()
    assert shown.state == {"value": SHOWN_ABOVE, "layout": None} and moved.state == {"value": later}
    assert layout.state == {"_model_name": "LayoutModel", "width": "auto"}


def test_what_a_solved_notebook_must_not_show(tmp_path):
    outputs = [
        new_output("stream", name="stderr", text="UserWarning: careful"),
        new_output("execute_result", data={"text/plain": f"PosixPath('{tmp_path}/weights')"}),
    ]
    problems = output_problems(notebook(outputs), "00_x", tmp_path)
    assert any("writes to stderr: UserWarning" in problem for problem in problems)
    assert any(f"prints the path {tmp_path} of this machine" in problem for problem in problems)
    assert output_problems(notebook([new_output("stream", name="stdout", text="fine")]), "00_x", tmp_path) == []


def timed(text, *tags, source="time()"):
    cell = new_code_cell(source, id="c1", outputs=[new_output("stream", name="stdout", text=text)])
    cell.metadata["tags"] = list(tags)
    return new_notebook(cells=[cell])


@pytest.mark.parametrize(
    ("new", "kept"),
    [
        (timed("linear   0.39 ms", "nbval-ignore-output"), True),
        (timed("linear  10.3 ms", "nbval-ignore-output"), True),  # aligned: another number of spaces
        (timed("bilinear 0.39 ms", "nbval-ignore-output"), False),
        (timed("linear   0.39 ms", "nbval-ignore-output", source="time(2)"), False),
        (timed("linear   0.39 ms"), False),  # an output that is compared is always the new one
    ],
)
def test_a_rebuild_keeps_times_and_nothing_else(new, kept):
    text = new.cells[0].outputs[0].text
    keep_times(new, timed("linear   0.41 ms", "nbval-ignore-output"))
    assert new.cells[0].outputs[0].text == ("linear   0.41 ms" if kept else text)
