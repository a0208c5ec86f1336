"""Reading conversations: what is good comes out as written, what is bad is named with file, line and remedy."""

import copy
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_course.finetune.data import REASONS, Record, read_records
from vlm_course.finetune.reading import RecordError, is_text, read_json

GOOD = {
    "id": "7",
    "image": "cat.png",
    "conversations": [
        {"from": "human", "value": "What is this?\n<image>"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Its colour?"},
        {"from": "gpt", "value": "Red."},
    ],
}
TEXT = {"id": "t", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "cat.png")
    return tmp_path


def changed(*path, to=None, record=GOOD):
    """A copy of a record with the value at `path` replaced, or without it where `to` is None."""
    out = here = copy.deepcopy(record)
    for step in path[:-1]:
        here = here[step]
    if to is None:
        del here[path[-1]]
    else:
        here[path[-1]] = to
    return out


def write(folder, records, name="talk.jsonl", **options):
    file = folder / name
    lines = [record if isinstance(record, str) else json.dumps(record, **options) for record in records]
    file.write_text("\n".join(lines) if name.endswith("l") else "[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return file


# --- good -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.json"])
def test_a_record_comes_out_as_turns_without_the_mark(folder, name):
    records = read_records(write(folder, [GOOD, TEXT], name))
    assert [r.turns for r in records] == [
        (("What is this?", "A cat."), ("Its colour?", "Red.")),
        (("Hello?", "Hello."),),
    ]
    assert records[0].image == folder / "cat.png" and records[1].image is None
    assert [r.id for r in records] == ["7", "t"]
    line = 1 if name.endswith("l") else 2
    assert records[0].where.startswith(f"{name}, line {line}") and records[1].place.line == line + 1
    assert len(records) == 2 and records.skipped == {} and isinstance(records[0], Record)
    assert str(records) == "2 conversations with 3 questions, 1 of them about an image"


def test_what_decides_is_the_first_character_not_the_name(folder):
    array, lines = write(folder, [GOOD], "a.json"), write(folder, [GOOD], "b.jsonl")
    swapped = folder / "c.jsonl", folder / "d.json"
    swapped[0].write_bytes(b"\xef\xbb\xbf" + array.read_bytes())
    swapped[1].write_bytes(b"\xef\xbb\xbf\n\n" + lines.read_bytes())
    turns = [read_records(file)[0].turns for file in (array, lines, *swapped)]
    assert all(each == turns[0] for each in turns)
    assert read_records(swapped[1])[0].place.line == 3


def test_images_are_found_beside_the_file_in_images_or_where_one_says(folder):
    (folder / "images").mkdir()
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    file = write(folder, [GOOD])
    assert read_records(file)[0].image == folder / "cat.png"
    shutil.move(folder / "cat.png", folder / "images" / "cat.png")
    assert read_records(file)[0].image == folder / "images" / "cat.png"
    shutil.move(folder / "images" / "cat.png", elsewhere / "cat.png")
    assert read_records(file, images=elsewhere)[0].image == elsewhere / "cat.png"
    with pytest.raises(ValueError, match="no folder of images"):
        read_records(file, images=folder / "nowhere")


def test_a_folder_with_one_file_is_enough_and_images_that_nobody_asks_about_are_named(folder):
    write(folder, [GOOD, TEXT])
    Image.new("RGB", (4, 4)).save(folder / "dog.jpg")
    records = read_records(folder)
    assert len(records) == 2 and records.unasked == (folder / "dog.jpg",)
    assert "1 images have no record, the first 'dog.jpg'" in str(records)
    write(folder, [GOOD], "more.json")
    with pytest.raises(ValueError, match=r"holds 2 .json or .jsonl files \(more.json, talk.jsonl\), expected 1"):
        read_records(folder)


def test_a_fingerprint_changes_with_the_content_and_not_with_the_place(folder):
    first = read_records(write(folder, [GOOD, TEXT])).fingerprint
    assert read_records(write(folder, ["", GOOD, TEXT], "moved.jsonl")).fingerprint == first
    other = changed("conversations", 1, "value", to="A dog.")
    for records in ([TEXT, GOOD], [GOOD], [other, TEXT]):
        assert read_records(write(folder, records)).fingerprint != first


# --- bad --------------------------------------------------------------------------------------------------------------

HUMAN, GPT = GOOD["conversations"][0], GOOD["conversations"][1]
BAD = [
    ("corrupt JSON", json.dumps(GOOD)[:-9], "column"),
    ("corrupt JSON", "[" * 200_000, "nested|expecting"),
    ("wrong fields", "17", "int"),
    ("wrong fields", {"messages": []}, "'messages'"),
    ("wrong fields", changed("conversations", to=[]), "at least 2 messages"),
    ("wrong fields", changed("image", to=["cat.png", "dog.png"]), "one file"),
    ("wrong fields", changed("conversations", 0, to={"role": "user", "content": "Hi <image>"}), "message 1 of 4"),
    ("wrong fields", changed("conversations", 1, "value", to="half \ud800"), "message 2 of 4 .* UTF-8"),
    ("wrong roles", changed("conversations", 0, "from", to="user"), "message 1 of 4 is from 'user', expected 'human'"),
    ("wrong roles", changed("conversations", to=[HUMAN, HUMAN, GPT]), "message 2 of 3 is from 'human', expected 'gpt'"),
    ("wrong roles", changed("conversations", to=[GPT, HUMAN]), "expected 'human'"),
    ("text without <image>", changed("conversations", 0, "value", to="What?"), "stands 0 times .* 'cat.png'"),
    ("text without <image>", changed("conversations", 0, "value", to="<image> <image> What?"), "stands 2 times"),
    ("text without <image>", changed("conversations", 2, "value", to="<image> And?"), "and 1 times after it"),
    ("<image> without an image", changed("image"), "names 0 images"),
    ("image without a question", changed("conversations", 0, "value", to=" <image>\n"), "'cat.png' comes without"),
    ("empty question", changed("conversations", 2, "value", to="\n"), "message 3 of 4, the question"),
    ("empty answer", changed("conversations", 1, "value", to=" "), "message 2 of 4, the answer"),
    ("empty answer", changed("conversations", 3), "message 3 of 3, a question, has no answer"),
    ("missing image", changed("image", to="dog.png"), "no image 'dog.png'"),
    ("missing image", changed("image", to="a" * 3000), "no image 'aaa"),
    ("missing image", changed("image", to="nul\0.png"), "no image"),
    ("unreadable image", changed("image", to="cut.png"), "'cut.png' is damaged or incomplete"),
    ("unreadable image", changed("image", to="none.png"), "'none.png' is empty"),
]


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.json"])
@pytest.mark.parametrize(("reason", "record", "says"), BAD)
def test_a_bad_record_is_named_with_its_line_and_left_out_when_asked(folder, name, reason, record, says):
    whole = Image.effect_noise((64, 64), 50).convert("RGB")
    whole.save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    (folder / "none.png").touch()
    file = write(folder, [GOOD, record, TEXT], name)
    line = 2 if name.endswith("l") else 3
    with pytest.raises(RecordError, match=says) as error:
        read_records(file)
    message = str(error.value)
    # What is broken inside an array may show only in the next line.
    lines = (line, line + 1) if reason == "corrupt JSON" and name.endswith("n") else (line,)
    assert error.value.reason == reason and error.value.place.line in lines
    assert message.startswith(f"{name}, line {error.value.place.line}") and "\n" not in message and len(message) < 420
    kept = read_records(file, skip_bad=True)
    assert kept.skipped == {reason: 1} and reason in REASONS
    assert [r.id for r in kept] == ["7", "t"]
    assert f"1 records skipped: 1 {reason}" in str(kept) and message in str(kept)


def test_skipped_records_are_counted_by_reason(folder):
    bad = [record for _, record, _ in BAD if "cut" not in str(record) and "none" not in str(record)]
    records = read_records(write(folder, [GOOD, *bad, TEXT]), skip_bad=True)
    assert len(records) == 2
    assert records.skipped == {
        "corrupt JSON": 2, "wrong fields": 6, "wrong roles": 3, "text without <image>": 3,
        "<image> without an image": 1, "image without a question": 1, "empty question": 1,
        "empty answer": 2, "missing image": 3,
    }  # fmt: skip
    assert list(records.examples) == list(records.skipped)


def test_with_nothing_left_the_first_reason_is_said(folder):
    with pytest.raises(ValueError, match=r"0 usable records of 2, .*; the first: talk.jsonl, line 1: "):
        read_records(write(folder, ["{", "17"]), skip_bad=True)
    with pytest.raises(ValueError, match=r"empty.json is empty: 0 records"):
        read_records(write(folder, [""], "empty.jsonl").rename(folder / "empty.json"))
    with pytest.raises(ValueError, match="0 usable records of 0"):
        read_records(write(folder, [], "empty.json"))
    with pytest.raises(ValueError, match="there is no file"):
        read_records(folder / "nothing.json")


def test_images_may_go_unread_but_not_missing(folder):
    (folder / "none.png").touch()
    assert len(read_records(write(folder, [changed("image", to="none.png")]), check="exists")) == 1
    with pytest.raises(ValueError, match="there is no image"):
        read_records(write(folder, [changed("image", to="dog.png")]), check="exists")
    with pytest.raises(ValueError, match="check is 'all'"):
        read_records(folder, check="all")


@pytest.mark.parametrize(
    ("text", "kept", "line", "says"),
    [
        ('[{A},\n{B}', ["A", "B"], 2, "not closed"),
        ('[{A}\n{B}]', ["A", "B"], 1, "not followed by a comma"),
        ('[{A},\n{B},\n]', ["A", "B"], 3, "column|comma"),
        ('[{A},\n{B}]\n{A}', ["A", "B"], 3, "behind the end"),
        ('[{A},\n{"id": "x", "conversations": [{"from": "human",\n{B}]', ["A", "B"], 3, "column"),
        ('[{A}, {"id": }, {B}]', ["A", "B"], 1, "record 2.*column"),
        ("[{A},\n\n{B}", ["A", "B"], 3, "not closed"),
    ],
)  # fmt: skip
def test_a_broken_array_keeps_what_can_be_read(folder, text, kept, line, says):
    for letter in "AB":
        text = text.replace("{" + letter + "}", json.dumps(changed("id", to=letter, record=TEXT)))
    (folder / "talk.json").write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=says) as error:
        read_records(folder / "talk.json")
    assert error.value.place.line == line
    records = read_records(folder / "talk.json", skip_bad=True)
    assert [r.id for r in records] == kept and records.skipped == {"corrupt JSON": 1}


def test_a_line_that_is_not_utf8_loses_only_itself(folder):
    bad = json.dumps(changed("conversations", 1, "value", to="caf\u00e9", record=TEXT), ensure_ascii=False)
    good = bad.encode()
    (folder / "talk.jsonl").write_bytes(b"\n".join([good, bad.encode("latin-1"), good]))
    records = read_records(folder / "talk.jsonl", skip_bad=True)
    assert len(records) == 2 and records.skipped == {"wrong fields": 1}
    assert records[0].turns[0][1] == "caf\u00e9"


@given(st.lists(st.text(max_size=8).filter(is_text), max_size=4), st.integers(0, 3), st.booleans())
def test_an_array_reads_as_json_does_with_true_lines(tmp_path_factory, texts, indent, minified):
    values = [{"conversations": [text, {"value": text}]} for text in texts]
    file = tmp_path_factory.mktemp("json") / "a.json"
    file.write_text(json.dumps(values, indent=None if minified else indent), encoding="utf-8")
    found = list(read_json(file))
    assert [value for _, value in found] == values
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, (place, _) in enumerate(found, 1):
        assert place.number == number and lines[place.line - 1].lstrip("[ ").startswith("{")
