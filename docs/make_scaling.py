"""Writes the numbers of docs/scaling.md and its picture: `python docs/make_scaling.py`, from the repository's root.

What was measured is read from docs/scaling_measured.json; what is assumed is in this file, by name.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from mnist_dist.benchmark.cost_model import (
    Device,
    Interconnect,
    Link,
    Mode,
    Prediction,
    Workload,
    amdahl_limit,
    doublings,
    efficiency,
    exact_reduction_s,
    fastest,
    fit_device,
    fit_link,
    last_paying,
    predict,
    ring_all_reduce_s,
    speed_up,
    tree_all_reduce_s,
)
from mnist_dist.results.png import add_grid, to_png

DOCS = Path(__file__).parent
PAGE = DOCS / "scaling.md"
PICTURE = DOCS / "images" / "scaling.png"
MEASURED = DOCS / "scaling_measured.json"
RECIPE = Workload()

# Assumptions about an H100 or H200 (nothing here was measured on one).
KERNELS_A_STEP = 80
SECONDS_A_LAUNCH = 5e-6
GPU_OVERHEAD_S = 15e-6  # Adam over 269,322 weights, the bucket's copies: a few small kernels' own time
FLOP_A_ROW = 60.2e9 / 49_500
GPU_FLOP_PER_S = 40e12  # 4 % of the peak of bfloat16: the matrices are small
ASSUMED_GPU = Device(
    launch_s=KERNELS_A_STEP * SECONDS_A_LAUNCH, overhead_s=GPU_OVERHEAD_S, rows_per_s=GPU_FLOP_PER_S / FLOP_A_ROW
)

# Assumptions about links: latency, and the share of the nominal bandwidth that a program sees.
BANDWIDTH_SHARE = 0.8
NVLINK = Link(alpha_s=2e-6, beta_s_per_byte=1 / (BANDWIDTH_SHARE * 450e9))
ETHERNET_ALPHA_S = 5e-6
BYTES = Link(alpha_s=0, beta_s_per_byte=1)  # on this link the formulas give bytes in place of seconds


def ethernet(gigabits_per_s: float) -> Link:
    """A network card of that many Gb/s."""
    return Link(alpha_s=ETHERNET_ALPHA_S, beta_s_per_byte=8 / (BANDWIDTH_SHARE * gigabits_per_s * 1e9))


FLAT = [Interconnect(f"{rate} Gb/s", ethernet(rate)) for rate in (100, 200, 400)]
NODES = Interconnect("nodes of 8, 400 Gb/s", ethernet(400), inside=NVLINK)
INTERCONNECTS = [Interconnect("NVLink", NVLINK), *FLAT, NODES]
NUMBERS = [1, 2, 4, 8, 16, 64, 256, 1024]
MODES: list[Mode] = ["strong", "weak"]

# Okabe-Ito: told apart with any colour vision; every line has its own marker too.
LOOKS = {
    "NVLink": ("#000000", "o"),
    "100 Gb/s": ("#D55E00", "s"),
    "200 Gb/s": ("#E69F00", "^"),
    "400 Gb/s": ("#0072B2", "D"),
    "nodes of 8, 400 Gb/s": ("#009E73", "v"),
}


def load_measured() -> dict[str, Any]:
    """Compute, all-reduces and epochs as measured on the machine that the page names."""
    measured: dict[str, Any] = json.loads(MEASURED.read_text())
    return measured


def measured_core() -> Device:
    """One CPU core."""
    return fit_device(load_measured()["compute"])


def times(device: Device, interconnect: Interconnect, mode: Mode) -> Callable[[int], Prediction]:
    """Predictions as a function of the number of replicas."""
    return lambda num_replicas: predict(device, interconnect=interconnect, mode=mode, num_replicas=num_replicas)


def epochs(device: Device, interconnect: Interconnect, mode: Mode) -> Callable[[int], float]:
    """Seconds of an epoch as a function of the number of replicas."""
    return lambda num_replicas: predict(device, interconnect=interconnect, mode=mode, num_replicas=num_replicas).epoch_s


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steps_table() -> str:
    """Microseconds per step on the assumed GPU."""
    rows = []
    for number in NUMBERS:
        cells = [
            " / ".join(f"{predict_gpu(interconnect, mode, number).step_s * 1e6:,.0f}" for mode in MODES)
            for interconnect in INTERCONNECTS
        ]
        rows.append([f"{number:,}", *cells])
    return table(["GPUs", *(interconnect.name for interconnect in INTERCONNECTS)], rows)


def predict_gpu(interconnect: Interconnect, mode: Mode, num_replicas: int) -> Prediction:
    """The assumed GPU with the recipe's workload."""
    return predict(ASSUMED_GPU, interconnect=interconnect, mode=mode, num_replicas=num_replicas)


def limits_table() -> str:
    """Where it stops paying off, for both devices."""
    rows = []
    for name, device, interconnects in (("GPU", ASSUMED_GPU, INTERCONNECTS), ("CPU core", measured_core(), FLAT)):
        for interconnect in interconnects:
            row = [f"{name}, {interconnect.name}"]
            for mode in MODES:
                at = times(device, interconnect, mode)
                last = last_paying(epochs(device, interconnect, mode))
                best = fastest(epochs(device, interconnect, mode))
                row += [f"{last:,}", f"{best:,}", f"{speed_up(at(1), at(best)):.1f}"]
            weak = times(device, interconnect, "weak")
            rows.append([*row, f"{100 * efficiency(weak(1), weak(64), mode='weak'):.0f} %"])
    header = ["", "strong: pays up to", "fastest", "speed-up there"]
    header += ["weak: pays up to", "fastest", "speed-up there", "efficiency at 64"]
    return table(header, rows)


def exact_table() -> str:
    """What the reduction sends and how long it takes, with reproducibility=fast and =exact."""
    size, rows = RECIPE.message_bytes, []
    for number in NUMBERS[1:]:
        exact = partial(exact_reduction_s, num_bytes=size, num_replicas=number, num_shards=NUMBERS[-1])
        fast = [partial(way, num_bytes=size, num_replicas=number) for way in (ring_all_reduce_s, tree_all_reduce_s)]
        sent = [fast[0](BYTES), exact(BYTES), exact(BYTES, has_all_to_all=False)]
        row = [f"{number:,}", *(f"{num_bytes / 1e6:,.2f}" for num_bytes in sent), f"{sent[1] / sent[0]:.2f}"]
        for interconnect in INTERCONNECTS[:-1]:
            row.append(" / ".join(f"{way(interconnect.link) * 1e6:,.0f}" for way in (*fast, exact)))
        rows.append(row)
    header = ["replicas", "MB sent: fast", "exact", "exact, gather only", "exact to fast"]
    return table([*header, *(f"{interconnect.name}, µs" for interconnect in INTERCONNECTS[:-1])], rows)


def assumptions() -> str:
    """The assumed numbers, as a list."""
    gpu = ASSUMED_GPU
    return "\n".join(
        [
            f"- GPU (H100 or H200): {KERNELS_A_STEP} kernels per step, {SECONDS_A_LAUNCH * 1e6:g} µs each to launch: "
            f"{gpu.launch_s * 1e6:.0f} µs; {gpu.overhead_s * 1e6:.0f} µs for the optimizer; "
            f"{GPU_FLOP_PER_S / 1e12:g} TFLOP/s on {FLOP_A_ROW / 1e6:.2f} MFLOP per row: "
            f"{512 / gpu.rows_per_s * 1e6:.0f} µs for 512 rows.",
            f"- NVLink: alpha {NVLINK.alpha_s * 1e6:g} µs; {BANDWIDTH_SHARE:.0%} of 450 GB/s in each direction. "
            "Beyond one NVLink domain (8 GPUs in a usual machine, 72 in a rack) this column is hypothetical.",
            f"- Interconnect: alpha {ETHERNET_ALPHA_S * 1e6:g} µs; {BANDWIDTH_SHARE:.0%} of the nominal rate; "
            "every GPU has its own card. One GPU per machine, or (last column) machines of 8 GPUs with NVLink inside.",
        ]
    )


def validation() -> str:
    """Predicted against measured, on the machine at hand."""
    core, rows = measured_core(), []
    for number, measured in enumerate(load_measured()["rounds"], start=1):
        link = fit_link(measured["all_reduce"])
        step = core.compute_s(256) + ring_all_reduce_s(link, num_bytes=RECIPE.message_bytes, num_replicas=2)
        predicted = RECIPE.steps_per_epoch("strong", num_replicas=2) * step
        (seen,) = (row["seconds"] for row in measured["all_reduce"] if row["bytes"] == RECIPE.message_bytes)
        rows.append(
            [
                f"{number}",
                f"{core.compute_s(256) * 1e3:.1f} ms",
                f"{link.alpha_s * 1e3:.1f} ms",
                f"{1e-9 / link.beta_s_per_byte:.1f} GB/s",
                f"{(step - core.compute_s(256)) * 1e3:.1f} / {seen * 1e3:.1f} ms",
                f"{predicted:.2f} s",
                f"{measured['epoch_s']:.2f} s",
                f"{100 * (predicted / measured['epoch_s'] - 1):+.0f} %",
            ]
        )
    header = ["round", "compute of 256 rows, fitted", "alpha", "1 / beta", "all-reduce of 1.08 MB, fitted / measured"]
    return table([*header, "epoch, predicted", "epoch, measured", "error"], rows)


def bounds() -> str:
    """What is left with a free interconnect."""
    return (
        f"Amdahl's limit (strong scaling, any number of replicas, a free interconnect): "
        f"{amdahl_limit(ASSUMED_GPU):.2f} times one GPU, {amdahl_limit(measured_core()):.0f} times one CPU core."
    )


PARTS: dict[str, Callable[[], str]] = {
    "assumptions": assumptions,
    "steps": steps_table,
    "limits": limits_table,
    "bounds": bounds,
    "exact": exact_table,
    "validation": validation,
}


def render(page: str) -> str:
    """The page with all parts between `<!-- NAME -->` and `<!-- end -->` replaced."""
    for name, make in PARTS.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        assert page.count(begin) == 1, f"{name}: not one place in {PAGE}"
        before, rest = page.split(begin)
        _, after = rest.split(end, maxsplit=1)
        page = f"{before}{begin}{make()}\n{end}{after}"
    return page


def draw() -> Figure:
    """Step time (strong) and rows per second (weak), of the assumed GPU and of the measured CPU core."""
    figure = Figure(figsize=(12, 9.5), dpi=105, layout="constrained")
    panels = figure.subplots(2, 2)
    core = measured_core()
    names = ("GPU (assumed, not measured)", "CPU core (measured), interconnect (assumed)")
    for row, device, interconnects, name in zip(panels, (ASSUMED_GPU, core), (INTERCONNECTS, FLAT), names, strict=True):
        _draw_strong(row[0], device, interconnects, f"{name}: strong scaling")
        _draw_weak(row[1], device, interconnects, f"{name}: weak scaling")
    for axes in panels[0]:
        _label_lines(axes, INTERCONNECTS)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=11, frameon=False)
    return figure


def _draw_strong(axes: Axes, device: Device, interconnects: Sequence[Interconnect], title: str) -> None:
    numbers = doublings()
    for interconnect in interconnects:
        at = times(device, interconnect, "strong")
        values = [1e6 * at(number).step_s for number in numbers]
        _draw_line(axes, interconnect, numbers, values)
        best = fastest(epochs(device, interconnect, "strong"))
        axes.plot(best, 1e6 * at(best).step_s, "o", color=LOOKS[interconnect.name][0], markersize=13, fillstyle="none")
    free = Interconnect("compute alone", Link(0, 0))
    values = [1e6 * times(device, free, "strong")(number).step_s for number in numbers]
    axes.plot(numbers, values, color="#777777", linestyle="--", linewidth=1.5, label="a free interconnect")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _set_axes(axes, title, "Step time, µs (a ring marks the minimum)")


def _draw_weak(axes: Axes, device: Device, interconnects: Sequence[Interconnect], title: str) -> None:
    numbers = doublings()
    for interconnect in interconnects:
        at = times(device, interconnect, "weak")
        values = [100 * efficiency(at(1), at(number), mode="weak") for number in numbers]
        _draw_line(axes, interconnect, numbers, values)
    axes.axhline(100, color="#777777", linestyle="--", linewidth=1.5)
    last = RECIPE.num_examples / RECIPE.batch_rows
    axes.axvline(last, color="#777777", linestyle=":", linewidth=1.5)
    note = "right of this line\none step is more\nthan an epoch"
    axes.text(last * 1.15, 0.04, note, transform=axes.get_xaxis_transform(), fontsize=10, color="#444444")
    _set_axes(axes, title, "Images per second and replica, % of one alone")
    axes.set_ylim(45, 103)


def _draw_line(axes: Axes, interconnect: Interconnect, numbers: Sequence[int], values: Sequence[float]) -> None:
    color, marker = LOOKS[interconnect.name]
    axes.plot(numbers, values, color=color, marker=marker, markersize=5, linewidth=1.8, label=interconnect.name)


def _label_lines(axes: Axes, interconnects: Sequence[Interconnect]) -> None:
    """Names at the lines' right ends."""
    lines = {line.get_label(): line for line in axes.lines}
    for interconnect in interconnects:
        numbers, values = (np.asarray(data) for data in lines[interconnect.name].get_data())
        axes.annotate(
            interconnect.name.replace(", ", ",\n"),
            xy=(numbers[-1], values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            annotation_clip=False,
            color=LOOKS[interconnect.name][0],
            fontsize=10,
            va="center",
        )


def _set_axes(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("Replicas", fontsize=11)
    axes.set_ylabel(label, fontsize=11)
    axes.xaxis.set_major_locator(FixedLocator(doublings()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    add_grid(axes)


def main() -> None:
    """Write the page's numbers and the picture."""
    PAGE.write_text(render(PAGE.read_text()))
    picture = to_png(draw)
    PICTURE.write_bytes(picture)
    print(f"{PAGE} and {PICTURE} ({len(picture) / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
