"""Reports of real runs, in a real browser."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.browser import visit
from support.job import MIRRORED, SINGLE, wait_for_epoch
from support.runs import history_of, summary_of

from mnist_dist.results.predictions import PREDICTIONS, Predictions
from mnist_dist.run.sweep_folder import read_sweep

pytestmark = pytest.mark.xdist_group("reports")

REPORT = ("-m", "mnist_dist.report")
HOSTILE = "<script>window.pwned=1</script><img src=x onerror=window.pwned=1>"


@pytest.fixture(scope="session")
def folders(tmp_path_factory, train, uninterrupted, run_python, args) -> dict[str, Path]:
    """Folders with a page each, as commands have left them."""
    root = tmp_path_factory.mktemp("reports")
    finished = root / "finished"
    shutil.copytree(uninterrupted, finished)
    failed = root / "failed"
    result = train(failed, "optimizer=sgd", "optimizer.learning_rate=1e30")
    assert result.returncode == 1
    compared = root / "compared"
    shutil.copytree(uninterrupted, compared / "first")
    for name, keys in {"second": ["seed=1"], "third": ["optimizer.learning_rate=0.00003"]}.items():
        assert train(compared / name, *keys, "trainer.epochs=12").returncode == 0
    shutil.copytree(failed, compared / "fourth")
    assert run_python(*REPORT, f"run_dir={compared}").returncode == 0
    swept = root / "swept"
    (root / "space.yaml").write_text("optimizer.learning_rate: choice(0.01,0.1,0.2,0.4,1e30)\nmodel.dropout: 0.1,0.2\n")
    words = [f"space={root / 'space.yaml'}", "sampler=grid", "num_trials=10", "jobs=2", f"sweep_dir={swept}"]
    result = run_python("-m", "mnist_dist.sweep", *words, *args, "optimizer=sgd", "trainer.epochs=3")
    assert result.returncode == 0, result.stderr
    return {"finished": finished, "failed": failed, "compared": compared, "swept": swept}


KINDS = ("finished", "failed", "compared", "swept")
TABLES = {"finished": 5, "failed": 2, "compared": 3, "swept": 2}
HEADINGS = {"finished": "Finished", "failed": "Failed", "compared": "4 runs", "swept": "10 of 10 trials"}
PLOTS = {"finished": 7, "failed": 1, "compared": 6, "swept": 3}


@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")])
@pytest.mark.parametrize("kind", KINDS)
def test_opens_anywhere(browser, folders, kind, width, scheme, scripts):
    with visit(browser, folders[kind] / "report.html", width=width, scheme=scheme, scripts=scripts) as seen:
        assert seen.messages == []
        assert seen.requests == []
        assert seen.page.locator("table").count() == TABLES[kind]
        assert seen.page.locator("svg.plot").count() == PLOTS[kind]
        assert all(row.inner_text().strip() for row in seen.page.locator("tbody tr").all())
        assert seen.page.locator("h1").inner_text() == HEADINGS[kind]
        for plot in seen.page.locator("svg.plot:visible").all():
            box = plot.bounding_box()
            assert box["width"] > 200 and box["height"] > 60
        if scripts:  # it needs one to look
            assert seen.sideways() == 0
            assert seen.clipped() == []


def test_says_what_the_run_says(browser, folders):
    summary, history = summary_of(folders["finished"]), history_of(folders["finished"])
    with visit(browser, folders["finished"] / "report.html") as seen:
        text = seen.page.locator("body").inner_text()
        assert seen.page.locator("h1").inner_text() == "Finished"
        for name in ("train", "val", "test"):
            row = seen.page.locator("#results tbody tr", has_text=name).inner_text().split()
            assert row[1] == f"{100 * summary[name]['accuracy']:.2f}"
            assert row[4] == f"{summary[name]['num_correct']:,}"
        assert summary["weights_sha256"][:16] in text
        assert summary["versions"]["tensorflow"] in text
        curves = json.loads(seen.page.locator("#curves svg.plot").first.get_attribute("data-chart"))["curves"]
        assert [curve["name"] for curve in curves] == ["train", "validation"]
        assert curves[1]["y"] == pytest.approx(history.column("val_accuracy"), rel=1e-5)
        cells = seen.page.locator(".confusion tbody td").all_inner_texts()
        predictions = Predictions.from_bytes((folders["finished"] / PREDICTIONS).read_bytes())
        assert [int(cell or 0) for cell in cells] == predictions.splits["test"].confusion.reshape(-1).tolist()


def test_a_sweep_says_what_its_trials_say(browser, folders):
    found = read_sweep(folders["swept"])
    with visit(browser, folders["swept"] / "report.html") as seen:
        rows = [row.inner_text().split("\t") for row in seen.page.locator("#trials tbody tr").all()]
        assert sorted(int(row[0]) for row in rows) == list(range(10))
        for row in rows:
            trial = found.trials[int(row[0])]
            assert trial.state in row[1]
            assert row[2] == (f"{trial.value:.4f}" if trial.value is not None else "\N{EN DASH}")
            assert row[3:5] == [trial.texts["optimizer.learning_rate"], trial.texts["model.dropout"]]
            assert ("loss became" in row[-1]) == (trial.state == "failed") == (row[3] == "1e+30")
        assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)[2:] + 2 * ["\N{EN DASH}"]
        for link in seen.page.locator("#trials a").all():
            assert (folders["swept"] / link.get_attribute("href")).is_file()
        assert f"The best is trial {found.best.number}, " in seen.page.locator(".lead").inner_text()
        command = seen.page.locator("#search pre").inner_text()
        assert all(text in command for text in found.best.overrides)


def test_predictions_are_those_of_the_model(uninterrupted, small_arrays):
    import keras

    predictions = Predictions.from_bytes((uninterrupted / PREDICTIONS).read_bytes())
    model = keras.models.load_model(uninterrupted / "model.keras")
    images = small_arrays["x_test"].reshape(len(small_arrays["x_test"]), -1) / np.float32(255)
    probabilities = model.predict(images, verbose=0)
    answers, labels = probabilities.argmax(axis=1), small_arrays["y_test"]
    assert np.array_equal(predictions.splits["test"].correct, answers == labels)
    wrong = predictions.mistakes
    assert np.array_equal(wrong.images, small_arrays["x_test"][wrong.example])
    assert np.array_equal(wrong.predicted, answers[wrong.example])
    assert np.allclose(wrong.probability, probabilities.max(axis=1)[wrong.example], atol=1e-5)
    assert {name: len(split.correct) for name, split in predictions.splits.items()} == {
        name: summary_of(uninterrupted)[name]["num_examples"] for name in ("train", "val", "test")
    }


def test_replicas_make_the_same_predictions(uninterrupted, run_job, args, tmp_path):
    run_job(MIRRORED, *args, f"run_dir={tmp_path / 'run'}")
    assert (tmp_path / "run" / PREDICTIONS).read_bytes() == (uninterrupted / PREDICTIONS).read_bytes()


def test_values_at_the_pointer(browser, folders):
    with visit(browser, folders["finished"] / "report.html") as seen:
        plot = seen.page.locator("#curves svg.plot").first
        values = seen.page.locator("#curves .values").first
        assert not values.is_visible()
        box = plot.bounding_box()
        seen.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert values.is_visible()
        shown = values.bounding_box()
        assert box["y"] <= shown["y"] <= box["y"] + box["height"] / 2
        assert box["x"] <= shown["x"] and shown["x"] + shown["width"] <= box["x"] + box["width"]
        epoch = int(re.search(r"Epoch (\d+)", values.inner_text())[1])
        expected = history_of(folders["finished"]).epochs[epoch - 1].val_accuracy
        assert f"validation {100 * expected:.2f} %" in values.inner_text()
        seen.page.mouse.move(0, 0)
        assert not values.is_visible()


@pytest.mark.parametrize("scripts", [True, False])
def test_axis_can_be_logarithmic(browser, folders, scripts):
    with visit(browser, folders["finished"] / "report.html", scripts=scripts) as seen:
        linear, log = (seen.page.locator(f"#curves figure.scales .{name}") for name in ("linear", "log"))
        assert (linear.is_visible(), log.is_visible()) == (True, False)
        seen.page.get_by_role("checkbox", name="log axis").check()
        assert (linear.is_visible(), log.is_visible()) == (False, True)


def test_sorting(browser, folders):
    with visit(browser, folders["compared"] / "report.html") as seen:
        runs = seen.page.locator("#runs")

        def column(number: int) -> list[str]:
            return seen.page.locator(f"#runs tbody tr td:nth-child({number})").all_inner_texts()

        titles = seen.page.locator("#runs thead th").all_inner_texts()
        rate = titles.index("optimizer.learning_rate") + 1
        runs.get_by_role("button", name="optimizer.learning_rate").click()
        assert [float(value) for value in column(rate)] == [1e30, 0.001, 0.001, 0.00003]
        runs.get_by_role("button", name="optimizer.learning_rate").click()
        assert [float(value) for value in column(rate)] == [0.00003, 0.001, 0.001, 1e30]
        runs.get_by_role("button", name="Test accuracy", exact=True).click()
        accuracies = column(titles.index("Test accuracy") + 1)
        assert accuracies[-1] == "\N{EN DASH}"  # whatever the direction
        assert accuracies[:-1] == sorted(accuracies[:-1], reverse=True)


def test_comparison_names_what_differs_and_nothing_else(browser, folders):
    with visit(browser, folders["compared"] / "report.html") as seen:
        titles = seen.page.locator("#runs thead th").all_inner_texts()
        keys = {title for title in titles if title == title.lower() and title not in ("seed",)}
        assert {"optimizer.learning_rate", "optimizer.name", "trainer.epochs"} <= keys
        assert not {"data.name", "model.name", "batch.global_size", "run_dir"} & keys
        assert seen.page.locator("#runs a").count() == 4
        for link in seen.page.locator("#runs a").all():
            assert (folders["compared"] / link.get_attribute("href")).is_file()


def test_bit_identical_up_to(run_python, train, uninterrupted, tmp_path, browser):
    """A run that was changed after some epochs: its data are the same until then."""
    assert train(tmp_path / "other", "trainer.epochs=7").returncode == 0
    shutil.copytree(uninterrupted, tmp_path / "third")
    lines = (tmp_path / "third" / "history.csv").read_text().splitlines(keepends=True)
    lines[8:] = [line.rpartition(",")[0] + "," + "0" * 64 + "\n" for line in lines[8:]]
    (tmp_path / "third" / "history.csv").write_text("".join(lines))
    runs = f"run_dir=[{uninterrupted},{tmp_path / 'other'},{tmp_path / 'third'}]"
    assert run_python(*REPORT, runs, cwd=tmp_path).returncode == 0
    with visit(browser, tmp_path / "comparison.html") as seen:
        text = seen.page.locator("#runs").inner_text()
        assert "in all 7 epochs that both have" in text
        assert "up to epoch 7" in text


def test_reasons(run_job, start, args, tmp_path, run_python):
    """A run that was stopped, and one that was killed, say so; both resume, and the page then has all of it."""
    run_dir = tmp_path / "run"
    job = start(SINGLE, *args, f"run_dir={run_dir}")
    wait_for_epoch(job, run_dir, 2)
    job.processes[0].terminate()
    assert job.codes() == [75]
    page = (run_dir / "report.html").read_text()
    assert ">Stopped<" in page and "Stopped on request after epoch" in page
    job = start(SINGLE, *args, f"run_dir={run_dir}")
    wait_for_epoch(job, run_dir, 1 + len(history_of(run_dir).epochs))
    job.kill()
    with contextlib.suppress(OSError):
        job.wait()
    assert run_python(*REPORT, f"run_dir={run_dir}").returncode == 0
    assert ">Lost<" in (run_dir / "report.html").read_text()
    last_sign = (run_dir / "history.csv").stat().st_mtime
    (result,) = run_job(SINGLE, *args, f"run_dir={run_dir}")
    assert result.returncode == 0
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["started", "stopped", "started", "lost", "started", "finished"]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert events[0]["epoch"] == 0 and events[1]["epoch"] == events[2]["epoch"] >= 2
    assert events[3]["time"] == last_sign
    assert events[3]["epoch"] >= events[4]["epoch"] >= events[2]["epoch"]
    page = (run_dir / "report.html").read_text()
    assert ">Finished<" in page and "stopped on request after epoch" in page


def test_a_lost_peer_is_the_reason(start, args, tmp_path):
    run_dir = tmp_path / "run"
    job = start(("horovod", 2), *args, "trainer.epochs=4000", f"run_dir={run_dir}", launcher="srun")
    wait_for_epoch(job, run_dir, 2)
    job.processes[1].kill()
    assert job.codes()[0] == 76
    page = (run_dir / "report.html").read_text()
    assert ">Failed<" in page and re.search(r"<p class=\"lead\">Rank 1 .*is gone", page)


def test_no_report_where_none_is_wanted(train, tmp_path):
    assert train(tmp_path / "run", "report=false", "trainer.epochs=1").returncode == 0
    assert not (tmp_path / "run" / "report.html").exists()


def test_reference_curves(train, tmp_path, browser):
    assert train(tmp_path / "run", "plots.reference=original", "trainer.epochs=2").returncode == 0
    with visit(browser, tmp_path / "run" / "report.html") as seen:
        chart = json.loads(seen.page.locator("#curves svg.plot").first.get_attribute("data-chart"))
        names = [curve["name"] for curve in chart["curves"]]
        assert names == ["train", "validation", "train, original run", "validation, original run"]
        assert [len(curve["x"]) for curve in chart["curves"]] == [2] * 4


def test_fail_if_worse(folders, run_python, tmp_path):
    compared = folders["compared"]
    first, third = summary_of(compared / "first")["test"], summary_of(compared / "third")["test"]
    drop = first["accuracy"] - third["accuracy"]
    assert drop > 0
    runs = f"run_dir=[{compared / 'first'},{compared / 'third'}]"
    output = f"output={tmp_path / 'page.html'}"
    assert run_python(*REPORT, runs, output, f"fail_if_worse={drop + 1e-6}").returncode == 0
    result = run_python(*REPORT, runs, output, f"fail_if_worse={drop / 2}")
    assert result.returncode == 1
    assert result.stderr.startswith("worse: third has a test accuracy of ") and "McNemar's p = " in result.stderr
    assert (
        run_python(
            *REPORT, f"run_dir=[{compared / 'third'},{compared / 'first'}]", output, "fail_if_worse=0"
        ).returncode
        == 0
    )
    result = run_python(*REPORT, f"run_dir=[{compared / 'first'},{compared / 'fourth'}]", output, "fail_if_worse=1")
    assert result.returncode == 1
    assert result.stderr == "worse: fourth has no result (failed)\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "error: run_dir=None: say what to report on: either run_dir=... or sweep_dir=..."),
        (["run_dir=missing"], "error: run_dir=missing: cannot be read: No such file or directory"),
        (["run_dir=."], "error: run_dir=.: no run here, nor in the folders below it; name the folder of a run"),
        (["run_dir=[a,b]"], "error: run_dir=a: no run here; name the folder of a run"),
        (["run_dir=[]"], "error: run_dir=[]: must be a run folder, a list of them, or a folder of runs"),
        (["run_dir=a", "fail_if_worse=2"], "error: fail_if_worse=2.0: must be from 0 to 1"),
    ],
)
def test_bad_input(run_python, words, expected):
    result = run_python(*REPORT, *words)
    assert (result.returncode, result.stderr) == (2, expected + "\n")


def test_texts_of_others_are_text(browser, folders, run_python, tmp_path):
    """Class names, paths, values, reasons: whatever they contain, they are shown, and nothing runs."""
    run_dir = tmp_path / re.sub("/", "", HOSTILE) / "run"
    shutil.copytree(folders["finished"], run_dir)
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(re.sub("path: .*", f"path: '{HOSTILE}'", config, count=1))
    predictions = Predictions.from_bytes((run_dir / PREDICTIONS).read_bytes())
    names = tuple(f"{HOSTILE}{name}" for name in predictions.class_names)
    hostile = Predictions(names, predictions.splits, predictions.mistakes)
    (run_dir / PREDICTIONS).write_bytes(hostile.to_bytes())
    events = (run_dir / "events.jsonl").read_text().replace('"single"', json.dumps(HOSTILE))
    (run_dir / "events.jsonl").write_text(events)
    failed = tmp_path / re.sub("/", "", HOSTILE) / "failed"
    shutil.copytree(folders["failed"], failed)
    events = (failed / "events.jsonl").read_text().replace("the training loss", HOSTILE)
    (failed / "events.jsonl").write_text(events)
    swept = tmp_path / re.sub("/", "", HOSTILE) / "swept"
    shutil.copytree(folders["swept"], swept)
    plan = json.loads((swept / "sweep.json").read_text())
    plan["overrides"] = [HOSTILE]
    (swept / "sweep.json").write_text(json.dumps(plan))
    record = json.loads((swept / "trials" / "0009.json").read_text())
    (swept / "trials" / "0009.json").write_text(json.dumps({**record, "reason": HOSTILE}))
    for key, folder in (("run_dir", run_dir), ("run_dir", failed), ("run_dir", run_dir.parent), ("sweep_dir", swept)):
        assert run_python(*REPORT, f"{key}='{folder}'").returncode == 0
        for scripts in (True, False):
            with visit(browser, folder / "report.html", scripts=scripts) as seen:
                assert "<script>window.pwned=1<" in seen.page.locator("body").inner_text()
                assert (seen.messages, seen.requests) == ([], [])
                assert seen.page.locator("script").count() == 1
                if scripts:
                    assert seen.page.evaluate("window.pwned === undefined")
                    assert seen.sideways() == 0
