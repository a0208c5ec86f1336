"""Exercise: LLaVA-1.5's conversation template, with the image where it really stands."""

import random

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake

WORDS = "red blue star cross small large left above one two yes no cat sofa".split()


def oracle(turns: list, image: bool, system: str) -> tuple:
    text, spans = system, []
    text += " "
    for number in range(len(turns)):
        question, answer = turns[number]
        text += "USER: "
        if number == 0 and image:
            text += "<image>"
            text += "\n"
        text += question
        text += " ASSISTANT:"
        if answer is None:
            continue
        text += " "
        first = len(text)
        text += answer
        text += "</s>"
        spans.append((first, len(text)))
    return text, tuple(spans)


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    say = lambda low, high: " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))  # noqa: E731

    def case(turns: int, image: bool, *, open_: bool, same: bool = False) -> Case:
        answers = [say(1, 3) + "." for _ in range(turns)]
        if same:  # an answer that stood in the text before: whoever searches for it finds the wrong place
            answers = [answers[0]] * turns
        talk = [(f"{answers[0]} Is it so, {say(1, 3)}?", answer) for answer in answers]
        if open_:
            talk[-1] = (talk[-1][0], None)
        return Case({"turns": talk, "image": image, "system": f"You see {say(2, 4)}."})

    return [
        case(1, True, open_=False),
        case(3, True, open_=False, same=True),
        case(2, True, open_=True),
        case(2, False, open_=False),
    ]


def build(
    turns,
    image,
    system,
    *,
    head="",
    after_image="\n",
    image_last=False,
    in_every=False,
    image_always=False,
    end="</s>",
    span_end=True,
    gap=" ",
    span_gap=False,
    between="",
    open_gap="",
    first_gap=" ",
    use_system=True,
    search=False,
    roles=("USER:", "ASSISTANT:"),
    question_span=False,
    only_last=False,
):
    """The right template with one thing changed."""
    text, spans = head + (system if use_system else ""), []
    text += first_gap if use_system else ""
    for number, (question, answer) in enumerate(turns):
        here = (image or image_always) and (number == 0 or in_every) and not head
        words = f"{question}{after_image}<image>" if here and image_last else question
        words = f"<image>{after_image}{question}" if here and not image_last else words
        opening = len(text)
        text += f"{roles[0]} {words} {roles[1]}"
        if answer is None:
            text += open_gap
            continue
        start = len(text) + len(gap) * (not span_gap)
        text += f"{gap}{answer}{end}"
        stop = len(text) if span_end else len(text) - len(end)
        if search:
            start = text.find(answer)
            stop = start + len(answer + end)
        spans.append((opening if question_span else start, stop))
        text += between
    return text, spans[-1:] if only_last else spans


def changed(**options):
    return lambda turns, image, system: build(turns, image, system, **options)


def image_first(turns, image, system):
    return build(turns, image, system, head="<image>\n" if image else "")


def joined(turns, image, system):
    """Pieces in a list, their lengths summed."""
    pieces, spans = [system, " "], []
    for number, (question, answer) in enumerate(turns):
        pieces += ["USER: ", "<image>\n" * (image and not number), question, " ASSISTANT:"]
        if answer is not None:
            pieces.append(" ")
            start = sum(map(len, pieces))
            pieces += [answer, "</s>"]
            spans.append([start, sum(map(len, pieces))])
    return "".join(pieces), [tuple(span) for span in spans]


def recursive(turns, image, system):
    """The last turn is put behind the prompt of the others."""
    if not turns:
        return system + " ", []
    text, spans = recursive(turns[:-1], image, system)
    question, answer = turns[-1]
    text = text + "USER: " + ("<image>\n" if image and len(turns) == 1 else "") + question + " ASSISTANT:"
    if answer is None:
        return text, spans
    response = answer + "</s>"
    text = text + " " + response
    return text, [*spans, (len(text) - len(response), len(text))]


VICUNA_PROMPT = Exercise(
    name="vicuna_prompt",
    chapter="04",
    title="Build It: the conversation template",
    difficulty="medium",
    minutes=15,
    points=4,
    attribute="vicuna_prompt",
    twin="vlm_course.chat:vicuna_prompt",
    interface=FunctionInterface(
        {"turns": "list of (question, answer or None)", "image": "True or False", "system": "string"},
        "(string, list of (start, end))",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "image before the system text": Mistake(
            "Your image stands in front of the system text, as in the source lesson: in LLaVA-1.5 it opens the first "
            "question.",
            image_first,
        ),
        "image behind the question": Mistake(
            "Your image stands behind the question: LLaVA-1.5 puts it in front, so that the image never sees the "
            "question.",
            changed(image_last=True),
        ),
        "image in every question": Mistake(
            "Your image stands in every question: there is one image, and it belongs to the first.",
            changed(in_every=True),
        ),
        "no line end behind the image": Mistake(
            "There is no line end between <image> and the question.", changed(after_image="")
        ),
        "space behind the image": Mistake(
            "Between <image> and the question stands a line end, not a space.", changed(after_image=" ")
        ),
        "image whatever is asked": Mistake(
            "Your prompt has an <image> even where image is False.", changed(image_always=True)
        ),
        "no end mark": Mistake(
            "Your answers do not end in </s>: a model trained on them never learns to stop.", changed(end="")
        ),
        "end mark not learned": Mistake(
            "Your spans end before </s>: it must be learned too, or the model never stops.", changed(span_end=False)
        ),
        "span with the space": Mistake(
            "Your spans begin with the space behind ASSISTANT: they begin with the answer's first character.",
            changed(span_gap=True),
        ),
        "span of the whole turn": Mistake(
            "Your spans cover the question too: only the answer and its </s> are to be learned.",
            changed(question_span=True),
        ),
        "only the last answer": Mistake(
            "Only your last answer has a span: every answer of the conversation is learned.", changed(only_last=True)
        ),
        "space between turns": Mistake(
            "There is a space between </s> and the next USER: LLaVA-1.5 has none.", changed(between=" ")
        ),
        "no space before the answer": Mistake(
            "There is no space between ASSISTANT: and the answer.", changed(gap="", open_gap="")
        ),
        "open prompt ends in a space": Mistake(
            "Your open prompt ends in a space: it ends with the colon, and the model writes the space itself.",
            changed(open_gap=" "),
        ),
        "answers searched for": Mistake(
            "You search for the answer in the text and find an earlier place with the same words: count instead.",
            changed(search=True),
        ),
        "no system text": Mistake("Your prompt does not begin with the system text.", changed(use_system=False)),
        "no space behind the system text": Mistake(
            "There is no space between the system text and the first USER.", changed(first_gap="")
        ),
        "roles in lower case": Mistake(
            "Your roles are in lower case: Vicuna was tuned with USER and ASSISTANT in capitals.",
            changed(roles=("user:", "assistant:")),
        ),
    },
    also_correct={"pieces in a list": joined, "recursion": recursive},
)
