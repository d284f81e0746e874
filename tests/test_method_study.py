"""The study of methods: which runs it makes, how it resumes, its verdicts and its page.

The runs are made up here, but for one. Their losses are known, so the verdicts are too.
"""

import argparse
import hashlib
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rouge_score")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The scripts, which import each other by bare names."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    names = {"study": "methods", "claims": "methods_claims", "page": "methods_page"}
    yield argparse.Namespace(**{k: importlib.import_module(v) for k, v in names.items()})
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


SETTING = {"weights": "0" * 64, "data": "minichat", "epochs": 3, "steps": 9, "limit": 4}
TRUTH = {  # the best rate by its power of two from the middle, the loss there, what is forgotten
    "LoRA r 8, q/v": (1, 2.00, 0.10), "full fine-tuning": (0, 1.90, 0.50),
    "LoRA r 2, all-linear": (0, 1.95, 0.10), "DoRA r 8, q/v": (0, 2.00, 0.1),
    "PiSSA r 8, q/v": (0, 2.001, 0.1), "LoRA+ r 8, q/v": (-3, 2.002, 0.1),
    "AdaLoRA r 8, q/v": (0, 2.05, 0.1), "prefix of 16": (0, 2.1, 0.0),
    "prefix of 16, no MLP": (0, 2.2, 0.0),
    "prompt of 50": (4, 2.9, 0.0), "LoRA r 4 with a prefix of 8": (0, 2.0, 0.1),
    "LoRA r 64, q/v": (0, 2.0, 0.1), "rsLoRA r 64, q/v": (0, 1.99, 0.1),
}  # fmt: skip


def texts(nats: list[float], tokens: list[int]) -> dict[str, Any]:
    return {"nats": nats, "tokens": tokens}


def kept(more: float) -> dict[str, Any]:
    """The loss on each chat is 1 and more, on each text of prose 2 and more."""
    chat = texts([5 * (1 + more), 15 * (1 + more)], [5, 15])
    return {"chat": chat, "prose": texts([8 * (2 + more)] * 2, [8, 8])}


def made_up(study: Any, job: Any) -> dict[str, Any]:
    """A parabola over the logarithm of the rate, shifted a little by the seed."""
    scores = {"rouge1": [40.0, 50.0, 30.0 + job.seed, 20.0]}

    def tested(loss: float) -> dict[str, Any]:
        """The same loss on the test split: each dialogue's is that of its tokens."""
        tokens = [10, 20, 30, 40]
        return {"test": {"dialogues": texts([n * loss for n in tokens], tokens)}, "scores": scores}

    if job.rate is None:
        found = {"validation_loss": 3.0, "forgotten": kept(0.0)}
        return found | {"wall_minutes": 0.1} | tested(3.0)
    power = math.log2(job.rate / study.METHODS[job.method][1])
    place, loss, lost = TRUTH[job.method]
    if power - place > 2.5:
        return {"validation_loss": None, "failed": "lower --learning-rate", "wall_minutes": 0.1}
    result = {"validation_loss": loss + 0.1 * (power - place) ** 2 + 0.01 * job.seed}
    result |= {"trainable": 1000, "stored": 900, "minutes": 1.0, "peak_gib": 0.5}
    result["wall_minutes"] = 1.0
    if "AdaLoRA" in job.method:
        result["ranks"] = {f"layer{i}": i + job.seed % 2 * (i == 0) for i in range(5)}
    if job.search:
        return result | {"validation_loss": result["validation_loss"] + 0.5}
    more = lost + 0.001 * job.seed
    result |= tested(result["validation_loss"])
    return result | {"forgotten": kept(more)}


@pytest.fixture(scope="module")
def plan(scripts: Any) -> Any:
    return scripts.study.Plan(list(TRUTH), [0, 1, 2], 5, 3)


def conduct(scripts: Any, plan: Any, work: Path, minutes: float = 60) -> tuple[Any, list[Any]]:
    """The study with made-up runs; what is done, and which jobs were started."""
    started: list[Any] = []

    def run(job: Any, *_: Any) -> dict[str, Any]:
        started.append(job)
        return made_up(scripts.study, job)

    options = argparse.Namespace(work=work, minutes=minutes, processes=2, pretraining_data="")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scripts.study, "run", run)
        return scripts.study.study(plan, SETTING, options)[0], started


@pytest.fixture(scope="module")
def result(scripts: Any, plan: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done, _ = conduct(scripts, plan, tmp_path_factory.mktemp("work"))
    study = scripts.study
    base = done[study.Job(study.BASE, None, 0, False)]
    rows = study.collected(plan, done)
    more = {"seeds": [0, 1, 2], "search_steps": 3, "left_out": [], "core_hours": 2.5}
    return json.loads(json.dumps({**SETTING, **more, "base": base, "methods": rows}))


def test_every_method_is_in_the_study(scripts: Any) -> None:
    assert list(TRUTH) == list(scripts.study.METHODS)
    assert {name for claim in scripts.claims.CLAIMS for name in claim.names} <= set(TRUTH)


def test_searches_come_first_then_seeds_then_neighbours(
    scripts: Any, plan: Any, tmp_path: Path
) -> None:
    done, started = conduct(scripts, plan, tmp_path)
    assert len(started) == len(set(started)) == len(done)
    assert started[0].rate is None
    kinds = ["search" if job.search else "all" for job in started[1:]]
    assert kinds.index("all") == kinds.count("search")  # but for the last to finish
    best = {name: scripts.study.METHODS[name][1] * 2.0 ** TRUTH[name][0] for name in TRUTH}
    for name, rate in best.items():
        jobs = [job for job in started if job.method == name]
        searched = sorted(job.rate for job in jobs if job.search)
        assert len(searched) == 5 + max(0, abs(TRUTH[name][0]) - 1)
        assert searched[0] < rate < searched[-1]
        full = sorted((job.rate, job.seed) for job in jobs if not job.search)
        near = [scripts.study.shifted(rate, factor) for factor in (0.5, 1, 2)]
        assert full == [(r, seed) for r in near for seed in (0, 1, 2)]
    places = [started.index(job) for job in started if job.rate and not job.search]
    own = [started[i].rate == pytest.approx(best[started[i].method], rel=1e-2) for i in places]
    assert own == sorted(own, reverse=True)


def test_it_goes_on_where_it_was_stopped(scripts: Any, plan: Any, tmp_path: Path) -> None:
    """A line that was cut off is run again; one of other weights does not count."""
    done, _ = conduct(scripts, plan, tmp_path)
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines()
    other = json.loads(lines[3])
    other["setting"]["weights"] = "1" * 64
    path.write_text("\n".join([*lines[:3], json.dumps(other), *lines[4:-1], lines[-1][:40]]))
    again, started = conduct(scripts, plan, tmp_path)
    assert again == done
    assert {job.method for job in started} == {
        json.loads(lines[i])["job"]["method"] for i in (3, -1)
    }
    assert len(started) == 2
    assert conduct(scripts, plan, tmp_path)[1] == []
    with pytest.MonkeyPatch.context() as patched:  # other flags are another method
        name = "LoRA r 8, q/v"
        patched.setitem(scripts.study.METHODS, name, (["--rank", "9"], 4e-3))
        jobs = conduct(scripts, plan, tmp_path)[1]
    assert {job.method for job in jobs} == {name}


def test_the_rates_of_all_seeds_go_on_where_the_best_is_at_an_end(
    scripts: Any, plan: Any, tmp_path: Path
) -> None:
    """The search, of fewer steps, may point to a rate that is too high."""
    name, study = "LoRA r 8, q/v", scripts.study
    alone = study.Plan([name], [0, 1, 2], 5, 3)
    with pytest.MonkeyPatch.context() as patched:
        real = made_up

        def two_lower(study: Any, job: Any) -> dict[str, Any]:
            there = study.Job(job.method, job.rate and job.rate * 4, job.seed, job.search)
            return real(study, job if job.search else there)

        patched.setattr(sys.modules[__name__], "made_up", two_lower)
        done, _ = conduct(scripts, alone, tmp_path)
    best = alone.chosen(name, done)
    assert best == pytest.approx(2 * study.METHODS[name][1])
    assert alone.final(name, done) == pytest.approx([best / 8, best / 4, best / 2, best, best * 2])
    (row,) = study.collected(alone, done)
    assert scripts.claims.best_rate(row) == pytest.approx(best / 4)


def test_when_the_minutes_are_over_nothing_starts(scripts: Any, plan: Any, tmp_path: Path) -> None:
    done, started = conduct(scripts, plan, tmp_path, minutes=0)
    assert done == {}
    assert started == []
    assert len(list(plan.wanted(done))) == 1 + 5 * len(TRUTH)


def test_a_run_that_would_not_end_in_time_does_not_start(
    scripts: Any, plan: Any, tmp_path: Path
) -> None:
    """The first of its kind does: nobody knows how long it takes. Another call goes on."""
    done, started = conduct(scripts, plan, tmp_path, minutes=0.5)
    assert 2 <= len(started) == len(done) <= 3  # the base, and a search on each process
    again, more = conduct(scripts, plan, tmp_path)
    assert again.items() > done.items()
    assert not {*started} & {*more}


def test_a_run_that_fails_is_left_out_and_stops_no_other(
    scripts: Any, plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, name = scripts.study, "DoRA r 8, q/v"
    bad = study.Job(name, study.METHODS[name][1], 0, True)
    with pytest.MonkeyPatch.context() as patched:
        real = made_up

        def broken(study: Any, job: Any) -> dict[str, Any]:
            if job == bad:
                raise RuntimeError("exit code 1")
            return real(study, job)

        patched.setattr(sys.modules[__name__], "made_up", broken)
        done, _ = conduct(scripts, plan, tmp_path)
    assert f"{bad} failed: exit code 1" in capsys.readouterr().out
    assert bad not in done
    assert not [job for job in done if job.method == name and not job.search]
    assert {job.method for job in done if not job.search} == {study.BASE, *TRUTH} - {name}
    _, started = conduct(scripts, plan, tmp_path)
    assert started[0] == bad
    assert {job.method for job in started} == {name}


EXPECTED = {
    "LoRA is no worse": "does not hold",
    "LoRA's best rate": "holds",  # 2e-3 / 1.25e-4 = 16
    "LoRA in all layers": "holds",
    "DoRA, PiSSA and LoRA+": "holds",
    "None of DoRA": "holds",
    "LoRA learns less": "holds",
    "PiSSA wants": "holds",  # 1e-3 / 8e-3
    "rsLoRA is better": "holds",
    "LoRA+ is better": "does not hold",
    "AdaLoRA moves": "does not hold",
    "A prefix that trains": "holds",
}


def test_the_verdicts_are_those_of_the_made_up_losses(scripts: Any, result: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in result["methods"]}
    found = {claim.text: claim.verdict(rows)[0] for claim in scripts.claims.CLAIMS}
    assert len(found) == len(EXPECTED)
    for start, verdict in EXPECTED.items():
        (said,) = [v for text, v in found.items() if text.startswith(start)]
        assert said == verdict, start
    del rows["full fine-tuning"]
    assert scripts.claims.CLAIMS[0].verdict(rows) == ("not measured", "")


@pytest.mark.parametrize(
    ("values", "below", "alike"),
    [
        ([-0.1, -0.11, -0.12], "holds", "does not hold"),
        ([0.1, 0.11, 0.12], "does not hold", "does not hold"),
        ([-0.1, 0.0, 0.1], "cannot tell", "cannot tell"),
        ([0.001, 0.0, -0.001], "cannot tell", "holds"),
        ([-0.1], "cannot tell", "cannot tell"),  # a single seed says nothing
    ],
)
def test_a_verdict_needs_the_whole_interval(
    scripts: Any, values: list[float], below: str, alike: str
) -> None:
    claims = scripts.claims
    found = claims.interval(values)
    assert claims.below(found, 0) == below
    assert claims.within(found, -claims.MARGIN, claims.MARGIN) == alike


def test_an_interval_covers_seeds_and_dialogues(scripts: Any) -> None:
    """Seeds agree to the last digit; the dialogues do not, and the interval is theirs."""
    rows = []
    for shift in ([0.0, 0.0, 0.0, 0.0], [3.0, -2.0, 1.0, 2.0]):
        nats = [20.0 + x for x in shift]
        run = {"rate": 1e-3, "validation_loss": 2.0}
        run |= {"test": {"dialogues": texts(nats, [10] * 4)}}
        run |= {"forgotten": {"chat": texts(nats, [10] * 4), "prose": texts([7.0, 9.0], [1, 3])}}
        rows.append({"name": "x", "runs": [run | {"seed": seed} for seed in range(3)]})
    mean, low, high = scripts.claims.difference(rows[1], rows[0])
    # of equal counts, the ratio's error is that of a mean: s / sqrt(n), with s^2 = 14 / 3
    half = 1.96 * math.sqrt(14 / 3 / 4) / 10
    assert (mean, low, high) == pytest.approx((0.1, 0.1 - half, 0.1 + half))
    # of two sets the mean; the prose is alike, so half of the chats' error is left
    found = scripts.claims.forgotten(rows[1], rows[0])
    assert found == pytest.approx((0.05, 0.05 - half / 2, 0.05 + half / 2))


def test_the_best_rate_of_a_seed_is_the_parabola_s(scripts: Any) -> None:
    def row(*places: float) -> dict[str, Any]:
        runs = [
            {"rate": 2.0**k, "seed": seed, "validation_loss": 2 + (k - place) ** 2}
            for seed, place in enumerate(places) for k in (-11, -10, -9)
        ]  # fmt: skip
        return {"name": "x", "runs": runs}

    claims = scripts.claims
    assert claims.best_rates(row(-10.3, -9.8)) == pytest.approx({0: -10.3, 1: -9.8})
    assert claims.best_rates(row(-10.3, -8.0)) == pytest.approx({0: -10.3})  # at an end
    found = claims.ratio(row(-10.2, -10.0, -9.8), row(-10.3, -10.0, -9.7))
    assert found == pytest.approx((1.0, 2**-0.2484, 2**0.2484), rel=1e-3)  # 0.1 x 4.303 / sqrt(3)
    verdict = claims.rate_between(0, 1)(row(-8.0), row(-10.0))
    assert verdict == ("cannot tell", "the best rate is at an end of those tried")


@pytest.mark.parametrize("degrees", range(1, 10))
def test_the_interval_is_student_s(scripts: Any, degrees: int) -> None:
    """Of 95%: the density, integrated up to the quantile in small steps, gives 0.475."""
    n, end = degrees, scripts.claims.STUDENT[degrees]
    scale = math.gamma((n + 1) / 2) / math.sqrt(n * math.pi) / math.gamma(n / 2)
    steps = 20_000
    middles = [(i + 0.5) * end / steps for i in range(steps)]
    area = sum(scale * (1 + x * x / n) ** (-(n + 1) / 2) for x in middles) * end / steps
    assert area == pytest.approx(0.475, abs=1e-4)
    values = [float(i * i) for i in range(n + 1)]
    mean = sum(values) / (n + 1)
    error = math.sqrt(sum((x - mean) ** 2 for x in values) / n / (n + 1))
    assert scripts.claims.interval(values) == pytest.approx(
        (mean, mean - end * error, mean + end * error)
    )


def test_the_page_says_what_the_result_says(
    scripts: Any, result: dict[str, Any], tmp_path: Path
) -> None:
    """And README; a page that differs is told, and without a result both are silent."""
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    readme, file = tmp_path / "README.md", tmp_path / "methods.json"
    readme.write_text("# A\n\nB.<!-- study --><!-- end -->\n\nC\n")
    main, docs = scripts.page.main, tmp_path / "docs" / "methods.md"
    assert main(tmp_path, file, check=True) == 0  # no result, no page
    file.write_text(json.dumps(result))
    assert main(tmp_path, file, check=True) == 1
    assert main(tmp_path, file, check=False) == 0
    assert main(tmp_path, file, check=True) == 0
    text, block = docs.read_text(), readme.read_text()
    assert "fine-tunes earlier weights of pocket-bart (SHA-256 0000" in text
    assert "with earlier weights of pocket-bart." in block
    assert "2.5 hours of a core" in text
    row = "| LoRA r 8, q/v | 1,000 | 900 | 5, 0.0005 to 0.008 | 0.004 | 3 | 2.010 [1.985, 2.035] |"
    assert f"{row} 2.010 [1.985, 2.035] |" in text
    assert text.count("| holds |") + text.count("| does not hold |") == len(EXPECTED)
    assert "0.101 [0.099, 0.103]" in text  # forgotten
    assert block.count("\n") == 5 + 1 + 5
    assert "full fine-tuning 1.910" in block
    assert "that hold here: 8, that do not: 3, undecided: 0." in block
    for name in ("methods-rates.svg", "methods-forgetting.svg"):
        assert (tmp_path / "docs" / name).read_text().startswith("<?xml")
    docs.write_text(text.replace("2.010", "2.009"))
    assert main(tmp_path, file, check=True) == 1
    shipped = hashlib.sha256(scripts.study.WEIGHTS.read_bytes()).hexdigest()
    assert "fine-tunes pocket-bart (SHA-256" in scripts.page.page(result | {"weights": shipped})
    searched = [row | {"runs": []} for row in result["methods"]]
    file.write_text(json.dumps(result | {"methods": searched}))  # no run of all steps yet
    assert main(tmp_path, file, check=False) == 0
    assert not docs.exists()
    assert readme.read_text() == "# A\n\nB.<!-- study --><!-- end -->\n\nC\n"


def test_the_repository_s_page_is_that_of_its_result(scripts: Any) -> None:
    """Of the weights that the package holds."""
    page = scripts.page
    assert page.main(ROOT, page.RESULT, check=True) == 0
    if page.RESULT.exists():
        weights = hashlib.sha256(scripts.study.WEIGHTS.read_bytes()).hexdigest()
        assert json.loads(page.RESULT.read_text())["weights"] == weights


@pytest.mark.slow
def test_a_run_measures_what_it_should(scripts: Any, tmp_path: Path) -> None:
    study = scripts.study
    setting = SETTING | {"steps": 3, "limit": 2}
    name = "AdaLoRA r 8, q/v"
    found = study.run(study.Job(name, 3.2e-2, 1, False), setting, tmp_path, None)
    assert 1 < found["validation_loss"] < 6
    assert {len(scores) for scores in found["scores"].values()} == {2}
    assert {len(values) for values in found["test"]["dialogues"].values()} == {2}
    assert 1 < scripts.claims.mean_loss(found["test"]) < 6
    assert sum(found["ranks"].values()) == 8 * 22
    assert found["stored"] == found["trainable"]  # the ranks it took are in the file too
    assert found["peak_gib"] > 0.1
    assert "forgotten" not in found
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".txt"]  # no weights are left
