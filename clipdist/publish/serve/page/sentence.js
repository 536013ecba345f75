// A sentence, and the pictures of the gallery that fit it.

import { announce, byId, card, complain, count, el, hint } from "./dom.js";
import { hitGrid } from "./picture.js";
import { Work } from "./service.js";

const TOP = 24;
const SUGGESTIONS = 5;

let about = null;
const work = new Work(byId("sentence-work"));

export function startSentence(served) {
  about = served;
  byId("sentence-form").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  byId("sentence-text").addEventListener("input", fits);
  const chip = ({ title }) => el("button", { type: "button", class: "chip", click: () => search(title) }, title);
  byId("suggestions").replaceChildren(...about.classes.slice(0, SUGGESTIONS).map(chip));
}

function fits() {
  const [length, most] = [byId("sentence-text").value.length, about.limits.max_text_characters];
  const wrong = length > most && `This service takes up to ${count(most)} characters; found ${count(length)}.`;
  complain("sentence-error", wrong);
  return !wrong;
}

async function search(text = byId("sentence-text").value.trim()) {
  byId("sentence-text").value = text;
  if (!text || !fits()) return;
  byId("sentence-result").replaceChildren();
  const options = { body: JSON.stringify({ text, top: TOP }), headers: { "Content-Type": "application/json" } };
  const answer = await work.run(async (send) => (await send("/api/text", options)).json(), () => search(text));
  if (!answer) return;
  const note = hint(`the nearest ${answer.hits.length} of ${count(about.gallery.rows)}, by cosine`);
  const more = hint("Choose a picture to look at it, and for its neighbours.");
  byId("sentence-result").replaceChildren(card(`“${text}”`, note, hitGrid(answer.hits), more));
  announce(`${answer.hits.length} pictures found`);
}
