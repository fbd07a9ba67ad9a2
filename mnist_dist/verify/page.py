"""`verify.html`: the verdict, who is to blame, and what each check found and measured."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mnist_dist.config.compare import flatten
from mnist_dist.results.page import (
    Column,
    Html,
    Tone,
    badge,
    build_document,
    code,
    command_line,
    facts,
    fold,
    headline,
    join,
    lines,
    section,
    share_bar,
    table,
    text,
)
from mnist_dist.results.quantities import as_title, as_value, counted, seconds_text
from mnist_dist.verify.evidence import show_evidence
from mnist_dist.verify.report import CheckResult, RankFacts, Report, Status, Suspect

MAX_OPEN_ROWS = 16
"""Of ranks or suspects; more of them are folded."""

# Signs and words as well as colours: not everybody tells these apart.
_LOOKS: Mapping[Status, tuple[str, Tone]] = {
    "pass": ("\N{CHECK MARK}", "good"),
    "fail": ("\N{MULTIPLICATION X}", "bad"),
    "degraded": ("!", "warn"),
    "inconclusive": ("?", "unsure"),
    "info": ("i", "info"),
    "skipped": ("\N{EN DASH}", "quiet"),
}
_ORDER: tuple[Status, ...] = ("fail", "degraded", "inconclusive", "pass", "info", "skipped")


def build_page(report: Report) -> str:
    """The text of `verify.html`."""
    devices = counted(report.num_replicas, "replica")
    parts: list[Html] = []
    if report.suspects:
        parts.append(section(text("Suspects"), _suspects(report.suspects), name="suspects"))
    evidence = {check.number: show_evidence(check) for check in report.checks}
    parts.append(section(text("Checks"), _checks(report.checks, evidence), name="checks"))
    for check in report.checks:
        if evidence[check.number]:
            title = join(
                [Html(f'<span class="number">{check.number}</span>'), text(as_title(check.name)), _badge(check.status)]
            )
            summary = Html(f"<p>{text(check.summary)}</p>")
            parts.append(section(title, summary, *evidence[check.number], name=f"check-{check.number}"))
    parts.append(section(text("Ranks"), _ranks(report.ranks), name="ranks"))
    parts.append(section(text("Run"), *_run(report), name="run"))
    return build_document(
        f"{report.verdict}: verify, {devices}",
        header=_header(report),
        sections=parts,
        footer=text("All measured values are in verify.json, beside this page."),
    )


def _header(report: Report) -> Html:
    counts = Counter(check.status for check in report.checks)
    glyph, tone = {"PASS": _LOOKS["pass"], "DEGRADED": _LOOKS["degraded"], "FAIL": _LOOKS["fail"]}[report.verdict]
    if report.verdict == "PASS" and not counts["pass"]:
        # Nothing failed, since nothing was tried: no reason for green.
        glyph, tone = _LOOKS["skipped"]
    label = (
        f"mnist_dist verify · {counted(report.num_replicas, 'replica')}, {report.strategy} · {_moment(report.started)}"
    )
    title = headline(report.verdict, glyph, tone=tone, label=label, sentence=_sentence(report))
    tally = [
        badge(f"{counts[status]} {status}", _LOOKS[status][0], _LOOKS[status][1]) for status in _ORDER if counts[status]
    ]
    return Html(f'{title}\n<p class="tally">{join(tally, " ")}</p>')


def _sentence(report: Report) -> Html:
    """What is in doubt, then what is wrong, or that nothing is."""
    counts = Counter(check.status for check in report.checks)
    doubts = " and ".join(
        f"{counted(counts[status], 'check')} {'is' if counts[status] == 1 else 'are'} {status}"
        for status in ("inconclusive", "skipped")
        if counts[status]
    )
    where = f"in {seconds_text(report.seconds)} on {counted(report.num_replicas, 'replica')}"
    found = _trouble(report.checks) or _success(counts, where) or f"Nothing was tested {where}."
    return text(f"{doubts}. {found}" if doubts else found)


def _trouble(checks: Sequence[CheckResult]) -> str:
    """The first of the worst checks, and how many more there are; empty without any."""
    worst = [check for status in ("fail", "degraded") for check in checks if check.status == status]
    if not worst:
        return ""
    first = worst[0]
    verb = "failed" if first.status == "fail" else "found the cluster degraded"
    sentence = f"Check {first.number}, {as_title(first.name).lower()}, {verb}: {first.summary}"
    if len(worst) == 1:
        return sentence
    return f"{sentence.rstrip('.')}. {counted(len(worst) - 1, 'more check')} failed or found it degraded."


def _success(counts: Mapping[Status, int], where: str) -> str:
    """How many checks passed; empty if none did."""
    passed = counts["pass"]
    if not passed:
        return ""
    if passed == sum(counts.values()):
        return f"All {counted(passed, 'check')} passed {where}."
    measured = f" and {counts['info']} only measured" if counts["info"] else ""
    return f"{counted(passed, 'check')} passed{measured}, {where}."


def _checks(checks: Sequence[CheckResult], evidence: Mapping[int, Sequence[Html]]) -> Html:
    longest = max((check.seconds for check in checks), default=0.0)
    lines = []
    for check in checks:
        name = text(as_title(check.name))
        if evidence[check.number]:
            name = Html(f'<a href="#check-{check.number}">{name}</a>')
        share = share_bar(check.seconds / longest) if longest > 0 else Html("")
        took = "" if check.status == "skipped" and not check.seconds else f"{check.seconds:,.1f} s"
        lines.append(
            f'<li><span class="number">{check.number}</span> <span class="name">{name}</span> '
            f'<span class="status">{_badge(check.status)}</span> <span class="summary">{text(check.summary)}</span> '
            f'<span class="time">{share if took else ""} <span class="seconds">{text(took)}</span></span></li>'
        )
    return Html('<ol class="checks">\n' + "\n".join(lines) + "\n</ol>")


def _suspects(suspects: Sequence[Suspect]) -> Html:
    columns = [
        Column("Rank", "number"),
        Column("Host", "code"),
        Column("Device", "code"),
        Column("Check"),
        Column("Evidence", "prose"),
    ]
    rows = [
        [
            text(f"{suspect.rank:,}"),
            text(suspect.host),
            text(suspect.device or "\N{EN DASH}"),
            text(as_title(suspect.check)),
            text(suspect.evidence),
        ]
        for suspect in suspects
    ]
    first = table(columns, rows[:MAX_OPEN_ROWS], stacked=True)
    rest = rows[MAX_OPEN_ROWS:]
    if not rest:
        return first
    return join([first, fold(text(counted(len(rest), "more suspect")), table(columns, rest, stacked=True))])


def _ranks(ranks: Sequence[RankFacts]) -> Html:
    columns = [
        Column("Rank", "number"),
        Column("Host", "code"),
        Column("Devices"),
        Column("GPUs", "code"),
        Column("CPU"),
        Column("Cores", "number"),
    ]
    rows = [
        [
            text(f"{rank.rank:,}"),
            text(rank.host),
            lines(map(text, rank.devices)),
            lines(map(text, rank.gpus)) or text("\N{EN DASH}"),
            text(rank.cpu),
            text(f"{rank.cores:,}"),
        ]
        for rank in ranks
    ]
    if len(rows) <= MAX_OPEN_ROWS:
        return table(columns, rows)
    num_hosts = len({rank.host for rank in ranks})
    return fold(text(f"{counted(len(rows), 'rank')} on {counted(num_hosts, 'host')}"), table(columns, rows))


def _run(report: Report) -> Iterable[Html]:
    dataset = report.dataset
    pairs = [("Started", text(_moment(report.started))), ("Took", text(seconds_text(report.seconds)))]
    pairs += [("Strategy", text(report.strategy)), ("Replicas", text(f"{report.num_replicas:,}"))]
    if "name" in dataset:
        pairs.append(("Data set", text(dataset["name"])))
    if isinstance(dataset.get("num_train"), int):
        pairs.append(("Training examples", text(f"{dataset['num_train']:,}")))
    if "sha256" in dataset:
        pairs.append(("SHA-256 of the data", code(str(dataset["sha256"])[:16])))
    yield facts(pairs)
    yield command_line(report.command)
    if report.versions:
        yield facts([(name, text(version)) for name, version in report.versions.items()])
    if report.configuration:
        settings = [(key, code(as_value(value))) for key, value in flatten(report.configuration).items()]
        yield fold(text(f"Configuration: {counted(len(settings), 'key')}"), facts(settings, kind="many"))


def _badge(status: Status) -> Html:
    glyph, tone = _LOOKS[status]
    return badge(status, glyph, tone)


def _moment(started: str) -> str:
    """A date and a time of day without the fractions of a second."""
    day, _, time = started.partition("T")
    clock, zone = time[:8], time[8:].lstrip(".0123456789")
    return f"{day} {clock} {zone}".strip()
