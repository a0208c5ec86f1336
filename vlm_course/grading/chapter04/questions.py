"""The check question of chapter 4."""

from vlm_course.grading.quiz import Option, Question

WHAT_TUNING_CHANGES = Question(
    name="q_4_1",
    chapter="04",
    text="What sets visual instruction tuning apart from training on captions?",
    options={
        "a": Option(
            "The loss: only instruction tuning masks everything but the response.",
            "LLaVA masks the image when it trains on captions too. The same function makes the labels of both stages.",
        ),
        "b": Option(
            "The data: many kinds of instruction about an image, each with the response that it asks for.",
            "The architecture, the loss and the mask stay; what is asked, and so what must be read off the image, "
            "changes. In LLaVA the language model learns as well, where stage 1 trains the bridge alone.",
        ),
        "c": Option(
            "The image: its tokens stand behind the question, so that they can attend to it.",
            "In LLaVA-1.5 the image stands in front of the question, and under a causal mask it sees none of it.",
        ),
        "d": Option(
            "The gradient: it no longer reaches the bridge, because visual tokens carry no loss.",
            "It does reach the bridge, through the attention of the response to the image. No other way trains it.",
        ),
    },
    answer="b",
)
