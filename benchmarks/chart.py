"""Bar chart of the burst: `python -m benchmarks.chart RUNS CHART.svg`. RUNS is the output of the peers' `run.py`."""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

ENGINE_NAMES = {
    "payready": "payready",
    "payready_before": "payready, before 0013",
    "restate": "Restate",
    "celery_block": "Celery, a task that blocks",
    "celery_poll": "Celery, a task that polls",
    "dbos": "DBOS",
}
ROW, LEFT, WIDTH = 34, 200, 760
SVG_HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="14">'
    '<rect width="100%" height="100%" fill="white"/>'
    '<text x="{left}" y="24" font-weight="bold">CPU seconds for 1,000 payments in a burst (less is better)</text>'
)
SVG_BAR = (
    '<text x="{x}" y="{y}" text-anchor="end">{name}</text>'
    '<rect x="{left}" y="{top}" width="{length:.0f}" height="20" fill="{colour}"/>'
    '<text x="{end:.0f}" y="{y}">{cpu:.1f} s, {rate:.0f} payments per second</text>'
)


def draw_chart(runs: Path) -> str:
    """Return the chart as SVG, with the medians of all rounds."""
    rounds = defaultdict[str, list[tuple[float, float]]](list)
    for line in runs.read_text().splitlines():
        run = json.loads(line)
        if run.get("mode") == "burst" and "sut" in run:
            rounds[run["sut"]].append((run["cpu_s_per_1000"], run["payments_per_s"]))
    medians = {
        name: [statistics.median(column) for column in zip(*results, strict=True)] for name, results in rounds.items()
    }
    scale = (WIDTH - LEFT - 230) / max(cpu for cpu, _ in medians.values())
    parts = [SVG_HEAD.format(width=WIDTH, height=ROW * (len(medians) + 1) + 20, left=LEFT)]
    for row, name in enumerate(sorted(medians, key=lambda name: medians[name][0]), start=1):
        cpu, rate = medians[name]
        top, length = ROW * row + 6, cpu * scale
        colour = "#1f6f5c" if name == "payready" else "#b9c4c9"
        place = {"x": LEFT - 10, "y": top + 15, "left": LEFT, "top": top, "length": length, "end": LEFT + length + 8}
        parts.append(SVG_BAR.format(name=ENGINE_NAMES[name], colour=colour, cpu=cpu, rate=rate, **place))
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw_chart(Path(sys.argv[1])))
