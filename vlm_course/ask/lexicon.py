"""The words that `scope` understands, with what each stands for. A question with any other word is refused.

Lower-case tags are properties (size, colour, shape, direction, with their name in the scenes world), noun (an object of
any shape) and filler (no meaning that matters here). Tags in capitals are cues for the kind of question.
"""

from ..worlds.scenes import COLOURS

SIZE_WORDS = {
    "small": "small little tiny smallest",
    "large": "large big huge largest biggest",
}
COLOUR_WORDS = {colour: colour for colour in COLOURS} | {"gray": "gray grey"}
SHAPE_WORDS = {
    "circle": "circle circles circular disk disks disc discs round",
    "rectangle": "rectangle rectangles rectangular oblong oblongs",
    "triangle": "triangle triangles triangular",
    "diamond": "diamond diamonds rhombus rhombuses rhombi lozenge lozenges",
    "cross": "cross crosses plus pluses",
    "star": "star stars",
}
DIRECTION_WORDS = {
    "left": "left leftmost",
    "right": "right",
    "above": "above over higher up",
    "below": "below under beneath underneath lower down",
}

CUES = {
    "COLOUR": "color colors colour colours hue hues tint shade coloring colouring",
    "PAINTED": "colored coloured painted",
    "FORM": "form geometric geometrical",
    "KIND": "kind sort type",
    "SIZE": "size sizes",
    "COUNT": "count number amount quantity total",
    "MANY": "many",
    "WHERE": "where locate find",
    "POINT": "point position location coordinates center centre middle place spot",
    "BOX": "box boxes bounding mark outline frame",
    "DRAW": "draw put make",
    "CAPTION": "describe description caption summarize summarise summary list everything about",
    "RELATIVE": "relative relation respect compared side direction",
    "THERE": "there exist exists present visible appear appears contain contains include includes show shows shown see "
    "depicted seen found have has had got notice",
    "IMAGE": "image images picture pictures scene drawing",
    "ANY": "any anything something some",
    "NOT": "not no nothing none without lack lacks lacking absent missing never",
    "OR": "or",
    "IF": "if whether",
    "WHAT": "what which",
    "HOW": "how",
    "BE": "is are be was",
    "DO": "do does did can could will would",
    "THAN": "than more further farther",
    "ALL": "all each every both",
    "NAME": "name identify",
    "WRITE": "write",
}
NOUNS = "object objects shape shapes thing things item items figure figures one ones it its they them their"
FILLERS = """
a an the this that these those of in on at to for from by with as and so here anywhere around 's
me you i we us my let tell say give state determine check look know wonder please kindly just now
altogether overall call called used drawn been lie lies sit sits stand stands standing located positioned placed sized
shaped regarding hey hi ok okay same
""".split()

# What to say about words that are common in questions about pictures and are not understood here.
_COLOURS = f"the colours I know are {', '.join(COLOURS[:-1])} and {COLOURS[-1]}"
_SHAPES = "the shapes I know are circle, rectangle, triangle, diamond, cross and star"
_COMPARE = "the only comparison I know is left of, right of, above or below"
_REAL = "I have only ever seen drawn shapes, no living things and no real objects"
REASONS = {
    _COLOURS: "violet white turquoise magenta gold golden silver beige crimson scarlet maroon "
    "navy olive lime indigo lavender",
    _SHAPES: "square squares oval ovals ellipse ellipses hexagon hexagons pentagon pentagons octagon octagons polygon "
    "polygons heart hearts arrow arrows line lines cube cubes sphere spheres ring rings crescent trapezoid",
    _COMPARE: "same different fewer less equal most smaller larger bigger nearest closest touching behind inside "
    "between next near far beside",
    _REAL: "people person persons man men woman women girl boy child children face dog dogs cat cats animal animals "
    "bird birds car cars house houses tree trees",
    "I cannot read text": "text word words letter letters written sign says",
    "I answer only what can be seen": "why who when whose",
    "I say how many there are when asked how many": "two three four five six seven eight nine ten",
}

# Words one letter away from a word above that are not a misspelling of it.
NOT_TYPOS = frozenset(
    """
    greed greek greet preen slack blank block crown frown grown drown brow browns fellow bellow mellow crows gross
    across cress stare start stats stairs scars stays stark smell stall mall shall barge lager charge colon shame shale
    share shave shaken grape were three theme then elbow bellows udder night light fight sight eight might
    bright tight paint print joint court mount county mage think thinks wings kings rings farm worm firm
    pick pin ping kink link mink pine pint punk rink sink wink pinks range oranges grange clan cyans
    from lost last witch plush tangle bound ground sound mound wound pound hound found axis angle angles
    """.split()
)


def _table() -> dict[str, tuple[str, str]]:
    table = {word: ("filler", word) for word in FILLERS}
    table |= {word: (tag, word) for tag, text in CUES.items() for word in text.split()}
    table |= {word: ("noun", word) for word in NOUNS.split()}
    named = {"size": SIZE_WORDS, "colour": COLOUR_WORDS, "shape": SHAPE_WORDS, "direction": DIRECTION_WORDS}
    for tag, values in named.items():
        table |= {word: (tag, value) for value, text in values.items() for word in text.split()}
    return table


LEXICON = _table()
REASON_OF = {word: reason for reason, text in REASONS.items() for word in text.split()}
