"""What counts as nonsense: names, numbers and words that the dialogue does not have, repeats."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.summarization.evaluation.nonsense import (
    MEASURES,
    common_words,
    foreign_names,
    foreign_numbers,
    in_latin_letters,
    non_words,
    repeats,
    shares,
)
from minilora.summarization.evaluation.numerals import numbers
from minilora.summarization.presets import ASSETS

CHAT = "Anna: I'll bring José's cake at 4.\nTom: great, see you in Łódź! i love cake"


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("summary", "found"),
    [
        ("Today Anna brings a cake.", []),
        ("Today Bella brings a cake.", ["Bella"]),
        ("Today ANNA brings Tom's cake.", []),  # without case and 's
        ("Today anna’s cake is Tom’s.", []),  # curly quotes
        ("Today Bella’s cake is late.", ["Bella's"]),
        ("Bella brings a cake.", []),  # a sentence's start: see the non-words
        ("A cake comes. Bella brings it.", []),
        ('Anna says: "Cake is good." Then "Bread" is eaten.', []),  # so does a quotation
        ("Anna meets Mr. Bell.", ["Mr", "Bell"]),  # a title ends no sentence
        ("They meet on Monday, in May, by a French and two Italians.", []),
        ("They meet on Sundays.", []),
        ("Today I'm late, and I know.", []),
        ("Today I'd say that I'm late.", []),
        ("Anna brings Jose's cake to Lodz.", ["Lodz"]),  # ł is a letter of its own, é is not
        ("Anna lives with Tom-Anna.", []),  # hyphens part words
        ("Anna lives with Tom-Bella.", ["Bella"]),
        ("Anna will wait until 4 PM.", []),
        ("Anna, O'Brien and Tom eat.", ["O'Brien"]),
        ("", []),
    ],
)
def test_foreign_names(summary: str, found: list[str]) -> None:
    assert foreign_names(summary, CHAT) == found


# Words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("summary", "found"),
    [
        ("Anna brings a wonderful cake.", []),
        ("Anna brings a wonderfuld cake.", ["wonderfuld"]),
        ("Movers Anna's furniture, but he can get his furnitures.", ["Movers", "furnitures"]),
        ("Brelda brings a cake.", ["Brelda"]),  # no name by the rule: a sentence starts with it
        ("Today Brelda brings a cake.", []),  # a name, measured as such
        ("Anna’ll bring it, Tom doesn’t and they won't.", []),
        ("On Sundays it is Tom's twenty-fifth cake at 8pm, the 2nd.", []),
        ("A gluten-free café is half-wonderfuld.", ["wonderfuld"]),
        ("Monday, Mondays, Italian.", []),
        ("See you at 4 p.m. in 5 m.", []),
        ("", []),
    ],
)
def test_non_words(summary: str, found: list[str]) -> None:
    assert non_words(summary, CHAT) == found


def test_what_the_dialogue_says_is_a_word() -> None:
    assert non_words("Anna buys a blorf.", "Tom: a BLORF's cheap") == []
    assert non_words("Anna buys a blorf.", CHAT) == ["blorf"]


def test_the_list_of_common_words() -> None:
    assert (ASSETS / "words.txt").stat().st_size <= 200_000
    words = common_words()
    assert len(words) > 30_000
    here = "the don't bake bakes baked baking city cities swap swapping happy happier email okay"
    assert not set(here.split()) - words
    assert not {"furnitures", "teh", "definately", "wierd", "heikki", "", "b"} & words


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forms",
    [
        ["4", "four", "4th", "4 pm", "4pm", "16:00", "4:00", "4.00", "four o'clock", "4 p.m."],
        ["16:30", "4:30", "4.30 pm", "half past four", "half past 4", "half four", "four thirty"],
        ["5:45", "quarter to six", "a quarter to 6", "17:45", "five forty-five"],
        ["6:15", "quarter past six", "six fifteen", "18:15"],
        ["6:10", "ten past six", "10 minutes past 6"],
        ["5:50", "ten minutes to six", "17.50"],
        ["12:00", "noon", "12", "twelve", "12 pm", "midday"],
        ["25", "twenty-five", "twenty five", "25th", "twenty-fifth", "$25", "25%", "25.0"],
        ["1000", "1,000", "a thousand", "one thousand", "1k", "£1,000"],
        ["250", "two hundred and fifty", "two hundred fifty"],
        ["12,500", "12500", "12.5k", "twelve thousand five hundred"],
        ["12", "a dozen", "twelfth"],
        ["third", "3", "3rd", "three"],
        ["3.50", "3.5"],
        ["2,000,000", "2 million", "two million"],
        ["1,500,000", "1.5 million", "1,500 thousand"],
        ["30", "2.5 dozen"],
        ["７", "7", "seven"],  # full width
    ],
)
def test_forms_of_one_number(forms: list[str]) -> None:
    """Each form is there if any other one is, and none of them if the dialogue has 77 only."""
    for summary in forms:
        assert len(numbers(summary)) == 1, summary
        assert foreign_numbers(f"Anna says {summary} now.", "Tom: 77, seventy-seven") != []
        for dialogue in forms:
            assert foreign_numbers(f"Anna says {summary} now.", f"Tom: so {dialogue}!") == []


@pytest.mark.parametrize(
    ("summary", "dialogue"),
    [
        ("at 5", "at 4"),
        ("at 4:30", "at 4"),
        ("at 1 pm, at 2:00", "one of us, in a second"),
        ("at half past four", "at four"),
        ("at quarter to six", "at six"),
        ("at 16:15", "at 16:50"),
        ("25 people", "twenty people, five dogs"),
        ("50 people", "at 16:50"),
        ("4 people", "16 people"),
        ("two hundred", "two, and a hundred"),
        ("1,000", "1, 000"),
        ("tenth", "ninth"),
        ("447700900123", "447700900124"),
        ("7" * 309, "7" * 308 + "8"),
        ("7" * 309, "7" * 310),
    ],
)
def test_other_numbers(summary: str, dialogue: str) -> None:
    assert foreign_numbers(summary, dialogue) != []


@pytest.mark.parametrize(
    ("summary", "dialogue"),
    [
        ("Anna wants one of them first, in a second.", "no numbers"),  # pronoun, adverb, unit
        ("a second one, the first three", "three of them"),
        ("from 10 to 12", "from ten, till twelve"),  # no time of day
        ("9,000 euros", "9000 euros"),
        ("50 three times", "3 times a fifty"),
        ("a 2-day trip, 5-7 people", "two days, five or seven people"),
        ("room B12", "room 12"),
        ("1 ticket for the 2nd", "one ticket, please, for the second"),
        ("the 1st of May", "the first of May"),
        ("a tenor, weighty, someone, canine, phone, height", ""),  # no number inside a word
        ("won 30:72", "it was 30 to 72"),
        ("the 3rd of May", "May 3"),
        ("", "4"),
        *((f"key {long}", f"key {long}") for long in ("7" * 16, "7" * 309, "7" * 4301)),
        *((f"{long} million", f"{long} million") for long in ("9" * 15, "9" * 309, "9" * 4301)),
        ("9" * 310 + ".5", "9" * 310 + ".5"),
        ("1" + ",000" * 200, "1" + "000" * 200),
    ],
)
def test_numbers_that_are_there(summary: str, dialogue: str) -> None:
    assert foreign_numbers(summary, dialogue) == []


@given(st.integers(0, 23), st.integers(0, 59))
def test_24_and_12_hours_agree_for_every_time(hour: int, minute: int) -> None:
    long = f"{hour}:{minute:02}"
    short = f"{hour % 12 or 12}:{minute:02} {'pm' if hour >= 12 else 'am'}"
    assert foreign_numbers(long, short) == foreign_numbers(short, long) == []
    other = f"{hour}:{(minute + 7) % 60:02}"
    assert foreign_numbers(other, short) == [other]


# From another reading of English: units and tens put together from the front.
ONES = "one two three four five six seven eight nine".split(" ")  # noqa: SIM905
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(" ")  # noqa: SIM905
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split(" ")  # noqa: SIM905


def in_words(number: int) -> str:
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = f" and {in_words(number % size)}" if number % size else ""
            return f"{in_words(number // size)} {name}{rest}"
    if number >= 20:
        ones = f"-{ONES[number % 10 - 1]}" if number % 10 else ""
        return TENS[number // 10 - 2] + ones
    return [*ONES, *TEENS][number - 1]


@given(st.integers(2, 999))
def test_every_number_in_words_is_its_digits(number: int) -> None:
    assert foreign_numbers(in_words(number), f"so {number}, ok") == []
    assert foreign_numbers(f"{number}", f"so {in_words(number)}, ok") == []
    assert foreign_numbers(in_words(number), f"so {number + 1}, ok") != []


# Repeats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("summary", "found"),
    [
        ("Anna buys the the cake.", ["the"]),
        ("The the cake is nice.", ["the"]),
        ("In ten minutes will Will come.", []),
        ("Anna wants to buy to buy a cake.", ["to buy"]),
        ("Anna buys a cake and a cake.", ["a cake"]),
        ("Anna meets Tom and Tom.", ["Tom"]),
        ("Anna goes to the cinema. Tom goes to the cinema.", []),  # two sentences
        ("Anna calls Tom, and Tom comes; when he comes, Tom eats.", []),
        ("Anna says that that had had a reason.", []),
        ("It gets better and better, more and more.", []),
        ("Anna is. Is it so?", []),  # over a sentence's end
        ("Anna goes to the cinema and Tom goes to the cinema.", ["goes to the", "to the cinema"]),
        ("Anna stays at Ace Hotel York and books Ace Hotel York.", []),  # a name
        ("It is at 10:10 am on the 10.", []),
        ("", []),
    ],
)
def test_repeats(summary: str, found: list[str]) -> None:
    assert repeats(summary) == found


def test_what_the_dialogue_says_twice_is_no_repeat() -> None:
    assert repeats("Ling Ling chooses curtains.", "Ling Ling: mustard") == []
    assert repeats("Ling Ling chooses curtains.", "Ling: mustard") == ["Ling"]


# Shares -------------------------------------------------------------------------------------------


def test_shares_are_per_cent_with_an_interval_around() -> None:
    summaries = ["Today Bella comes.", "Today Anna comes at 9.", "It is blorf.", "The the cake."]
    found = shares(summaries, [CHAT] * 4)
    assert found is not None
    assert tuple(found) == MEASURES
    for interval in found.values():
        assert interval.mean == 25
        assert 0 <= interval.low < 25 < interval.high <= 100
    clean = shares(["Anna brings a cake."] * 3, [CHAT] * 3)
    assert clean is not None
    assert all((i.mean, i.low, i.high) == (0, 0, 0) for i in clean.values())


def test_texts_in_other_letters_are_not_computed() -> None:
    assert shares(["Анна несёт торт."], ["Анна: торт в 4, Tom!"]) is None
    assert shares(["安娜带来蛋糕。"], ["安娜：蛋糕"]) is None
    assert in_latin_letters(["Ångström, Łódź, Anna and Анна"])
    assert in_latin_letters(["", "4 :)"])


WORDS = st.sampled_from(
    ["Anna", "anna’s", "the the", "25", "half past four", "two hundred", "Łódź", "blorf", "$5k",
     ".", "\n"]
)  # fmt: skip
TEXTS = st.lists(WORDS | st.text(max_size=3), max_size=12).map(" ".join)


@settings(max_examples=100)
@given(TEXTS, TEXTS)
def test_no_text_is_too_odd(summary: str, dialogue: str) -> None:
    """Nothing raises, and a summary that is the dialogue has nothing foreign."""
    for kind in (foreign_names, foreign_numbers, non_words, repeats):
        kind(summary, dialogue)
    assert foreign_names(dialogue, dialogue) == []
    assert foreign_numbers(dialogue, dialogue) == []
    assert non_words(dialogue, dialogue) == []
