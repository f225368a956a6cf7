// The viewer: one picture as large as the window, or larger.

const viewer = { series: [], index: 0, zoom: 1 };

const openViewer = (series, index) => {
  viewer.series = series;
  viewer.index = index;
  viewer.zoom = 1;
  const dialog = document.getElementById("viewer");
  if (!dialog.open) dialog.showModal();
  showInViewer();
};

const showInViewer = () => {
  const dialog = document.getElementById("viewer"), picture = viewer.series[viewer.index];
  const stage = dialog.querySelector(".stage"), frame = frameOf(picture), image = frame.firstChild;
  image.loading = "eager";
  image.alt = picture.label;
  stage.replaceChildren(frame);
  const resize = () => {
    const [, , width, height] = picture.box ?? [0, 0, image.naturalWidth || 1, image.naturalHeight || 1];
    const fit = Math.min((stage.clientWidth - 24) / width, (stage.clientHeight - 24) / height);
    frame.style.width = `${width * fit * viewer.zoom}px`;
  };
  image.addEventListener("load", resize);
  resize();
  if (picture.file && picture.file !== picture.source) {
    const original = new Image(); // it is not there where the page was copied alone
    original.addEventListener("load", () => {
      const [width, height] = picture.size ?? [original.naturalWidth, original.naturalHeight];
      if (original.naturalWidth === width && original.naturalHeight === height) image.src = picture.file;
    });
    original.src = picture.file;
  }
  frame.addEventListener("click", () => zoomViewer(viewer.zoom < 4 ? 2 : 1 / viewer.zoom));
  const several = viewer.series.length > 1 ? ` (${viewer.index + 1} of ${viewer.series.length})` : "";
  const link = picture.file ? make("a", { href: picture.file, target: "_blank", rel: "noopener" }, "file") : "";
  dialog.querySelector("footer").replaceChildren(picture.label + several, link && " · ", link);
  dialog.querySelector("[data-step='-1']").disabled = viewer.index === 0;
  dialog.querySelector("[data-step='1']").disabled = viewer.index === viewer.series.length - 1;
};

const zoomViewer = factor => {
  const dialog = document.getElementById("viewer"), stage = dialog.querySelector(".stage");
  const frame = stage.firstChild, before = viewer.zoom;
  viewer.zoom = Math.min(16, Math.max(1, viewer.zoom * factor));
  const ratio = viewer.zoom / before;
  frame.style.width = `${frame.getBoundingClientRect().width * ratio}px`;
  stage.scrollLeft = (stage.scrollLeft + stage.clientWidth / 2) * ratio - stage.clientWidth / 2;
  stage.scrollTop = (stage.scrollTop + stage.clientHeight / 2) * ratio - stage.clientHeight / 2;
};

const stepViewer = step => {
  const next = viewer.index + step;
  if (next < 0 || next >= viewer.series.length) return;
  viewer.index = next;
  viewer.zoom = 1;
  showInViewer();
};

{
  const dialog = document.getElementById("viewer");
  for (const button of dialog.querySelectorAll("[data-step]"))
    button.addEventListener("click", () => stepViewer(Number(button.dataset.step)));
  for (const button of dialog.querySelectorAll("[data-zoom]"))
    button.addEventListener("click", () => zoomViewer(Number(button.dataset.zoom)));
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", event => {
    const keys = { ArrowLeft: () => stepViewer(-1), ArrowRight: () => stepViewer(1), "+": () => zoomViewer(2),
      "=": () => zoomViewer(2), "-": () => zoomViewer(0.5), 0: () => zoomViewer(1 / viewer.zoom) };
    if (keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    }
  });
}
