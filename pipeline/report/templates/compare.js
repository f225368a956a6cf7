// The concepts of two runs, with their sample grids next to each other.

const data = JSON.parse(document.getElementById("data").textContent);
const controls = document.getElementById("controls"), view = document.getElementById("view");
const PAGE = 20, SIDES = ["first", "second"];

const changeOf = (row, score) => {
  const [first, second] = row.values.map(values => values[score]);
  return first === undefined || second === undefined ? null : second - first;
};

const sideOf = (row, number) => {
  const sheet = row.sheets[number];
  if (!sheet) return null;
  if (sheet.note) return { note: make("div", { class: "note" }, sheet.note) };
  const templates = data.prompts[number][row.category === "style" ? "style" : "object"];
  const prompts = templates.map(template => template.replace("{}", row.names[number]));
  const picture = { source: sheet.sheet, file: "", label: `${SIDES[number]} run: sample grid of ${row.concept}` };
  return { picture, ...cutSheet(picture, data.layouts[number][sheet.layout], prompts, row.concept) };
};

const scoreTable = row => make("table", {},
  make("thead", {}, make("tr", {}, ["", ...SIDES, "difference"].map((name, place) => make("th", { scope: "col", class: place ? "number" : null }, name)))),
  make("tbody", {}, data.scores.filter(([score]) => changeOf(row, score) !== null).map(([score, title]) => {
    const digits = ["steps", "seconds"].includes(score) ? 0 : 3, change = changeOf(row, score);
    return make("tr", {}, make("th", { scope: "row" }, title), row.values.map(values => make("td", { class: "number" }, fixed(values[score], digits))),
      make("td", { class: "number" }, digits ? signed(change) : (change < 0 ? "−" : "+") + fixed(Math.abs(change), 0)));
  })));

const pairCard = row => {
  const sides = [sideOf(row, 0), sideOf(row, 1)], cut = sides.map(side => side?.samples ?? []);
  const series = [...(sides[0]?.photos ?? sides[1]?.photos ?? []), ...cut[0].flatMap(([, pictures], place) => [...pictures, ...(cut[1][place]?.[1] ?? [])])];
  const photos = (sides[0]?.photos ?? sides[1]?.photos ?? []).slice(0, 8);
  return make("article", { class: "card" },
    make("header", {}, make("h3", {}, row.concept), row.gates[0] !== row.gates[1] ? make("span", { class: "badge" }, row.gates.map(gate => gate || "no gate").join(" → ")) : null),
    make("div", { class: "scroll" }, scoreTable(row)),
    photos.length ? make("div", {}, make("div", { class: "label" }, "photos"), strip(photos, series, 8)) : null,
    sides[0] || sides[1] ? make("div", { class: "pair" }, sides.map((side, number) => make("div", {},
      make("h4", {}, `${SIDES[number]} run: ${data.names[number]}`),
      side?.note ?? (side?.samples ? sampleFigures(side.samples, series) : side?.picture ? strip([side.picture], [side.picture], 1) : "no sample grid")))) : null);
};

const update = (limit = PAGE) => {
  const wanted = controls.elements.q.value.toLowerCase(), score = controls.elements.score.value, order = controls.elements.order.value;
  const change = row => changeOf(row, score) ?? 0;
  const compare = { size: (a, b) => Math.abs(change(b)) - Math.abs(change(a)), up: (a, b) => change(b) - change(a),
    down: (a, b) => change(a) - change(b), name: (a, b) => a.concept.localeCompare(b.concept, "en", { numeric: true }) }[order];
  const found = data.rows.filter(row => row.concept.toLowerCase().includes(wanted)).sort(compare);
  view.replaceChildren(...found.slice(0, limit).map(pairCard));
  document.getElementById("count").textContent = `${whole(found.length)} of ${whole(data.rows.length)} concepts, ${whole(Math.min(limit, found.length))} shown.`;
  const more = document.getElementById("more");
  more.hidden = found.length <= limit;
  more.onclick = () => update(limit + PAGE);
};

controls.elements.score.replaceChildren(...data.scores.map(([name, title]) => make("option", { value: name }, title)));
controls.addEventListener("submit", event => event.preventDefault());
controls.addEventListener("input", delayed(150, () => update()));
update();
