"""Rules for the repository as a whole: sizes, pins, what no file may contain, and that README tells the truth."""

import ast
import importlib.metadata
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
OLDEST = runpy.run_path(str(ROOT / "tests" / "oldest.py"))
MEGABYTE = 2**20
BINARY = {".png", ".jpg", ".gif", ".safetensors", ".webp", ".tif", ".bmp"}
# Written in pieces, so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:wo" r"rk|ro" r"ot|farm|home/\w+|Users/\w+|tmp/\w+)/[.\w]")
REGISTRY_HOST = re.compile("py" r"pi\.(?:org|python)|python" r"hosted\.org|registry\.npm" "js|/simp" "le/")


def tracked():
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: an unpacked archive has no list of tracked files")
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_tracked_files_are_small():
    sizes = {file.relative_to(ROOT): file.stat().st_size / MEGABYTE for file in tracked()}
    assert not {str(name): size for name, size in sizes.items() if size >= 16}
    assert sum(sizes.values()) < 35


def test_what_is_generated_or_the_learners_own_is_not_tracked():
    names = {file.relative_to(ROOT).as_posix() for file in tracked()}
    assert not [name for name in names if name.startswith(("work/", ".venv", "build/", "runs/"))]
    assert {name for name in names if name.startswith("nbgrader/")} <= {"nbgrader/nbgrader_config.py"}


@pytest.mark.parametrize("forbidden", [MACHINE_PATH, REGISTRY_HOST], ids=["machine path", "registry host"])
def test_no_file_contains(forbidden):
    found = []
    for file in tracked():
        if file.suffix not in BINARY:
            hits = forbidden.finditer(file.read_text(errors="replace"))
            found += [f"{file.relative_to(ROOT)}: {hit.group()}" for hit in hits]
    assert not found


@pytest.mark.parametrize("path", ["work/main/x", "root/.cache", "tmp/a/b.py", "home/ann/x"])
def test_machine_paths_would_be_found(path):
    assert MACHINE_PATH.search(f'File "/{path}"')
    assert not MACHINE_PATH.search(f"../{path}")


def test_every_pin_is_exact_and_portable():
    for pin in pins():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), (
            f"{pin}: exactly one version, no local part, no path"
        )
        assert pin.url is None and not pin.extras, pin
    unconditional = [canonicalize_name(pin.name) for pin in pins()]
    assert len(unconditional) == len(set(unconditional))


def test_every_pin_installs_on_the_oldest_python():
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    installed = [dist for dist in importlib.metadata.distributions() if dist.metadata["Requires-Python"]]
    named = {canonicalize_name(pin.name) for pin in pins()}
    needs = {dist.name: dist.metadata["Requires-Python"] for dist in installed if canonicalize_name(dist.name) in named}
    assert needs and not {name: need for name, need in needs.items() if oldest not in SpecifierSet(need)}


def test_pins_lie_within_the_declared_ranges():
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins()}
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["course"]:
        need = Requirement(text)
        assert canonicalize_name(need.name) in versions, f"{need.name} is not pinned in constraints.txt"
        assert need.specifier.contains(versions[canonicalize_name(need.name)]), text


@pytest.mark.parametrize("extra", ["finetune", "course"])
def test_the_oldest_environment_is_at_the_lower_bounds(extra):
    lines = OLDEST["oldest_pins"](PROJECT, (ROOT / "constraints.txt").read_text())
    oldest = [Requirement(line) for line in lines]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in oldest}
    assert len(versions) == len(oldest)
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]:
        need = Requirement(text)
        assert f">={versions[canonicalize_name(need.name)]}" in map(str, need.specifier), text
        assert need.specifier.contains(versions[canonicalize_name(need.name)]), text


@pytest.mark.parametrize(
    ("extra", "wrong"), [(["torch"], "'torch' starts no range"), (["torch>=2"], "torch starts at 2.11 and at 2:")]
)
def test_a_range_without_one_lower_bound_is_named(extra, wrong):
    with pytest.raises(ValueError, match=wrong):
        OLDEST["lower_bounds"]({"dependencies": ["torch>=2.11"], "optional-dependencies": {"more": extra}})


def test_the_whole_closure_is_pinned():
    pinned = {canonicalize_name(pin.name) for pin in pins()}
    if f"torch=={importlib.metadata.version('torch').split('+')[0]}" not in map(str, pins()):
        pytest.skip("another environment, such as that of make test-oldest, has a closure of its own")
    seen, waiting = set(), [("vlm-course", frozenset({"course"}))]
    while waiting:
        name, extras = waiting.pop()
        seen.add((name, extras))
        for text in importlib.metadata.requires(name) or []:
            need = Requirement(text)
            wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras | {""})
            follow = (canonicalize_name(need.name), frozenset(need.extras))
            if wanted and follow not in seen:
                waiting.append(follow)
    assert not {name for name, _ in seen} - pinned - {"vlm-course"}


def test_conda_environment_pins_nothing_of_its_own():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    named = [entry for entry in dependencies if isinstance(entry, str)]
    assert [re.split("[=<> ]", entry)[0] for entry in named] == ["python", "pip"]
    assert named[1] == "pip"
    assert [entry for entry in dependencies if not isinstance(entry, str)] == [
        {"pip": ["-c constraints.txt", "-e .[course]"]}
    ]


def top_level_imports(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def allowed(dependencies):
    names = {canonicalize_name(Requirement(text).name) for text in dependencies}
    modules = importlib.metadata.packages_distributions().items()
    installed = {module for module, owners in modules if names & {canonicalize_name(owner) for owner in owners}}
    return installed | set(sys.stdlib_module_names) | {"vlm_course"}


def test_notebooks_need_only_what_a_learner_installs():
    base = allowed(PROJECT["dependencies"])
    sources = sorted((ROOT / "solutions").glob("*.py"))
    assert sources
    missing = {
        f"{file.name}: {name}" for file in sources for name in top_level_imports(file.read_text()) if name not in base
    }
    assert not missing


def test_the_package_imports_only_what_it_declares():
    declared = allowed(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["course"])
    files = sorted((ROOT / "vlm_course").rglob("*.py"))
    missing = {
        f"{file.name}: {name}" for file in files for name in top_level_imports(file.read_text()) if name not in declared
    }
    # Triton comes with the torch of a machine that can have a GPU, and these files are imported on one only.
    assert missing == {f"{name}.py: triton" for name in ("decode_kernels", "optimizer_kernel", "prefill_kernels")}


def test_readme_commands_are_make_targets_and_ci_runs_the_second():
    commands = re.findall(r"^```\n(make \S+)\n```$", README, flags=re.MULTILINE)
    assert commands == ["make lab", "make test"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"lab", "test", "build", "bench", "test-oldest", "mutate"} <= targets
    assert set(re.findall(r"`make ([a-z-]+)", README)) <= targets
    assert (ROOT / ".ci" / "run").read_text().rstrip().splitlines()[-1] == "make test"


def test_readme_commands_of_the_program_exist():
    from vlm_course.cli import app, train

    known = {command.name or command.callback.__name__ for command in app.registered_commands} | {"train"}
    assert {command.callback.__name__ for command in train.registered_commands} == {"small"}
    assert set(re.findall(r"vlm-course ([a-z]+)", README)) - {"lab"} <= known


def test_readme_files_exist():
    beside = ["LICENSE", "NOTICE", "CITATION.cff", "constraints.txt", "environment.yml"]
    links = [*re.findall(r"\]\(([^)#:]+)\)", README), *beside]
    assert not [link for link in links if not (ROOT / link).exists()]


def test_readme_chapters_are_the_chapters():
    from vlm_course.finetune.stored import missing
    from vlm_course.studies.results import load_results

    states = "finished|studies rehearsed|GPU runs missing|planned"
    rows = re.findall(rf"^\| (\d+) \| ([^|]+) \| (\d*) ?\| ({states}) \|$", README, flags=re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(11))
    sources = {int(file.name[:2]): file.read_text() for file in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py"))}
    assert {int(row[0]) for row in rows if row[3] != "planned"} == set(sources)
    for number, title, minutes, state in rows:
        if state != "planned":
            text = sources[int(number)]
            studies = re.findall(r'load_results\("([\w-]+)"\)', text)
            rehearsed = any(load_results(name).rehearsal for name in studies)
            assert rehearsed == (state == "studies rehearsed"), f"chapter {number}: {studies}"
            waits = "stored_run(" in text and bool(missing())
            assert waits == (state == "GPU runs missing"), f"chapter {number}: stored runs missing are {missing()}"
            assert re.search(rf"^# # (Chapter )?{number}[.:] {re.escape(title)}$", text, flags=re.MULTILINE)
            assert re.search(rf"[Aa]bout {minutes} minutes", text), f"chapter {number} names another time than README"
        else:
            assert not minutes


def test_versions_agree():
    import vlm_course

    assert f"version: {vlm_course.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert text.rstrip().endswith("limitations under the License.")


@pytest.mark.parametrize(("version", "status"), [("3, 10", 1), ("3, 11", 0)])
def test_an_old_python_gets_one_sentence(tmp_path, version, status):
    """The Makefile's check, with an interpreter that claims to be of another version and makes no environment."""
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = -c ]; then\n'
        f'  exec {sys.executable} -c "import sys; sys.version_info = ({version}); $2"\n'
        "fi\n"
        f'mkdir -p "$3/bin" && touch "$3/bin/python"\n'
    )
    fake.chmod(0o755)
    command = ["make", "--silent", f"{tmp_path}/env/bin/python", f"PYTHON={fake}", f"VENV={tmp_path}/env"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert bool(run.returncode) == bool(status)
    said = [line for line in (run.stdout + run.stderr).splitlines() if not re.match(r"make(\[\d+\])?:", line)]
    assert len(said) == status
    assert all("Python 3.11" in line for line in said)


def test_every_room_of_the_package_is_on_the_map():
    """CONTRIBUTING.md names each top-level module of vlm_course, and no module that is gone."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("## Rooms") : text.index("## New weights")]
    named = {
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    rooms = {path.stem for path in (ROOT / "vlm_course").glob("*.py") if not path.stem.startswith("__")}
    rooms |= {path.parent.name for path in (ROOT / "vlm_course").glob("*/__init__.py")}
    assert named == rooms
