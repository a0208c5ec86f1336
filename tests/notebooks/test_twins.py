"""What a chapter has the learner write is the package's definition; a difference in the text or in a name is found."""

import pytest

from vlm_course.build.source import parse_source
from vlm_course.build.twins import global_names, twin_problems

CHAPTER = '''# %% locked="imports"
import torch
from torch import nn
from vlm_course.grading import part

# %% exercise="vision_projection" twin="vlm_course.bridges.VisionProjection"
class VisionProjection(nn.Module):
    """A docstring of its own."""

    def __init__(self, vision_dim: int, llm_dim: int):
        super().__init__()
        ### BEGIN SOLUTION
        self.mlp = nn.Sequential(
            nn.Linear(vision_dim, llm_dim),
            nn.GELU(),
            nn.Linear(llm_dim, llm_dim),
        )
        ### END SOLUTION

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Here too."""
        return self.mlp(features)  # [B, N, D_vision] -> [B, N, D_llm]

# %% check="vision_projection" points=1
VisionProjection(2, 3)

# %%
VisionProjection = part("VisionProjection", globals())
'''


def problems(*changes):
    text = CHAPTER
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return twin_problems(parse_source(text, "02_x"), "02_x")


def test_the_packages_definition_is_its_twin():
    assert problems() == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nn.GELU()", "nn.ReLU()", "nn.ReLU()|nn.GELU()"),
        ("llm_dim: int", "llm_dim", "VisionProjection differs from vlm_course.bridges.VisionProjection"),
        ("import torch\n", "import numpy as torch\n", "torch, which VisionProjection uses, means another object"),
        ("from torch import nn\n", "", "nn, which VisionProjection uses, is not defined"),
        ("import torch\n", "import torch\nsuper = None\n", "super, which VisionProjection uses, means another object"),
        ("# %%\nVision", "# %%\nfor nn in ():\n    pass\nVision", "nn, which VisionProjection uses, means another"),
        ("class VisionProjection", "class Projection", "the cell defines no VisionProjection"),
        ("bridges.VisionProjection", "bridges.Missing", "vlm_course.bridges defines no Missing"),
        ("vlm_course.bridges.", "vlm_course.nowhere.", "there is no module vlm_course.nowhere"),
    ],
)
def test_differences_are_found_and_the_cell_named(old, new, message):
    found = problems((old, new))
    assert any(all(part in problem for part in message.split("|")) for problem in found), found
    assert all(problem.startswith("02_x, cell 2 (vision_projection): ") for problem in found)


def test_a_decorator_that_is_not_validation_counts():
    assert problems(("class Vision", "@torch.no_grad()\nclass Vision"))


def test_a_name_may_come_from_another_twin():
    source = """# %% locked="imports"
import torch
from torch import nn

# %% exercise="norm" twin="vlm_course.bridges.LayerNorm2d"
### BEGIN SOLUTION
LAYER_NORM_2D
### END SOLUTION

# %% check="norm" points=1
pass
"""
    import ast
    import inspect

    from vlm_course import bridges

    def bare(thing):  # a learner writes no validation
        text = inspect.getsource(thing)
        return text[text.index("class ") :]

    names = {name: ast.parse(bare(getattr(bridges, name))).body[0] for name in ("LayerNorm2d", "RegBlock")}
    assert "LayerNorm2d" in global_names(names["RegBlock"])
    source = source.replace("LAYER_NORM_2D", bare(bridges.LayerNorm2d))
    assert twin_problems(parse_source(source, "02_x"), "02_x") == []
    with_block = source + "\n".join(
        [
            '\n# %% exercise="block" twin="vlm_course.bridges.RegBlock"',
            "### BEGIN SOLUTION",
            bare(bridges.RegBlock),
            "### END SOLUTION",
            '\n# %% check="block" points=1\npass\n',
        ]
    )
    found = twin_problems(parse_source(with_block, "02_x"), "02_x")
    assert not any("LayerNorm2d, which" in problem for problem in found)
    assert any("SqueezeExcite, which RegBlock uses, is not defined" in problem for problem in found)


def test_global_names_of_nested_scopes_defaults_and_annotations():
    import ast

    code = """
def f(a: Shape, b=DEFAULT, *, c=[g(x) for x in LIST]) -> Out:
    local = 1
    def inner(y):
        global shared
        return local + y + outer(y) + shared
    return lambda z: z + inner(a) + (w := free)
"""
    assert global_names(ast.parse(code).body[0]) == {
        *("Shape", "DEFAULT", "g", "LIST", "Out", "shared", "outer", "free"),
    }
