"""A button that trains a chapter's comparison again: as a rehearsal of a minute or two, or as it was."""

from __future__ import annotations

import threading
from pathlib import Path

from . import study
from .common import run_study
from .results import load_results

REHEARSAL = 0.01  # share of the steps; one seed


class Rerun:
    """A choice, a button, a progress bar and what happens, in words. `view` is the widget.

    The training runs in a thread, so the notebook stays usable; `wait()` blocks until it has ended. Finished runs are
    kept in `out` and skipped, so a second click goes on where an interrupted training stopped.
    """

    def __init__(self, name: str, *, out: Path | str = "runs/study", device: str | None = None):
        import ipywidgets
        import torch

        self.study, self.out = study(name), Path(out)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        choices = [("a rehearsal: a few steps, one seed", "rehearsal"), ("all of it: hours without a GPU", "all")]
        self.choice = ipywidgets.Dropdown(options=choices, value="rehearsal", description="Train")
        self.button = ipywidgets.Button(description="Start")
        self.bar = ipywidgets.FloatProgress(value=0.0, min=0.0, max=1.0, description="Progress")
        self.says = ipywidgets.HTML(f"<p>Runs on {self.device}, writes to {self.out}.</p>")
        self.button.on_click(lambda _: self.start())
        self.view = ipywidgets.VBox([ipywidgets.HBox([self.choice, self.button]), self.bar, self.says])
        self.thread: threading.Thread | None = None

    def start(self, *, scale: float | None = None) -> None:
        """Begin, unless a training is under way. `scale` replaces that of the rehearsal."""
        if self.thread is not None and self.thread.is_alive():
            return
        whole = self.choice.value == "all"
        options = {"seeds": 3 if whole else 1, "scale": 1.0 if whole else scale or REHEARSAL}
        self.thread = threading.Thread(target=self._run, args=(options,), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Return when the training has ended."""
        if self.thread is not None:
            self.thread.join()

    def _run(self, options: dict) -> None:
        folder = self.out / ("all" if options["scale"] == 1 else "rehearsal")
        try:
            run_study(self.study, device=self.device, out=folder, log=self._say, progress=self._move, **options)
        except Exception as error:  # shown where the reader looks: an exception in a thread would be lost
            self._say(f"Stopped: {error}")
            return
        self._say(f"Done. {load_results(self.study.name, folder).note()}")

    def _say(self, text: str) -> None:
        import html

        self.says.value = f'<p role="status" aria-live="polite">{html.escape(text)}</p>'

    def _move(self, share: float) -> None:
        self.bar.value = share

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        bundle = self.view._repr_mimebundle_()
        bundle.pop("text/html", None)
        return {**bundle, "text/plain": f"A button that runs: vlm-course study {self.study.name}"}


def rerun(name: str, **options) -> Rerun:
    """The button for a study, ready to be the last line of a cell."""
    return Rerun(name, **options)
