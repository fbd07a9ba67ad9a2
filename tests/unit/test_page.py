"""The page of a verification: what it says, that it stands alone, and that nothing in a report can break it."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from xml.etree import ElementTree

import matplotlib
import pytest

from mnist_dist.results.page import printable
from mnist_dist.results.png import TRAIN_COLOR, VALIDATION_COLOR
from mnist_dist.results.quantities import bytes_text, digits, seconds_text
from mnist_dist.results.svg import create_page_figure, to_svg
from mnist_dist.verify.page import build_page
from mnist_dist.verify.report import CheckResult, RankFacts, Report, Suspect, judge

NAMES = (
    *("environment", "detectors", "identity", "collectives", "data", "cross_examination", "exact", "fast"),
    *("learning", "precision", "interruption", "slow_rank", "scaling", "reference"),
)
HOSTILE = "</title></style><script>alert('a')</script>\"&amp;\x00\x1b[31m\ud800\u202e$x_{$"


def create_transfers(replicas: int) -> list[dict]:
    transfers = []
    for collective, factor in (("all_reduce", 1.0), ("all_gather", 1.4), ("broadcast", 1.9)):
        for num_bytes in (4 * 4**i for i in range(12)):
            seconds = (38e-6 + num_bytes / 2.1e9) * (1 + 0.1 * random.random()) / factor
            moved = num_bytes / seconds / 1e9 * (2 * (replicas - 1) / replicas)
            transfers.append({"collective": collective, "bytes": num_bytes, "seconds": seconds, "bus_gb_per_s": moved})
    return transfers


def create_numbers(precision: str) -> list[dict]:
    numbers = []
    for name, mean, width in (
        ("log loss, epoch 1", -0.3437, 0.0081),
        ("log loss, epoch 2", -1.0942, 0.0123),
        ("log loss, epoch 3", -1.3318, 0.0141),
        ("log validation loss", -1.7841, 0.0312),
        ("logit validation accuracy", 2.8812, 0.0402),
    ):
        deviations = random.uniform(-2.5, 2.5)
        name = name if precision == "float32" else f"{name}, paired"
        values = {"mean": mean, "low": mean - 4.1 * width, "high": mean + 4.1 * width}
        numbers.append({"name": name, "value": mean + deviations * width, **values, "deviations": deviations})
    return numbers


def create_details(replicas: int) -> dict[str, dict]:
    losses = [2.31 * 0.9**i + 0.02 * random.random() for i in range(25)]
    per_rank = [49500 // replicas + (rank < 49500 % replicas) for rank in range(replicas)]
    shards = [f"{shard:064x}" for shard in range(8)]
    rounds = [[[0.0412 + 0.003 * random.random() for _ in range(6)] for _ in range(replicas)] for _ in range(2)]
    counts = sorted({1, 2, replicas // 2 or 1, replicas})
    points = [
        {"kind": kind, "replicas": n, "images_per_s": 12000 * n * loss**n, "efficiency": loss**n / loss}
        for kind, loss in (("strong", 0.95 ** (2 / replicas)), ("weak", 0.98 ** (2 / replicas)))
        for n in counts
    ]
    return {
        "detectors": {"faults_put_in": 13, "faults_caught": 13},
        "collectives": {"transfers": create_transfers(replicas)},
        "data": {"examples": 49500, "exactly_once": 49500, "per_rank": per_rank},
        "cross_examination": {"shards": 8, "digests": [shards] * replicas, "repeats_equal": [True] * replicas},
        "exact": {
            "runs": [
                {"optimizer": name, "losses": losses, "reference_losses": losses, "first_difference": None}
                for name in ("sgd", "adam")
            ]
        },
        "fast": {"distance": 3.1e-6, "noise": [2e-6 + 2e-6 * random.random() for _ in range(8)], "limit": 2.4e-5},
        "learning": {
            "numbers": create_numbers("float32"),
            "history": [
                {"epoch": i, "loss": 0.7 / i, "val_loss": 0.3 / i, "val_accuracy": 0.9 + 0.02 * i} for i in (1, 2, 3)
            ],
        },
        "precision": {
            "numbers": create_numbers("mixed"),
            "overflow": {"skipped_on": [True] * replicas, "scale_before": 32768.0, "scale_after": 16384.0},
        },
        "interruption": {"write_s": 0.0312, "read_s": 0.0094, "bytes": 4_912_000},
        "slow_rank": {"rounds": rounds, "slowest_ratio": 1.04, "limit": 1.33},
        "scaling": {"points": points, "compute_s": 0.0412, "communication_s": 0.0061},
        "reference": {"compared": [], "not_comparable": "no reference was given"},
    }


SUMMARIES = {
    "environment": "All ranks run the same code, packages and configuration; no warning.",
    "detectors": "13 faults were put in, and all 13 were caught with the right rank.",
    "identity": "Configuration, code, data, initial weights and slots are the same on all ranks.",
    "collectives": "Every element of 36 transfers is exact.",
    "data": "Each of 49,500 examples is seen exactly once, with its label.",
    "cross_examination": "All replicas compute the same gradients, and the same when asked twice.",
    "exact": "25 steps of SGD and of Adam equal those of one replica, bit by bit.",
    "fast": "The weights are as near to those of one replica as rounding allows.",
    "learning": "5 of 5 numbers of 3 epochs are inside the band.",
    "precision": "5 of 5 numbers are inside the paired band; an overflow skips the step on all replicas.",
    "interruption": "A checkpoint is read back to the same bits; a flipped byte and a truncation are refused.",
    "slow_rank": "The slowest replica takes 1.04 times as long as the fastest; the limit is 1.33.",
    "scaling": "2 replicas are 1.83 times as fast as one: an efficiency of 91 %.",
    "reference": "Not asked for: reference=FILE compares with an earlier verify.json.",
}
SECONDS = (1.8, 4.2, 0.3, 6.1, 5.2, 9.8, 14.1, 8.7, 31.5, 19.9, 3.3, 9.2, 11.8, 0.0)


def create_report(replicas: int = 2, *, statuses: dict[str, str] | None = None, **changes) -> Report:
    random.seed(7)
    details = create_details(replicas)
    status_of = dict.fromkeys(NAMES, "pass") | {"scaling": "info", "reference": "skipped"} | (statuses or {})
    checks = tuple(
        CheckResult(i, name, status_of[name], SUMMARIES[name], SECONDS[i], details=details.get(name, {}))
        for i, name in enumerate(NAMES)
    )
    ranks = tuple(
        RankFacts(
            rank,
            f"node{rank // 8 + 1:03d}",
            (f"GPU:{rank % 8}",),
            (f"GPU-5b1e77c2-90{rank:03d}-4c6e-b1f7-0d93f2a6c81e",),
            "AMD EPYC 9654 96-Core Processor",
            24,
        )
        for rank in range(replicas)
    )
    report = Report(
        verdict=judge(checks),
        started="2026-03-02T14:05:12.482133+01:00",
        seconds=118.4,
        command="python -m mnist_dist.verify data.path=/shared/mnist.npz strategy=horovod",
        strategy="horovod",
        num_replicas=replicas,
        dataset={
            "name": "mnist",
            "sha256": "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
            "num_train": 49500,
        },
        configuration={
            "data": {"path": "/shared/mnist.npz", "validation_fraction": 0.1},
            "model": {"name": "mlp", "hidden": [512, 512], "dropout": 0.2},
            "optimizer": {"name": "adam", "learning_rate": 0.001},
            "trainer": {"epochs": 3, "batch_size": 128, "precision": "float32", "reproducibility": "exact", "seed": 0},
            "strategy": "horovod",
            "resume": True,
            "plots": {"reference": None},
        },
        versions={
            "mnist_dist": "0.5.0",
            "python": "3.11.7",
            "tensorflow": "2.21.0",
            "keras": "3.15.0",
            "numpy": "2.3.1",
            "horovod": "0.28.1",
        },
        ranks=ranks,
        checks=checks,
    )
    return replace(report, **changes)


def change_check(report: Report, name: str, **changes) -> Report:
    checks = tuple(replace(check, **changes) if check.name == name else check for check in report.checks)
    return replace(report, checks=checks, verdict=judge(checks))


def create_failed() -> Report:
    """Four replicas, of which one computes wrongly."""
    report = create_report(4)
    shards = report.checks[5].details["digests"][0]
    wrong = [*shards[:3], "f" * 64, *shards[4:]]
    uuid = report.ranks[2].gpus[0]
    report = change_check(
        report,
        "cross_examination",
        status="fail",
        summary="Replica 2 computes shard 3 unlike the other three.",
        suspects=(Suspect(2, "node001", "cross_examination", "Its gradient of shard 3 differs.", uuid),),
        details={"shards": 8, "digests": [shards, shards, wrong, shards], "repeats_equal": [True, True, False, True]},
    )
    adam = report.checks[6].details["runs"][1]
    later = [loss * 1.2 for loss in adam["losses"][8:]]
    sgd = {**adam, "optimizer": "sgd", "losses": adam["losses"][:8] + later, "first_difference": 9}
    report = change_check(report, "exact", status="fail", summary="SGD differs.", details={"runs": [sgd, adam]})
    noise = report.checks[7].details["noise"]
    details = {"distance": 9.3e-4, "noise": noise, "limit": 2.4e-5}
    report = change_check(report, "fast", status="fail", summary="Too far away.", details=details)
    times = (("step", 1.18), ("all-reduce of 16 MiB", 1.31), ("epoch", 1.05), ("checkpoint", 0.82))
    compared = [{"name": name, "ratio": ratio, "limit": 1.1} for name, ratio in times]
    details = {"compared": compared, "not_comparable": None}
    return change_check(report, "reference", status="degraded", summary="Slower than before.", details=details)


def create_degraded() -> Report:
    report = create_report(8)
    rounds = [
        [[t * 1.7 if i == 5 else t for t in own] for i, own in enumerate(r)]
        for r in report.checks[11].details["rounds"]
    ]
    return change_check(
        report,
        "slow_rank",
        status="degraded",
        summary="Replica 5 takes 1.71 times as long as the fastest.",
        suspects=(Suspect(5, "node001", "slow_rank", "1.71 and 1.70 times the time of the fastest."),),
        details={"rounds": rounds, "slowest_ratio": 1.71, "limit": 1.33},
    )


def create_hostile() -> Report:
    report = create_failed()
    ranks = tuple(
        replace(rank, host=HOSTILE, devices=(HOSTILE,), gpus=(HOSTILE,), cpu=HOSTILE) for rank in report.ranks
    )
    suspect = Suspect(2, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    checks = tuple(
        replace(check, name=HOSTILE, summary=HOSTILE, suspects=(suspect,), details=spoil(check.details))
        for check in report.checks
    )
    changes = {
        "configuration": {HOSTILE: {HOSTILE: HOSTILE}},
        "versions": {HOSTILE: HOSTILE},
        "dataset": {"name": HOSTILE},
    }
    texts = {"command": HOSTILE, "strategy": HOSTILE, "started": HOSTILE}
    return replace(report, ranks=ranks, checks=checks, **texts, **changes)


def spoil(value):
    """All texts in it replaced by a hostile one, and one more value with such a key."""
    if isinstance(value, dict):
        return {key: spoil(part) for key, part in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [spoil(part) for part in value]
    return HOSTILE if isinstance(value, str) else value


REPORTS = {
    "pass": create_report,
    "one replica": lambda: create_report(1),
    "512 replicas": lambda: create_report(512),
    "failed": create_failed,
    "degraded": create_degraded,
    "skipped": lambda: create_report(statuses=dict.fromkeys(NAMES, "skipped")),
    "no details": lambda: replace(
        create_report(), checks=tuple(replace(check, details={}) for check in create_report().checks)
    ),
    "no checks": lambda: replace(create_report(), checks=(), ranks=(), versions={}, configuration={}, dataset={}),
    "hostile": create_hostile,
}


def parse(page: str) -> ElementTree.Element:
    """The page as XML, which HTML like this one is too."""
    return ElementTree.fromstring(page)


def get_text(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def get_section(root: ElementTree.Element, name: str) -> ElementTree.Element:
    found = root.find(f".//section[@id='{name}']")
    assert found is not None, name
    return found


def get_lead(report: Report) -> str:
    lead = parse(build_page(report)).find(".//p[@class='lead']")
    assert lead is not None
    return get_text(lead)


class Balance(HTMLParser):
    """What an HTML parser sees: elements that are open, and those it met."""

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], Counter()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags[tag] += 1

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# The page as a file


@pytest.fixture(params=REPORTS)
def page(request) -> str:
    return build_page(REPORTS[request.param]())


def test_well_formed(page):
    assert page.encode("utf-8")
    parse(page)
    balance = Balance()
    balance.feed(page)
    balance.close()
    assert balance.open == []
    assert balance.tags["section"] >= 3
    assert balance.tags["script"] == balance.tags["iframe"] == balance.tags["img"] == balance.tags["object"] == 0


def test_stands_alone(page):
    for element in parse(page).iter():
        for key, value in element.attrib.items():
            assert not key.startswith("on"), "no script"
            if key in ("src", "href", "srcset", "data", "action"):
                assert value.startswith("#") or value == "data:,", f"{key}={value}"
            assert not re.search(r"url\((?!#)", value), f"{key}={value}"
    style = parse(page).find(".//style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    assert "http:" not in page
    assert "https:" not in page


def test_ids_are_unique_and_links_lead_somewhere(page):
    root = parse(page)
    ids = Counter(element.get("id") for element in root.iter() if element.get("id"))
    assert not [name for name, count in ids.items() if count > 1]
    for element in root.iter():
        for value in element.attrib.values():
            for name in re.findall(r"url\(#(.*?)\)", value):
                assert name in ids
        if element.get("href", "").startswith("#"):
            assert element.get("href")[1:] in ids
        if element.get("aria-labelledby"):
            assert element.get("aria-labelledby") in ids


def test_pictures_have_titles(page):
    for picture in parse(page).iter("svg"):
        assert picture.get("role") == "img"
        assert get_text(picture.find("title"))


@pytest.mark.parametrize(("name", "most"), [("pass", 200_000), ("failed", 200_000), ("512 replicas", 600_000)])
def test_size(name, most):
    assert len(build_page(REPORTS[name]()).encode()) < most


def test_same_report_same_page():
    expected = build_page(create_failed())
    assert build_page(Report.from_json(create_failed().to_json())) == expected
    # The user's own settings do not count.
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "lines.linewidth": 9, "axes.grid": True}):
        assert build_page(create_failed()) == expected


def test_hostile_texts_are_shown_as_they_are():
    root = parse(build_page(create_hostile()))
    shown = " ".join(printable(HOSTILE).split())
    for name in ("suspects", "checks", "ranks", "run"):
        assert shown in get_text(get_section(root, name)), name
    assert not list(root.iter("script"))
    assert "Not shown here" not in get_text(root)


# What it says


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scaling": "pass", "reference": "pass"}, "All 14 checks passed in 118 s on 2 replicas."),
        ({"reference": "info"}, "12 checks passed and 2 only measured, in 118 s on 2 replicas."),
        ({}, "1 check is skipped. 12 checks passed and 1 only measured, in 118 s on 2 replicas."),
        (
            {"fast": "inconclusive", "slow_rank": "inconclusive"},
            "2 checks are inconclusive and 1 check is skipped. "
            "10 checks passed and 1 only measured, in 118 s on 2 replicas.",
        ),
        (
            {"data": "fail"},
            "1 check is skipped. Check 4, data, failed: Each of 49,500 examples is seen exactly once, with its label.",
        ),
        (
            {"slow_rank": "degraded", "precision": "fail", "data": "inconclusive", "reference": "pass"},
            "1 check is inconclusive. Check 9, precision, failed: 5 of 5 numbers are inside the paired band; an "
            "overflow skips the step on all replicas. 1 more check failed or found it degraded.",
        ),
        (dict.fromkeys(NAMES, "skipped"), "14 checks are skipped. Nothing was tested in 118 s on 2 replicas."),
    ],
)
def test_sentence(changes, expected):
    assert get_lead(create_report(statuses=changes)) == expected


@pytest.mark.parametrize(
    ("name", "verdict", "tone"),
    [
        ("pass", "PASS", "good"),
        ("failed", "FAIL", "bad"),
        ("degraded", "DEGRADED", "warn"),
        ("skipped", "PASS", "quiet"),  # nothing was tried: no reason for green
        ("no checks", "PASS", "quiet"),
    ],
)
def test_verdict(name, verdict, tone):
    root = parse(build_page(REPORTS[name]()))
    assert get_text(root.find(".//h1")) == verdict
    assert root.find(f".//div[@class='headline {tone}']") is not None
    assert get_text(root.find(".//title")).startswith(f"{verdict}: ")


def test_every_check_has_a_line_with_its_status_in_words():
    statuses = ("pass", "fail", "degraded", "inconclusive", "info", "skipped")
    report = create_report(statuses=dict(zip(NAMES, statuses * 3, strict=False)))
    lines = parse(build_page(report)).findall(".//ol[@class='checks']/li")
    assert len(lines) == 14
    signs = {}
    for line, check in zip(lines, report.checks, strict=True):
        sign, word = get_text(line.find(".//span[@class='status']")).split()
        assert word == check.status
        signs[word] = sign
        assert get_text(line.find("span[@class='number']")) == str(check.number)
        assert get_text(line.find("span[@class='summary']")) == check.summary
    assert len(set(signs.values())) == len(statuses)


def test_the_longest_check_has_the_longest_bar():
    lines = parse(build_page(create_report())).findall(".//ol[@class='checks']/li")
    widths = {}
    for line in lines:
        bar = line.find(".//span[@class='bar']/span")
        widths[get_text(line.find("span[@class='name']"))] = bar.get("style") if bar is not None else None
    assert widths["Learning"] == "width: 100.0%"
    assert widths["Detectors"] == "width: 13.3%"
    assert widths["Reference"] is None


def test_suspects():
    root = parse(build_page(create_failed()))
    (row,) = get_section(root, "suspects").findall(".//tbody/tr")
    uuid = "GPU-5b1e77c2-90002-4c6e-b1f7-0d93f2a6c81e"
    assert [get_text(cell) for cell in row] == [
        "2",
        "node001",
        uuid,
        "Cross examination",
        "Its gradient of shard 3 differs.",
    ]
    assert parse(build_page(create_report())).find(".//section[@id='suspects']") is None


def test_many_suspects_are_folded():
    suspects = tuple(Suspect(rank, f"node{rank}", "identity", "Other weights.") for rank in range(40))
    section = get_section(parse(build_page(change_check(create_report(64), "identity", suspects=suspects))), "suspects")
    assert get_text(section.find(".//summary")) == "24 more suspects"
    assert len(section.findall(".//tbody/tr")) == 40
    assert len(section.findall("./div/table/tbody/tr")) == 16


def test_many_ranks_are_folded():
    section = get_section(parse(build_page(create_report(512))), "ranks")
    assert get_text(section.find("./details/summary")) == "512 ranks on 64 hosts"
    assert len(section.findall("./details//tbody/tr")) == 512
    few = get_section(parse(build_page(create_report(16))), "ranks")
    assert few.find("details") is None
    assert len(few.findall(".//tbody/tr")) == 16


def test_configuration_as_it_is_written():
    (entries,) = get_section(parse(build_page(create_report())), "run").findall(".//dl[@class='many']")
    settings = {get_text(entry[0]): get_text(entry[1]) for entry in entries}
    assert settings["trainer.epochs"] == "3"
    assert settings["resume"] == "true"
    assert settings["plots.reference"] == "null"
    assert settings["model.hidden"] == "[512, 512]"


# What the checks measured


def get_evidence(details: dict, number: int = 3) -> ElementTree.Element | None:
    check = CheckResult(number, "check", "pass", "Fine.", details=details)
    root = parse(build_page(replace(create_report(), checks=(check,))))
    return root.find(f".//section[@id='check-{number}']")


def test_each_check_has_its_pictures():
    root = parse(build_page(create_failed()))
    expected = {3: 1, 4: 0, 6: 2, 7: 1, 8: 1, 9: 1, 10: 0, 11: 1, 12: 2, 13: 1}
    for number, pictures in expected.items():
        assert len(list(get_section(root, f"check-{number}").iter("svg"))) == pictures, number
    assert root.find(".//section[@id='check-0']") is None, "no details, no section"


ALL_DETAILS = [(name, key) for name, details in create_details(2).items() for key in details]


@pytest.mark.parametrize(("name", "key"), ALL_DETAILS)
def test_any_key_may_be_absent(name, key):
    details = create_details(2)[name]
    del details[key]
    section = get_evidence(details)
    assert section is None or "Not shown here" not in get_text(section)


@pytest.mark.parametrize(("name", "key"), ALL_DETAILS)
@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 0, [None], [{}], [[]], [[[]]], [[None, 1.0]], True])
def test_no_value_is_too_strange_for_a_page(name, key, value):
    get_evidence({**create_details(2)[name], key: value})


def test_a_part_that_cannot_be_shown_is_named():
    section = get_evidence(
        {**create_details(2)["fast"], "noise": [None], "write_s": 0.5, "read_s": 0.25, "bytes": 4000}
    )
    assert "Not shown here, see verify.json: distance, limit, noise." in get_text(section)
    assert "Write500 msRead250 msCheckpoint4 kB" in get_text(section), "the others are"


def get_odd_cells(section: ElementTree.Element) -> set[tuple[int, int]]:
    rows = section.findall(".//tbody/tr")
    return {
        (int(get_text(row[0])), column)
        for row in rows
        for column, cell in enumerate(row[1:])
        if cell.get("class") == "cell bad"
    }


def test_cross_examination_marks_the_minority():
    section = get_section(parse(build_page(create_failed())), "check-5")
    assert get_odd_cells(section) == {(2, 3), (2, 8)}
    # Of two nobody knows which one is right.
    assert get_odd_cells(get_evidence({"digests": [["a", "b"], ["a", "c"]]})) == {(0, 1), (1, 1)}
    assert get_odd_cells(get_evidence({"digests": [["a"], ["b"], ["b"]]})) == {(0, 0)}


def test_cross_examination_of_many_shows_who_differs():
    digests = [["a", "b"]] * 511 + [["a", "c"]]
    section = get_evidence({"digests": digests})
    assert len(section.findall(".//tbody/tr")) == 1
    assert get_odd_cells(section) == {(511, 1)}
    assert "511 replicas of 512 agree" in get_text(section)


def test_examples_that_are_missing():
    missing = get_evidence({"examples": 49500, "exactly_once": 49377, "per_rank": [24750, 24627]})
    assert "123 examples not seen exactly once." in get_text(missing)
    assert "not seen" not in get_text(get_evidence(create_details(2)["data"]))


def test_what_has_a_view_is_not_listed_again():
    terms = [get_text(term) for term in get_evidence(create_details(2)["data"]).iter("dt")]
    assert terms == ["Examples", "Seen exactly once", "Rank 0", "Rank 1"]


def test_exact_names_the_first_difference():
    section = get_section(parse(build_page(create_failed())), "check-6")
    captions = [get_text(caption) for caption in section.iter("figcaption")]
    assert captions == ["sgd, 25 steps: different from step 9 on", "adam, 25 steps: equal"]
    marked, unmarked = section.iter("svg")
    assert "first difference: step 9" in get_text(marked)
    assert "var(--bad)" in ElementTree.tostring(marked, encoding="unicode")
    assert "var(--bad)" not in ElementTree.tostring(unmarked, encoding="unicode")


@pytest.mark.parametrize(("distance", "is_bad"), [(3e-6, False), (3e-5, True), (9e-4, True)])
def test_a_distance_beyond_the_limit(distance, is_bad):
    svg = ElementTree.tostring(next(get_evidence({**create_details(2)["fast"], "distance": distance}).iter("svg")))
    assert (b"var(--bad)" in svg) == is_bad


def get_number(value: float) -> dict:
    return {"name": "loss", "value": value, "low": 1.0, "high": 4.0, "mean": 2.0, "deviations": -1.5}


@pytest.mark.parametrize(
    ("value", "caption", "is_bad"),
    [
        (2.5, "1 of 1 number inside the band", False),
        (4.01, "0 of 1 number inside the band", True),
        (-90.0, "0 of 1", True),
    ],
)
def test_numbers_and_bands(value, caption, is_bad):
    section = get_evidence({"numbers": [get_number(value)]})
    assert get_text(section.find(".//figcaption")).startswith(caption)
    assert (b"var(--bad)" in ElementTree.tostring(next(section.iter("svg")))) == is_bad
    assert get_text(section.find(".//tbody/tr")[4]) == "\N{MINUS SIGN}1.5"


def test_overflow_on_some():
    overflow = {"skipped_on": [True, False, True, False], "scale_before": 32768.0, "scale_after": 16384.0}
    shown = get_text(get_evidence({"overflow": overflow}))
    assert "skipped on 2 of 4 replicas" in shown
    assert "32,768 \N{RIGHTWARDS ARROW} 16,384" in shown
    assert "Not skipped on replica 1, 3." in shown


def test_ratios_beyond_their_limits():
    section = get_section(parse(build_page(create_failed())), "check-13")
    assert get_text(section.find(".//figcaption")) == "2 of 4 times beyond the limit"
    assert "checkpoint" in get_text(next(section.iter("svg")))
    told = get_evidence({"compared": [], "not_comparable": "another GPU"})
    assert "Not comparable: another GPU" in get_text(told)


def test_no_bandwidth_with_one_replica():
    section = get_section(parse(build_page(create_report(1))), "check-3")
    assert not list(section.iter("svg"))
    assert len(section.findall(".//tbody/tr")) == 3


def test_details_that_no_view_knows():
    shown = get_text(get_evidence({"faults_caught": 13, "ok": True, "hosts": ["a", "b"], "deep": [{"x": 1}]}))
    assert "Faults caught13" in shown
    assert "Okyes" in shown
    assert "Hostsa, b" in shown
    assert "Deep" not in shown


# Figures in the colours of the page


def draw_two_lines():
    figure = create_page_figure(2)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=TRAIN_COLOR)
    axes.plot([0, 1], [1, 0], color=VALIDATION_COLOR, marker="o")
    axes.set_title("Two < three & four", parse_math=False)
    return figure


def test_figures_follow_the_theme():
    svg = to_svg(draw_two_lines, name="a", title="Lines <1>")
    root = ElementTree.fromstring(svg)
    assert root.get("fill") == "currentColor"
    assert "stroke: var(--series-1)" in svg
    assert "stroke: var(--series-2)" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg), "no colour of its own"
    assert get_text(root.find("title")) == "Lines <1>"
    texts = [text.text for text in root.iter("text")]
    assert "Two < three & four" in texts
    assert all("var(--font)" in text.get("style") for text in root.iter("text"))
    assert "DejaVu" not in svg


def test_figures_share_a_page():
    ids = [set(re.findall(r' id="(.*?)"', to_svg(draw_two_lines, name=name, title="Lines"))) for name in "ab"]
    assert ids[0]
    assert not ids[0] & ids[1]


def read_theme(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6,8});", css))


def get_contrast(one: str, other: str) -> float:
    """As WCAG defines it, from 1 to 21."""
    luminances = []
    for color in (one, other):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminances.append(sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
    high, low = max(luminances), min(luminances)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme):
    css = resources.files("mnist_dist.results").joinpath("page.css").read_text("utf-8")
    light, dark = css.split("prefers-color-scheme: dark", 1)
    colors = read_theme(light) | (read_theme(dark) if theme == "dark" else {})
    for ground in ("page", "surface"):
        for ink in ("ink", "muted", "link", "bad"):
            assert get_contrast(colors[ink], colors[ground]) >= 4.5, (ink, ground)
    for tone in ("good", "bad", "warn", "unsure", "info", "quiet"):
        assert get_contrast(colors[f"{tone}-ink"], colors[f"{tone}-fill"]) >= 4.5, tone
        assert get_contrast(colors["ink"], colors[f"{tone}-fill"]) >= 4.5, tone
    for line in ("series-1", "series-2", "series-3"):
        assert get_contrast(colors[line], colors["surface"]) >= 3, line
        assert get_contrast(colors[line], colors["band"]) >= 2.5, line


def test_dark_defines_what_light_defines():
    css = resources.files("mnist_dist.results").joinpath("page.css").read_text("utf-8")
    light, dark = css.split("prefers-color-scheme: dark", 1)
    assert read_theme(light).keys() == read_theme(dark).keys()
    used = set(re.findall(r"var\(--([\w-]+)\)", css + build_page(create_failed())))
    defined = set(re.findall(r"--([\w-]+):", css))
    assert used <= defined, used - defined


# Quantities


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"),
        (38.2e-6, "38.2 µs"),
        (0.00456, "4.56 ms"),
        (0.9994, "999 ms"),
        (1.5, "1.50 s"),
        (118.4, "118 s"),
        (119.6, "2 min 0 s"),
        (185, "3 min 5 s"),
        (36000, "10.0 h"),
    ],
)
def test_seconds(seconds, expected):
    assert seconds_text(seconds) == expected


def test_bytes():
    assert [bytes_text(n) for n in (4, 1024, 65536, 2**24)] == ["4 B", "1 KiB", "64 KiB", "16 MiB"]


def test_digits():
    values = (0, 3.1e-6, -0.5, 9.996, 123.4, 24000, 2.5e7)
    expected = ["0", "3.10e\N{MINUS SIGN}6", "\N{MINUS SIGN}0.5000", "10.0", "123", "24,000", "2.50e7"]
    assert [digits(value) for value in values] == expected


def test_report_is_json():
    assert json.loads(create_failed().to_json())["verdict"] == "FAIL"
