// Many pictures: sent a few at a time, so that progress shows, and gathered in one table.

import { announce, byId, card, count, el, hint } from "./dom.js";
import { FORM_BYTES, tooLarge } from "./picture.js";
import { form, ServiceError, Work } from "./service.js";

const FILES_PER_REQUEST = 8;
const ROWS_SHOWN = 200;

let limits = null;
let files = [];
let done = 0;
let header = ""; // the table's first line
let lines = ""; // the others, as the service wrote them
const work = new Work(byId("batch-work"));

export function startBatch(about) {
  limits = about.limits;
  byId("batch-drop").addEventListener("click", () => byId("batch-files").click());
  byId("batch-files").addEventListener("change", ({ target }) => {
    if (target.files.length) newBatch([...target.files]);
    target.value = "";
  });
}

export function newBatch(given) {
  [files, done, header, lines] = [given, 0, "", ""];
  work.cancel();
  byId("batch-state").hidden = true;
  byId("batch-result").replaceChildren();
  const large = given.map((file) => tooLarge(file, limits)).filter(Boolean);
  const rest = given.filter((file) => !tooLarge(file, limits));
  const without = rest.length ? () => newBatch(rest) : null;
  if (large.length) work.fail(new ServiceError(large.join(" ")), without, "Go on without");
  else goOn();
}

// The next files that fit one request together.
function nextFiles() {
  let size = 0;
  const fits = (file) => (size += file.size + FORM_BYTES) <= limits.max_upload_bytes;
  const some = files.slice(done, done + Math.min(FILES_PER_REQUEST, limits.max_batch_files));
  const first = some.findIndex((file) => !fits(file));
  return first < 0 ? some : some.slice(0, first);
}

async function goOn() {
  const batch = files;
  showState("running");
  while (done < batch.length) {
    const some = nextFiles();
    const taken = await work.run(async (send) => {
      take(await (await send("/api/batch", { body: form({ images: some }) })).text());
      return true;
    }, goOn, "Go on");
    if (files !== batch) return; // another batch came
    if (!taken) return showState("stopped");
    done += some.length;
    showState("running");
  }
  showState("done");
  announce(`All ${batch.length} pictures are done.`);
}

function take(csv) {
  const end = csv.indexOf("\n") + 1;
  if (header && header !== csv.slice(0, end)) throw new Error("the table's columns changed between two requests");
  header = csv.slice(0, end);
  lines += csv.slice(end);
}

function showState(state) {
  byId("batch-state").hidden = false;
  Object.assign(byId("batch-progress"), { max: files.length, value: done });
  const stopped = state === "stopped" ? ", stopped" : "";
  byId("batch-count").textContent = `${count(done)} of ${count(files.length)} pictures done${stopped}`;
  const download = byId("batch-download");
  download.hidden = !header || state === "running";
  URL.revokeObjectURL(download.href);
  download.href = URL.createObjectURL(new Blob([header, lines], { type: "text/csv" }));
  if (header) showTable();
}

function showTable() {
  const [head, ...rows] = parseCsv(header + lines);
  const cells = (tag, row) => el("tr", {}, row.map((cell) => el(tag, {}, cell)));
  const body = rows.slice(0, ROWS_SHOWN).map((row) => cells("td", row));
  const table = el("table", {}, el("thead", {}, cells("th", head)), el("tbody", {}, body));
  const note = rows.length > ROWS_SHOWN && hint(`the first ${ROWS_SHOWN} of ${count(rows.length)} rows`);
  const scroll = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" }, table);
  byId("batch-result").replaceChildren(card("Table", note, scroll));
}

// Rows of cells by RFC 4180: quoted cells may hold commas, line ends and doubled quotes.
function parseCsv(text) {
  const rows = [[]];
  for (const [, quoted, plain, end] of text.matchAll(/(?:"((?:[^"]|"")*)"|([^,\r\n]*))(,|\r?\n|$)/g)) {
    rows.at(-1).push(quoted?.replaceAll('""', '"') ?? plain);
    if (end !== ",") rows.push([]);
  }
  return rows.filter((row) => row.length > 1);
}
