// One picture: its classes, the captions that fit, what in it speaks for them, its neighbours in the gallery.

import { announce, byId, bytes, card, complain, count, el, hint, icon, percent, score } from "./dom.js";
import { form, ServiceError, Work } from "./service.js";

const TOP = 8;
const QUERY_SIDE = 512; // of a gallery's picture that becomes the query
export const FORM_BYTES = 4096; // of a request, beside the file itself

let about = null;
let picture = null; // the File that is shown
let pictureSize = null; // of it, null where the browser cannot show it
let words = []; // the user's own classes
const work = new Work(byId("picture-work"));
const mapWork = new Work(byId("map-work"));

export function startPicture(served) {
  about = served;
  for (const id of ["choose", "empty"]) byId(id).addEventListener("click", () => byId("picture-file").click());
  byId("picture-file").addEventListener("change", ({ target }) => {
    if (target.files.length) showPicture(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  byId("words-form").addEventListener("submit", useWords);
  byId("words-clear").addEventListener("click", clearWords);
  byId("map-shown").addEventListener("change", drawMap);
  byId("map-strength").addEventListener("input", drawMap);
}

export async function showPicture(file) {
  picture = file;
  work.cancel();
  hideMap();
  byId("picture-result").replaceChildren();
  const size = await show(byId("preview"), file);
  if (picture !== file) return; // another one came meanwhile
  pictureSize = size;
  byId("empty").hidden = true;
  showFrame();
  byId("preview").alt = `The picture ${file.name}`;
  const facts = [file.name, size && `${size.width} × ${size.height}`, bytes(file.size)];
  byId("picture-name").replaceChildren(facts.filter(Boolean).join(" · "));
  const refused = tooLarge(file, about.limits) || tooManyPixels(size, about.limits);
  if (refused) work.fail(new ServiceError(refused));
  else await analyse();
}

// A picture that the browser cannot show has a map all the same.
function showFrame() {
  byId("frame").hidden = !pictureSize && byId("overlay").hidden;
  byId("unseen").hidden = !picture || !byId("frame").hidden;
}

// Shows a file or blob in an <img>: its size, or null where the browser cannot.
function show(image, blob) {
  URL.revokeObjectURL(image.src);
  return new Promise((resolve) => {
    image.onload = () => resolve({ width: image.naturalWidth, height: image.naturalHeight });
    image.onerror = () => resolve(null);
    image.src = URL.createObjectURL(blob);
  });
}

export function tooLarge(file, limits) {
  if (file.size + FORM_BYTES <= limits.max_upload_bytes) return null;
  return `${file.name} has ${bytes(file.size)}; this service takes up to ${bytes(limits.max_upload_bytes)}.`;
}

function tooManyPixels(size, limits) {
  if (!size || size.width * size.height <= limits.max_image_pixels) return null;
  const [found, most] = [size.width * size.height, limits.max_image_pixels].map((pixels) => count(pixels / 1e6));
  return `The picture has ${found} megapixels; this service takes up to ${most}.`;
}

async function analyse() {
  const body = form({ image: picture, classes: words.length ? words.join("\n") : null, top: TOP });
  const answer = await work.run(async (send) => (await send("/api/image", { body })).json(), analyse);
  if (!answer) return;
  const cards = [classCard(answer.classes), captionCard(answer.captions), neighbourCard(answer.neighbours)];
  const together = answer.batched_with > 1 ? `, in a batch of ${answer.batched_with}` : "";
  const took = el("p", { class: "timing" }, `${(1000 * answer.seconds).toFixed(0)} ms${together}`);
  byId("picture-result").replaceChildren(...cards.filter(Boolean), took);
  byId("picture-result").firstChild.scrollIntoView({ block: "nearest" }); // below the picture on a phone
  const [best] = answer.classes;
  announce(best ? `Done: ${best.title}, ${percent(best.probability)}` : "Done");
}

function classCard(classes) {
  if (!classes.length) return card("Classes", null, hint("There are none. Name some under “Your own classes”."));
  const rows = classes.map(({ name, title, probability }) => chooser(classParts(title, probability), title, name));
  const rest = 1 - classes.reduce((sum, one) => sum + one.probability, 0);
  if (rest > 0.0005) rows.push(el("li", { class: "row rest" }, classParts("all other classes", rest)));
  const more = about.relevance && hint(icon("where"), "Choose one to see what in the picture speaks for it.");
  return card(words.length ? "Your classes" : "Classes", calibration(), el("ol", { class: "bars" }, rows), more);
}

function classParts(title, share) {
  const fill = el("span", { class: "fill" });
  fill.style.width = `${100 * share}%`;
  const track = el("span", { class: "track", "aria-hidden": "true" }, fill);
  return [el("span", { class: "name" }, title), track, value(percent(share))];
}

function calibration() {
  if (words.length) return badge("not calibrated for these words", "The temperature was not fitted on these classes.");
  if (!about.calibrated_on) return badge("not calibrated", "It may be too sure, or not sure enough.");
  return badge(`calibrated on ${about.calibrated_on}`, "The temperature was fitted there.", "good");
}

const badge = (text, title, kind = "") => el("span", { class: `badge ${kind}`, title }, text);
const value = (text) => el("span", { class: "value" }, text);

// A row of an answer that, where the model can, shows what in the picture speaks for `text`.
function chooser(parts, label, text) {
  if (!about.relevance) return el("li", { class: "row" }, parts);
  const click = ({ currentTarget }) => showMap(label, text, currentTarget);
  return el("li", {}, el("button", { class: "row", "aria-pressed": "false", click }, parts));
}

function captionCard(captions) {
  if (!captions.length) return null;
  const parts = (one) => [el("span", { class: "words" }, one.text), value(score(one.score))];
  const rows = captions.map((one) => chooser(parts(one), one.text, one.text));
  return card("Captions that fit best", badge("cosine"), el("ol", { class: "captions" }, rows));
}

function neighbourCard(neighbours) {
  if (!neighbours.length) return null;
  return card("Nearest pictures", badge(`among ${count(about.gallery.rows)}, by cosine`), hitGrid(neighbours));
}

// Pictures of the gallery; choosing one makes it the query.
export const hitGrid = (hits) => el("ul", { class: "hits" }, hits.map((hit) => el("li", {}, hitButton(hit))));

function hitButton(hit) {
  const source = `/api/gallery/${encodeURIComponent(hit.row)}/thumbnail`;
  const image = el("img", { src: `${source}?side=256`, alt: "", loading: "lazy" });
  image.addEventListener("error", () => image.replaceWith(el("span", { class: "blank" }, "no picture")));
  const label = `Use ${hit.key} as the picture, cosine ${score(hit.score)}: ${hit.text}`;
  const [key, text] = [["key", hit.key], ["words", hit.text]].map(([kind, said]) => el("span", { class: kind }, said));
  const click = () => useHit(hit, `${source}?side=${QUERY_SIDE}`);
  const inside = [image, value(score(hit.score)), key, text];
  return el("button", { class: "hit", title: hit.text, "aria-label": label, click }, inside);
}

async function useHit(hit, source) {
  location.hash = "/picture";
  scrollTo(0, 0);
  const get = async (send) => (await send(source, { method: "GET" })).blob();
  const blob = await work.run(get, () => useHit(hit, source));
  if (blob) await showPicture(new File([blob], `${hit.key}.${blob.type.split("/")[1]}`, { type: blob.type }));
}

function useWords(event) {
  event.preventDefault();
  const named = [...new Set(byId("words").value.split(/[,\n]/).map((word) => word.trim()).filter(Boolean))];
  const { max_classes: most, max_text_characters: longest } = about.limits;
  const tooMany = named.length > most && `This service takes up to ${count(most)} classes.`;
  const tooLong = named.join().length > longest && `This service takes up to ${count(longest)} characters in all.`;
  const wrong = named.length < 2 ? "Name two classes or more, so that there is a choice." : tooMany || tooLong;
  complain("words-error", wrong);
  if (!wrong) setWords(named);
}

function clearWords() {
  byId("words").value = "";
  complain("words-error", "");
  if (words.length) setWords([]);
}

function setWords(given) {
  words = given;
  hideMap();
  if (picture) analyse();
  else announce("These classes are used with the next picture.");
}

async function showMap(label, text, button) {
  const chosen = button.ariaPressed === "true";
  hideMap();
  if (chosen) return;
  button.ariaPressed = "true";
  byId("map").hidden = false;
  byId("map-text").replaceChildren("What in the picture speaks for ", el("strong", {}, label));
  const ask = async (send) => (await send("/api/relevance", { body: form({ image: picture, text }) })).blob();
  const blob = await mapWork.run(ask, () => { hideMap(); showMap(label, text, button); });
  const size = blob && (await show(byId("overlay"), blob));
  if (!size || button.ariaPressed !== "true") return;
  // The map is of the square that the model takes from the picture: it lies over a picture that is square already.
  const over = pictureSize && Math.abs(pictureSize.width / pictureSize.height - size.width / size.height) < 0.02;
  byId("frame").classList.toggle("apart", !over);
  byId("map-over").hidden = !over;
  byId("map-apart").hidden = over;
  byId("overlay").alt = `Relevance map for ${label}`;
  byId("map-controls").hidden = false;
  drawMap();
  byId("view").scrollIntoView({ block: "nearest" });
  announce(`The map for ${label} lies over the picture.`);
}

function drawMap() {
  const apart = byId("frame").classList.contains("apart");
  byId("overlay").hidden = !byId("map-shown").checked;
  byId("overlay").style.opacity = apart ? 1 : byId("map-strength").value / 100;
  showFrame();
}

function hideMap() {
  mapWork.cancel();
  for (const id of ["map", "map-controls", "overlay"]) byId(id).hidden = true;
  showFrame();
  for (const row of document.querySelectorAll("#picture-result [aria-pressed=true]")) row.ariaPressed = "false";
}
