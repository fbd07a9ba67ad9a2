"""The page of a sweep: its trials, the best so far, which keys matter, and what the good trials have in common."""

import shlex
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from mnist_dist.base.files import describe_os_error
from mnist_dist.config.search_space import Interval, parse_space
from mnist_dist.report.charts import Scale, draw_importances, draw_parallel, draw_search
from mnist_dist.report.parts import linked, or_dash, settings
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
    picture,
    remark,
    section,
    side_by_side,
    table,
    text,
)
from mnist_dist.results.quantities import counted, moment_text, percent_text, seconds_text
from mnist_dist.results.svg import to_svg
from mnist_dist.run.folder import REPORT_PAGE
from mnist_dist.run.sweep_folder import Sweep, SweepFolder, Trial, TrialState

_LOOKS: Mapping[TrialState, tuple[str, Tone]] = {
    "finished": ("\N{CHECK MARK}", "good"),
    "running": ("\N{BLACK RIGHT-POINTING TRIANGLE}", "info"),
    "waiting": ("\N{HORIZONTAL ELLIPSIS}", "unsure"),
    "pruned": ("\N{BLACK SCISSORS}", "quiet"),
    "failed": ("\N{MULTIPLICATION X}", "bad"),
}
_MIN_TRIALS = 4
"""Of fewer finished trials nothing can be said about the importance of a key."""


def build_sweep_page(sweep: Sweep, *, output: Path) -> str:
    """The page, which will be written to `output`: its links to the trials' own pages begin there."""
    sections = [
        section(text("Search"), *_search(sweep), name="search"),
        section(text("Trials"), *_trials(sweep, output), name="trials"),
        section(text("Plan"), *_plan(sweep), name="plan"),
    ]
    done = sum(trial.is_final for trial in sweep.trials)
    is_over = done >= sweep.plan.num_trials and done == len(sweep.trials)
    glyph, tone = _LOOKS["waiting" if not is_over else "finished" if sweep.best else "failed"]
    word = f"{done} of {counted(sweep.plan.num_trials, 'trial')}"
    header = headline(word, glyph, tone=tone, label=f"Sweep {sweep.path}", sentence=text(_lead(sweep)))
    footer = text(f"Written {moment_text(time.time())} from the folders in {sweep.path}; python -m mnist_dist.report")
    return build_document(
        f"Sweep {sweep.path.name}: {word}", header=header, sections=sections, footer=footer, has_script=True
    )


def _lead(sweep: Sweep) -> str:
    best = sweep.best
    if best is None or best.value is None:
        return "No trial is finished."
    values = ", ".join(f"{key} {_short(value)}" for key, value in best.texts.items())
    return f"The best is trial {best.number}, with a validation accuracy of {percent_text(best.value)}: {values}."


def _search(sweep: Sweep) -> Iterator[Html]:
    finished = [trial for trial in sweep.trials if trial.value is not None and trial.state == "finished"]
    if not finished:
        yield remark(text("No trial is finished, so there is nothing to show."))
        return
    reached = [(trial.number, trial.value or 0.0) for trial in finished]
    scales = [_scale(key, finished, sweep) for key in sweep.plan.space]
    history = to_svg(partial(draw_search, reached), name="history", title="Validation accuracy of each trial")
    parallel = to_svg(
        partial(draw_parallel, scales, [value for _, value in reached]),
        name="parallel",
        title="The values of each trial on parallel axes, the better ones darker",
    )
    pictures = [
        picture(history, caption="Each trial, and the best so far"),
        picture(parallel, caption="All finished trials: a line each, the better the darker"),
    ]
    importances, why_not = _importances(sweep, len(finished))
    if importances:
        svg = to_svg(partial(draw_importances, importances), name="importances", title="Importance of each key")
        pictures.append(picture(svg, caption="How much of the difference each key explains (PED-ANOVA)"))
    yield side_by_side(pictures)
    if why_not:
        yield remark(text(why_not))
    if sweep.best:
        yield remark(text("To train the best again, into another folder:"))
        own_files = [f"--config-dir={sweep.plan.config_dir}"] if sweep.plan.config_dir else []
        words = [*own_files, *sweep.plan.overrides, *sweep.best.overrides, "run_dir=ANOTHER_FOLDER"]
        yield command_line(f"python -m mnist_dist.train {shlex.join(words)}")


def _short(value: str) -> str:
    """A number with as many digits as one compares; anything else as it is."""
    try:
        return value if len(value) <= 8 else f"{float(value):.4g}"
    except ValueError:
        return value


def _scale(key: str, trials: list[Trial], sweep: Sweep) -> Scale:
    dimension = parse_space(sweep.plan.space)[key]
    if isinstance(dimension, Interval):
        numbers = [float(trial.params[key]) for trial in trials]
        return Scale(key, numbers, (float(dimension.low), float(dimension.high)), is_log=dimension.is_log)
    texts = list(dimension.texts)
    places = [float(texts.index(trial.texts[key])) for trial in trials]
    return Scale(key, places, (0.0, max(1.0, len(texts) - 1.0)), names=texts)


def _importances(sweep: Sweep, num_finished: int) -> tuple[Mapping[str, float], str]:
    """How much each key matters (Watanabe et al. 2023, PED-ANOVA, by Optuna), or why that is unknown."""
    if num_finished < _MIN_TRIALS:
        return {}, f"The importance of the keys is shown from {_MIN_TRIALS} finished trials on."
    if len(sweep.plan.space) < 2:
        return {}, ""
    try:
        import optuna
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError:
        return {}, "The importance of the keys needs Optuna: pip install 'mnist-dist[sweep]'"
    journal = SweepFolder(sweep.path).journal_path
    if not journal.is_file():
        return {}, "The importance of the keys needs journal.log, which the next sweep command here makes again."
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.load_study(study_name=None, storage=storage)
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()), ""
    except OSError as error:
        return {}, f"The importance of the keys is unknown: journal.log cannot be read ({describe_os_error(error)})."
    except (KeyError, RuntimeError, ValueError) as error:  # torn, or all trials alike
        return {}, f"The importance of the keys is unknown ({error})."


def _trials(sweep: Sweep, output: Path) -> Iterator[Html]:
    if not sweep.trials:
        yield remark(text("No trial has been started."))
        return
    columns = [
        Column("Trial", "number"),
        Column("State"),
        Column("Validation accuracy", "number"),
        *(Column(key, "code") for key in sweep.plan.space),
        *(Column(title, "number") for title in ("Epochs", "Starts", "Time, s")),
        Column("Reason", "prose"),
    ]
    rows = []
    for trial in sorted(sweep.trials, key=lambda trial: -(trial.value or 0.0)):
        page = sweep.run_dir(trial) / REPORT_PAGE
        last = trial.attempts[-1] if trial.attempts else None
        seconds = sum(one.ended - one.started for one in trial.attempts if one.ended is not None)
        rows.append(
            [
                linked(trial.number, page, output=output),
                badge(trial.state, *_LOOKS[trial.state]),
                or_dash(trial.value, "{:.4f}"),
                *(code(_short(trial.texts.get(key, "\N{EN DASH}"))) for key in sweep.plan.space),
                or_dash(last.reached_epoch if last else None, "{}"),
                text(len(trial.attempts)),
                text(f"{seconds:.1f}"),
                text(trial.reason),
            ]
        )
    yield table(columns, rows, sortable=True)


def _plan(sweep: Sweep) -> Iterator[Html]:
    plan = sweep.plan
    yield table(
        [Column("Key", "code"), Column("Values", "code")],
        [[text(key), text(values)] for key, values in plan.space.items()],
        caption="Search space",
    )
    attempts = [one for trial in sweep.trials for one in trial.attempts]
    ended = [one.ended - one.started for one in attempts if one.ended is not None]
    yield facts(
        [
            ("Sampler", text(plan.sampler)),
            ("Pruner", text(plan.pruner)),
            ("Seed", text(plan.seed)),
            ("Attempts from a checkpoint, at most", text(plan.max_attempts)),
            ("Hosts", text(", ".join(sorted({one.host for one in attempts})) or "\N{EN DASH}")),
            ("All trainings", text(seconds_text(sum(ended)))),
        ]
    )
    if plan.overrides:
        yield facts([("Given for all trials", code(" ".join(plan.overrides)))])
    summary = f"What all trainings have in common: {counted(len(plan.training), 'key')}"
    yield fold(text(summary), settings(plan.training.items()))
