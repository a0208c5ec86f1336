"""A notebook is stale when something that it reaches has changed, and only then."""

import pytest

from vlm_course.build.fingerprint import fingerprint
from vlm_course.build.reach import reached_files
from vlm_course.build.source import parse_source

GRADER = 'from vlm_course.grading.exercise import Exercise\n\nX = Exercise(name="{0}", attribute="{0}", twin="{1}")\n'
FILES = {
    "__init__.py": "",
    "vit.py": "from vlm_course.attention import attend\n",
    "attention.py": "def attend():\n    import vlm_course.lazy\n",
    "lazy.py": "",
    "other.py": "",
    "named.py": "",
    "times.py": "FILE = open_('times.json')\n",
    "times.json": "{}",
    "claims.py": "def claim_table(chapter):\n    return open_('claims_data', f'ch{chapter:02d}.json')\n",
    "claims_data/ch02.json": "[]",
    "claims_data/ch03.json": "[]",
    "words.py": "FILE = open_('pretrained', 'words.json')\n",
    "pretrained/__init__.py": "from . import card\n",
    "pretrained/card.py": "from ..named import x\n",
    "pretrained/unused.py": "",
    "pretrained/weights.safetensors": "w",
    "pretrained/words.json": "[]",
    "strings.py": "MODULE = 'vlm_course.other'\n",
    "catalog/__init__.py": "import importlib\n",
    "catalog/data/models.json": '{"class": "other.Tower"}',
    "finetune/__init__.py": "",
    "finetune/lora.py": "",
    "finetune/stored_runs/path.json": "{}",
    "grading/__init__.py": "from vlm_course.grading import registry\n",
    "grading/registry.py": "import importlib\n",
    "grading/exercise.py": "",
    "grading/chapter02/__init__.py": "",
    "grading/chapter02/bridge.py": GRADER.format("bridge", "vlm_course.named:Bridge"),
    "grading/chapter03/__init__.py": "",
    "grading/chapter03/splice.py": GRADER.format("splice", "vlm_course.other:splice"),
    "grading/chapter10/__init__.py": "",
    "grading/chapter10/lora.py": GRADER.format("lora", "vlm_course.finetune.lora:LoRA"),
}


@pytest.fixture
def package(tmp_path):
    root = tmp_path / "vlm_course"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def names(sources, package, chapter="99"):
    return {path.relative_to(package).as_posix() for path in reached_files(sources, chapter, package)}


def test_lazy_and_indirect_imports_are_reached(package):
    assert names("from vlm_course.vit import X", package) == {"__init__.py", "vit.py", "attention.py", "lazy.py"}
    assert names("%matplotlib inline\nfrom vlm_course import vit", package) >= {"vit.py", "lazy.py"}
    assert names("import vlm_course.strings", package) == {"__init__.py", "strings.py", "other.py"}


def test_a_subpackage_counts_with_its_data_and_not_with_modules_that_nothing_names(package):
    data = {"pretrained/weights.safetensors", "pretrained/words.json"}
    modules = {"__init__.py", "pretrained/__init__.py", "pretrained/card.py", "named.py"}
    assert names("from vlm_course.pretrained import load_small", package) == modules | data


def test_data_that_a_module_names_is_reached_wherever_it_lies(package):
    assert names("import vlm_course.times", package) == {"__init__.py", "times.py", "times.json"}
    assert names("import vlm_course.words", package) >= {"words.py", "pretrained/words.json"}


def test_a_class_that_stored_data_names_is_reached(package):
    assert names("import vlm_course.catalog", package) >= {"catalog/data/models.json", "other.py"}


def test_the_data_of_a_chapter_counts_for_it_and_for_who_asks(package):
    def claims(asked, chapter):
        cells = f"from vlm_course.claims import claim_table\nclaim_table({asked})"
        return {name for name in names(cells, package, chapter) if name.startswith("claims")}

    assert claims(2, "02") == {"claims.py", "claims_data/ch02.json"}
    assert claims(3, "02") == {"claims.py", "claims_data/ch02.json", "claims_data/ch03.json"}


def test_a_terminal_command_reaches_everything(package):
    assert names("!vlm-course ask cat.png 'what?'", package) == set(FILES)


CELLS = "# %%\nfrom vlm_course import pretrained, vit\nfrom vlm_course.grading import check\ncheck('{0}', globals())\n"


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("vit.py", {"02", "03", "10"}),
        ("lazy.py", {"02", "03", "10"}),
        ("pretrained/weights.safetensors", {"02", "03", "10"}),
        ("other.py", {"03"}),
        ("grading/registry.py", {"02", "03", "10"}),
        ("grading/exercise.py", {"02", "03", "10"}),
        ("grading/chapter02/bridge.py", {"02"}),
        ("grading/chapter02/__init__.py", {"02"}),
        ("grading/chapter03/splice.py", {"03"}),
        ("grading/chapter10/lora.py", {"10"}),
        ("finetune/lora.py", {"10"}),
        ("finetune/stored_runs/path.json", {"10"}),
    ],
)
def test_stale_exactly_where_something_reached_changed(package, changed, stale):
    exercises = {"02": "bridge", "03": "splice", "10": "lora"}
    notebooks = {number: parse_source(CELLS.format(name), "00_x") for number, name in exercises.items()}

    def prints():
        return {number: fingerprint(notebook, number, None, package) for number, notebook in notebooks.items()}

    before = prints()
    assert prints() == before
    path = package / changed
    path.write_text(path.read_text() + "\n ")
    assert {number for number, value in prints().items() if value != before[number]} == stale


def test_graders_of_another_chapter_count_where_the_chapter_asks_for_them(package):
    cells = "from vlm_course.grading.earlier import earlier\nBridge = earlier('bridge')"
    assert names(cells, package, "03") >= {"grading/chapter02/bridge.py", "grading/chapter03/splice.py", "named.py"}
    package.joinpath("vit.py").write_text("import vlm_course.grading\n\nX = vlm_course.grading.exercise('lora')\n")
    assert "finetune/lora.py" in names("import vlm_course.vit", package, "03")


def test_source_and_cost_count(package):
    one, two = (parse_source(f"# %%\nprint({n})\n", "00_x") for n in (1, 2))
    prints = {
        fingerprint(one, "00", None, package),
        fingerprint(two, "00", None, package),
        fingerprint(one, "00", {"seconds": 1}, package),
    }
    assert len(prints) == 3
