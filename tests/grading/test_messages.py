"""What crosses the pipe to an answer's process, and how a result is compared and described."""

import io
import math
import struct

import numpy as np
import pytest
import torch
from torch import nn

from vlm_course.grading import wire, worker
from vlm_course.grading.answers import Failure, LocalAnswer, stopped
from vlm_course.grading.compare import Opaque, agree, difference, parameters_differ, plain, show

# ------------------------------------------------------------------------------------------------------ the pipe


def sent(message):
    stream = io.BytesIO()
    wire.send(stream, message)
    return stream.getvalue()


def test_a_message_comes_back_as_it_was():
    message = {
        "do": "call",
        "arguments": (torch.arange(6.0).reshape(2, 3).T, [1, 2.5, None, "text"], {"inner": (True, torch.zeros(0))}),
        "result": Opaque("Figure"),
    }
    back = wire.receive(io.BytesIO(sent(message)))
    assert torch.equal(back["arguments"][0], message["arguments"][0])
    assert back["arguments"][1] == [1, 2.5, None, "text"]
    assert back["arguments"][2]["inner"][0] is True and back["arguments"][2]["inner"][1].shape == (0,)
    assert isinstance(back["result"], Opaque) and back["result"].kind == "Figure"


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return struct.pack("<Q", buffer.tell()) + buffer.getvalue()


class Harmful:
    ran = False

    def __reduce__(self):
        return setattr, (Harmful, "ran", True)


@pytest.mark.parametrize(
    "bytes_",
    [
        b"",
        b"123",
        struct.pack("<Q", 50) + b"too few",
        struct.pack("<Q", 1 << 40) + b"longer than any message",
        struct.pack("<Q", 5) + b"hello",
        pickled([1, 2]),
        pickled(Harmful()),
    ],
    ids=["nothing", "half a length", "cut off", "too long", "no message", "no dict", "code"],
)
def test_whatever_else_comes_is_the_end_and_runs_no_code(bytes_):
    with pytest.raises(EOFError):
        wire.receive(io.BytesIO(bytes_))
    assert not Harmful.ran


# ------------------------------------------------------------------------------------------- the answer's process


def served(*requests):
    """What the process answers to these requests, in this process."""
    replies = io.BytesIO()
    worker.serve(io.BytesIO(b"".join(map(sent, requests))), replies)
    replies.seek(0)
    return [wire.receive(replies) for _ in requests]


@pytest.fixture
def define(tmp_path):
    """define(text, name) -> the request that makes the process hold the answer `name` of that file."""

    def request(text, name):
        path = tmp_path / "answer.py"
        path.write_text(text)
        return {"do": "define", "path": str(path), "name": name, "off_limits": [], "driver": None}

    return request


def test_a_module_is_built_loaded_and_called(define):
    text = "from torch import nn\nclass Bridge(nn.Linear):\n    pass\n"
    weight, bias = torch.ones(2, 3), torch.tensor([1.0, -1.0])
    *done, result = served(
        define(text, "Bridge"),
        {"do": "build", "construct": {"in_features": 3, "out_features": 2}, "positional": True, "device": "cpu"},
        {"do": "load", "values": {"weight": weight, "bias": bias}},
        {"do": "call", "arguments": (torch.ones(1, 3),)},
    )
    assert done == [{"result": None}, {"result": [("weight", (2, 3)), ("bias", (2,))]}, {"result": None}]
    assert result["result"].tolist() == [[4.0, 2.0]]


def test_a_value_answers_for_itself(define):
    assert served(define('q_2_1 = "c"\n', "q_2_1"), {"do": "call", "arguments": ()})[1] == {"result": "c"}


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("other = 1\n", "not_attempted", "answer.py does not define answer."),
        ("def answer(:\n", "error", "Line 1 of answer.py is not Python"),
        ("answer = 1 / 0\n", "error", "ZeroDivisionError"),
        ("answer = bytearray(1 << 62)\n", "error", "more memory than this check allows"),
    ],
)
def test_a_definition_that_fails_is_one_sentence_and_the_process_goes_on(define, text, kind, says):
    failed = served(define(text, "answer"))[0]
    assert failed["kind"] == kind and says in failed["says"]


def test_a_call_that_fails_leaves_the_process_alive(define):
    text = "def answer(x):\n    if x > 1:\n        raise MemoryError\n    return x\n"
    first, second = served(
        define(text, "answer"), {"do": "call", "arguments": (2,)}, {"do": "call", "arguments": (1,)}
    )[1:]
    assert "more memory" in first["says"] and second == {"result": 1}


def test_what_is_built_must_be_a_module():
    with pytest.raises(Failure, match="a class, not an object"):
        LocalAnswer(lambda: nn.Linear).build({}, positional=True)
    with pytest.raises(Failure, match="an object of the class dict"):
        LocalAnswer(lambda: {}).build({}, positional=True)


def test_a_stub_is_told_from_an_operation_that_torch_lacks():
    def stub():
        raise NotImplementedError

    def lacking():
        raise RuntimeError("no such kernel\nsecond line")

    for call, kind, says in ((stub, "not_attempted", "Not attempted yet."), (lacking, "error", "no such kernel")):
        try:
            call()
        except Exception as error:
            failure = stopped(error)
        assert failure.kind == kind and says in failure.says and "\n" not in failure.says
    assert "sys.exit()" in stopped(SystemExit(0)).says


# ---------------------------------------------------------------------------------------------------- comparing


def test_numpys_results_count_as_ours():
    assert torch.equal(plain(np.arange(3.0)), torch.arange(3.0, dtype=torch.float64))
    assert plain(np.float64(2.5)) == 2.5 and type(plain(np.float64(2.5))) is float
    assert wire.receive(io.BytesIO(sent({"result": plain(np.float64(2.5))}))) == {"result": 2.5}
    assert plain({1: (np.int64(3),), "a": object()})["1"] == (3,)
    assert plain([object()])[0].kind == "object"


@pytest.mark.parametrize(
    ("got", "want", "right"),
    [
        (torch.tensor(3.0), 3, True),
        (3.0, 3, True),
        (True, 1, False),
        (math.nan, 1.0, False),
        (math.inf, 1.0, False),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        ("3", 3, False),
        (torch.zeros(2), torch.zeros(3), False),
        ([0.0], torch.zeros(1), False),
        (torch.tensor([1000.001]), torch.tensor([1000.0]), True),  # 1e-5 of the scale
        (torch.tensor([1000.1]), torch.tensor([1000.0]), False),
        ((1, 2), (1, 2, 3), False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        (None, None, True),
        ("a", "a", True),
        (torch.ones(2), torch.ones(2, dtype=torch.bool), False),  # attention would add it to the scores
        (torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.bool), False),
        (torch.ones(2), torch.ones(2, dtype=torch.long), False),
        (torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.long), True),
    ],
)
def test_agree(got, want, right):
    assert agree(got, want, 1e-5) is right


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, 3), "a tensor of shape (2, 3)"),
        (torch.tensor(1234), "1,234"),
        (20_979_712, "20,979,712"),
        (0.1234567, "0.123457"),
        (True, "True"),
        ("c", "'c'"),
        ((1000,), "(1000,)"),
        ((1, 2.5), "(1, 2.5)"),
        ([torch.zeros(2), torch.zeros(2)], "a list of 2 tensors of shape (2,)"),
        ([1, torch.zeros(2)], "[1, a tensor of shape (2,)]"),
        ({"a": 1}, "a dict with the keys 'a'"),
        (None, "nothing"),
        (Opaque("Figure"), "an object of the class Figure"),
    ],
)
def test_show(value, words):
    assert show(value) == words


@pytest.mark.parametrize(
    ("got", "want", "words"),
    [
        (None, torch.zeros(2), "Nothing came back"),
        (1.0, torch.zeros(2), "should be a tensor of shape (2,)"),
        ((1.0, 2.0), torch.zeros(2), "one tensor of shape (2,); yours is a list or tuple"),
        (torch.ones(2), torch.ones(2).bool(), "booleans, torch.bool; yours is torch.float32"),
        (torch.zeros(1).half(), torch.ones(1), "torch.float16, which rounds"),
        ((1, 2), (1, 2, 3), "should have 3 entries; yours has 2"),
        (((1,), "b"), ((1,), "c"), "Entry 1 of 2, counted from 0: The answer here is 'c'; yours is 'b'"),
        (tuple(range(1, 26)), tuple(range(25)), "Entry 0 of 25, counted from 0: The answer here is 0; yours is 1"),
        (torch.zeros(2), (1, 2), "list or tuple of 2 entries; yours is a tensor of shape (2,)"),
        ("a" * 30 + "c" + "d" * 30, "a" * 30 + "b" + "d" * 30, "From character 30 on"),
        ("a" * 30, "a" * 31, "From character 30 on"),
        (1.00000001, 1.0, "The answer here is 1.0; yours is 1.00000001"),
        (torch.zeros(3), torch.zeros(2), "the shape (2,); yours has (3,)"),
        (torch.tensor([math.nan]), torch.zeros(1), "NaN or infinity"),
        (torch.tensor([0.5]), torch.zeros(1), "largest difference is 0.5"),
        (3, {"a": 1}, "should be a dict with the keys 'a'; yours is 3"),
        ({"b": 1}, {"a": 1}, "no entry 'a'"),
        ({"a": 2}, {"a": 1}, "entry 'a' should be 1; yours is 2"),
        ({"a": 1, "b": 2}, {"a": 1}, "an entry 'b' too many"),
        (5, 4, "The answer here is 4; yours is 5"),
    ],
)
def test_difference_is_one_sentence_that_names_both(got, want, words):
    said = difference(got, want)
    assert words in said and "\n" not in said


def test_parameters_are_counted_first():
    want = {"weight": (2, 3), "bias": (2,)}
    assert "no parameters" in parameters_differ([], want)
    assert "6 parameters here; it should have 8" in parameters_differ([("weight", (2, 3))], want)
    assert "8, is right, but their shapes" in parameters_differ([("weight", (4, 2))], want)
