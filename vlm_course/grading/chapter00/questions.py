"""The check question of chapter 0."""

from vlm_course.grading.quiz import Option, Question

CORE_CHALLENGE = Question(
    name="q_0_1",
    chapter="00",
    text="What makes it hard to put images and text into one model?",
    options={
        "a": Option(
            "Images hold more bytes than text, so they do not fit into memory.",
            "Size is a cost and not the obstacle: 576 visual tokens fit easily, and a longer text fills as much.",
        ),
        "b": Option(
            "Pixels are continuous and arranged in space, words are discrete symbols in a row; the model needs one "
            "representation in which the two can interact.",
            "The bridge gives patches the form of word embeddings, so one attention reads both.",
        ),
        "c": Option(
            "Language models cannot take vectors as input, only words.",
            "Inside, a language model only ever sees vectors: the embedding table turns words into them first.",
        ),
        "d": Option(
            "Vision encoders have to be trained on the same sentences as the language model.",
            "They were trained apart: LLaVA takes a finished CLIP tower and a finished language model, and joins them.",
        ),
    },
    answer="b",
)
