// The interactive Pareto front: uPlot draws axes and zooms, this draws points with both intervals, and names them.
"use strict";
(function () {
  const SHAPES = {
    chosen(c, x, y, r) { star(c, x, y, 1.9 * r); },
    qualifies(c, x, y, r) { c.arc(x, y, r, 0, 2 * Math.PI); },
    open(c, x, y, r) { polygon(c, [[x, y - 1.25 * r], [x + 1.25 * r, y], [x, y + 1.25 * r], [x - 1.25 * r, y]]); },
    fp32(c, x, y, r) { c.rect(x - r, y - r, 2 * r, 2 * r); },
  };

  function polygon(c, corners) {
    corners.forEach(([x, y], i) => (i ? c.lineTo(x, y) : c.moveTo(x, y)));
    c.closePath();
  }

  function star(c, x, y, r) {
    const corners = [];
    for (let i = 0; i < 10; i++) {
      const length = i % 2 ? 0.45 * r : r, angle = (Math.PI / 5) * i - Math.PI / 2;
      corners.push([x + length * Math.cos(angle), y + length * Math.sin(angle)]);
    }
    polygon(c, corners);
  }

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue("--" + name).trim();
    return {
      ink: of("ink"), grid: of("line"), chosen: of("chosen"), qualifies: of("good"), open: of("open"), fp32: of("ink"),
      dominated: of("grey"), front: of("good"),
    };
  }

  function chart(holder) {
    const data = JSON.parse(holder.querySelector("script[type='application/json']").textContent);
    const points = data.points.slice().sort((a, b) => a.x - b.x);
    const target = holder.querySelector(".plot"), tip = holder.querySelector(".tip");
    let paint = colours(), shown = null;

    function draw(u) {
      const c = u.ctx, ratio = devicePixelRatio || 1;
      const X = (v) => u.valToPos(v, "x", true), Y = (v) => u.valToPos(v, "y", true);
      c.save();
      c.beginPath();
      c.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
      c.clip();
      line(0, paint.ink, []);
      line(-data.margin, paint.open, [6 * ratio, 4 * ratio]);
      const front = points.filter((p) => p.front);
      c.strokeStyle = paint.front;
      c.lineWidth = 1.5 * ratio;
      c.beginPath();
      front.forEach((p, i) => {
        if (i) c.lineTo(X(p.x), Y(front[i - 1].y));
        i ? c.lineTo(X(p.x), Y(p.y)) : c.moveTo(X(p.x), Y(p.y));
      });
      c.globalAlpha = 0.5;
      c.stroke();
      c.globalAlpha = 1;
      for (const behind of [true, false]) {
        for (const p of points) {
          if (behind !== (p.dominated && p !== shown)) continue;
          c.globalAlpha = p.dominated && p !== shown ? 0.45 : 1;
          const colour = p.dominated && p.kind !== "chosen" ? paint.dominated : paint[p.kind];
          c.strokeStyle = c.fillStyle = colour;
          c.lineWidth = (p === shown ? 2.5 : 1.2) * ratio;
          if (!p.dominated || p === shown || points.length <= 60) {
            c.beginPath();
            if (p.ylow !== null) { c.moveTo(X(p.x), Y(p.ylow)); c.lineTo(X(p.x), Y(p.yhigh)); }
            if (p.xlow !== null) { c.moveTo(X(p.xlow), Y(p.y)); c.lineTo(X(p.xhigh), Y(p.y)); }
            c.stroke();
          }
          c.beginPath();
          SHAPES[p.dominated ? "qualifies" : p.kind](c, X(p.x), Math.min(Y(p.y), u.bbox.top + u.bbox.height), (p === shown ? 6 : 4.5) * ratio);
          c.fill();
        }
      }
      c.fillStyle = paint.ink;
      c.font = 12 * ratio + "px system-ui";
      c.textAlign = "right";
      c.fillText(data.beyond, u.bbox.left + u.bbox.width - 6 * ratio, Y(0) - 6 * ratio);
      c.restore();

      function line(value, colour, dash) {
        c.strokeStyle = colour;
        c.lineWidth = ratio;
        c.setLineDash(dash);
        c.beginPath();
        c.moveTo(u.bbox.left, Y(value));
        c.lineTo(u.bbox.left + u.bbox.width, Y(value));
        c.stroke();
        c.setLineDash([]);
      }
    }

    const xs = [data.left, data.right];
    const ys = [data.low, data.high];
    const axis = (label, size) => ({
      label, size, labelSize: 24, stroke: () => paint.ink, grid: { stroke: () => paint.grid, width: 1 },
      ticks: { stroke: () => paint.grid, width: 1 }, font: "12px system-ui", labelFont: "13px system-ui",
    });
    const height = () => Math.max(280, Math.min(460, 0.62 * target.clientWidth));
    const u = new uPlot({
      width: target.clientWidth, height: height(), legend: { show: false },
      cursor: { drag: { x: true, y: true, uni: 12 }, points: { show: false } },
      scales: { x: { time: false, range: (u, a, b) => (a === b || a === null ? xs : zoomed ? [a, b] : xs) },
                y: { range: (u, a, b) => (zoomed ? [a, b] : ys) } },
      axes: [axis(data.x, 36), axis(data.y, 52)],
      series: [{}, { paths: () => null, points: { show: false } }],
      hooks: { draw: [draw], setSelect: [select] },
    }, [points.map((p) => p.x), points.map((p) => p.y)], target);
    var zoomed = false;

    function select(u) {
      zoomed = u.select.width > 0;
    }

    u.over.addEventListener("dblclick", () => {
      zoomed = false;
      u.setScale("x", { min: xs[0], max: xs[1] });
      u.setScale("y", { min: ys[0], max: ys[1] });
    });

    function nearest(event) {
      const box = u.over.getBoundingClientRect();
      const left = event.clientX - box.left, top = event.clientY - box.top;
      let best = null, distance = 28;
      for (const p of points) {
        const d = Math.hypot(u.valToPos(p.x, "x") - left, u.valToPos(p.y, "y") - top) + (p.dominated ? 4 : 0);
        if (d < distance) { best = p; distance = d; }
      }
      return best;
    }

    function show(p) {
      if (p === shown) return;
      shown = p;
      u.redraw(false);
      tip.hidden = !p;
      if (!p) return;
      tip.replaceChildren(...p.text.map((text, i) => {
        const part = document.createElement(i ? "div" : "strong");
        part.textContent = text;
        return part;
      }));
      const box = u.over.getBoundingClientRect(), outer = holder.getBoundingClientRect();
      const x = box.left - outer.left + u.valToPos(p.x, "x"), y = box.top - outer.top + u.valToPos(p.y, "y");
      tip.style.left = Math.max(0, Math.min(x + 12, holder.clientWidth - tip.offsetWidth)) + "px";
      tip.style.top = (y + 14 + tip.offsetHeight > holder.clientHeight ? y - 14 - tip.offsetHeight : y + 14) + "px";
    }

    u.over.addEventListener("mousemove", (event) => show(nearest(event)));
    u.over.addEventListener("click", (event) => show(nearest(event)));
    u.over.addEventListener("mouseleave", () => show(null));
    new ResizeObserver(() => {
      if (target.clientWidth) u.setSize({ width: target.clientWidth, height: height() });
    }).observe(target);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      paint = colours();
      u.redraw(false);
    });
    holder.classList.add("drawn");
  }

  document.querySelectorAll(".front").forEach(chart);
})();
