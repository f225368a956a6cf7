// The map: each concept at the place of its learned rows, as a thumbnail where there is room.

const GROUPS = 8;

const drawMap = (positions, colourBy) => {
  const wanted = new Set(positions), place = colourBy === "" ? null : placeOf[colourBy];
  const names = place === null ? [] : [...new Set(data.map.points.map(([position]) => rows[position] ? String(rows[position][place] ?? "") : ""))].sort();
  const groupOf = position => (place === null ? 0 : Math.min(GROUPS - 1, names.indexOf(String(rows[position][place] ?? ""))));
  const tip = make("div", { class: "tip", hidden: true });
  const box = make("div", { id: "map", role: "group", "aria-label": "map of learned rows; arrow keys step from concept to concept" }, tip);
  const taken = new Set();
  const points = data.map.points.filter(([position]) => position < rows.length).sort((a, b) => a[1] - b[1]);
  const buttons = points.map(([position, x, y], number) => {
    const sheets = sheetsOf(position, detailsNow(position)), first = sheets?.samples?.[0]?.[1]?.[0];
    const square = `${Math.round(x * 18)},${Math.round(y * 12)}`; // one thumbnail for each square of a grid
    const hasRoom = first && position < numInside && !taken.has(square);
    if (hasRoom) taken.add(square);
    const button = make("button", { type: "button", tabindex: number ? "-1" : "0", "aria-label": value(position, "concept"),
      class: `${hasRoom ? "thumbnail " : ""}group-${groupOf(position)}${wanted.has(position) ? "" : " faint"}` },
      hasRoom ? frameOf(first) : "");
    button.style.left = `${4 + 92 * x}%`;
    button.style.top = `${6 + 88 * (1 - y)}%`;
    const show = () => {
      tip.hidden = false;
      tip.replaceChildren(first ? frameOf(first) : "", make("b", {}, value(position, "concept")),
        value(position, "clip_i") === null ? "" : make("div", { class: "soft" }, `CLIP-I ${fixed(value(position, "clip_i"))}`));
    };
    for (const event of ["mouseenter", "focus"]) button.addEventListener(event, show);
    button.addEventListener("mouseleave", () => (tip.hidden = true));
    button.addEventListener("click", () => openConcept(position, positions));
    return button;
  });
  box.append(...buttons);
  box.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key], now = buttons.indexOf(document.activeElement);
    const next = step && buttons[now + step];
    if (!next) return;
    event.preventDefault();
    buttons[now].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  const shares = data.map.shares.map(share => `${Math.round(100 * share)} %`);
  const key = names.length ? make("div", { class: "legend" }, names.slice(0, GROUPS).map((name, number) =>
    make("span", {}, make("span", { class: `key group-${number}` }), number === GROUPS - 1 && names.length > GROUPS ? "others" : name || "(none)"))) : "";
  return [make("p", {}, `Concepts whose learned rows are alike lie near each other: the first two principal components of the rows, which hold ${shares[0]} (across) and ${shares[1]} (up) of their variance.`
    + (points.length < data.numRows ? ` ${whole(points.length)} concepts are on the map.` : "")), key, box];
};
