// The list: search, filters, order and views. Its state is in the address, so that a view can be sent to others.

const controls = document.getElementById("controls"), view = document.getElementById("view");
const more = document.getElementById("more"), count = document.getElementById("count");
const PAGE = { cards: 24, table: 200, pictures: 24, map: Infinity };
const DIRECT = ["status", "gate", "category", "kind"]; // columns with a choice of their own
const state = { q: "", column: "", operator: "has", value: "", sort: "", down: "", view: "cards", prompt: "", colour: "", concept: "" };
for (const name of DIRECT) state[name] = "";
let shown = PAGE.cards, latest = 0, listed = [];

const remember = changes => {
  Object.assign(state, changes);
  const kept = Object.entries(state).filter(([name, text]) => text !== "" && !(name === "view" && text === "cards") && !(name === "operator" && text === "has"));
  history.replaceState(null, "", kept.length ? `#${new URLSearchParams(kept)}` : location.pathname + location.search);
};

const query = () => {
  const place = state.column === "" ? null : placeOf[state.column] ?? null;
  const choices = DIRECT.filter(name => state[name] !== "" && name in placeOf).map(name => [placeOf[name], state[name] === "(none)" ? "" : state[name]]);
  return { words: state.q.toLowerCase().split(/\s+/).filter(Boolean), choices, place, operator: state.operator, wanted: state.value };
};

const isPlain = () => !state.q && !DIRECT.some(name => state[name]) && (!state.column || !state.value) && !state.sort && !state.down;

// Draw the list anew. Anything but the page's own order needs all rows; those of parts are loaded first.
const update = async (limit = PAGE[state.view]) => {
  const mine = ++latest;
  let trouble = "";
  shown = limit;
  try {
    if (!isPlain() || state.view === "map" || limit > rows.length)
      await loadRows(number => mine === latest && (count.textContent = `reading rows: ${whole(number)} of ${whole(data.numRows)} …`));
  } catch (error) {
    trouble = `Only ${whole(rows.length)} of ${whole(data.numRows)} rows are at hand: ${error.message}. `;
  }
  if (mine !== latest) return;
  const positions = inOrder([...rows.keys()].filter(matches(query())), state.sort === "" ? null : placeOf[state.sort], state.down === "1");
  const page = positions.slice(0, limit);
  listed = positions;
  view.replaceChildren(...(await VIEWS[state.view](page, positions)));
  if (mine !== latest) return;
  const total = isPlain() ? data.numRows : positions.length;
  more.hidden = state.view === "map" || page.length >= total;
  more.textContent = `Show ${whole(Math.min(PAGE[state.view], total - page.length))} more`;
  const found = isPlain() ? `${whole(data.numRows)} in all` : `${whole(positions.length)} of ${whole(data.numRows)} match`;
  count.textContent = `${trouble}${found}${state.view === "map" ? "" : `, ${whole(page.length)} shown`}.`;
};

const heading = (column, place) => {
  const sorted = state.sort === column.name;
  return make("th", { scope: "col", class: column.number ? "number" : null, "aria-sort": sorted ? (state.down ? "descending" : "ascending") : null },
    make("button", { type: "button", click: () => sortBy(column.name, sorted && !state.down ? "1" : "") },
      column.title, sorted ? (state.down ? " ▼" : " ▲") : ""));
};

const hiddenColumns = new Set(["clip_i_initializer", "clip_t_initializer", "attempts", "finished", "placeholder"]);

const tableView = (page, positions) => {
  const used = columns.map((column, place) => [column, place]).filter(([column]) => !hiddenColumns.has(column.name));
  const chooser = make("details", {}, make("summary", {}, "Columns"), make("div", { class: "legend" }, columns.map(column =>
    make("label", {}, make("input", { type: "checkbox", checked: !hiddenColumns.has(column.name), change: event => {
      hiddenColumns[event.target.checked ? "delete" : "add"](column.name);
      update(shown);
    } }), ` ${column.title}`))));
  const cell = (position, [column, place]) => {
    const text = textOf(position, column, place);
    return make("td", { class: column.number ? "number" : null }, column.name !== "concept" ? text
      : make("button", { type: "button", class: "open", click: () => openConcept(position, positions) }, text));
  };
  return [chooser, make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "table of concepts" }, make("table", {},
    make("thead", {}, make("tr", {}, used.map(([column, place]) => heading(column, place)))),
    make("tbody", {}, page.map(position => make("tr", {}, used.map(each => cell(position, each)))))))];
};

const picturesView = async (page, positions) => {
  const input = make("input", { type: "search", value: state.prompt, placeholder: "such as: beach", input: delayed(250, event => {
    remember({ prompt: event.target.value });
    albums().then(found => list.replaceChildren(...found));
  }) });
  const albums = async () => {
    const wanted = state.prompt.toLowerCase();
    return Promise.all(page.filter(position => value(position, "pictures")).map(position => detailsOf(position).then(album(position, positions, wanted))));
  };
  const list = make("div", {}, await albums());
  return [make("p", {}, make("label", {}, "Prompts that contain ", input)), list];
};

const mapView = (page, positions) => {
  const offered = columns.filter(column => column.choices && column.choices.length > 1);
  const choose = make("select", { change: event => { remember({ colour: event.target.value }); update(); } },
    [["", "one colour"], ...offered.map(column => [column.name, column.title])].map(([name, title]) => make("option", { value: name, selected: state.colour === name }, title)));
  return [make("p", {}, make("label", {}, "Colour by ", choose)), ...drawMap(positions, offered.some(each => each.name === state.colour) ? state.colour : "")];
};

const VIEWS = {
  cards: (page, positions) => [make("div", { class: "cards" }, page.map(position => card(position, positions)))],
  table: tableView, pictures: picturesView, map: mapView,
};

const sortBy = (name, down) => {
  remember({ sort: name, down });
  controls.elements.sort.value = name;
  showDirection();
  update();
};

const showDirection = () => {
  const button = document.getElementById("direction");
  button.textContent = state.down ? "▼ descending" : "▲ ascending";
  button.setAttribute("aria-pressed", String(state.down === "1"));
};

const options = (select, entries, chosen) =>
  select.replaceChildren(...entries.map(([name, title]) => make("option", { value: name, selected: name === chosen }, title)));

// Offer the operators and the values that go with the column of the free filter.
const offerValues = () => {
  const column = columns[placeOf[state.column]], input = controls.elements.value;
  const operators = column?.number ? [["least", "at least"], ["most", "at most"], ["is", "is"]] : [["has", "contains"], ["is", "is"]];
  if (!operators.some(([name]) => name === state.operator)) remember({ operator: operators[0][0] });
  options(controls.elements.operator, operators, state.operator);
  document.getElementById("values").replaceChildren(...(column?.choices ?? []).map(([text]) => make("option", { value: text })));
  for (const name of ["operator", "value"]) controls.elements[name].disabled = !column;
  input.inputMode = column?.number ? "decimal" : "text";
};

const begin = () => {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  for (const name of Object.keys(state)) if (name in given) state[name] = given[name];
  if (!(state.view in VIEWS) || !document.querySelector(`[data-view="${state.view}"]`)) state.view = "cards";
  for (const name of ["sort", "column"]) if (!(state[name] in placeOf)) state[name] = "";
  for (const name of DIRECT) {
    const choices = columns[placeOf[name]]?.choices ?? [], label = document.getElementById(`choose-${name}`);
    const all = data.numRows, known = choices.reduce((sum, [, number]) => sum + number, 0);
    const entries = choices.map(([text, number]) => [text, `${text} (${whole(number)})`]);
    if (known < all && choices.length) entries.push(["(none)", `(none) (${whole(all - known)})`]);
    label.hidden = entries.length < 2;
    if (!entries.some(([text]) => text === state[name])) state[name] = "";
    options(label.querySelector("select"), [["", "all"], ...entries], state[name]);
  }
  const titles = columns.map(column => [column.name, column.title]);
  options(controls.elements.column, [["", "any column …"], ...titles], state.column);
  options(controls.elements.sort, [["", document.getElementById("sort").dataset.first], ...titles], state.sort);
  controls.elements.q.value = state.q;
  offerValues();
  controls.elements.value.value = state.value;
  showDirection();
  showView();
};

const showView = () => {
  for (const button of document.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", String(button.dataset.view === state.view));
};

controls.addEventListener("submit", event => event.preventDefault());
const updateSoon = delayed(150, () => update()); // the list alone waits: no change of a control may be lost
controls.addEventListener("input", event => {
  const { name, value: text } = event.target;
  if (!(name in state)) return;
  remember({ [name]: text });
  if (name === "column") {
    remember({ value: "" });
    controls.elements.value.value = "";
    offerValues();
  }
  updateSoon();
});
document.getElementById("direction").addEventListener("click", () => sortBy(state.sort, state.down ? "" : "1"));
document.getElementById("clear").addEventListener("click", () => {
  for (const name of ["q", "column", "value", "sort", "down", ...DIRECT]) state[name] = "";
  remember({});
  begin();
  update();
});
for (const button of document.querySelectorAll("[data-view]"))
  button.addEventListener("click", () => {
    remember({ view: button.dataset.view });
    showView();
    update();
  });
more.addEventListener("click", () => update(shown + PAGE[state.view]));
{
  const dialog = document.getElementById("concept");
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => remember({ concept: "" }));
  dialog.addEventListener("click", event => event.target === dialog && dialog.close());
}

begin();
const asked = state.concept;
update().then(async () => {
  if (!asked) return;
  const find = () => [...rows.keys()].find(position => value(position, "concept") === asked);
  if (find() === undefined) await loadRows(() => {});
  if (find() !== undefined) openConcept(find(), listed);
});
