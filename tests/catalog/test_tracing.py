"""Every traceable model of the catalog: its forward pass has the widths, layers and tokens that its facts state."""

import functools
import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from vlm_course import cli
from vlm_course.catalog import find
from vlm_course.catalog.tracing import trace_model
from vlm_course.trace import TraceRow, format_table, row, to_json

# one of each architecture; other sizes are built, not run, in test_building.py
TRACED = [
    find(name)
    for name in """llava-1.5-13b, llava-v1-13b, honeybee-7b, llava-next-mistral-7b, qwen-vl, qwen2-vl-2b, qwen2.5-vl-3b,
    internvl-1.0-7b, internvl-2.5-1b, flamingo-3b, idefics-9b, kosmos-2, shikra-7b, molmo-7b-d, fuyu-8b, paligemma-3b,
    blip-2-opt-2.7b, instructblip-7b, docowl, docowl-1.5, ureader, emu, textmonkey, nougat-base, openvla-7b, emu3,
    clip-vit-l-14-336, siglip-so400m-14-224, internvit-300m-448, nfnet-f6""".split(",")
]
CHATS = [model for model in TRACED if model.kind != "vision encoder"]
# what an image of the trace gives in all, where it is not one image's tokens: tiles, crops, windows
TOKENS = {"internvl-1.5": 7 * 256, "internvl-2.5": 7 * 256, "molmo": 5 * 144, "docowl-1.5": 5 * 257, "ureader": 5 * 65}
TOKENS |= {"qwen2": 96}


@functools.cache
def traced(name):
    return trace_model(find(name), text_tokens=50)


def _named(rows, pattern):
    return [r for r in rows if re.search(pattern, r.name)]


@pytest.mark.parametrize("model", TRACED, ids=lambda model: model.name)
def test_rows_are_complete_and_in_both_forms(model):
    rows = traced(model.name)
    assert all(len(r.axes) == len(r.shape) and r.meaning and r.stage for r in rows)
    assert rows[0].stage == "input"
    assert format_table(rows).count("\n") == len(rows) + 1
    assert json.loads(to_json(rows))[0]["stage"] == "input"


@pytest.mark.parametrize("model", CHATS, ids=lambda model: model.name)
def test_the_language_model_is_as_wide_and_deep_as_its_facts_say(model):
    rows = traced(model.name)
    (entry,) = [r for r in rows if r.name.endswith(":in") and r.stage == "fusion"]
    assert entry.shape[-1] == model["language_width"]
    blocks = _named([r for r in rows if r.stage == "decoder"], r"(?:layers|blocks)\.0-\d+$")
    if model["layers"] is not None:
        assert int(blocks[0].name.rsplit("-", 1)[1]) + 1 == model["layers"]
    assert rows[-1].axes[-1] == "V" and rows[-1].shape[:-1] == blocks[0].shape[:-1]
    if model["heads"] and (keys := _named(rows, r"self_attn\.k_proj$|attention\.key$")):
        (queries,) = _named(rows, r"self_attn\.q_proj$|attention\.query$")
        assert queries.shape[-1] * model["kv_heads"] == keys[0].shape[-1] * model["heads"]


@pytest.mark.parametrize("model", [m for m in CHATS if m["fusion"] == "in the sequence"], ids=lambda model: model.name)
def test_the_sequence_is_the_visual_tokens_and_the_words(model):
    (entry,) = [r for r in traced(model.name) if r.name.endswith(":in") and r.stage == "fusion"]
    known = next((count for name, count in TOKENS.items() if model.name.startswith(name)), model["visual_tokens"])
    if model.name == "fuyu-8b":
        known = 8 * (10 + 1)  # 8 rows of 10 patches, each with a newline
    if model.name == "emu3":
        known = 64 * 64
    assert entry.shape == (1, known + 50, model["language_width"])


@pytest.mark.parametrize("name", ["flamingo-3b", "idefics-9b", "nougat-base"])
def test_cross_attention_keeps_the_image_out_of_the_sequence(name):
    (entry,) = [r for r in traced(name) if r.name.endswith(":in") and r.stage == "fusion"]
    assert entry.shape[1] == 50
    assert any(r.shape[1] == find(name)["visual_tokens"] for r in traced(name) if r.stage in ("bridge", "fusion"))


@pytest.mark.parametrize("model", [m for m in TRACED if m.kind == "vision encoder"], ids=lambda model: model.name)
def test_a_tower_alone_has_the_width_and_the_patches_of_its_facts(model):
    rows = traced(model.name)
    assert any(r.shape[-1] == model["vision_width"] or r.shape[1] == model["vision_width"] for r in rows[1:])
    if model["patches"]:
        assert _named(rows, "patch_emb")[0].shape[1] == model["patches"]
        assert rows[-2].name.endswith(f"0-{model['layers'] - 1}") or f"0-{model['layers'] - 1}" in str(rows)


def test_more_words_make_the_sequence_longer_and_nothing_else():
    short, long = (trace_model(find("paligemma"), text_tokens=count) for count in (1, 7))
    assert [r.name for r in short] == [r.name for r in long]
    assert long[-1].shape[1] - short[-1].shape[1] == 6


def test_no_words_are_refused():
    with pytest.raises(ValueError, match="text_tokens is 0"):
        trace_model(find("paligemma"), text_tokens=0)


def test_transformers_looks_at_masks_again_afterwards():
    from transformers import masking_utils

    before = masking_utils.is_tracing
    trace_model(find("paligemma"))
    assert masking_utils.is_tracing is before


def test_a_tensor_of_another_rank_than_its_axes_is_named():
    import torch

    with pytest.raises(ValueError, match=r"x has shape \(1, 2\), but its axes are 'B T D'"):
        row("bridge", "x", torch.zeros(1, 2), "B T D", "tokens")
    assert isinstance(row("bridge", "x", torch.zeros(1, 2), "B T D|T D", "tokens"), TraceRow)


def test_the_program_traces_by_any_spelling():
    result = CliRunner().invoke(cli.app, ["trace", "LLaVA-1.5 13B", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)
    assert {"stage", "name", "shape", "dtype", "meaning", "axes"} == set(rows[0])
    assert [r["shape"] for r in rows if r["name"] == "bridge"] == [[1, 576, 5120]]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("qwen3-vl", r"no model named 'qwen3-vl'.*qwen2-vl"),
        ("gpt-4o", r"GPT-4o is closed: its architecture is not public"),
        ("textmonkey2", r"close to it: textmonkey"),
    ],
)
def test_what_cannot_be_traced_is_one_sentence_and_exit_code_2(name, sentence):
    run = subprocess.run(
        [sys.executable, "-m", "vlm_course", "trace", name], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2 and run.stdout == ""
    assert re.search(sentence, run.stderr) and run.stderr.count("\n") == 1


@pytest.mark.serial
@pytest.mark.parametrize("name", ["llava-1.5-13b", "openvla-7b", "qwen2.5-vl-72b"])
def test_the_largest_trace_in_10_seconds_and_2_gigabytes(name):
    # seconds of processor, so that a busy machine does not decide; alone they are the seconds on the clock
    child = subprocess.Popen(
        [sys.executable, "-m", "vlm_course", "trace", name],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds, gigabytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
    print(f"{name}: {seconds:.1f} s, {gigabytes:.2f} GB")
    assert child.returncode == 0
    assert seconds < 10
    assert gigabytes < 2
