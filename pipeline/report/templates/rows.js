// The rows of all concepts and their details: those inside the page, and those of parts, loaded when needed.

const data = JSON.parse(document.getElementById("data").textContent);
const columns = data.columns, placeOf = Object.fromEntries(columns.map((column, place) => [column.name, place]));
const FOLDER = columns.length, RESULT = FOLDER + 1, LAYOUT = FOLDER + 2;
const rows = data.rows, numInside = data.rows.length;
const value = (position, name) => rows[position][placeOf[name]] ?? null;

const parts = new Map(); // "kind-number" -> {promise, resolve, reject}

// A part calls this with its values. Each page loads only parts of its own report.
function reportPart(kind, number, values) {
  parts.get(`${kind}-${number}`).resolve(values);
}

const loadPart = (kind, number) => {
  const key = `${kind}-${number}`;
  if (!parts.has(key)) {
    const part = {};
    part.promise = new Promise((resolve, reject) => Object.assign(part, { resolve, reject }));
    parts.set(key, part);
    const path = `${data.parts.folder}/${kind}-${String(number).padStart(5, "0")}.js`;
    const failed = () => {
      parts.delete(key);
      part.reject(new Error(`${path} cannot be loaded: keep the folder "report" beside this page, or load the page anew`));
    };
    document.head.append(make("script", { src: path, error: failed }));
  }
  return parts.get(key).promise;
};

let reading = null;

// Load the rows of all parts, in their order. `tell` gets the number of rows at hand.
const loadRows = tell => {
  if (rows.length === data.numRows) return null;
  reading ??= (async () => {
    try {
      while (rows.length < data.numRows) {
        const part = Math.floor((rows.length - numInside) / data.parts.rows);
        for (const row of await loadPart("rows", part)) rows.push(row);
        parts.delete(`rows-${part}`);
        tell(rows.length);
      }
    } finally {
      reading = null;
    }
  })();
  return reading;
};

const detailsNow = position => (position < numInside ? data.details[position] : null);

const detailsOf = async position => {
  if (position < numInside) return data.details[position];
  const place = position - numInside;
  const part = await loadPart("details", Math.floor(place / data.parts.details));
  return part[place % data.parts.details];
};

const textOf = (position, column, place) => {
  const found = rows[position][place];
  if (found === null || found === undefined) return "";
  if (column.name.endsWith("_gain")) return signed(found);
  if (column.name.startsWith("clip_")) return fixed(found);
  return String(found);
};

// Searching and sorting give lists of positions.
const searched = []; // position -> its row's text in lower case

const searchable = position =>
  (searched[position] ??= rows[position].slice(0, FOLDER).filter(each => each !== null).join("\n").toLowerCase());

const matches = ({ words, choices, place, operator, wanted }) => position => {
  if (words.length && !words.every(word => searchable(position).includes(word))) return false;
  const row = rows[position];
  for (const [column, choice] of choices) if ((row[column] ?? "") !== choice) return false;
  if (place === null || wanted === "") return true;
  const found = row[place];
  if (operator === "is") return String(found ?? "") === wanted;
  if (operator === "has") return String(found ?? "").toLowerCase().includes(wanted.toLowerCase());
  return typeof found === "number" && (operator === "most" ? found <= Number(wanted) : found >= Number(wanted));
};

const inOrder = (positions, place, isDown) => {
  if (place === null) return isDown ? positions.reverse() : positions; // the page's own order
  const sign = isDown ? -1 : 1, isNumber = columns[place].number;
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  return positions.sort((a, b) => {
    const left = rows[a][place], right = rows[b][place];
    if (left === null || right === null) return (left === null) - (right === null) || a - b; // without a value: last
    return sign * (isNumber ? left - right : compare(left, right)) || a - b;
  });
};
