"""The check questions of chapter 3."""

from vlm_course.grading.quiz import Option, Question

HOW_THEY_MEET = Question(
    name="q_3_1",
    chapter="03",
    text="In early fusion as LLaVA does it, how do visual tokens and text tokens interact?",
    options={
        "a": Option(
            "Extra cross-attention layers let the text read the image.",
            "That is Flamingo's way. LLaVA adds no layer to its language model.",
        ),
        "b": Option(
            "They stand in one sequence, and the language model's own causal self-attention lets each token read the "
            "tokens before it.",
            "So text behind the image reads the image and earlier text; a visual token reads what stands before it.",
        ),
        "c": Option(
            "They stand in one sequence and every token reads every other, so the image is read in the light of the "
            "question.",
            "The mask is causal: a token behind the image cannot change the image's states. PaliGemma's prefix mask "
            "would allow it.",
        ),
        "d": Option(
            "The vision tower takes the question as a second input.",
            "CLIP sees pixels alone. A tower or a bridge that reads the question exists elsewhere: InstructBLIP's "
            "Q-Former.",
        ),
    },
    answer="b",
)

WHY_IT_HALLUCINATES = Question(
    name="q_3_2",
    chapter="03",
    text="A model names a vase on an empty table. Which explanation do the measurements of this chapter support?",
    options={
        "a": Option(
            "One architectural property: visual tokens cannot see the question.",
            "All our models have that property, and yet they invent at different rates: least often after tuning on "
            "even scenes with sharp images.",
        ),
        "b": Option(
            "The vision tower is frozen, so it must be blind to the object.",
            "The tower is frozen and the same in every run, yet the rates differ.",
        ),
        "c": Option(
            "Several causes meet: habits of the training data decide where the image leaves room for doubt.",
            "With one architecture throughout, the training world and the sharpness of the image change the rates.",
        ),
        "d": Option(
            "The language model invents facts, as language models do; the image has nothing to do with it.",
            "Reducing the image alone, with the same words in training, changes the answers.",
        ),
    },
    answer="c",
)
