// The values under the pointer, for every chart: the nearest measured step of each line. The page is whole without it.
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const write = (value, share) =>
    share ? (100 * value).toFixed(1) + "%" : Math.abs(value) < 1e-3 && value ? value.toExponential(1) : String(+value.toPrecision(4));

  for (const svg of document.querySelectorAll("svg.chart")) {
    const [left, right, low, high] = ["left", "right", "low", "high"].map((key) => +svg.dataset[key]);
    const lines = [...svg.querySelectorAll("[data-y]")].map((line) => ({
      label: line.dataset.label,
      xs: line.dataset.x.split(",").map(Number),
      ys: line.dataset.y.split(",").map(Number),
    }));
    const rule = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const view = svg.viewBox.baseVal;
    const hide = () => { tip.hidden = true; rule.remove(); };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * view.width;
      if (at < left - 4 || at > right + 4) return hide();
      const step = low + ((at - left) / (right - left)) * (high - low);
      const rows = lines.map((line) => {
        let best = 0;
        line.xs.forEach((x, i) => { if (Math.abs(x - step) < Math.abs(line.xs[best] - step)) best = i; });
        return { label: line.label, x: line.xs[best], y: line.ys[best] };
      });
      const shown = rows.reduce((a, b) => (Math.abs(b.x - step) < Math.abs(a.x - step) ? b : a)).x;
      tip.replaceChildren(
        Object.assign(document.createElement("div"), { textContent: "step " + Math.round(shown) }),
        ...rows.filter((row) => Math.abs(row.x - shown) <= (high - low) / 20).map((row) => {
          const line = document.createElement("div");
          line.append(row.label + "  ", Object.assign(document.createElement("b"), { textContent: write(row.y, "share" in svg.dataset) }));
          return line;
        }),
      );
      const x = left + ((shown - low) / (high - low)) * (right - left);
      for (const [key, value] of Object.entries({ x1: x, x2: x, y1: 12, y2: view.height - 24, class: "rule" })) rule.setAttribute(key, value);
      svg.append(rule);
      tip.hidden = false;
      tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
      tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
    });
  }
})();
