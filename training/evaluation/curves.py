"""Curves of a report that a reader points at and zooms into: what the page needs for them, with nothing from outside.

A curve is drawn by the browser, from its numbers; where scripts are off, its picture is shown.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence

from tasks.base import Chart
from training.checkpoints import json_text

Points = Sequence[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Curve(Chart):
    """A chart of values by step.

    Attributes:
      label: of the values.
      series: points by name, `train` first.
      log: whether the values have a logarithmic axis.
      zero: whether their axis begins at 0.
      percent: whether they are fractions, said in percent.
    """

    label: str = ""
    series: Mapping[str, Points] = dataclasses.field(default_factory=dict)
    log: bool = False
    zero: bool = False
    percent: bool = False


def figure(curve: Curve, picture: str) -> str:
    """The curve as HTML.

    Args:
      picture: the same as an element of HTML, for a browser without scripts.
    """
    values = {
        "label": curve.label,
        "log": curve.log,
        "zero": curve.zero,
        "percent": curve.percent,
        "series": [
            {"name": name, "points": [list(point) for point in points]} for name, points in curve.series.items()
        ],
    }
    # A script ends at the first </script, whatever it is in.
    content = json_text.text(values).replace("<", "\\u003c")
    title = html.escape(curve.title)
    return (
        f'<figure class="curve"><h3>{title}</h3><button type="button" hidden>whole curve</button>'
        f'<svg viewBox="0 0 500 290" role="img" aria-label="{title}"></svg><div class="said"></div>'
        f'<script type="application/json">{content}</script><noscript>{picture}</noscript></figure>'
    )


CSS = """
.curve { width: 500px; position: relative; }
.curve svg { display: block; width: 100%; height: auto; touch-action: pan-y; user-select: none; cursor: crosshair; }
.curve text { fill: var(--muted); font-size: 11.5px; }
.curve .axis { stroke: var(--line); }
.curve path { fill: none; stroke-width: 1.7; vector-effect: non-scaling-stroke; }
.curve .chosen { fill: var(--muted); opacity: 0.18; }
.curve button { position: absolute; right: 0; top: 0; font: inherit; font-size: 12.5px; color: var(--text);
  background: var(--back); border: 1px solid var(--line); border-radius: 4px; cursor: pointer; }
.curve .said { min-height: 42px; font-size: 13px; color: var(--muted); font-variant-numeric: tabular-nums; }
.curve .said b { font-weight: 600; color: var(--text); }
.curve .said span { display: inline-block; margin-right: 14px; overflow-wrap: anywhere; }
.curve .mark { display: inline-block; width: 9px; height: 9px; border-radius: 5px; margin-right: 5px; }
"""

SCRIPT = """
"use strict";
const WIDTH = 500, HEIGHT = 290, LEFT = 58, RIGHT = 22, TOP = 8, BOTTOM = 40;
const COLOURS = 8;

function element(parent, kind, attributes, text) {
  const made = document.createElementNS(parent.namespaceURI, kind);
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
    for (const factor of [1, 2, 5]) ticks.push(factor * 10 ** power);
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  return inside.length > 1 ? inside : linearTicks(low, high, 5);
}

function written(value, percent) {
  if (percent) return +(100 * value).toPrecision(4) + "%";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return size && size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
}

for (const host of document.querySelectorAll("figure.curve")) {
  const curve = JSON.parse(host.querySelector("script").textContent);
  const svg = host.querySelector("svg"), said = host.querySelector(".said"), whole = host.querySelector("button");
  for (const one of curve.series) one.points = one.points.filter((point) => point[1] !== null);
  const steps = [...new Set(curve.series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
  if (!steps.length) continue;
  const all = [steps[0], steps[steps.length - 1]];
  let range = all, across, down, begun = null, chosen = null;

  function draw() {
    const [first, last] = range[0] < range[1] ? range : [range[0] - 1, range[1] + 1];
    // What a line passes through on its way into the range and out of it is in view too.
    const seen = curve.series.flatMap((one) => one.points.filter((point, k) => {
      const before = one.points[k - 1], after = one.points[k + 1];
      return (point[0] >= first && point[0] <= last)
        || (after && point[0] < first && after[0] > first) || (before && point[0] > last && before[0] < last);
    }));
    const values = (seen.length ? seen : curve.series.flatMap((one) => one.points)).map((point) => point[1]);
    let low = Math.min(...values), high = Math.max(...values);
    const log = curve.log && low > 0;
    if (curve.zero) low = Math.min(0, low);
    if (low === high) { low -= Math.abs(low) * 0.1 || 1; high += Math.abs(high) * 0.1 || 1; }
    const scale = log ? Math.log10 : (value) => value;
    const room = 0.04 * (scale(high) - scale(low));
    const top = scale(high) + room, bottom = scale(low) - (curve.zero ? 0 : room);
    across = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first);
    down = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (top - scale(value)) / (top - bottom);
    svg.replaceChildren();
    const back = log ? [10 ** bottom, 10 ** top] : [bottom, top];
    for (const tick of log ? logTicks(...back) : linearTicks(...back, 5)) {
      element(svg, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: down(tick), y2: down(tick), class: "axis" });
      element(svg, "text", { x: LEFT - 6, y: down(tick) + 4, "text-anchor": "end" }, written(tick, curve.percent));
    }
    for (const tick of linearTicks(first, last, 6).filter(Number.isInteger)) {
      const text = tick.toLocaleString("en-US");
      element(svg, "text", { x: across(tick), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, text);
    }
    element(svg, "text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, "step");
    const middle = (TOP + HEIGHT - BOTTOM) / 2;
    const turned = { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` };
    element(svg, "text", turned, curve.label);
    const clip = "c" + Math.random().toString(36).slice(2);
    const box = { x: LEFT, y: 0, width: WIDTH - LEFT - RIGHT + 6, height: HEIGHT - BOTTOM + 4 };
    element(element(element(svg, "defs", {}), "clipPath", { id: clip }), "rect", box);
    const inside = element(svg, "g", { "clip-path": `url(#${clip})` });
    curve.series.forEach((one, k) => {
      const colour = `var(--series${k % COLOURS})`;
      const places = one.points.map((point) => across(point[0]) + " " + down(point[1]));
      element(inside, "path", { d: "M" + places.join("L"), style: `stroke: ${colour}` });
      if (one.points.length < 25 && (one.name !== "train" || one.points.length === 1))
        for (const point of one.points)
          element(inside, "circle", { cx: across(point[0]), cy: down(point[1]), r: 2.4, style: `fill: ${colour}` });
    });
    whole.hidden = range === all;
  }

  function legend() {
    tell(curve.series.map((one) => [one.name, null]), "");
  }

  function tell(rows, head) {
    said.replaceChildren();
    if (head) said.append(Object.assign(document.createElement("span"), { textContent: head }));
    rows.forEach(([name, value], k) => {
      if (value === undefined) return;
      const row = document.createElement("span"), mark = document.createElement("i");
      mark.className = "mark";
      mark.style.background = `var(--series${k % COLOURS})`;
      row.append(mark, name + " ");
      if (value !== null)
        row.append(Object.assign(document.createElement("b"), { textContent: written(value, curve.percent) }));
      said.append(row);
    });
  }

  function stepAt(event) {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * WIDTH;
    const share = (x - LEFT) / (WIDTH - LEFT - RIGHT), [first, last] = range;
    return first + Math.min(1, Math.max(0, share)) * (last - first);
  }

  function point(event) {
    const at = stepAt(event);
    const visible = steps.filter((step) => step >= range[0] && step <= range[1]);
    const nearest = (visible.length ? visible : steps).reduce((a, b) => Math.abs(b - at) < Math.abs(a - at) ? b : a);
    svg.querySelectorAll(".pointed").forEach((old) => old.remove());
    const x = across(nearest);
    element(svg, "line", { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM, class: "axis pointed" });
    const rows = curve.series.map((one, k) => {
      const found = one.points.find((value) => value[0] === nearest);
      const style = `fill: var(--series${k % COLOURS})`;
      if (found) element(svg, "circle", { cx: x, cy: down(found[1]), r: 4, style, class: "pointed" });
      return [one.name, found ? found[1] : undefined];
    });
    tell(rows, "step " + nearest.toLocaleString("en-US"));
    if (begun !== null) {
      const [from, to] = [begun, at].sort((a, b) => a - b);
      if (chosen) chosen.remove();
      const size = { x: across(from), width: across(to) - across(from), y: TOP, height: HEIGHT - TOP - BOTTOM };
      chosen = element(svg, "rect", { ...size, class: "chosen" });
    }
  }

  svg.addEventListener("pointerdown", (event) => {
    begun = stepAt(event);
    svg.setPointerCapture(event.pointerId);
    point(event);
  });
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerup", (event) => {
    const [from, to] = [begun, stepAt(event)].sort((a, b) => a - b);
    begun = null;
    chosen = null;
    if (across(to) - across(from) > 8 && steps.some((step) => step >= from && step <= to)) range = [from, to];
    draw();
  });
  svg.addEventListener("pointercancel", () => { begun = null; chosen = null; draw(); });
  svg.addEventListener("pointerleave", () => { if (begun === null) { draw(); legend(); } });
  const back = () => { range = all; draw(); legend(); };
  svg.addEventListener("dblclick", back);
  whole.addEventListener("click", back);
  draw();
  legend();
}
"""
