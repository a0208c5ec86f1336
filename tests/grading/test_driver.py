"""An answer that a driver uses in the answer's own process: a class in several steps, a function that needs a model."""

import pytest
import torch

from vlm_course.grading.answers import LocalAnswer
from vlm_course.grading.runner import check_file

CACHE = """
import torch

class PlainKVCache:
    def __init__(self):
        self.kept = {}

    @property
    def length(self):
        return self.kept[0][0].shape[2] if self.kept else 0

    def update(self, layer, *new):
        if layer in self.kept:
            new = tuple(torch.cat(pair, AXIS) for pair in zip(self.kept[layer], new))
        self.kept[layer] = new
        return new
"""

CACHED = """
import torch
from vlm_course.cache import KVCache

def greedy_cached(model, ids, pixels, max_new_tokens, eos_id):
    cache, embeds, new = KVCache(2), model.embed(ids, pixels), []
    while len(new) < max_new_tokens and eos_id not in new:
        new.append(int(model.decoder(embeds, cache=cache)[0, -1].argmax()))
        embeds = model.decoder.embed(torch.tensor([new[-1:]]))
    return torch.tensor([new])
"""


def twice(answer, x):
    return answer(answer(x))


def test_the_driver_stands_between_the_check_and_the_answer():
    answer = LocalAnswer(lambda x: x + 1, driver=f"{__name__}:twice")
    assert answer.call((torch.zeros(2),)).tolist() == [2, 2]


@pytest.mark.parametrize(("axis", "says"), [("2", "Correct"), ("1", "You join along the heads")])
def test_a_class_is_checked_in_another_process(tmp_path, axis, says):
    file = tmp_path / "answer.py"
    file.write_text(CACHE.replace("AXIS", axis))
    (result,) = check_file("05", "plain_kv_cache", file=file).results
    assert result.verdict.says.startswith(says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("", ""), "Correct"),
        (("new[-1:]", "new"), "You hand over all new tokens at each step"),
        (("    cache,", "    raise NotImplementedError\n    cache,"), "Not attempted yet"),
    ],
)
def test_a_function_that_needs_a_model_is_checked_in_another_process(tmp_path, change, says):
    file = tmp_path / "answer.py"
    file.write_text(CACHED.replace(*change) if change[0] else CACHED)
    (result,) = check_file("05", "greedy_cached", file=file).results
    assert result.verdict.says.startswith(says)


def test_the_packages_own_is_no_answer(tmp_path):
    file = tmp_path / "answer.py"
    file.write_text("from vlm_course.plain import greedy_cached\n")
    (result,) = check_file("05", "greedy_cached", file=file).results
    assert "leans on the package's own" in result.verdict.says
