// A concept: its card in the list, and everything about it in a dialog.

const sheetsOf = (position, detail) => {
  const row = rows[position], id = value(position, "concept");
  if (!row[RESULT] || value(position, "status") !== "done") return null;
  const file = pathOf("concepts", id, row[RESULT], data.files.grid);
  if (detail?.note) return { note: detail.note };
  const source = detail?.sheet || file;
  const layout = data.layouts[detail?.layout ?? row[LAYOUT]];
  const sheet = { source, file, label: `sample grid of ${id}` };
  return { ...cutSheet(sheet, layout, promptsOf(position), id), sheet };
};

const promptsOf = position => {
  const templates = data.prompts[value(position, "category") === "style" ? "style" : "object"];
  return templates.map(template => template.replace("{}", value(position, "placeholder") ?? ""));
};

const drawnOf = (position, detail) => (detail?.pictures ?? []).map(([template, seed, path, error, inside]) => ({
  prompt: template.replace("{}", value(position, "placeholder") ?? ""), template, seed, error,
  source: inside || (path && linkTo(path)), file: path && linkTo(path),
  label: `${template.replace("{}", value(position, "placeholder") ?? "")}, seed ${seed}`,
}));

const badges = position => {
  const status = value(position, "status"), gate = value(position, "gate");
  if (status !== "done") return make("span", { class: "badge bad" }, status);
  if (gate === "below") return make("span", { class: "badge bad" }, "below the gate");
  return gate ? make("span", { class: "badge good" }, gate) : null;
};

const gauge = (position, name, title) => {
  const found = value(position, name);
  if (found === null) return null;
  const [low, high] = data.scales[name], at = number => ((number - low) / (high - low)) * 140;
  const start = value(position, `${name}_initializer`), top = value(position, `${name}_photos`);
  return make("div", { class: "gauge" }, make("span", {}, title),
    draw("svg", { viewBox: "0 0 140 14", preserveAspectRatio: "none", "aria-hidden": "true" },
      draw("line", { class: "track", x1: 0, x2: 140, y1: 7, y2: 7 }),
      start === null ? null : draw("line", { class: "gain", x1: at(start), x2: at(found), y1: 7, y2: 7 }),
      start === null ? null : draw("line", { class: "start", x1: at(start), x2: at(start), y1: 2, y2: 12 }),
      top === null ? null : draw("ellipse", { class: "top", cx: at(top), cy: 7, rx: 2.4, ry: 4 }),
      draw("ellipse", { class: "dot", cx: at(found), cy: 7, rx: 2.6, ry: 4.6 })),
    make("b", {}, fixed(found)));
};

const summary = position => {
  const initializer = value(position, "initializer"), category = value(position, "category");
  return make("div", { class: "soft" }, make("code", {}, value(position, "placeholder") ?? ""),
    initializer ? ` from “${initializer}”` : "", category && category !== "object" ? ` · ${category}` : "");
};

const facts = position => {
  const counted = [
    [value(position, "steps"), "steps"], [value(position, "seconds"), "s in a slot"],
    [value(position, "tries") > 1 ? value(position, "tries") : null, "tries"],
    [value(position, "pictures"), "pictures drawn"],
  ];
  return counted.filter(([number]) => number !== null).map(([number, unit]) => `${whole(number)} ${unit}`).join(" · ");
};

const failure = position => {
  const [title, remedy] = data.remedies[value(position, "kind") || "unknown"] ?? ["", ""];
  return [make("div", { class: "note" }, value(position, "error") ?? ""), remedy && make("div", { class: "soft" }, `${title}: ${remedy}`)];
};

const wholeSheet = sheet => strip([sheet], [sheet], 1);

const samplesOf = (sheets, series, mostPhotos) => {
  if (!sheets) return null;
  if (sheets.note) return make("div", { class: "note" }, sheets.note);
  if (!sheets.samples) return wholeSheet(sheets.sheet);
  const photos = sheets.photos.slice(0, mostPhotos), more = sheets.photos.length - photos.length;
  const element = make("div", { class: "sheet" },
    photos.length ? make("div", {}, make("div", { class: "label" }, more ? `photos (${more} more)` : "photos"),
      strip(photos, series, Math.min(6, mostPhotos))) : null,
    sampleFigures(sheets.samples, series));
  element.addEventListener("otherlayout", event => {
    event.stopPropagation();
    element.replaceChildren(wholeSheet(sheets.sheet));
  }, { once: true });
  return element;
};

const card = (position, list) => {
  const id = value(position, "concept"), detail = detailsNow(position), sheets = sheetsOf(position, detail);
  const drawn = drawnOf(position, detail).filter(each => each.source), shown = drawn.slice(0, 6);
  const series = [...(sheets?.samples ? [...sheets.photos, ...sheets.samples.flatMap(([, each]) => each)] : []), ...drawn];
  return make("article", { class: "card" },
    make("header", {}, make("div", {},
      make("h3", {}, make("button", { type: "button", class: "open", click: () => openConcept(position, list) }, id)),
      summary(position)), badges(position)),
    value(position, "status") === "done" ? null : failure(position),
    samplesOf(sheets, series, 6),
    shown.length ? make("div", {}, make("div", { class: "label" },
      `drawn in bulk${drawn.length > shown.length ? ` (${drawn.length - shown.length} more)` : ""}`), strip(shown, series, 6)) : null,
    make("div", { class: "gauges" }, gauge(position, "clip_i", "CLIP-I"), gauge(position, "clip_t", "CLIP-T")),
    make("footer", {}, facts(position)));
};

const album = (position, list, wanted) => detail => {
  const drawn = drawnOf(position, detail).filter(each => each.template.toLowerCase().includes(wanted));
  const pictures = drawn.filter(each => each.source), lost = drawn.filter(each => each.error);
  const packed = drawn.length - pictures.length - lost.length;
  return make("section", { class: "album" },
    make("h3", {}, make("button", { type: "button", class: "open", click: () => openConcept(position, list) }, value(position, "concept"))),
    gallery(pictures),
    lost.map(each => make("p", { class: "note" }, `not drawn: ${each.label}: ${each.error}`)),
    packed ? make("p", {}, `${packed} pictures are inside images/metadata (generation.packed)`) : null,
    drawn.length ? null : make("p", {}, "no pictures"));
};

const gallery = pictures => make("div", { class: "gallery" }, pictures.map(picture =>
  make("figure", {}, make("figcaption", {}, picture.prompt), pictureButton(picture, pictures))));

const curveOf = curve => curve && make("div", { class: "curve" },
  make("div", { class: "soft" }, make("span", { class: "key-loss" }, "loss"), " (mean, and range as a band) and ",
    make("span", { class: "key-norm" }, "norm of the rows"), ` (dashed, from 0; at the end ${fixed(curve.last_norm, 2)})`),
  draw("svg", { viewBox: "-30 -6 276 112", role: "img", "aria-label": `loss between ${fixed(curve.low, 2)} and ${fixed(curve.high, 2)} over ${curve.last_step} steps` },
    draw("line", { class: "axis", x1: 0, x2: 240, y1: 90, y2: 90 }), draw("line", { class: "axis", x1: 0, x2: 0, y1: 0, y2: 90 }),
    draw("polygon", { class: "band", points: curve.band }), draw("polyline", { class: "norm", points: curve.norm }), draw("polyline", { class: "loss", points: curve.loss }),
    draw("text", { x: -4, y: 6, "text-anchor": "end" }, fixed(curve.high, 2)), draw("text", { x: -4, y: 90, "text-anchor": "end" }, fixed(curve.low, 2)),
    draw("text", { x: 0, y: 102 }, "step 1"), draw("text", { x: 240, y: 102, "text-anchor": "end" }, `step ${whole(curve.last_step)}`)));

const previewsOf = (position, detail) => {
  if (!detail.previews) return null;
  const id = value(position, "concept"), file = pathOf("concepts", id, rows[position][RESULT], data.files.previews);
  const { picture, size, cells } = detail.previews, sheet = { source: picture || file, file, label: `previews of ${id}` };
  const shown = cells.map(([step, box]) => ({ ...sheet, size, box, label: `step ${whole(step)}` }));
  const figures = shown.map(each => make("figure", {}, make("figcaption", {}, each.label), pictureButton(each, shown)));
  const element = make("div", { class: "previews" }, figures.length ? figures : wholeSheet(sheet));
  element.addEventListener("otherlayout", event => {
    event.stopPropagation();
    element.replaceChildren(wholeSheet(sheet));
  }, { once: true });
  return [make("div", { class: "label" }, `“${promptsOf(position)[0]}” at these steps, always from the same noise`), element];
};

const triesOf = (position, tries) => tries.length < 2 ? null : [make("h4", {}, "Tries: before and after"),
  make("div", { class: "tries" }, tries.map(each => {
    const file = pathOf("concepts", value(position, "concept"), each.fingerprint, data.files.grid);
    const name = each.rule || "the run's own settings";
    const cut = cutSheet({ source: each.sheet || file, file, label: `${name}: sample grid` }, data.layouts[each.layout ?? rows[position][LAYOUT]], promptsOf(position), name);
    const series = cut ? cut.samples.flatMap(([, pictures]) => pictures) : [];
    const scores = ["clip_i", "clip_t"].filter(score => score in each.scores)
      .map(score => `${score === "clip_i" ? "CLIP-I" : "CLIP-T"} ${fixed(each.scores[score])}`);
    return make("div", { class: each.kept ? "kept" : null },
      make("div", {}, make("b", {}, name), each.kept ? " · kept" : ""),
      each.error ? make("div", { class: "note" }, each.error) : make("div", { class: "soft" }, [...scores, `${whole(each.steps)} steps`].join(" · ")),
      each.error ? null : cut ? sampleFigures(cut.samples, series) : wholeSheet({ source: each.sheet || file, file, label: name }));
  }))];

const factList = (position, detail) => {
  const own = ["concept", "status", "pictures"], files = value(position, "status") === "done" ? ["embedding", "grid", "curve", detail.previews ? "previews" : null, "record", "log"].filter(Boolean) : ["failure", "log"];
  const row = rows[position], folder = name => pathOf("concepts", value(position, "concept"), ["record", "failure", "log"].includes(name) ? row[FOLDER] : row[RESULT], data.files[name]);
  const listed = columns.map((column, place) => [column, textOf(position, column, place)]).filter(([column, text]) => text && !own.includes(column.name));
  return make("dl", {},
    listed.map(([column, text]) => [make("dt", {}, column.title), make("dd", {}, text)]),
    Object.entries(detail.facts ?? {}).map(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]),
    detail.photos?.length ? [make("dt", {}, "photos"), make("dd", {}, detail.photos.map(address => make("div", {}, make("code", {}, address))))] : null,
    row[FOLDER] ? [make("dt", {}, "files"), make("dd", {}, files.map((name, number) => [number ? " · " : "", make("a", { href: folder(name) }, name)]))] : null);
};

// Open the dialog about a concept; `list` are the positions that its arrows step through.
const openConcept = async (position, list) => {
  const dialog = document.getElementById("concept"), body = dialog.querySelector("div"), index = list.indexOf(position);
  dialog.querySelector("h2").textContent = value(position, "concept");
  for (const [step, name] of [[-1, "previous"], [1, "next"]]) {
    const button = dialog.querySelector(`[data-go="${name}"]`), other = list[index + step];
    button.disabled = index < 0 || other === undefined;
    button.onclick = () => openConcept(other, list);
  }
  body.replaceChildren(make("p", {}, "loading …"));
  if (!dialog.open) dialog.showModal();
  remember({ concept: value(position, "concept") });
  try {
    const detail = await detailsOf(position);
    const sheets = sheetsOf(position, detail), drawn = drawnOf(position, detail), pictures = drawn.filter(each => each.source);
    const series = sheets?.samples ? [...sheets.photos, ...sheets.samples.flatMap(([, each]) => each)] : [];
    body.replaceChildren(...[make("p", {}, summary(position), badges(position)),
      value(position, "status") === "done" ? null : failure(position),
      samplesOf(sheets, series, 100),
      make("div", { class: "gauges" }, gauge(position, "clip_i", "CLIP-I"), gauge(position, "clip_t", "CLIP-T")),
      drawn.length ? [make("h4", {}, `Drawn in bulk: ${pictures.length}`), gallery(pictures),
        drawn.filter(each => each.error).map(each => make("p", { class: "note" }, `not drawn: ${each.label}: ${each.error}`))] : null,
      triesOf(position, detail.tries),
      detail.curve || detail.previews ? [make("h4", {}, "Learning"), previewsOf(position, detail), curveOf(detail.curve)] : null,
      make("h4", {}, "Facts"), factList(position, detail)].flat(2).filter(Boolean));
  } catch (error) {
    body.replaceChildren(make("p", { class: "note" }, error.message));
  }
  dialog.scrollTop = 0;
};
