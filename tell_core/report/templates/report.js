// Browses the items and saves the figures.
(() => {
  const PAGE_SIZE = 10;
  const carried = JSON.parse(document.getElementById("carried").textContent);

  // ---- figures as files -------------------------------------------------------------------

  function wrapped(text, width) {
    const lines = [""];
    for (const word of text.split(" ")) {
      const last = lines[lines.length - 1];
      if (last && last.length + word.length >= width) lines.push(word);
      else lines[lines.length - 1] = last ? `${last} ${word}` : word;
    }
    return lines;
  }

  function heading(figure, width) {
    const parts = [];
    let top = 16;
    const font = "fill:var(--ink);font-family:var(--sans)";
    for (const line of wrapped(figure.querySelector(".title")?.textContent ?? "", width / 7.2)) {
      parts.push(drawn("text", { x: 6, y: top, style: `${font};font-size:11px;font-weight:600` }, line));
      top += 15;
    }
    const group = figure.closest(".panel-group") ?? figure;
    const labels = new Set(carried.legends[figure.dataset.figure]);
    let left = 6;
    for (const key of group.querySelectorAll(":scope > .legend > li")) {
      const label = key.textContent.trim();
      if (!labels.has(label)) continue;
      const needed = 46 + 6 * label.length;
      if (left > 6 && left + needed > width) { left = 6; top += 15; }
      const sign = key.querySelector("svg").cloneNode(true);
      for (const [name, value] of [["x", left], ["y", top - 9], ["width", 34], ["height", 10]]) {
        sign.setAttribute(name, value);
      }
      parts.push(sign, drawn("text", { x: left + 40, y: top, style: `${font};font-size:10px` }, label));
      left += needed + 8;
    }
    return { parts, height: left > 6 ? top + 8 : top - 6 };
  }

  function composed(figure, themes) {
    const inner = figure.querySelector(".drawing svg").cloneNode(true);
    const [, , width, height] = inner.getAttribute("viewBox").split(" ").map(Number);
    const top = heading(figure, width);
    const whole = drawn("svg", {
      viewBox: `0 0 ${width} ${height + top.height}`, width, height: height + top.height,
    });
    whole.append(
      drawn("title", {}, figure.querySelector(".drawing").getAttribute("aria-label")),
      drawn("style", {}, `${themes} svg *{stroke-linejoin:round;stroke-linecap:butt}`),
      drawn("rect", { width: "100%", height: "100%", fill: "var(--paper)" }),
    );
    for (const [name, value] of [["x", 0], ["y", top.height], ["width", width], ["height", height]]) {
      inner.setAttribute(name, value);
    }
    inner.setAttribute("overflow", "visible");
    whole.append(...top.parts, inner);
    return { text: new XMLSerializer().serializeToString(whole), width, height: height + top.height };
  }

  function svgBlob(text) {
    return new Blob([text], { type: "image/svg+xml" });
  }

  async function pngBlob(figure) {
    const { text, width, height } = composed(figure, `:root{${carried.light} --sans: ${carried.fonts};}`);
    const address = URL.createObjectURL(svgBlob(text));
    try {
      const image = new Image();
      image.src = address;
      await image.decode();
      const canvas = element("canvas");
      const scale = 2.4;
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      return await new Promise((done) => canvas.toBlob(done, "image/png"));
    } finally {
      URL.revokeObjectURL(address);
    }
  }

  async function figureBlob(figure, format) {
    if (format === "csv") {
      return new Blob([carried.figures[figure.dataset.figure]], { type: "text/csv" });
    }
    if (format === "png") return pngBlob(figure);
    const dark = `@media (prefers-color-scheme: dark){:root{${carried.dark}}}`;
    return svgBlob(composed(figure, `:root{${carried.light} --sans: ${carried.fonts};}${dark}`).text);
  }

  function save(blob, name) {
    const link = element("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  for (const figure of document.querySelectorAll("figure[data-figure]")) {
    const line = figure.querySelector(".downloads");
    line.hidden = false;
    line.addEventListener("click", async (event) => {
      const format = event.target.dataset.format;
      if (format) save(await figureBlob(figure, format), `${figure.dataset.figure}.${format}`);
    });
  }

  // ---- items ------------------------------------------------------------------------------

  const GOLD = { title: "Log-probability of the reference", unit: " nats per token", higher: true };
  const FILTERS = [
    ["differ", "differ", (row) => row.tell !== row.sft],
    ["tell", "TELL better", (row, gain) => gain > 0],
    ["sft", "SFT better", (row, gain) => gain < 0],
    ["right", "both right", (row) => row.tellRight && row.sftRight],
    ["wrong", "both wrong", (row) => !row.tellRight && !row.sftRight],
    ["all", "all", () => true],
  ];
  const ORDERS = [
    ["size", "largest difference first", (a, b) => Math.abs(b.gain) - Math.abs(a.gain)],
    ["tell", "TELL's largest lead first", (a, b) => b.gain - a.gain],
    ["sft", "SFT's largest lead first", (a, b) => a.gain - b.gain],
    ["item", "as in the test set", () => 0],
  ];

  function written(value, isSigned) {
    if (value === null || !Number.isFinite(value)) return "–";
    const text = Math.abs(value).toFixed(Math.abs(value) < 10 ? 3 : 1);
    return (value < 0 ? "−" : isSigned ? "+" : "") + text;
  }

  function counted(tokens) {
    return tokens === null ? "none" : `${tokens.toLocaleString("en")} tokens`;
  }

  // Writes a text with the searched words marked.
  function writeMarked(target, text, words) {
    const lower = text.toLowerCase();
    let place = 0;
    while (words.length && lower.length === text.length) {
      const hits = words.map((word) => [lower.indexOf(word, place), word.length]).filter(([at]) => at >= 0);
      if (!hits.length) break;
      const [at, length] = hits.sort((a, b) => a[0] - b[0] || b[1] - a[1])[0];
      target.append(document.createTextNode(text.slice(place, at)));
      target.append(element("mark", "", text.slice(at, at + length)));
      place = at + length;
    }
    target.append(document.createTextNode(text.slice(place)));
  }

  class ItemBrowser {
    constructor(root) {
      this.root = root;
      this.data = JSON.parse(root.querySelector(".item-data").textContent);
      this.metrics = [GOLD, ...this.data.metrics];
      this.controls = Object.fromEntries(
        [...root.querySelectorAll("[data-control]")].map((one) => [one.dataset.control, one]),
      );
      this.page = 0;
      this.takePair(this.data.pairs[0]);
      this.fill("metric", this.metrics.map((metric, place) => [place, metric.title]));
      this.fill("order", ORDERS);
      this.fill("filter", FILTERS);
      this.judge();
      if (!this.matching().length) this.controls.filter.value = "all";
      this.listen();
      this.restart();
    }

    listen() {
      for (const name of ["task", "general", "seed"]) {
        this.controls[name].addEventListener("change", () => this.choosePair(name));
      }
      for (const name of ["filter", "metric", "order"]) {
        this.controls[name].addEventListener("change", () => this.restart());
      }
      this.controls.query.addEventListener("input", () => this.restart());
      this.root.querySelector(".pages").addEventListener("click", (event) => {
        const button = event.target.closest("button");
        if (button && button.getAttribute("aria-disabled") !== "true") this.turn(Number(button.dataset.step));
      });
    }

    fill(name, options, chosen) {
      const select = this.controls[name];
      select.replaceChildren(...options.map(([value, label]) => new Option(label, String(value))));
      if (chosen !== undefined) select.value = String(chosen);
    }

    // Options of the budgets and seeds; those of one value only are not shown.
    takePair(pair) {
      this.pair = pair;
      for (const name of ["task", "general", "seed"]) {
        const values = [...new Set(this.data.pairs.map((one) => one[name]))].sort((a, b) => a - b);
        const label = (value) => (name === "seed" ? String(value) : counted(value));
        this.fill(name, values.map((value) => [value, label(value)]), pair[name]);
        this.controls[name].closest("label").hidden = values.length < 2 && name === "general";
      }
      this.rows = pair.rows.map((row) => this.asRow(row));
    }

    asRow([place, tell, sft, tellScores, sftScores, tellGold, sftGold, tellRight, sftRight]) {
      const [id, prompt, reference] = this.data.items[place];
      const searched = [id, prompt, reference, tell, sft].join("\n").toLowerCase();
      return {
        place, id, prompt, reference, tell, sft, searched, tellRight, sftRight,
        tellScores: [tellGold, ...tellScores], sftScores: [sftGold, ...sftScores],
      };
    }

    // The pair of the changed value that agrees most with the other two.
    choosePair(changed) {
      const wanted = Object.fromEntries(["task", "general", "seed"].map((name) => [name, this.controls[name].value]));
      const agreeing = (pair) => Object.keys(wanted).filter((name) => String(pair[name]) === wanted[name]).length;
      const possible = this.data.pairs.filter((pair) => String(pair[changed]) === wanted[changed]);
      this.takePair(possible.sort((a, b) => agreeing(b) - agreeing(a))[0]);
      this.restart();
    }

    restart() {
      this.page = 0;
      this.judge();
      this.countFilters();
      this.show();
    }

    // Writes beside each filter how many items it keeps; the options themselves stay.
    countFilters() {
      FILTERS.forEach(([, label, keeps], place) => {
        const count = this.rows.filter((row) => keeps(row, row.gain)).length;
        this.controls.filter.options[place].textContent = `${label} (${count.toLocaleString("en")})`;
      });
    }

    // Difference of every item by the chosen metric, positive where TELL is better.
    judge() {
      const place = Number(this.controls.metric.value || 0);
      const sign = this.metrics[place].higher ? 1 : -1;
      for (const row of this.rows) {
        const [tell, sft] = [row.tellScores[place], row.sftScores[place]];
        row.gain = tell === null || sft === null ? 0 : sign * (tell - sft);
      }
    }

    words() {
      return this.controls.query.value.toLowerCase().split(/\s+/).filter(Boolean);
    }

    matching() {
      const keeps = FILTERS.find(([name]) => name === this.controls.filter.value)[2];
      const order = ORDERS.find(([name]) => name === this.controls.order.value)[2];
      const words = this.words();
      return this.rows
        .filter((row) => keeps(row, row.gain) && words.every((word) => row.searched.includes(word)))
        .sort((a, b) => order(a, b) || a.place - b.place);
    }

    turn(step) {
      this.page += step;
      this.show();
      this.root.querySelector(".status").scrollIntoView({ block: "start" });
    }

    show() {
      const found = this.matching();
      const pages = Math.max(1, Math.ceil(found.length / PAGE_SIZE));
      const first = this.page * PAGE_SIZE;
      const shown = found.slice(first, first + PAGE_SIZE);
      this.root.querySelector(".items").replaceChildren(...shown.map((row) => this.card(row)));
      this.writeStatus(found.length, first, shown.length);
      this.root.querySelector(".pages span").textContent = `Page ${this.page + 1} of ${pages}`;
      for (const button of this.root.querySelectorAll(".pages button")) {
        const target = this.page + Number(button.dataset.step);
        button.setAttribute("aria-disabled", String(target < 0 || target >= pages));
      }
      this.root.querySelector(".pages").hidden = pages === 1;
    }

    writeStatus(count, first, shown) {
      const where = shown ? `, ${first + 1} to ${first + shown} shown` : "";
      this.root.querySelector(".status").textContent =
        `${count.toLocaleString("en")} of ${this.rows.length.toLocaleString("en")} items${where}. ` +
        `TELL against ${this.pair.sft}, ${counted(this.pair.task)} of task data, seed ${this.pair.seed}.`;
    }

    card(row) {
      const words = this.words();
      const card = element("article", "comparison");
      card.append(element("h3", "", this.title(row)));
      const parts = element("dl");
      parts.append(
        this.part("prompt", "Prompt", row.prompt, words),
        this.part("", "Reference", row.reference, words),
        this.answer("tell", "TELL", row.tell, row.tellScores, row.tellRight, words),
        this.answer("sft", this.pair.sft, row.sft, row.sftScores, row.sftRight, words),
      );
      card.append(parts);
      return card;
    }

    title(row) {
      if (row.gain === 0) return `${row.id}: no difference in the score chosen`;
      const winner = row.gain > 0 ? "TELL" : this.pair.sft;
      const unit = this.metrics[Number(this.controls.metric.value)].unit ?? "";
      return `${row.id}: ${winner} better by ${written(Math.abs(row.gain))}${unit}`;
    }

    part(className, term, text, words) {
      const part = element("div", className);
      const content = element("dd");
      if (text === "") content.textContent = "(empty)";
      else writeMarked(content, text, words);
      part.append(element("dt", "", term), content);
      return part;
    }

    answer(style, label, text, scores, isRight, words) {
      const part = this.part(`answer ${style}`, label, text, words);
      const list = element("ul", "scores");
      list.append(element("li", "", isRight ? "✓ right" : "✗ wrong"));
      this.metrics.forEach((metric, place) => {
        const line = element("li", "", `${metric.title} `);
        line.append(element("b", "", written(scores[place])));
        list.append(line);
      });
      const scored = element("dd", "scored");
      scored.append(list);
      part.append(scored);
      return part;
    }
  }

  for (const root of document.querySelectorAll(".browser")) {
    if (!JSON.parse(root.querySelector(".item-data").textContent).pairs.length) continue;
    root.nextElementSibling.hidden = true;
    root.hidden = false;
    new ItemBrowser(root);
  }
})();
