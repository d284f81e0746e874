"""Say a rule-made summary of a service chat in other words.

The summaries of SGD, MultiWOZ and STAR follow a few templates, and the embedded data `bookings` has
some of them. Pre-training must not learn that wording, so each sentence is written anew here, and a
sentence that no rule knows is left out. The facts stay: who, what, where, when, how many.
"""

import re

import numpy as np

ANSWER = r"(?:suggests|finds|recommends)"
# The start of a sentence with the subject in group 1, and what it may become.
SENTENCES: list[tuple[str, list[str]]] = [
    (r"^(\S+) (?:is looking for|wants to find|needs|also needs|is also looking for) (?=an? |some )",
     [r"\1 asks for ", r"\1 would like ", r"\1 tries to get "]),
    (r"^(\S+) (?:wants to (?:see|watch)|also wants to watch) ", [r"\1 would like to see ", r"\1 is in the mood for "]),
    (r"^(\S+) wants to hear ", [r"\1 feels like ", r"\1 asks for "]),
    (r"^(\S+) (?:also )?wants to visit ", [r"\1 would like to go to ", r"\1 plans to see "]),
    (r"^(\S+) wants to rent ", [r"\1 asks for ", r"\1 would like to drive "]),
    (r"^(\S+) (?:wants|would like) to (?:book|reserve) ", [r"\1 tries to get ", r"\1 asks for "]),
    (r"^(\S+) (?:reserves|books) (a table for \w+ )(.*) for (\S+)\.$", [r"\4 gets \2\3 with \1's help.", r"\1 keeps \2free for \4 \3."]),
    (r"^(\S+) (?:reserves|books|will have) (a table for \w+) ", [r"\1 gets \2 ", r"\1 is going to eat out with \2 "]),
    (r"^(\S+) (?:reserves|books) (\w+ rooms? at |a house )(.*) for ([A-Z]\S+)\.$", [r"\1 arranges \2\3, where \4 will stay.", r"\4 will stay in \2\3, which \1 arranges."]),
    (r"^(\S+) (?:reserves|books) (?=\w+ rooms? at |a house )", [r"\1 takes ", r"\1 is going to stay in "]),
    (r"^(\S+) gets (\S+) (\w+) tickets? for ", [r"\2 can go to the event with \3 seats from \1: ", r"\1 obtains \3 seats on behalf of \2 at "]),
    (r"^(\S+) buys (\w+) tickets? for ", [r"\1 pays for \2 seats at ", r"\1 is going to see, with \2 seats, "]),
    (r"^(\S+) (?:buys|books) (\w+) (bus|train) tickets? from (.*) for ([A-Z]\S+)\.$", [r"\5 will go by \3 from \4, \2 in all, as \1 arranges."]),
    (r"^(\S+) (?:buys|books) (\w+) (bus|train) tickets? from ", [r"\1 will travel by \3, \2 in all, from ", r"\1 takes \2 seats on the \3 from "]),
    (r"^(\S+) books an? (.*?) flight ", [r"\1 is going to fly with \2 ", r"\1 takes \2 "]),
    (r"^(\S+) (?:has|makes|books) an appointment (with|at) ", [r"\1 is going to be seen \2 ", r"\1 gets a time \2 "]),
    (r"^(\S+) can't make an appointment ", [r"\1 gets no time ", r"There is no time for \1 "]),
    (r"^(\S+) can't (?:book|reserve) ", [r"\1 does not get ", r"\1 tries in vain to get "]),
    (r"^(\S+) rents an? ", [r"\1 hires a ", r"\1 will drive a "]),
    (r"^(\S+) asks about the weather ", [r"\1 wants to know how the weather will be ", r"\1 wonders about the forecast "]),
    (r"^It will be about (\S+) degrees with an? (\S+) percent chance of rain", [r"\1 degrees are expected, and rain with \2 percent", r"The forecast says \1 degrees and \2 percent risk of rain"]),
    (r"^(\S+) asks about free time (.*?) and is free ", [r"\1 looks up the calendar \2: there is nothing planned ", r"\1 has time \2, namely "]),
    (r"^(\S+) asks about free time ", [r"\1 looks for a gap in the calendar "]),
    (r"^(\S+) asks about the plans ", [r"\1 wants to know what is planned ", r"\1 looks up the appointments "]),
    (r"^(\S+) checks the balance of the (\w+) account, which is (\S+)\.$", [r"\1 has \3 in the \2 account.", r"There are \3 in \1's \2 account."]),
    (r"^(\S+) (?:schedules a visit to|will visit) ", [r"\1 is going to look at ", r"\1 will go and see "]),
    (r"^(\S+) asks about (.*?), which takes place ", [r"\1 wants to know more about \2. It is ", r"\1 hears that \2 is "]),
    (r"^(\S+) (?:also )?asks about ", [r"\1 wants to know about ", r"\1 inquires about "]),
    (r"^(\S+) asks when (.*?) is playing ", [r"\1 would like to see \2 ", r"\1 wants to know the times of \2 "]),
    (r"^(\S+) plays ", [r"\1 puts on ", r"\1 starts "]),
    (r"^(\S+) (?:orders|books) (?:a (\w+) ride|a ride) to (.*?) for (\w+ )(?:people|person)", [r"\1 calls a cab to \3, \4in all", r"A driver takes \1 to \3, \4in all"]),
    (r"^(\S+) books (\S+) (?:a (\w+) ride|a ride) to (.*?) for (\w+ )(?:people|person)", [r"\1 calls a cab that takes \2 to \4, \5in all", r"\2 gets a driver to \4 from \1, \5in all"]),
    (r"^(\S+) transfers (.*?) to ", [r"\1 sends \2 to ", r"\1 pays \2 to "]),
    (r"^(\S+) adds (.*?) to the calendar ", [r"\1 writes down \2 ", r"\1 notes \2 "]),
    (r"^(\S+) shares the location with ", [r"\1 shows where to find it to "]),
    (r"^(\S+) (?:suggests|recommends|finds) ", [r"\1 offers ", r"\1 names ", r"\1's answer is "]),
    (r"^(\S+) would like to (?:RSVP to|come to) ", [r"\1 accepts an invitation to "]),
    (r"^(\S+) would like to ", [r"\1 intends to ", r"\1 asks to "]),
    (r"^(\S+) wants to ", [r"\1 asks to ", r"\1 hopes to "]),
    (r"^(\S+) wants ", [r"\1 asks for "]),
    (r"^(\S+) will be arriving ", [r"\1 comes "]),
    (r"^(\S+) has had ", [r"\1 suffers from "]),
]  # fmt: skip
# Inside a sentence.
PHRASES: list[tuple[str, list[str]]] = [
    (rf", and (\S+) {ANSWER} one leaving at ", [r". \1 knows one at ", r". \1 offers it at "]),
    (rf", and (\S+) {ANSWER} (.*?) flight leaving at ", [r". \1 offers \2 at ", r". \1 has one of \2 at "]),
    (rf", and (\S+) {ANSWER} a showing at (.*?) at ", [r". \1 says that it starts at \2 in ", r". It starts at \2 in "]),
    (rf", and (\S+) {ANSWER} ", [r". \1 offers ", r". \1 names ", r". \1's idea is "]),
    (r", but there is no (?:table|room)s? available", [", but all is taken", ", but it is full"]),
    (r", and (\S+) orders it", [r", and \1 calls one", r", which \1 arranges"]),
    (r", picking it up at ", [", from "]),
    (r", which takes place ", [", "]),
]  # fmt: skip
# Words of `bookings` that may not be left.
FORBIDDEN = re.compile(
    r"\b(?:looking for|wants to (?:find|rent|book)|to rent|tickets? (?:for|from)|books|reserves|rents|"
    r"suggests|finds|recommends)\b"
)
STOP = re.compile(r"(?<=[\w.)'][.!?]) (?=[A-Z\ue000-\ue02f])")


def reword(summary: str, rng: np.random.Generator) -> str:
    """The summary in other words; empty if the rules know none of its sentences."""

    def choose(options: list[str]) -> str:
        return options[int(rng.integers(len(options)))]

    kept: list[str] = []
    for sentence in STOP.split(summary):
        for pattern, options in SENTENCES:
            said, found = re.subn(pattern, choose(options), sentence, count=1)
            if found:
                break
        else:
            continue
        for pattern, options in PHRASES:
            said = re.sub(pattern, choose(options), said)
        if not FORBIDDEN.search(said):
            kept.append(said)
    return " ".join(kept)
