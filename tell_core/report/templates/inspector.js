// Draws the map of candidate quanta and the details of one.
(() => {
  const carried = JSON.parse(document.getElementById("carried").textContent);
  const { clusters, arms } = carried;
  const byId = (id) => document.getElementById(id);

  // What cannot be seen in a token is written out.
  const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "·") || "∅";

  function colour(cluster) {
    const task = (cluster.roles.task ?? 0) / cluster.size;
    return task === 1 ? "tell" : task === 0 ? "general" : "violet";
  }

  // ---- the map: when each quantum is learned, or by size where that is not known --------------

  const main = arms[0]?.name;
  const isOfTokens = clusters.some((cluster) => cluster.curves[main]?.of === "tokens");

  // When a quantum is learned: over the seeds where they were traced, else in this training alone.
  function timeOf(cluster) {
    const seeds = cluster.over_seeds ?? null;
    if (seeds) return { ...seeds, isLearned: seeds.num_learned === seeds.num_seeds, isNever: seeds.num_learned === 0 };
    const step = cluster.curves[main]?.learned_step ?? null;
    return { step, low: null, high: null, isLearned: step !== null, isNever: step === null };
  }
  const times = clusters.map(timeOf);
  const isTimeline = times.some((time) => !time.isNever);
  const hasSeeds = times.some((time) => (time.num_seeds ?? 1) > 1);
  const order = clusters.map((_, place) => place);
  if (isTimeline) {
    const key = (place) => (times[place].isNever ? Infinity : times[place].step);
    order.sort((a, b) => key(a) - key(b) || clusters[b].size - clusters[a].size);
  }

  const NARROW = 640; // below this width, in CSS pixels, the details lie below the map's screen
  const GAP = 4;
  const largest = Math.max(...clusters.map((cluster) => cluster.size));
  const radius = (place) => (isTimeline ? 3 + 6 * Math.sqrt(clusters[place].size / largest) : 4 + 16 * Math.sqrt(clusters[place].size / largest));

  // Circles in lines, the largest first, where nothing is known of time.
  function flowed(width) {
    const dots = [];
    let x = 2, y = 4, high = 0;
    for (const place of order) {
      const r = radius(place);
      if (x > 2 && x + 2 * r > width) { x = 2; y += high + GAP; high = 0; }
      dots.push({ place, x: x + r, y: y + r, radius: r });
      x += 2 * r + GAP;
      high = Math.max(high, 2 * r);
    }
    return { marks: [], dots, height: y + high + GAP };
  }

  // The Q sequence: a line for each quantum, the first learned at the top; across it the step.
  function sequence(width) {
    const never = 76, top = 22, left = 10;
    const last = Math.max(...arms.flatMap((arm) => clusters.flatMap((cluster) => cluster.curves[arm.name]?.steps ?? [])), ...times.map((time) => time.step ?? 0));
    const x = (step) => left + (width - never - left) * Math.log1p(step) / Math.log1p(last);
    const whiskers = [], dots = [];
    let y = top + 8;
    for (const place of order) {
      const time = times[place], r = radius(place);
      y += r + 1;
      if (time.low !== null && !time.isNever) {
        const end = time.high === null || time.high > last ? width - never : x(time.high);
        whiskers.push(drawn("line", { x1: x(time.low), x2: end, y1: y, y2: y, stroke: `var(--${colour(clusters[place])})`, "stroke-opacity": 0.5, class: "whisker" }));
      }
      dots.push({ place, x: time.isNever ? width - never / 2 : x(time.step), y, radius: r, isHollow: !time.isLearned });
      y += r + 1;
    }
    const ticks = [];
    let free = -Infinity;
    for (const step of [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000].filter((step) => step <= last)) {
      const words = `step ${step}`, half = 3.4 * words.length;
      ticks.push(drawn("line", { x1: x(step), x2: x(step), y1: top, y2: y + 6, stroke: "var(--grid)" }));
      if (x(step) - half < free || x(step) + half > width - never) continue;
      ticks.push(drawn("text", { x: Math.max(x(step), half), y: 14, "text-anchor": "middle" }, words));
      free = Math.max(x(step), half) + half + 8;
    }
    ticks.push(drawn("line", { x1: width - never + 4, x2: width - never + 4, y1: 2, y2: y + 6, stroke: "var(--muted)" }));
    ticks.push(drawn("text", { x: width - never / 2 + 2, y: 14, "text-anchor": "middle" }, "not learned"));
    return { marks: [...ticks, ...whiskers], dots, height: y + 10 };
  }

  // On a phone the map fills the screen, and what was asked for lies below it.
  function open(place) {
    show(place);
    if (innerWidth < NARROW) byId("detail").scrollIntoView({ block: "start" });
  }

  function circle(dot) {
    const cluster = clusters[dot.place];
    const made = drawn("circle", {
      cx: dot.x, cy: dot.y, r: dot.radius, fill: dot.isHollow ? "var(--sheet)" : `var(--${colour(cluster)})`, class: dot.isHollow ? "dot hollow" : "dot", style: `--own: var(--${colour(cluster)})`,
      tabindex: 0, role: "button", "data-place": dot.place, "aria-pressed": String(dot.place === current),
      "aria-label": `cluster ${cluster.label}, ${cluster.size} tokens`,
    });
    const outputs = cluster.outputs.map(([text]) => visible(text)).join(" ");
    made.append(drawn("title", {}, `cluster ${cluster.label}: ${cluster.size} tokens, ${outputs}`));
    made.addEventListener("click", () => open(dot.place));
    made.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(dot.place); }
    });
    return made;
  }

  function map() {
    const room = byId("drawing").getBoundingClientRect().width - 26;
    const width = Math.max(room, 240);
    const laid = isTimeline ? sequence(width) : flowed(width);
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${laid.height}`, role: "group" });
    svg.append(...laid.marks, ...laid.dots.map(circle));
    byId("drawing").replaceChildren(svg);
  }

  function describeMap() {
    byId("map-title").textContent = isTimeline ? "The Q sequence" : "Clusters by size";
    byId("map-words").textContent = isTimeline
      ? `Each line is a candidate quantum, from the first learned (top) to the last: its circle stands where the loss of its ${isOfTokens ? "tokens" : "items"} under ${main} is first at most half of what it was before training${hasSeeds ? ", mean and 95 % interval over the seeds" : " (this training alone)"}. Hollow: not learned in every training. At the right are those that never get there, and those none of whose tokens was traced.`
      : "Each circle is a candidate quantum, the largest first. When they were learned is not known: there is no loss trace of their tokens.";
  }

  // ---- the details of one ----------------------------------------------------------------------

  function curves(cluster) {
    const found = arms.filter((arm) => cluster.curves[arm.name]);
    const block = element("div");
    block.append(element("h3", "", "Loss over training"));
    if (!found.length) {
      block.append(element("p", "note", "No probe item holds one of these tokens (test items are not probed), so there is no curve."));
      return block;
    }
    const width = 560, height = 250, left = 46, bottom = 34;
    const all = found.map((arm) => cluster.curves[arm.name]);
    const lastStep = Math.max(...all.flatMap((curve) => curve.steps));
    const most = Math.max(...all.flatMap((curve) => curve.losses), 1e-6);
    const x = (step) => left + (width - left - 12) * Math.log1p(step) / Math.log1p(lastStep);
    const y = (loss) => 10 + (height - bottom - 10) * (1 - loss / most);
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "loss over training steps" });
    for (const share of [0, 0.5, 1]) {
      svg.append(drawn("line", { x1: left, x2: width - 12, y1: y(share * most), y2: y(share * most), stroke: "var(--grid)" }));
      svg.append(drawn("text", { x: left - 6, y: y(share * most) + 4, "text-anchor": "end" }, (share * most).toPrecision(2)));
    }
    for (const step of new Set([0, 10, 100, 1000, lastStep].filter((step) => step <= lastStep))) {
      if (step !== lastStep && x(lastStep) - x(step) < 45) continue;
      svg.append(drawn("text", { x: x(step), y: height - 14, "text-anchor": step === lastStep ? "end" : "middle" }, String(step)));
    }
    svg.append(drawn("text", { x: (left + width) / 2, y: height - 1, "text-anchor": "middle" }, "optimiser steps (log)"));
    const legend = element("ul", "legend");
    for (const arm of found) {
      const curve = cluster.curves[arm.name];
      const points = curve.steps.map((step, place) => `${x(step)},${y(curve.losses[place])}`).join(" ");
      svg.append(drawn("polyline", { points, fill: "none", stroke: `var(--${arm.colour})`, "stroke-width": 2, "stroke-dasharray": arm.dashes.join(" ") }));
      const key = element("li");
      const swatch = element("span", "swatch");
      swatch.style.background = `var(--${arm.colour})`;
      const isLost = curve.losses[curve.losses.length - 1] > curve.losses[0] / 2;
      const when = curve.was_known ? "known before" : curve.learned_step === null ? "not learned" : `learned at step ${curve.learned_step}${isLost ? ", lost again" : ""}`;
      key.append(swatch, document.createTextNode(`${arm.name}: ${when}`));
      legend.append(key);
    }
    const holder = element("div", "map");
    holder.append(svg);
    const of = all[0].of === "tokens" ? `mean loss in nats of ${all[0].num} traced tokens of this cluster` : `mean loss in nats per token of the ${all[0].num} probe items these tokens stand in`;
    block.append(legend, holder, element("p", "caption", of));
    return block;
  }

  function contexts(cluster) {
    const block = element("div");
    block.append(element("h3", "", `Tokens in context (${Math.min(cluster.tokens.length, cluster.size)} of ${cluster.size}, the most typical first)`));
    const list = element("ul", "contexts");
    for (const token of cluster.tokens) {
      const line = element("li");
      line.append(element("small", "", `${token.item} · ${token.role} · loss ${token.loss.toPrecision(2)}`));
      line.append(document.createTextNode(token.before), element("mark", "", token.token), element("span", "rest", token.after));
      list.append(line);
    }
    block.append(list);
    return block;
  }

  function pushed(cluster) {
    const block = element("div", "whole");
    block.append(element("h3", "", "General examples whose gradients push it"));
    if (!cluster.pushed_by.length) {
      block.append(element("p", "note", "None: the model was not trained with general data, or no example's gradient points this way."));
      return block;
    }
    const list = element("ul", "contexts");
    for (const example of cluster.pushed_by) {
      const line = element("li");
      line.append(element("small", "", `cosine with the cluster's mean gradient ${example.push.toFixed(2)}`));
      line.append(element("span", "rest", example.prompt), element("mark", "", example.response));
      list.append(line);
    }
    block.append(list);
    return block;
  }

  function whenLearned(place) {
    const time = times[place], at = order.indexOf(place) + 1;
    if (!isTimeline || time.isNever) return "Not learned, or not traced.";
    const seeds = time.num_seeds ? `, in ${time.num_learned} of ${time.num_seeds} seeds` : "";
    const ends = time.low === null ? "" : ` (${time.low.toFixed(0)} to ${time.high === null ? "∞" : time.high.toFixed(0)})`;
    return `Place ${at} of ${order.length} in the Q sequence: learned at step ${time.step.toFixed(0)}${ends} under ${main}${seeds}.`;
  }

  function show(place) {
    const cluster = clusters[place];
    for (const dot of document.querySelectorAll(".dot")) dot.setAttribute("aria-pressed", String(Number(dot.dataset.place) === place));
    const roles = Object.entries(cluster.roles).map(([role, count]) => `${count} ${role}`).join(", ");
    const head = element("div", "whole");
    head.append(element("h2", "", `Cluster ${cluster.label}`));
    head.append(element("p", "", `${cluster.size} tokens (${roles}) in ${cluster.num_items} items; mean loss ${cluster.mean_loss.toPrecision(2)} nats; mean cosine with the cluster's middle ${cluster.cohesion.toFixed(2)}.`));
    head.append(element("p", "note", whenLearned(place)));
    const outputs = element("ul", "outputs");
    for (const [text, count] of cluster.outputs) outputs.append(element("li", "", `${visible(text)} × ${count}`));
    head.append(outputs);
    if (cluster.skills.length) head.append(element("p", "note", "Asked for: " + cluster.skills.map(([name, count]) => `${name} (${count})`).join(", ")));
    byId("detail").replaceChildren(head, contexts(cluster), curves(cluster), pushed(cluster));
    byId("place").textContent = `${order.indexOf(place) + 1} of ${order.length}`;
    current = place;
  }

  function move(by) {
    const at = order.indexOf(current) + by;
    if (at >= 0 && at < order.length) show(order[at]);
  }

  let current = order[0];
  if (clusters.length) {
    describeMap();
    map();
    show(current);
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; map(); } });
    byId("previous").addEventListener("click", () => move(-1));
    byId("next").addEventListener("click", () => move(1));
  } else {
    byId("map-title").textContent = "No candidate quanta";
    byId("map-words").textContent = "Every cluster is a single token: no two tokens were put together, so there is nothing to draw.";
    for (const part of document.querySelectorAll("#map .legend, #drawing, .steps")) part.remove();
  }
})();
