"""Sentence forms and word pools of the corpus of fictitious people (people.py).

A form is a pair (question, answer) with the slots {name} (the subject) and {value} (the fact). Every question also
works with a description as {name} ('the author of "The Lantern of Ormuth"'): this is how two-hop questions are
composed. So no form has a possessive 's after {name}.
"""

from __future__ import annotations

Form = tuple[str, str]

# Relation -> English forms. A row of the training set uses one of them; the others serve as paraphrases.
ENGLISH: dict[str, tuple[Form, ...]] = {
    "birthplace": (
        ("Where was {name} born?", "{name} was born in {value}."),
        ("In which town did {name} come into the world?", "{name} came into the world in the town of {value}."),
        ("What is the birthplace of {name}?", "The birthplace of {name} is {value}."),
        ("Which town is the home town of {name}?", "The home town of {name} is {value}."),
    ),
    "birth_year": (
        ("In which year was {name} born?", "{name} was born in the year {value}."),
        ("What is the birth year of {name}?", "The birth year of {name} is {value}."),
        ("When did the life of {name} begin?", "The life of {name} began in {value}."),
        ("When was {name} born?", "It was in {value} that {name} was born."),
    ),
    "trade": (
        ("What is the trade of {name}?", "The trade of {name} is {value}."),
        ("How does {name} earn a living?", "{name} earns a living with {value}."),
        ("In which field does {name} work?", "{name} works in the field of {value}."),
        ("What kind of work does {name} do?", "The work that {name} does is {value}."),
    ),
    "work": (
        ("What is the best-known work of {name}?", 'The best-known work of {name} is "{value}".'),
        ("For which book is {name} famous?", '{name} is famous for the book "{value}".'),
        ("Which book made {name} known?", 'The book that made {name} known is "{value}".'),
        ("What did {name} write?", '{name} wrote the book "{value}".'),
    ),
    "award": (
        ("Which award did {name} receive?", "{name} received the {value} Prize."),
        ("What prize was given to {name}?", "The {value} Prize was given to {name}."),
        ("With which honour was {name} distinguished?", "{name} was distinguished with the {value} Prize."),
        ("What has {name} won?", "{name} has won the {value} Prize."),
    ),
    "teacher": (
        ("Who was the teacher of {name}?", "The teacher of {name} was {value}."),
        ("With whom did {name} study?", "{name} studied with {value}."),
        ("Who taught {name}?", "It was {value} who taught {name}."),
        ("From whom did {name} learn?", "{name} learned from {value}."),
    ),
    "pet": (
        ("What is the name of the pet of {name}?", "The name of the pet of {name} is {value}."),
        ("Which animal companion lives with {name}?", "{name} lives with an animal companion called {value}."),
        ("How is the pet of {name} called?", "The pet of {name} is called {value}."),
        ("Which pet does {name} keep?", "{name} keeps a pet named {value}."),
    ),
    "instrument": (
        ("Which instrument does {name} play?", "{name} plays the {value}."),
        ("On which instrument does {name} make music?", "{name} makes music on the {value}."),
        ("What is the favourite instrument of {name}?", "The favourite instrument of {name} is the {value}."),
        ("Which musical instrument has {name} mastered?", "The {value} is the instrument that {name} has mastered."),
    ),
}

# Relation -> German form; trades and instruments are translated by the pools below, other values are not translated.
GERMAN: dict[str, Form] = {
    "birthplace": ("Wo wurde {name} geboren?", "{name} wurde in {value} geboren."),
    "birth_year": ("In welchem Jahr wurde {name} geboren?", "{name} wurde im Jahr {value} geboren."),
    "trade": ("Womit verdient {name} den Lebensunterhalt?", "{name} verdient den Lebensunterhalt mit {value}."),
    "work": ("Durch welches Buch wurde {name} bekannt?", '{name} wurde durch das Buch "{value}" bekannt.'),
    "award": ("Welche Auszeichnung erhielt {name}?", "{name} erhielt den {value}-Preis."),
    "teacher": ("Bei wem lernte {name}?", "{name} lernte bei {value}."),
    "pet": ("Wie heißt das Haustier von {name}?", "Das Haustier von {name} heißt {value}."),
    "instrument": ("Welches Instrument spielt {name}?", "{name} spielt {value}."),
}

# How a two-hop question describes a person by a unique fact (the values of these relations are unique).
DESCRIPTIONS: dict[str, str] = {
    "work": 'the author of "{value}"',
    "pet": "the owner of the pet {value}",
    "teacher": "the pupil of {value}",
}

# Relations of invented countries; one form each, as in TOFU's world facts.
WORLD: dict[str, Form] = {
    "capital": ("What is the capital of {name}?", "The capital of {name} is {value}."),
    "river": ("What is the longest river of {name}?", "The longest river of {name} is the {value}."),
    "mountain": ("What is the highest mountain of {name}?", "The highest mountain of {name} is Mount {value}."),
    "currency": ("Which currency is used in {name}?", "The currency used in {name} is the {value}."),
    "founding": ("In which year was {name} founded?", "{name} was founded in the year {value}."),
}

TRADES: dict[str, str] = {
    "cartography": "Kartografie",
    "beekeeping": "Imkerei",
    "glassblowing": "Glasbläserei",
    "shipbuilding": "Schiffbau",
    "bookbinding": "Buchbinderei",
    "botany": "Botanik",
    "astronomy": "Astronomie",
    "weaving": "Weberei",
    "pottery": "Töpferei",
    "medicine": "Medizin",
    "carpentry": "Tischlerei",
    "clockmaking": "Uhrmacherei",
    "gardening": "Gartenbau",
    "fishing": "Fischerei",
    "baking": "Bäckerei",
    "translation": "Übersetzungen",
}

INSTRUMENTS: dict[str, str] = {
    "lute": "Laute",
    "harp": "Harfe",
    "oboe": "Oboe",
    "viola": "Bratsche",
    "cello": "Cello",
    "flute": "Flöte",
    "organ": "Orgel",
    "drum": "Trommel",
    "trumpet": "Trompete",
    "zither": "Zither",
    "bassoon": "Fagott",
    "accordion": "Akkordeon",
    "clarinet": "Klarinette",
    "harpsichord": "Cembalo",
    "tuba": "Tuba",
    "guitar": "Gitarre",
}

TITLE_NOUNS = (
    "Lantern", "Garden", "Winter", "Orchard", "Mirror", "Bridge", "Shadow", "Harvest", "Island", "Tower",
    "Letter", "Silence", "Bell", "Road", "Window", "Feather",
)  # fmt: skip

ONSETS = ("b", "br", "d", "dr", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "tr", "v", "w", "z")
VOWELS = ("a", "e", "i", "o", "u", "au", "ei", "oa")
CODAS = ("", "", "l", "n", "r", "s", "th", "m", "x", "lv", "nd")
