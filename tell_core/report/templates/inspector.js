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
  const learnedStep = (cluster) => cluster.curves[main]?.learned_step ?? null;
  const isTimeline = clusters.some((cluster) => learnedStep(cluster) !== null);
  const isOfTokens = clusters.some((cluster) => cluster.curves[main]?.of === "tokens");
  const order = clusters.map((_, place) => place);
  if (isTimeline) {
    const key = (place) => learnedStep(clusters[place]) ?? Infinity;
    order.sort((a, b) => key(a) - key(b) || clusters[b].size - clusters[a].size);
  }

  const NARROW = 640; // below this width, in CSS pixels, points in time stand below one another
  const GAP = 4;
  const largest = Math.max(...clusters.map((cluster) => cluster.size));
  const radius = (place) => 4 + 16 * Math.sqrt(clusters[place].size / largest);

  // Groups of the map with their words: a point in time each, or everything in one.
  function groups() {
    if (!isTimeline) return [["", order]];
    const steps = order.map((place) => learnedStep(clusters[place])).filter((step) => step !== null);
    const slots = [...new Set(steps), null];
    return slots.map((step) => [
      step === null ? "not learned" : `step ${step}`,
      order.filter((place) => learnedStep(clusters[place]) === step),
    ]);
  }

  // Circles in lines of at most `room`, from (left, top) on, and where the last line ends.
  function flowed(places, left, top, room) {
    const dots = [];
    let x = left, y = top, high = 0;
    for (const place of places) {
      const r = radius(place);
      if (x > left && x + 2 * r > left + room) { x = left; y += high + GAP; high = 0; }
      dots.push({ place, x: x + r, y: y + r, radius: r });
      x += 2 * r + GAP;
      high = Math.max(high, 2 * r);
    }
    return { dots, bottom: y + high };
  }

  function side(width) {
    const found = groups(), room = width / found.length;
    const laid = found.map(([, places], column) => flowed(places, column * room + 10, 10, room - 16));
    const bottom = Math.max(...laid.map((group) => group.bottom)) + 10;
    const marks = found.flatMap(([words], column) => words && [
      drawn("line", { x1: column * room + 2, x2: column * room + 2, y1: 2, y2: bottom, stroke: "var(--grid)" }),
      drawn("text", { x: column * room + 6, y: bottom + 14 }, words),
    ]);
    return { marks, dots: laid.flatMap((group) => group.dots), height: bottom + 20 };
  }

  function stacked(width) {
    const marks = [], dots = [];
    let top = 0;
    for (const [words, places] of groups()) {
      if (words) marks.push(drawn("text", { x: 2, y: top + 16 }, words));
      const group = flowed(places, 2, top + (words ? 24 : 4), width - 4);
      dots.push(...group.dots);
      top = group.bottom + 10;
      marks.push(drawn("line", { x1: 0, x2: width, y1: top, y2: top, stroke: "var(--grid)" }));
    }
    return { marks, dots, height: top + 2 };
  }

  // On a phone the map fills the screen, and what was asked for lies below it.
  function open(place) {
    show(place);
    if (innerWidth < NARROW) byId("detail").scrollIntoView({ block: "start" });
  }

  function circle(dot) {
    const cluster = clusters[dot.place];
    const made = drawn("circle", {
      cx: dot.x, cy: dot.y, r: dot.radius, fill: `var(--${colour(cluster)})`, class: "dot",
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
    const laid = width < NARROW ? stacked(width) : side(width);
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${laid.height}`, role: "group" });
    svg.append(...laid.marks.filter(Boolean), ...laid.dots.map(circle));
    byId("drawing").replaceChildren(svg);
  }

  function describeMap() {
    byId("map-title").textContent = isTimeline ? "The Q sequence" : "Clusters by size";
    byId("map-words").textContent = isTimeline
      ? `Each circle is a candidate quantum, at the probe of arm ${main} at which the loss of its ${isOfTokens ? "tokens" : "items"} first is at most half of what it was before training. Those at the end never get there, or none of their tokens was traced.`
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
      const when = curve.was_known ? "known before" : curve.learned_step === null ? "not learned" : `learned at step ${curve.learned_step}`;
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

  function show(place) {
    const cluster = clusters[place];
    for (const dot of document.querySelectorAll(".dot")) dot.setAttribute("aria-pressed", String(Number(dot.dataset.place) === place));
    const roles = Object.entries(cluster.roles).map(([role, count]) => `${count} ${role}`).join(", ");
    const head = element("div", "whole");
    head.append(element("h2", "", `Cluster ${cluster.label}`));
    head.append(element("p", "", `${cluster.size} tokens (${roles}) in ${cluster.num_items} items; mean loss ${cluster.mean_loss.toPrecision(2)} nats; mean cosine with the cluster's middle ${cluster.cohesion.toFixed(2)}.`));
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
