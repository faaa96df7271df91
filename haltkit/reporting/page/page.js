"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const palette = ["#1f6fb2", "#d17a00", "#2e8b57", "#8e44ad", "#c0392b", "#555555", "#b59f00", "#008b9a"];
const symbols = ["circle", "square", "diamond", "triangle-up", "triangle-down", "star", "cross", "x"];
const dashes = ["solid", "dash", "dashdot", "dot"];
const config = { responsive: true, displayModeBar: false };
const layout = (more) => Object.assign({ margin: { l: 56, r: 12, t: 12, b: 48 }, hovermode: "closest",
  paper_bgcolor: "#fff", plot_bgcolor: "#fff", font: { size: 12 },
  legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 }, traceorder: "normal" } }, more);
const stepAxis = (last) => axis("loop step k", { range: [0.5, last + 0.5] });
const ordered = (found) => data.regions.filter((name) => Object.hasOwn(found, name));
const axis = (title, more) => Object.assign({ title: { text: title, standoff: 10 }, gridcolor: "#eceff3", zeroline: false,
  linecolor: "#9aa4b1", automargin: true }, more);
const logAxis = (title) => axis(title, { type: "log", exponentformat: "power", dtick: undefined, nticks: 8 });
const range = (n, first) => Array.from({ length: n }, (_, i) => i + first);
const show = (id) => { $(id).hidden = false; };
// Plotly reads a little HTML in its labels: what comes from the results is text and nothing else.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const element = (tag, text, more) => Object.assign(document.createElement(tag), { textContent: text ?? "" }, more);

// A logarithmic axis whose ticks are 1, 2 and 5 times the powers of ten, each written in full.
function timeTicks(times) {
  const tickvals = [];
  for (let power = Math.floor(Math.log10(Math.min(...times))); power <= Math.log10(Math.max(...times)); power++)
    for (const first of [1, 2, 5]) tickvals.push(Number((first * 10 ** power).toPrecision(1)));
  return { type: "log", tickmode: "array", tickvals, ticktext: tickvals.map(String) };
}

function heading() {
  document.title = data.title;
  $("title").textContent = data.title;
  $("about").textContent = data.about;
  $("partial").hidden = !data.partial;
  $("missing").hidden = data.comparison !== null;
}

function tradeoff(found) {
  if (!found) return;
  show("tradeoff-part");
  const { rows, level, unit, item } = found, metric = plain(found.metric);
  const text = found.metric === "CE" ? "cross-entropy" : found.metric;
  $("band").textContent = `within ${level} ${unit}`;
  $("close-level").textContent = `what is within ${2 * level} ${unit}`;
  const names = [...new Set(rows.map((r) => r.policy))];
  const traces = names.map((name, i) => {
    const own = rows.filter((r) => r.policy === name).sort((a, b) => a.ms - b.ms);
    return { name: name === "fixed" ? "fixed depth" : plain(name), mode: "lines+markers", x: own.map((r) => r.ms),
      y: own.map((r) => r.delta), line: { color: palette[i % 8], dash: dashes[i % 4] },
      marker: { symbol: symbols[i % 8], size: 9 },
      error_y: { type: "data", array: own.map((r) => 2 * (r.delta_se || 0)), thickness: 1, width: 3 },
      text: own.map((r) => `<b>${plain(r.setting)}</b><br>tau ${r.tau === null ? "none" : r.tau.toPrecision(3)}` +
        `<br>steps ${Object.entries(r.steps).map(([k, v]) => `${plain(k)}: ${v.toFixed(1)}`).join(", ")}` +
        `<br>${metric} ${r.loss.toFixed(4)} (${r.delta >= 0 ? "+" : ""}${r.delta.toFixed(4)})` +
        `<br>${r.ms.toFixed(3)} ms/${plain(item)}, ${r.speedup.toFixed(2)}x`),
      hovertemplate: "%{text}<extra></extra>" };
  });
  Plotly.newPlot("tradeoff", traces, layout({ xaxis: axis(`time (ms per ${plain(item)})`, timeTicks(rows.map((r) => r.ms))),
    yaxis: axis(plain(`${text} above full depth (${unit})`)),
    shapes: [{ type: "rect", xref: "paper", x0: 0, x1: 1, y0: -level, y1: level, fillcolor: "#e8ecf1", line: { width: 0 },
      layer: "below" }] }), config);
  $("close").addEventListener("change", (event) => Plotly.relayout("tradeoff", event.target.checked
    ? { "yaxis.range": [-2 * level, 2 * level] } : { "yaxis.autorange": true }));
}

function geometry(models) {
  show("geometry-part");
  const signals = [["step_norm", "step norm ‖d<sub>k</sub>‖", true], ["cosine", "cos(d<sub>k</sub>, d<sub>k-1</sub>)", false]];
  const boxes = [];
  for (const [signal, title, log] of signals) {
    for (const name of ordered(models.trained)) {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      const box = document.createElement("div");
      caption.textContent = `region ${name}`;
      box.className = "plot";
      box.id = `${signal}-${name}`;
      figure.append(caption, box);
      $("geometry").append(figure);
      boxes.push([box, name, signal, title, log]);
    }
  }
  // Drawn only now: a plot takes the width that its box has among all the others.
  for (const [box, name, signal, title, log] of boxes) {
    const traces = [];
    let last = 1;
    Object.entries(models).forEach(([model, found], i) => {
      if (!Object.hasOwn(found, name)) return;
      const region = found[name];
      const mean = region[`${signal}_mean`] || [], std = region[`${signal}_std`] || mean, k = range(mean.length, 1);
      last = mean.length;
      if (model === "trained") {
        const low = mean.map((v, j) => v === null ? null : log ? Math.max(v - std[j], v / 10) : v - std[j]);
        const high = mean.map((v, j) => v === null ? null : v + std[j]);
        traces.push({ x: k, y: low, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false });
        traces.push({ x: k, y: high, mode: "lines", line: { width: 0 }, fill: "tonexty", hoverinfo: "skip",
          fillcolor: "rgba(31,111,178,.18)", name: "1 sigma" });
      }
      traces.push({ x: k, y: mean, mode: "lines+markers", name: model === "trained" ? "this model" : model,
        marker: { size: 4 }, line: { color: i ? "#555" : palette[0], dash: i ? "dot" : "solid" },
        hovertemplate: "k = %{x}: %{y:.4g}<extra></extra>" });
    });
    const floor = models.trained[name].floor;
    const shapes = log && floor ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: floor, y1: floor,
      line: { dash: "dash", width: 1, color: "#888" } }] : [];
    const yaxis = log ? logAxis(title) : axis(title, { range: [-1.05, 1.05] });
    Plotly.newPlot(box, traces, layout({ xaxis: stepAxis(last), yaxis, shapes }), config);
  }
}

function paths(found) {
  if (!found) return;
  show("paths-part");
  const loops = found.segments.filter((s) => s.loop);
  const last = Math.max(...loops.map((s) => s.points[0].length)) - 1;
  const label = (t) => plain(`${found.positions[t]}: ${JSON.stringify(found.text[t])}`);
  const tokens = range(found.positions.length, 0);
  const whole = tokens.map((t) => {
    const line = found.segments.flatMap((s) => s.points[t]);
    return { x: line.map((p) => p[0]), y: line.map((p) => p[1]), mode: "lines", line: { color: "#c6ccd4", width: 1 },
      hoverinfo: "skip", showlegend: false };
  });
  const keys = loops.map((segment, i) => ({ x: [null], y: [null], mode: "markers", name: plain(`region ${segment.name}`),
    marker: { color: palette[i % 8], symbol: symbols[i % 8], size: 9 } }));
  const [first, second] = found.explained;
  const look = layout({ xaxis: axis(`component 1 (${(100 * first).toFixed(0)}% of the variance)`),
    yaxis: axis(`component 2 (${(100 * second).toFixed(0)}%)`), uirevision: "keep" });
  const draw = (k) => {
    const dots = loops.map((segment, i) => {
      const x = [], y = [], text = [], opacity = [], size = [];
      tokens.forEach((t) => segment.points[t].slice(0, k + 1).forEach((p, step) => {
        const now = step === Math.min(k, segment.points[t].length - 1);
        x.push(p[0]); y.push(p[1]); text.push(`${label(t)}<br>region ${plain(segment.name)}, step ${step}`);
        opacity.push(now ? 1 : 0.25 + 0.5 * step / last); size.push(now ? 11 : 6);
      }));
      return { x, y, text, mode: "markers", showlegend: false, hovertemplate: "%{text}<extra></extra>",
        marker: { color: palette[i % 8], symbol: symbols[i % 8], opacity, size } };
    });
    $("step-value").textContent = k;
    return Plotly.react("paths", [...whole, ...dots, ...keys], look, config);
  };
  const slider = $("step");
  slider.max = last;
  slider.value = last;
  slider.addEventListener("input", () => draw(Number(slider.value)));
  draw(last);
}

function blue(share) {
  const light = [239, 246, 252], dark = [12, 54, 104];
  return light.map((v, i) => Math.round(v + (dark[i] - v) * share));
}

function tokens(found) {
  if (!found) return;
  show("tokens-part");
  const policies = Object.keys(found.steps), regions = ordered(found.curves);
  for (const [id, names] of [["policy", policies], ["region", regions]]) {
    $(id).replaceChildren(...names.map((name) => new Option(name, name)));
    $(id).addEventListener("change", () => paint());
  }
  $("how").textContent = found.how === "native" ? "Steps are those the model itself took, halting token by token."
    : "Steps are replayed from a recording at full depth, which is exact only where tokens do not look at each other.";
  const spans = found.text.map((text, i) => {
    const span = element("span", text.replace(/\n/g, "⏎\n") || "·", { tabIndex: 0 });
    for (const event of ["mouseenter", "focus", "click"]) span.addEventListener(event, () => look(i));
    return span;
  });
  $("tokens").replaceChildren(...spans);
  let chosen = 0, bounds = [0, 1];
  const paint = () => {
    const steps = found.steps[$("policy").value][$("region").value];
    bounds = [Math.min(...steps), Math.max(...steps)];
    steps.forEach((s, i) => {
      const share = bounds[1] > bounds[0] ? (s - bounds[0]) / (bounds[1] - bounds[0]) : 0;
      spans[i].style.background = `rgb(${blue(share)})`;
      spans[i].style.color = share > 0.5 ? "#fff" : "#1c2430";
      spans[i].title = `${s} steps`;
      spans[i].dataset.steps = s;
    });
    $("least").textContent = `${bounds[0]} steps`;
    $("most").textContent = `${bounds[1]} steps`;
    look(chosen);
  };
  const look = (i) => {
    spans[chosen].classList.remove("on");
    chosen = i;
    spans[i].classList.add("on");
    const region = $("region").value, policy = $("policy").value, steps = found.steps[policy][region][i];
    const traces = [["step_norm", "step norm"], ["acceleration", "acceleration"]].map(([key, name], j) => ({
      x: range(found.loops, 1), y: found.curves[region][key][i], name, mode: "lines+markers", marker: { size: 5, symbol: symbols[j] },
      line: { color: palette[j], dash: dashes[j] }, hovertemplate: `${name} at %{x}: %{y:.3g}<extra></extra>` }));
    $("token").textContent = `Position ${i}, ${JSON.stringify(found.text[i])}: ${steps} steps in region ${region}.`;
    return Plotly.react("curve", traces, layout({ xaxis: stepAxis(found.loops), yaxis: logAxis("norm"),
      shapes: [{ type: "line", x0: steps, x1: steps, yref: "paper", y0: 0, y1: 1, line: { color: "#d1495b", dash: "dash" } }] }),
      config);
  };
  paint();
}

function unfolding(found) {
  if (!found) return;
  show("unfolding-part");
  $("problem").textContent = found.title;
  const last = found.answers.length, latest = Math.max(...found.settled, 1), slider = $("unfolded"), box = $("cells");
  box.style.gridTemplateColumns = `repeat(${found.columns}, minmax(2.4rem, max-content))`;
  let chosen = found.settled.indexOf(latest), timer = null;
  const cells = found.cells.map((text, i) => {
    const cell = element("button", "", { type: "button", disabled: !found.asked[i] });
    cell.addEventListener("click", () => { chosen = i; draw(Number(slider.value)); });
    return cell;
  });
  box.replaceChildren(...cells);
  const queries = found.cells.some((text, i) => found.asked[i] && text.length > 1);
  const draw = (k) => {
    $("unfolded-value").textContent = `${k} of ${last}`;
    found.answers[k - 1].forEach((answer, i) => {
      const settled = found.asked[i] && k >= found.settled[i], share = found.settled[i] / latest, cell = cells[i];
      cell.textContent = found.asked[i] && queries ? `${found.cells[i]} ${answer}` : answer;
      cell.className = !found.asked[i] ? "given" : settled ? "settled" : "open";
      cell.style.background = settled ? `rgb(${blue(share)})` : "";
      cell.style.color = settled && share > 0.5 ? "#fff" : "";
      cell.dataset.settled = found.settled[i];
      if (i === chosen) cell.classList.add("on");
    });
    const course = found.answers.slice(0, k).map((answers) => answers[chosen]);
    const moves = course.filter((answer, step) => step === 0 || answer !== course[step - 1]);
    const query = queries ? `${found.cells[chosen]} ` : "";
    $("path").textContent = `${query}${moves.join(" → ")}: settles at step ${found.settled[chosen]} of ${last}, ` +
      (found.answers[last - 1][chosen] === found.right[chosen] ? "right." : `not right (${found.right[chosen]}).`);
  };
  const stop = () => { clearInterval(timer); timer = null; $("play").textContent = "play"; };
  const go = (k) => { slider.value = k; draw(k); };
  $("play").addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (Number(slider.value) >= latest) go(1);
    $("play").textContent = "stop";
    timer = setInterval(() => { const k = Number(slider.value); if (k >= latest) stop(); else go(k + 1); }, 400);
  });
  slider.max = last;
  slider.addEventListener("input", () => { stop(); draw(Number(slider.value)); });
  go(Math.min(latest, last));
}

function claims(found) {
  if (!found.length) return;
  show("claims-part");
  $("claims").replaceChildren(...found.map((one) => {
    const claim = element("td", one.text, { title: one.rule }), row = document.createElement("tr");
    if (one.reason) claim.append(element("br"), element("span", one.reason, { className: "soft" }));
    const cells = ["measured", "untrained"].map((key) => element("td", one[key]));
    ["measured", "untrained"].forEach((key, i) => { cells[i].dataset.name = key; });
    row.append(element("td", one.name), claim, ...cells,
      element("td", one.ruling.replace(" at this scale", ""), { className: `ruling ${one.ruling.split(" ")[0]}` }));
    return row;
  }));
}

heading();
for (const [draw, found] of [[tradeoff, data.comparison], [geometry, data.geometry], [paths, data.paths],
  [unfolding, data.unfolding], [tokens, data.tokens], [claims, data.claims]]) {
  try { draw(found); } catch (error) {  // of results that were edited; the other parts can still be looked at
    $("about").after(element("p", `The part "${draw.name}" cannot be shown: ${error.message}`, { className: "note" }));
  }
}
document.body.dataset.ready = "yes";
