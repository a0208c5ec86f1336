"""Execute every notebook once, offline: solved ones against their stored outputs, student ones unsolved, and the
canary.

    python tests/notebooks/run.py [notebook ...] [-- pytest options]

Every connection beyond loopback is refused by an audit hook (tests/offline) in each kernel and child, and by an empty
network namespace where the system allows one.
"""

import fcntl
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from vlm_course.build.course import Course
from vlm_course.build.execute import CELL_TIMEOUT_S, kernel_environment

TESTS = Path(__file__).resolve().parents[1]
CANARY = TESTS / "offline" / "canary.ipynb"
NAMESPACE = ["unshare", "--map-root-user", "--net"]


def offline_environment(home: str | Path) -> dict[str, str]:
    """The build's environment for kernels, with the audit hook on the path."""
    environment = kernel_environment(home)
    path = [str(TESTS / "offline"), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(path)}


def nbval_command(notebooks: list[Path], options: list[str] = ()) -> list[str]:
    """pytest with nbval: outputs that are stored are compared, a notebook without any has to run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
    command += ["--nbval-sanitize-with", str(TESTS / "nbval.cfg"), "--nbval-cell-timeout", str(CELL_TIMEOUT_S)]
    return [*command, *options, *map(str, notebooks)]


def namespace_works() -> bool:
    """Whether this system lets us enter an empty network namespace and raise its loopback."""
    try:
        trial = subprocess.run(
            [*NAMESPACE, sys.executable, __file__, "--inside", "true"], capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return trial.returncode == 0


def raise_loopback() -> None:
    """Switch on `lo`, which is down in a new namespace and which kernels talk over (ip link set lo up)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        get_flags, set_flags, up = 0x8913, 0x8914, 0x1
        request = fcntl.ioctl(control, get_flags, struct.pack("16sh22x", b"lo", 0))
        flags = struct.unpack("16sh22x", request)[1] | up
        fcntl.ioctl(control, set_flags, struct.pack("16sh22x", b"lo", flags))


def main(arguments: list[str]) -> int:
    """Exit status of pytest."""
    if arguments[:1] == ["--inside"]:
        raise_loopback()
        os.execvp(arguments[1], arguments[1:])
    at = arguments.index("--") if "--" in arguments else len(arguments)
    names, options = arguments[:at], arguments[at + 1 :]
    course = Course()
    notebooks = [Path(name) for name in names] or [
        path for c in course.chapters() for path in (c.solved, c.student)
    ] + [CANARY]
    prefix = [*NAMESPACE, sys.executable, __file__, "--inside"] if namespace_works() else []
    print(f"{len(notebooks)} notebooks; offline by audit hook{' and network namespace' if prefix else ''}", flush=True)
    with tempfile.TemporaryDirectory(prefix="vlm-course-") as home:
        environment = offline_environment(home)
        # Building matplotlib's font cache writes to stderr, in whichever cell is first to plot.
        subprocess.run(
            [sys.executable, "-c", "import matplotlib.font_manager"], env=environment, check=True, capture_output=True
        )
        return subprocess.run(
            [*prefix, *nbval_command(notebooks, options)], env=environment, cwd=course.root
        ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
