// The map of heads: choose one, see what it does and where it looks. Everything is on the page; nothing is fetched.

const data = JSON.parse(document.getElementById("data").textContent);
const map = document.querySelector(".map");
const cells = [...map.querySelectorAll("button")];
const panel = document.getElementById("head");
const by = document.getElementById("by");
const scale = document.querySelector(".scale");
const percent = (x) => `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)}%`;
const number = (x) => (x === null ? "–" : Math.abs(x) >= 1000 || (x !== 0 && Math.abs(x) < 0.001) ? x.toExponential(1) : String(Number(x.toPrecision(3))));

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

// ---- colours ----

for (const name of Object.keys(data.scores)) by.append(new Option(name, name));
by.addEventListener("change", () => {
  const rows = data.scores[by.value];
  map.classList.toggle("scored", Boolean(rows));
  scale.hidden = !rows;
  if (!rows) return;
  const there = rows.flat().filter((x) => x !== null);
  const low = Math.min(...there), high = Math.max(...there);
  cells.forEach((cell) => {
    const [layer, head] = cell.dataset.head.split(".").map(Number);
    const value = rows[layer][head];
    cell.style.setProperty("--share", value === null ? 0 : (value - low) / (high - low || 1));
  });
  scale.firstElementChild.textContent = number(low);
  scale.lastElementChild.textContent = number(high);
});

const pills = [...document.querySelectorAll(".roles button")];
for (const pill of pills) {
  pill.addEventListener("click", () => {
    const on = pill.getAttribute("aria-pressed") !== "true";
    for (const other of pills) other.setAttribute("aria-pressed", String(on && other === pill));
    map.classList.toggle("dim", on);
    for (const cell of cells) {
      const roles = data.roles[cell.dataset.head] || [];
      cell.classList.toggle("lit", on && roles.some((each) => each.role === pill.dataset.role));
    }
  });
}

// ---- one head ----

function weights(layer, head) {
  const bytes = atob(data.attention[layer][head]);
  const at = (query, entry) => (bytes.charCodeAt((query * (query + 1)) / 2 + entry) / 255) ** 2;
  return {bytes, at};
}

function shown(token) {
  return token.replaceAll("\n", "⏎").trim() ? token.replaceAll("\n", "⏎").trim() : "space";
}

function rank(rows, value) {
  return 1 + rows.flat().filter((x) => x !== null && x > value).length;
}

function attention(layer, head) {
  const {at} = weights(layer, head);
  const count = data.tokens.length;
  const box = make("div");
  const hint = make("p", "Where it looks: choose a token of the text. The darker, the more of the head's attention goes there.", "hint");
  const text = make("p", undefined, "text");
  const said = make("output");
  const spans = data.tokens.map((token) => {
    const span = make("span", token);
    span.tabIndex = -1;
    span.setAttribute("role", "button");
    return span;
  });
  text.append(...spans);

  function look(query) {
    const row = data.tokens.map((_, entry) => (entry <= query ? at(query, entry) : 0));
    spans.forEach((span, entry) => {
      span.style.setProperty("--look", Math.sqrt(row[entry]).toFixed(3));
      span.classList.toggle("after", entry > query);
      span.classList.toggle("here", entry === query);
      span.tabIndex = entry === query ? 0 : -1;
    });
    const best = row.map((weight, entry) => [weight, entry]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([w]) => w > 0.02);
    const named = best.map(([weight, entry]) => `“${shown(data.tokens[entry])}” at ${entry} (${percent(weight)})`);
    said.textContent = `From “${shown(data.tokens[query])}” at ${query} it looks at ${named.join(", ") || "no token in particular"}.`;
  }
  text.addEventListener("click", (event) => {
    const query = spans.indexOf(event.target);
    if (query >= 0) look(query);
  });
  text.addEventListener("mouseover", (event) => {
    const query = spans.indexOf(event.target);
    if (query >= 0) look(query);
  });
  text.addEventListener("keydown", (event) => {
    const from = spans.indexOf(document.activeElement);
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 8, ArrowUp: -8, Home: -count, End: count}[event.key];
    if (from < 0 || !step) return;
    event.preventDefault();
    const to = Math.min(Math.max(from + step, 0), count - 1);
    look(to);
    spans[to].focus();
  });

  const canvas = make("canvas");
  canvas.width = canvas.height = count;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "All of its attention: a row for each token that looks, a column for each that is looked at");
  canvas.title = "A row for each token that looks, a column for each that is looked at";
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    look(Math.min(count - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * count))));
  });
  paint(canvas, at, count);
  // To begin with, the token from which it looks most at anything but the first token and itself.
  let best = count - 1, most = 0;
  for (let query = 2; query < count; query++) {
    for (let entry = 1; entry < query; entry++) {
      if (at(query, entry) > most) [best, most] = [query, at(query, entry)];
    }
  }
  look(best);
  box.append(hint, text, said, canvas);
  return box;
}

let repaint = () => {};
function paint(canvas, at, count) {
  repaint = () => {
    const style = getComputedStyle(document.documentElement);
    const rgb = (name) => style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
    const ink = rgb("--accent"), paper = rgb("--paper");
    const context = canvas.getContext("2d");
    const image = context.createImageData(count, count);
    for (let query = 0; query < count; query++) {
      for (let entry = 0; entry < count; entry++) {
        const share = entry <= query ? Math.sqrt(at(query, entry)) : 0;
        for (let k = 0; k < 3; k++) image.data[4 * (query * count + entry) + k] = paper[k] + share * (ink[k] - paper[k]);
        image.data[4 * (query * count + entry) + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  };
  repaint();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => repaint());

function choose(cell, focus, say = true) {
  if (say) document.getElementById("said").textContent = cell.getAttribute("aria-label"); // for screen readers
  for (const other of cells) {
    other.tabIndex = other === cell ? 0 : -1;
    other.setAttribute("aria-selected", String(other === cell));
  }
  if (focus) cell.focus();
  const name = cell.dataset.head;
  const [layer, head] = name.split(".").map(Number);
  const roles = data.roles[name] || [];
  const does = make("ul", undefined, "does");
  for (const each of roles) {
    const item = make("li");
    const said = make("span");
    said.append(make("b", `${each.role}: `), each.words);
    item.append(make("span", undefined, `dot ${each.colour}`), said);
    does.append(item);
  }
  const figures = make("dl", undefined, "figures");
  for (const [score, rows] of Object.entries(data.scores)) {
    const value = rows[layer][head];
    if (value === null) continue;
    const row = make("div");
    const dd = make("dd", `${number(value)} `);
    dd.append(make("small", `no. ${rank(rows, value)} of ${rows.flat().filter((x) => x !== null).length}`));
    row.append(make("dt", score), dd);
    figures.append(row);
  }
  panel.replaceChildren(
    make("h3", `Head ${name}`),
    roles.length ? does : make("p", "No probe found a clear part for it.", "hint"),
    figures,
    ...(!data.tokens.length ? [] : data.attention[layer][head] ? [attention(layer, head)]
      : [make("p", "This layer has no attention.", "hint")]),
  );
}

map.addEventListener("click", (event) => {
  const cell = event.target.closest("button");
  if (!cell) return;
  choose(cell, false);
  // On a narrow screen what is told of it lies below the map.
  if (panel.getBoundingClientRect().top > innerHeight - 120) panel.scrollIntoView();
});
map.addEventListener("keydown", (event) => {
  const from = cells.indexOf(document.activeElement);
  const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: data.heads, ArrowUp: -data.heads}[event.key];
  if (from < 0 || !step) return;
  event.preventDefault();
  const to = from + step;
  if (to >= 0 && to < cells.length) choose(cells[to], true);
});

// The first to be seen: a head with a rare role, so that there is something to see.
const first = cells.find((cell) => (data.roles[cell.dataset.head] || []).some((each) => ["retrieval", "induction"].includes(each.role)));
choose(first || cells.find((cell) => data.roles[cell.dataset.head]) || cells[0], false, false);
