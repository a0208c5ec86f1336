"""check, part and question as a notebook uses them."""

import nbclient
import nbformat
import pytest
import torch
from torch import nn

from vlm_course.grading import AnswerError, NotAttempted, check, part
from vlm_course.grading.registry import exercises, questions, twin


class Right(nn.Module):
    def __init__(self, vision_dim, llm_dim):
        super().__init__()
        self.a, self.b = nn.Linear(vision_dim, llm_dim), nn.Linear(llm_dim, llm_dim)

    def forward(self, x):
        return self.b(nn.functional.gelu(self.a(x)))


class Stub(nn.Module):
    def __init__(self, vision_dim, llm_dim):
        super().__init__()
        raise NotImplementedError("write your solution here")


class HalfStub(nn.Module):
    def __init__(self, vision_dim, llm_dim):
        super().__init__()
        self.mlp = nn.Linear(vision_dim, llm_dim)

    def forward(self, x):
        raise NotImplementedError


def test_right_answer_prints_its_points(capsys):
    check("vision_projection", {"VisionProjection": Right})
    check("vision_projection", {"VisionProjection": Right}, seed=3)
    assert capsys.readouterr().out.splitlines() == [
        "Correct: Build It: the projection bridge. 4 points.",
        "Correct on other inputs too (draw 3).",
    ]


@pytest.mark.parametrize("stub", [Stub, HalfStub])
def test_stub_is_no_attempt(stub):
    with pytest.raises(NotImplementedError, match="not attempted") as caught:
        check("vision_projection", {"VisionProjection": stub})
    assert type(caught.value).__name__ == "NotImplementedError"
    assert caught.value._render_traceback_() == [str(caught.value)]


def test_wrong_answer_is_one_sentence_first():
    class NoGelu(Right):
        def forward(self, x):
            return self.b(self.a(x))

    with pytest.raises(AnswerError) as caught:
        check("vision_projection", {"VisionProjection": NoGelu})
    assert str(caught.value).splitlines()[0] == exercises()["vision_projection"].mistakes["no activation"].says


def test_missing_name_says_what_to_run():
    with pytest.raises(AnswerError, match="run the cell that defines it"):
        check("vision_projection", {})
    with pytest.raises(ValueError, match="no exercise 'nonsense'"):
        check("nonsense", {})


def own_subclass(package):
    return type("VisionProjection", (package,), {"__module__": "__main__"})


def wrapper(package):
    class VisionProjection(nn.Module):
        def __init__(self, vision_dim, llm_dim):
            super().__init__()
            self.inner = package(vision_dim, llm_dim)

        def forward(self, x):
            return self.inner(x)

    return VisionProjection


def borrowed_forward(package):
    class VisionProjection(nn.Module):
        def __init__(self, vision_dim, llm_dim):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(vision_dim, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))

        def forward(self, x):
            return package.forward(self, x)

    return VisionProjection


@pytest.mark.parametrize("make", [lambda package: package, own_subclass, wrapper, borrowed_forward])
def test_the_packages_own_class_is_no_answer(make):
    with pytest.raises(AnswerError, match=r"package's own vlm_course\.bridges\.VisionProjection"):
        check("vision_projection", {"VisionProjection": make(twin(exercises()["vision_projection"]))})


@pytest.mark.parametrize("name", [item.name for item in exercises().values()])
def test_every_twin_is_refused(name):
    item = exercises()[name]
    with pytest.raises(AnswerError, match="package's own"):
        check(name, {item.attribute: twin(item)})


def test_a_wrapped_function_is_refused():
    package = twin(exercises()["projection_parameters"])
    with pytest.raises(AnswerError, match="package's own"):
        check("projection_parameters", {"projection_parameters": lambda v, d: package(v, d)})


def test_exception_names_the_learners_line():
    class Broken(Right):
        def forward(self, x):
            return self.b(x)

    with pytest.raises(AnswerError, match=r"stops with RuntimeError.*\(line \d+: return self.b\(x\)\)\."):
        check("vision_projection", {"VisionProjection": Broken})


def test_nothing_returned():
    with pytest.raises(AnswerError, match="return statement"):
        check("projection_parameters", {"projection_parameters": lambda vision_dim, llm_dim: None})


def test_cut_gradient_is_named():
    class Detached(Right):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(AnswerError, match="nothing could be trained"):
        check("vision_projection", {"VisionProjection": Detached})


def test_part_gives_the_learners_own_or_the_packages(capsys):
    package = twin(exercises()["vision_projection"])
    assert part("VisionProjection", {"VisionProjection": Right}) is Right
    namespace = {"VisionProjection": Stub}
    namespace["VisionProjection"] = part("VisionProjection", namespace)
    assert namespace["VisionProjection"] is package
    assert part("vision_projection", {}) is package
    assert capsys.readouterr().out.splitlines() == [
        "VisionProjection: yours.",
        "VisionProjection: the package's, until yours passes its check.",
        "VisionProjection: the package's, until yours passes its check.",
    ]
    with pytest.raises(NotAttempted):
        check("vision_projection", namespace)
    namespace["VisionProjection"] = Right
    assert part("VisionProjection", namespace) is Right


def test_the_13b_bridge_may_use_what_part_gave():
    package = twin(exercises()["vision_projection"])
    check("vision_projection_13b", {"build_projection_13b": lambda: package(1024, 5120)})


def test_warnings_of_a_right_answer_stay_off_stderr(capfd):
    import sys
    import warnings

    def count(vision_dim, llm_dim):
        warnings.warn("noise", stacklevel=1)
        print("noise", file=sys.stderr)
        return llm_dim * (vision_dim + llm_dim + 2)

    check("projection_parameters", {"projection_parameters": count})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("asked", questions().values(), ids=lambda q: q.name)
def test_questions(asked, capsys):
    assert asked.answer in asked.options
    with pytest.raises(NotImplementedError):
        check(asked.name, {asked.name: None})
    with pytest.raises(NotImplementedError):
        check(asked.name, {})
    for letter, option in asked.options.items():
        assert option.reason.endswith(".")
        assert option.text in asked.markdown()
        if letter == asked.answer:
            check(asked.name, {asked.name: letter.upper()})
            check(asked.name, {asked.name: lambda letter=letter: letter})
        else:
            with pytest.raises(AnswerError) as caught:
                check(asked.name, {asked.name: letter})
            assert option.reason in str(caught.value)
    with pytest.raises(AnswerError, match="one of the letters"):
        check(asked.name, {asked.name: 3})


def test_a_kernel_shows_the_sentence_and_no_stack():
    cells = [
        "from vlm_course.grading import check, question",
        "def projection_parameters(vision_dim, llm_dim):\n    return vision_dim * llm_dim + llm_dim**2",
        "check('projection_parameters', globals())",
        "def projection_parameters(vision_dim, llm_dim):\n    raise NotImplementedError('write your solution here')",
        "check('projection_parameters', globals())",
        "question('q_0_1')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True).execute()
    (wrong,), (stub,) = notebook.cells[2].outputs, notebook.cells[4].outputs
    assert (wrong.ename, stub.ename) == ("AnswerError", "NotImplementedError")
    assert wrong.traceback == [wrong.evalue]
    assert wrong.evalue.splitlines()[0] == "You left out the biases: each layer has one for every output."
    assert "display_data" in {output.output_type for output in notebook.cells[5].outputs}
    assert not [output for output in notebook.cells[5].outputs if output.output_type == "error"]


def test_an_answer_that_writes_into_its_input_is_told():
    """It would change the tower's own weights in a later cell. The oracle's tensors stay whole."""

    class Vandal(Right):
        def forward(self, x):
            out = super().forward(x.clone())
            x.zero_()
            return out

    with pytest.raises(AnswerError, match="changes its argument number 1"):
        check("vision_projection", {"VisionProjection": Vandal})
    check("vision_projection", {"VisionProjection": Right})


def test_lists_are_inputs_too():
    def pack_row(ids, labels):
        for row in labels:
            row[0] = -100
        row, targets = ([item for row in rows for item in row] for rows in (ids, labels))
        documents = [number for number, row in enumerate(ids) for _ in row]
        return row, targets, documents, [place for row in ids for place in range(len(row))]

    with pytest.raises(AnswerError, match="changes its argument number 2"):
        check("pack_row", {"pack_row": pack_row})


def test_close_is_not_close_enough():
    class Off(Right):
        def forward(self, x):
            return super().forward(x) + 1e-3 * torch.ones(())

    with pytest.raises(AnswerError, match="values are not"):
        check("vision_projection", {"VisionProjection": Off})


def test_a_list_of_tensors_is_described_by_its_length_and_shape():
    from vlm_course.grading.compare import show

    assert show([torch.zeros(2, 3), torch.ones(2, 3)]) == "a list of 2 tensors of shape (2, 3)"
    assert show([-2, -4]) == "[-2, -4]"
