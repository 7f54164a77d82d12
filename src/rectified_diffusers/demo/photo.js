// The value of the component is a JPEG as a data URL, at most SIDE pixels wide and high: an image file or the camera's
// last frame. Nothing else leaves the browser.
const SIDE = 768, INTERVAL = 300; // milliseconds between frames
const find = (selector) => element.querySelector(selector);
const copy = document.createElement('canvas'), video = document.createElement('video');
video.muted = video.playsInline = true;
let timer = null;
function say(text) { find('p[role=status]').textContent = text; }
function paint() {
  const shown = find('canvas');
  [shown.width, shown.height] = [copy.width, copy.height];
  shown.getContext('2d').drawImage(copy, 0, 0);
  find('[data-action=camera]').textContent = timer ? 'Stop' : 'Camera';
}
function send(source, width, height) {
  const scale = Math.min(1, SIDE / Math.max(width, height));
  [copy.width, copy.height] = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  const pen = copy.getContext('2d');
  pen.fillStyle = '#fff'; // JPEG has no transparency
  pen.fillRect(0, 0, copy.width, copy.height);
  pen.drawImage(source, 0, 0, copy.width, copy.height);
  props.value = copy.toDataURL('image/jpeg', 0.85);
  paint();
  trigger('change');
}
function stop() {
  clearInterval(timer);
  timer = null;
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
  paint();
}
async function start() {
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}});
    await video.play();
    say('');
  } catch {
    say('No camera: it needs a page with HTTPS, and your permission.');
    return;
  }
  timer = setInterval(() => {
    if (find('canvas').checkVisibility()) send(video, video.videoWidth, video.videoHeight);
    else stop(); // another tab of the page
  }, INTERVAL);
}
element.addEventListener('click', (event) => {
  const action = event.target.dataset.action;
  if (action === 'upload') find('input').click();
  else if (action === 'camera') timer ? stop() : start();
});
element.addEventListener('change', async (event) => {
  if (event.target.type !== 'file' || !event.target.files.length) return;
  stop();
  try {
    const image = await createImageBitmap(event.target.files[0]);
    send(image, image.width, image.height);
    say('');
  } catch {
    say('This file is not an image that the browser can read.');
  }
  event.target.value = '';
});
