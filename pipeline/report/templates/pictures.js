// Pictures: whole files, and cells of a sample grid.
// A picture: {source, file, label, size, box}. `source` is shown; `file` is the original, for the viewer. With a `box`
// [left, top, width, height] it is that cell of a sheet of this `size`.

// Return an address under which all cells of a sheet inside the page share one decoded picture.
const addresses = new Map();
const addressOf = source => {
  if (!source.startsWith("data:")) return source;
  if (!addresses.has(source)) {
    const [type, text] = source.slice("data:".length).split(";base64,");
    const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
    addresses.set(source, URL.createObjectURL(new Blob([bytes], { type })));
  }
  return addresses.get(source);
};

const frameOf = picture => {
  const waits = picture.source.startsWith("data:") ? null : "lazy";
  const image = make("img", { src: addressOf(picture.source), alt: "", loading: waits });
  const frame = make("span", { class: picture.box ? "picture cell" : "picture" }, image);
  if (picture.box) {
    const [left, top, width, height] = picture.box, [sheetWidth, sheetHeight] = picture.size;
    frame.style.aspectRatio = `${width} / ${height}`;
    image.style.width = `${(100 * sheetWidth) / width}%`;
    image.style.height = `${(100 * sheetHeight) / height}%`;
    image.style.left = `${(-100 * left) / width}%`;
    image.style.top = `${(-100 * top) / height}%`;
  }
  return frame;
};

// Return the button that shows a picture and opens it in the viewer, beside the others of `series`.
const pictureButton = (picture, series) => {
  const frame = frameOf(picture), image = frame.firstChild;
  const button = make("button", { type: "button", class: frame.className, "aria-label": `enlarge: ${picture.label}`,
    click: () => openViewer(series, series.indexOf(picture)) }, image);
  button.style.aspectRatio = frame.style.aspectRatio;
  image.addEventListener("error", () => {
    button.className = "picture missing";
    button.disabled = true;
    button.replaceChildren("not found: ", picture.file);
  });
  if (picture.box && picture.source === picture.file)
    image.addEventListener("load", () => {
      const [width, height] = picture.size;
      if (image.naturalWidth !== width || image.naturalHeight !== height)
        button.dispatchEvent(new CustomEvent("otherlayout", { bubbles: true }));
    });
  return button;
};

// Return the photos and the samples of a sheet as {photos: [picture], samples: [[prompt, [picture]]]}.
const cutSheet = (sheet, layout, prompts, name) => {
  if (!layout) return null;
  const cell = (box, label) => ({ ...sheet, box, size: layout.size, label });
  return {
    photos: layout.photos.map((box, number) => cell(box, `photo ${number + 1} of ${name}`)),
    samples: layout.rows.map((boxes, row) => {
      const prompt = prompts[row] ?? "";
      return [prompt, boxes.map((box, number) => cell(box, `${prompt}, sample ${number + 1}`))];
    }),
  };
};

const strip = (pictures, series, across) => {
  const element = make("div", { class: "strip" }, pictures.map(picture => pictureButton(picture, series)));
  if (across) element.style.setProperty("--across", Math.max(across, pictures.length));
  return element;
};

const sampleFigures = (samples, series) => make("div", { class: "samples" }, samples.map(([prompt, pictures]) => {
  const cells = make("div", { class: "cells" }, pictures.map(picture => pictureButton(picture, series)));
  cells.style.setProperty("--cells", Math.min(pictures.length, 4));
  return make("figure", {}, make("figcaption", {}, prompt), cells);
}));
