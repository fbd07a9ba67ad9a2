"""Check 0: do the nodes fit together? What `doctor` finds on each rank, before anything is started."""

import json
from collections.abc import Sequence
from dataclasses import replace

from mnist_dist.doctor.examine import examine
from mnist_dist.doctor.finding import Finding as Symptom
from mnist_dist.doctor.finding import RankReport
from mnist_dist.doctor.merge import Row, merge
from mnist_dist.verify.checks.base import Detector, Evidence, Finding
from mnist_dist.verify.context import Context

_PROBE_S = 60.0


class Environment(Detector):
    """All that `doctor` looks at."""

    name = "environment"

    def measure(self, context: Context) -> Evidence:
        """This rank's findings."""
        # A folder like that of a training; this one has files already.
        config = replace(context.asked, run_dir=str(context.folder / "run"))
        findings = examine(config, context.topology, timeout_s=_PROBE_S)
        report = RankReport(context.topology.rank, context.host, tuple(findings))
        return {"report": report.to_json()}

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """Errors fail; warnings are told."""
        rows = merge([RankReport.from_json(one["report"]) for one in evidence])
        details = {"rows": [row.to_dict() for row in rows if row.status != "ok"]}
        errors = [row for row in rows if row.status == "error"]
        warnings = [row for row in rows if row.status == "warning"]
        if errors:
            return Finding("fail", "; ".join(map(_describe, errors)), _blame(errors), details)
        if warnings:
            names = ", ".join(row.name for row in warnings)
            text = f"{len(rows) - len(warnings)} of {len(rows)} rows are as they should be; warnings: {names}"
            return Finding("pass", f"{text} (python -m mnist_dist.doctor)", {}, details)
        return Finding("pass", f"{len(rows)} rows, nothing stands in the way", {}, details)

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """The last rank has other code."""
        report = json.loads(evidence[-1]["report"])
        if len(evidence) == 1:
            report["findings"].append(vars(Symptom("spoiled", "error", "a fault", "none")))
        for finding in report["findings"]:
            finding["facts"] = {key: "spoiled" if "code" in key else value for key, value in finding["facts"].items()}
        evidence[-1]["report"] = json.dumps(report)
        return len(evidence) - 1 if len(evidence) > 1 else None


def _describe(row: Row) -> str:
    others = [deviation for deviation in row.deviations if deviation.status == "error"]
    if others:
        return f"{row.name}: rank {others[0].rank} on {others[0].host}: {others[0].found} (fix: {others[0].fix})"
    return f"{row.name}: {row.found} (fix: {row.fix})"


def _blame(errors: Sequence[Row]) -> dict[int, str]:
    return {
        deviation.rank: f"{row.name}: {deviation.found}"
        for row in errors
        for deviation in row.deviations
        if deviation.status == "error"
    }
