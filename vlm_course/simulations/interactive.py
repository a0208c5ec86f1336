"""A simulation is a function from control values to a frame; everything else here is plumbing shared by all of them.

The first frame is drawn without any widget, so it can be read where widgets do not run: on paper, in a preview, with a
screen reader.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_course.simulations.figures import Picture, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Frame:
    """What a simulation shows for one setting of its controls: a figure, its alt text, and the same facts in words
    and numbers.
    """

    figure: Figure
    alt: str
    text: str

    def picture(self) -> Picture:
        return picture(self.figure, self.alt)


class Simulation:
    """Controls, a picture and a text read-out that follow each other.

    draw      called with the control values by keyword; returns a `Frame`. An exception in it is raised, never
    swallowed.
    controls  name of the argument -> an ipywidgets value widget, in the order in which they are shown.

    In a notebook the object itself is the live view; `first_frame()` is the static one.
    """

    def __init__(self, draw: Callable[..., Frame], controls: Mapping[str, Any], *, title: str):
        import ipywidgets

        self.draw, self.controls, self.title = draw, dict(controls), title
        self.figure, self.readout = ipywidgets.HTML(), ipywidgets.HTML()
        for control in self.controls.values():
            control.observe(self._redraw, names="value")
        self._redraw()
        self.view = ipywidgets.VBox([*self.controls.values(), self.figure, self.readout])

    def values(self) -> dict[str, Any]:
        return {name: control.value for name, control in self.controls.items()}

    def frame(self) -> Frame:
        """The frame for the present values of the controls."""
        return self.draw(**self.values())

    def first_frame(self) -> None:
        """Display the present frame without widgets: the picture, then the read-out as text."""
        from IPython.display import display

        display(self.picture)
        print(self.shown.text)

    def _redraw(self, change=None) -> None:
        self.shown = frame = self.frame()
        self.picture = frame.picture()  # rendered once: a second time the layout moves by a fraction of a pixel
        self.figure.value = self.picture.html()
        self.readout.value = (
            f'<p role="status" aria-live="polite">{html.escape(frame.text).replace(chr(10), "<br>")}</p>'
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        bundle = self.view._repr_mimebundle_()
        bundle.pop("text/html", None)
        return {**bundle, "text/plain": f"{self.title}: controls {', '.join(self.controls)}"}
