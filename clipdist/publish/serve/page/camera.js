// A still from the camera.

import { byId, complain } from "./dom.js";

const REFUSED = {
  NotAllowedError: "The browser was not allowed to use the camera. Allow it beside the address, then open this again.",
  NotFoundError: "No camera was found on this device.",
  NotReadableError: "The camera is in use by another program.",
};
const INSECURE = "Browsers open the camera on https and on localhost only: reach this page through the ssh tunnel.";

let stream = null;

export function startCamera(use) {
  const dialog = byId("camera-dialog");
  byId("camera").addEventListener("click", open);
  byId("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", stop);
  byId("camera-take").addEventListener("click", async () => {
    const file = await still(byId("camera-video"));
    dialog.close();
    use(file);
  });
}

async function open() {
  const [dialog, video, take] = ["camera-dialog", "camera-video", "camera-take"].map(byId);
  take.disabled = true;
  video.hidden = false;
  complain("camera-message", "");
  dialog.showModal();
  try {
    if (!navigator.mediaDevices) throw Object.assign(new Error(INSECURE), { name: "SecurityError" });
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    if (!dialog.open) return stop(); // closed while the browser was asking
    video.srcObject = stream;
    await video.play();
    take.disabled = false;
    take.focus();
  } catch (error) {
    video.hidden = true;
    complain("camera-message", REFUSED[error.name] ?? `The camera cannot be used: ${error.message}`);
  }
}

async function still(video) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
  return new File([blob], "camera.jpg", { type: blob.type });
}

function stop() {
  for (const track of stream?.getTracks() ?? []) track.stop();
  stream = null;
  byId("camera-video").srcObject = null;
}
