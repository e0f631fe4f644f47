// Bundled with Vega, Vega-Lite and vegaEmbed, and put into the page as a module.

const data = (id) => JSON.parse(document.getElementById(id).textContent);

// The texts beside the marks: Vega moves them to where they cover nothing and drops those without room.
function placeNames(spec) {
  const names = spec.marks.find((mark) => mark.type === "text");
  if (!names) return spec;
  const others = spec.marks.filter((mark) => ["symbol", "rule"].includes(mark.type)).map((mark) => mark.name);
  names.transform = [{
    type: "label", size: [{signal: "max(width, 1)"}, {signal: "max(height, 1)"}], offset: [7], avoidMarks: others,
    anchor: ["right", "left", "top", "bottom", "top-right", "bottom-right", "top-left", "bottom-left"],
  }];
  return spec;
}

const specs = data("charts");
for (const place of document.querySelectorAll("[data-chart]")) {
  const spec = specs[place.dataset.chart];
  vegaEmbed(place, spec, {
    ast: true, // no eval, which the page's content policy forbids
    renderer: "svg", // so that the page's style sheet colours the texts, light and dark
    patch: placeNames,
    actions: {export: true, source: false, compiled: false, editor: false},
    downloadFileName: spec.description.toLowerCase().replaceAll(" ", "-"),
    scaleFactor: {png: 2},
  }).catch((error) => {
    place.textContent = "This chart could not be drawn.";
    console.error(error);
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.sort;
    const compare = (a, b) => column === 0 ? a.localeCompare(b) : Number(a) - Number(b);
    const rows = [...body.rows].sort((a, b) => {
      if (!key(a) || !key(b)) return !key(a) - !key(b); // what was not measured stays below
      return descending ? compare(key(b), key(a)) : compare(key(a), key(b));
    });
    body.append(...rows);
  }));
}

// The passage: the same tokens for all recipes, so that a change of recipe shows what differs.
const passages = data("held");
for (const view of document.querySelectorAll(".held")) {
  const {tokens, recipes} = passages[view.dataset.held];
  const readout = view.querySelector("output");
  const spans = tokens.map((token) => {
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = token;
    span.tabIndex = -1;
    return span;
  });
  view.querySelector(".passage").append(...spans);
  spans[0].tabIndex = 0; // one stop for the tab key, arrows from there

  function show({heads, of, label}) {
    spans.forEach((span, i) => {
      span.style.setProperty("--held", heads[i] / of);
      span.title = `held by ${heads[i]} of ${of} heads`;
    });
    const anywhere = heads.filter((count) => count > 0).length;
    const everywhere = heads.filter((count) => count === of).length;
    readout.textContent =
      `${label}: of ${tokens.length} tokens ${anywhere} are held by some head, ${everywhere} by every head.`;
  }
  function say(event) {
    if (!event.target.classList.contains("token")) return;
    const token = event.target.textContent.replaceAll("\n", "⏎").trim() || "space";
    readout.textContent = `“${token}” is ${event.target.title}.`;
  }
  const passage = view.querySelector(".passage");
  passage.addEventListener("mouseover", say);
  passage.addEventListener("focusin", say);
  passage.addEventListener("click", (event) => event.target.focus());
  passage.addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10}[event.key];
    const from = spans.indexOf(document.activeElement);
    if (!step || from < 0) return;
    event.preventDefault();
    const to = Math.min(Math.max(from + step, 0), spans.length - 1);
    spans[from].tabIndex = -1;
    spans[to].tabIndex = 0;
    spans[to].focus();
  });
  view.addEventListener("change", (event) => show(recipes[event.target.value]));
  show(recipes[view.querySelector("input:checked").value]);
}
