"""A notebook is stale when something that it reaches has changed, and only then."""

import pytest

from vlm_course.build.fingerprint import fingerprint, reached_files
from vlm_course.build.source import parse_source


@pytest.fixture
def package(tmp_path):
    root = tmp_path / "vlm_course"
    files = {
        "__init__.py": "",
        "vit.py": "from vlm_course.attention import attend\n",
        "attention.py": "def attend():\n    import vlm_course.lazy\n",
        "lazy.py": "",
        "other.py": "",
        "named.py": "",
        "pretrained/__init__.py": "from . import card\n",
        "pretrained/card.py": "from ..named import x\n",
        "pretrained/weights.safetensors": "w",
        "strings.py": "MODULE = 'vlm_course.other'\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def names(sources, package):
    return {path.relative_to(package).as_posix() for path in reached_files(sources, package)}


def test_lazy_and_indirect_imports_are_reached(package):
    assert names("from vlm_course.vit import X", package) == {"__init__.py", "vit.py", "attention.py", "lazy.py"}
    assert names("%matplotlib inline\nfrom vlm_course import vit", package) >= {"vit.py", "lazy.py"}
    assert names("import vlm_course.strings", package) == {"__init__.py", "strings.py", "other.py"}


def test_a_subpackage_counts_with_its_data(package):
    pretrained = {"pretrained/__init__.py", "pretrained/card.py", "pretrained/weights.safetensors"}
    assert names("from vlm_course.pretrained import load_small", package) == {"__init__.py", "named.py"} | pretrained
    assert len(names("!vlm-course ask cat.png 'what?'", package)) == 10


@pytest.mark.parametrize(
    ("changed", "stale"),
    [("vit.py", True), ("lazy.py", True), ("pretrained/weights.safetensors", True), ("other.py", False)],
)
def test_stale_exactly_when_something_reached_changed(package, changed, stale):
    notebook = parse_source("# %%\nfrom vlm_course import pretrained, vit\n", "00_x")
    before = fingerprint(notebook, None, package)
    assert fingerprint(notebook, None, package) == before
    path = package / changed
    path.write_text(path.read_text() + "# more\n")
    assert (fingerprint(notebook, None, package) != before) == stale


def test_source_and_cost_count(package):
    one, two = (parse_source(f"# %%\nprint({n})\n", "00_x") for n in (1, 2))
    prints = {
        fingerprint(one, None, package),
        fingerprint(two, None, package),
        fingerprint(one, {"seconds": 1}, package),
    }
    assert len(prints) == 3
