"""The table of a data set on docs/pocket-bart.md, from ladder_NAME.json and reading_NAME.json."""

from typing import Any

DATA = ("bookings", "minichat", "minichat-hard", "samsum")
NONSENSE = {
    "foreign_names": "invented names",
    "foreign_numbers": "invented numbers",
    "non_words": "non-words",
    "repeats": "repeats",
}
READ = {"readable": "readable", "right_or_in_part": "right in part or all", "right": "right in all"}
SIDES = {"base": "base", "LoRA r 8": "finetuned", "reference": "reference"}  # that were read
Result = dict[str, Any]


def cell(interval: list[float] | None, form: str = ".1f") -> str:
    """A mean with its 95% interval; empty if there is none."""
    if interval is None:
        return ""
    mean, low, high = (f"{value:{form}}" for value in interval)
    return f"{mean} [{low}, {high}]"


def table(result: Result, reading: Result | None) -> list[list[str]]:
    """One row a contestant; the reading's columns only if it counts."""
    valid = reading if reading and why_not(result, reading) is None else None
    head = [f"{result['n']} test dialogues of {result['data']}", "trained", "ROUGE-1", "gain"]
    head += NONSENSE.values()
    head += [f"{title}, of {valid['n']}" for title in READ.values()] if valid else []
    rows = [head]
    lead = f"the first {result['turns']} turns, copied"
    sides = {"base": result["base"]} | {row["name"]: row for row in result["rows"]}
    sides |= {lead: result["lead"], "reference": result["reference"]}
    for name, row in sides.items():
        found = row["intervals"]
        gain = cell(row.get("gain", {}).get("rouge1"), "+.1f")
        figures = [f"{row['trainable']:,}" if "trainable" in row else "", cell(found.get("rouge1"))]
        figures += [gain, *(cell(found[key]) for key in NONSENSE)]
        if valid:
            side = valid["results"].get(SIDES.get(name, ""), {})
            figures += [str(side.get(key, "")) for key in READ]
        rows.append(["pocket-bart as it ships" if name == "base" else name, *figures])
    return rows


def note(result: Result, reading: Result | None) -> str:
    """Below the table: what LoRA reaches, and the reading."""
    loras = [row for row in result["rows"] if row["name"].startswith("LoRA")]
    parts = [
        f"{row['name']} minus the first turns, copied: {cell(row['lead'], '+.1f')} points."
        for row in loras
        if row["name"] == "LoRA r 8"
    ]
    known = {row["name"]: row["share_of_full"] for row in loras if "share_of_full" in row}
    if shares := [f"{name} {cell(share, '.0%')}" for name, share in known.items() if share]:
        parts.append(f"Share of full fine-tuning's gain: {'; '.join(shares)}.")
    elif known:
        parts.append("Full fine-tuning's gain may be zero, so no share of it is given.")
    return " ".join([*parts, sentence(result, reading)])


def why_not(result: Result, reading: Result) -> str | None:
    """Why a reading is no result; None if it is one."""
    settings = reading["settings"]
    if settings["weights"] != result["weights"]:
        return "is of other weights"
    if settings["split"] != "test":
        return f"is a draft, of the {settings['split']} split"
    if reading["void"]:
        right = reading["results"]["reference"]["right"]
        return f"is void: only {right} of the {reading['n']} references were found right in all"
    return None


def sentence(result: Result, reading: Result | None) -> str:
    """What is told of the reading."""
    if result["data"] == "samsum":
        return "Not read: SAMSum's licence does not allow sheets with its dialogues."
    if reading is None:
        texts = f"build/pocket/evaluation_{result['data']}.json"
        return f"Not read yet: `python benchmarks/reading.py sheet {texts}`."
    first, second = reading["settings"]["readers"]
    told = f"The blind reading of {reading['n']} dialogues by {first} and by {second}"
    if why := why_not(result, reading):
        return f"{told} {why}."
    says = []
    for title, row in reading["agreement"].items():
        kappa = "" if row["kappa"] is None else f" (Cohen's kappa {row['kappa']:.2f})"
        says.append(f"{row['agreed']:.0%}{kappa} of the summaries on whether they are {title}")
    return f"{told} counts what both say. They agree about {' and '.join(says)}."
