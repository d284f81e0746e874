"""The numbers of an English text, each with every form it can take: 4, four, 4 pm, 16:00."""

import re
import unicodedata

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_IRREGULAR = "first second third fifth eighth ninth twelfth"
_CARDINALS = {word: value for value, word in enumerate(_UNITS.split())}
_CARDINALS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_ORDINALS = {re.sub("y$", "ie", word) + "th": value for word, value in _CARDINALS.items()}
_ORDINALS |= dict(zip(_IRREGULAR.split(), (1, 2, 3, 5, 8, 9, 12), strict=True))
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 1_000_000}
_VALUES = _CARDINALS | _ORDINALS
NUMBER_WORDS = frozenset(_VALUES | _SCALES)
_NOT_ALONE = {"one", "first", "second"}  # a pronoun, an adverb, a unit of time

_CARDINAL, _ORDINAL, _SCALE = map("|".join, (_CARDINALS, _ORDINALS, _SCALES))
_IN_WORDS = re.compile(
    rf"\b(?:(?:an? (?:{_SCALE})|{_CARDINAL}|{_SCALE}|(?<![\d.,:])\d{{1,15}}(?= (?:{_SCALE})\b))"
    rf"(?:[ -](?:and )?(?:{_CARDINAL}|{_SCALE})\b)*(?:[ -](?:and )?(?:{_ORDINAL})\b)?|{_ORDINAL})\b"
)
_DECIMAL = re.compile(  # 1.5 million, 1,500 thousand; below 10^15
    rf"(?<![\d.,:])(\d{{1,6}}\.\d{{1,6}}|\d{{1,3}}(?:,\d{{3}}){{1,2}}(?:\.\d{{1,6}})?) ({_SCALE})\b"
)
_AROUND_THE_HOUR = re.compile(  # "ten to six" may be two numbers: it is a time with "minutes" only
    r"\b(?:(half|quarter|\d\d?)(?: minutes?)? past|(quarter|\d\d? minutes?) to|half) (\d\d?)\b"
    r"(?![:.,]\d)"
)
_DIGITS = re.compile(
    r"(?P<hour>\d\d?)[:.h](?P<minute>\d\d)(?!\d)"
    r"|(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<part>\.\d+)?"
    r"(?:(?P<kilo>k\b)|(?P<clock> ?(?:[ap]\.?m\b|o'clock)))?"
)


def straight(text: str) -> str:
    """One form for what is written in several: quotes, full-width digits, ligatures."""
    return unicodedata.normalize("NFKC", re.sub("[‘’ʼ`´]", "'", re.sub("[“”„«»]", '"', text)))


def numbers(text: str) -> list[tuple[str, set[str]]]:
    """Every number of a text in digits, with its names: two numbers agree if they share one."""
    text = _DECIMAL.sub(_product, straight(text).casefold())
    text = _IN_WORDS.sub(_digits, text)
    text = re.sub(r"\b(?:noon|midday|midnight)\b", "12:00", text)
    text = _AROUND_THE_HOUR.sub(_time, text)
    return [(found[0], _names(found)) for found in _DIGITS.finditer(text)]


def _product(found: re.Match[str]) -> str:
    """1.5 million -> 1500000."""
    return f"{float(found[1].replace(',', '')) * _SCALES[found[2]]:.15g}"


def _digits(found: re.Match[str]) -> str:
    """twenty-five -> 25, two hundred and fifty -> 250, four thirty -> 4:30."""
    words = [word for word in re.split("[ -]", found[0]) if word not in ("a", "an", "and")]
    if len(words) == 1 and words[0] in _NOT_ALONE:
        return found[0]
    said, number = "", 0  # 0: none begun
    for word in words:
        value = _VALUES[word] if word in _VALUES else int(word) if word.isdecimal() else 0
        if word in _SCALES:
            low = number % 1000 if number > 1000 else number  # of 12,005 hundred: five
            number += (low or 1) * _SCALES[word] - low
        elif number >= 20 and value < (100 if number % 100 == 0 else 10) and number % 10 == 0:
            number += value
        elif not number and re.search(":[2-5]0$", said) and value < 10:
            said = said[:-1] + str(value)  # five forty | five
        elif 1 <= number <= 12 and 10 <= value < 60:
            said, number = f"{said} {number}:{value}", 0
        else:
            said, number = f"{said} {number}" if number else said, value
    return f"{said} {number}".strip() if number or not said else said.strip()


def _time(found: re.Match[str]) -> str:
    """Half past 4, half 4 -> 4:30; quarter to 6 -> 5:45."""
    past, to, hour = found.groups()
    said = (past or to or "half").split()[0]
    minutes = {"half": 30, "quarter": 15}.get(said) or int(said)
    at = 60 * int(hour) + (-minutes if to else minutes)
    return f"{at // 60 % 24}:{at % 60:02}"


def _names(found: re.Match[str]) -> set[str]:
    if found["hour"]:
        hour, minute = int(found["hour"]), int(found["minute"])
        if hour > 24 or minute > 59:  # 3.75, and a score of 30:72
            return {f"{hour + minute / 100:g}"} if "." in found[0] else {str(hour), str(minute)}
        return _clock(hour, minute) | {f"{hour + minute / 100:g}"}  # 4.30 may be a price
    digits = found["whole"].replace(",", "")
    if len(digits) > 15:  # a float does not tell such numbers apart, or cannot hold them
        return {digits + (found["part"] or "")}
    whole = int(digits)
    value = whole + float(found["part"] or 0)
    names = {f"{value:.15g}"} | ({f"{1000 * value:.15g}"} if found["kilo"] else set())
    return names | (_clock(whole, 0) if found["clock"] and whole <= 24 else set())


def _clock(hour: int, minute: int) -> set[str]:
    """What a time of day can be called: 16:00 is 4:00, 4 and 16."""
    hours = {str(hour), str(hour % 12 or 12), str(hour % 12 + 12)} if minute == 0 else set()
    return {f"{hour % 12}:{minute:02}"} | hours
