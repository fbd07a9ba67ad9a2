"""Check 2: do all ranks start from the same configuration, code, data, weights and optimizer slots?"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

from mnist_dist.config.compare import job_keys
from mnist_dist.doctor.checks.software import code_digest
from mnist_dist.launch.agreement import job_facts
from mnist_dist.launch.gpus import own_uuids
from mnist_dist.verify.checks.base import Detector, Evidence, Finding, by_replica, minority, names_of
from mnist_dist.verify.context import Context, digest

_RANDOM = "initial weights as computed here"


class Identity(Detector):
    """Compares digests, over the line to rank 0 and not by the collectives, which are checked later."""

    name = "identity"

    def __init__(self, start: Callable[[Context], None]) -> None:
        """Create it; `start` starts the devices, once the ranks are known to agree on what to start."""
        self._start = start

    def measure(self, context: Context) -> Evidence:
        """Facts of the process; and if all have the same, digests of what the backend has given to the replicas."""
        config = asdict(context.config)
        for key in ("checks", "budget_s", "deadline_s", "reference", "strict"):
            config.pop(key)
        facts = {
            **job_facts(job_keys(config), num_gpus=len(own_uuids(context.topology))),
            "code": code_digest(),
            "data": context.dataset.sha256,
        }
        all_same = context.settle(facts, lambda values: all(value == values[0] for value in values))
        if not all_same:
            return {"facts": facts, "state": [], _RANDOM: ""}
        context.enter("starting TensorFlow and the backend")
        self._start(context)
        context.enter("distributing the initial state")
        engine = context.assemble()
        variables = engine.state.variables
        copies = {name: context.strategy.copies(variable) for name, variable in variables.items()}
        num_local = len(context.strategy.devices())
        return {
            "facts": facts,
            "state": [
                {name: digest(values[index].tobytes()) for name, values in copies.items()} for index in range(num_local)
            ],
            _RANDOM: digest(engine.flat_model.get_weights().tobytes()),
        }

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """All must be equal; of two that differ, the one that is not what the seed says."""
        facts = [one["facts"] for one in evidence]
        for key in sorted({key for own in facts for key in own}):
            values = [own.get(key) for own in facts]
            if len(set(values)) > 1:
                odd = minority(values)
                blamed = {rank: f"has {key}={values[rank]}" for rank in odd or ()}
                who = names_of(odd) if odd else "the ranks"
                return Finding(
                    "fail", f"{who} differ in {key}: {' and '.join(sorted(set(map(str, values)))[:3])}", blamed
                )
        states = by_replica(evidence, "state")
        ranks = [rank for rank, one in enumerate(evidence) for _ in one["state"]]
        for name in states[0]:
            values = [state[name] for state in states]
            # The weights must also be what each rank computes from the seed; that decides between two.
            expected = [evidence[rank][_RANDOM] for rank in ranks] if name == "weights" else values
            if len(set(values)) == 1 and values == expected:
                continue
            odd = minority(values) or [index for index, value in enumerate(values) if value != expected[index]]
            blamed = {index: f"its initial {name} are {values[index]}, not as on the others" for index in odd}
            who = names_of(blamed, "replica") if blamed else "the replicas"
            return Finding(
                "fail", f"{who} did not start with the same {name}", blamed, {"digests": values}, of="replica"
            )
        summary = f"configuration, code, data and {len(states[0])} variables are the same on {len(states)} replica(s)"
        return Finding("pass", summary, details={"facts": facts[0], "state": states[0]})

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """Other weights on the last replica."""
        evidence[-1]["state"][-1]["weights"] = "spoiled"
        return len(evidence) - 1
