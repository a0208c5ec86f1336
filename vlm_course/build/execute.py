"""Execute a notebook in a fresh kernel and measure it."""

import copy
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from vlm_course.build.errors import BuildError, cell_name

CELL_TIMEOUT_S = 300


@dataclass(frozen=True)
class Cost:
    """What one run took: wall-clock seconds with the start of the kernel, and the largest resident memory of it and its
    children."""

    seconds: float
    peak_mb: float


def kernel_environment(home: str | Path) -> dict[str, str]:
    """The environment that kernels get, here and in the tests: CPU, offline, two threads, nobody's own settings or
    progress.

    `home` is an empty folder in which a notebook may store what it remembers of the learner.
    """
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(Path(home) / "ipython"),
        "OMP_NUM_THREADS": "2",
        "PYTHONHASHSEED": "0",
        "VLM_COURSE_HOME": str(home),
    }


def error_of(cell):
    """The error output of an executed cell, None where it did not raise."""
    return next((output for output in cell.get("outputs", []) if output.output_type == "error"), None)


def execute(notebook, slug: str, folder: Path):
    """Run every cell, past errors too; returns the executed copy and its Cost.

    `folder` is the kernel's working directory. Raises BuildError naming the cell where the kernel died or the time ran
    out.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    executed, at = copy.deepcopy(notebook), {"position": 1}
    client = NotebookClient(
        executed,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        allow_errors=True,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        on_cell_start=lambda cell, cell_index: at.update(position=cell_index + 1),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vlm-course-") as home:
        meter, started = _MemoryMeter(client), time.perf_counter()
        try:
            with meter:
                client.execute(env=kernel_environment(home))
        except (CellTimeoutError, DeadKernelError) as error:
            name = cell_name(executed.cells[at["position"] - 1], at["position"])
            what = f"ran longer than {CELL_TIMEOUT_S} s" if isinstance(error, CellTimeoutError) else "killed the kernel"
            raise BuildError(f"{slug}, {name}: the cell {what}") from error
        return executed, Cost(time.perf_counter() - started, meter.peak / 1e6)


class _MemoryMeter(threading.Thread):
    """Samples the resident memory of the client's kernel and of its children."""

    def __init__(self, client, interval: float = 0.1):
        super().__init__(daemon=True)
        self.client, self.interval, self.peak, self.over = client, interval, 0, threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self.over.set()
        self.join()

    def run(self):
        import psutil

        while not self.over.wait(self.interval):
            pid = getattr(getattr(self.client.km, "provisioner", None), "pid", None)
            if pid is None:
                continue
            try:
                kernel = psutil.Process(pid)
                processes = [kernel, *kernel.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            self.peak = max(self.peak, sum(map(_resident, processes)))


def _resident(process) -> int:
    import psutil

    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
