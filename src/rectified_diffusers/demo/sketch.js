// Lines are lists of points in [0, 1]^2. The value of the component is the JSON of all lines.
const lines = [];
let line = null, sent = 0;
let cursor = [0.5, 0.5], penDown = false; // of the keyboard
const STEP = 1 / 64;
const canvas = () => element.querySelector('canvas');
function paint() {
  const pen = canvas().getContext('2d'), size = canvas().width;
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, size, size);
  pen.lineWidth = 9;
  pen.lineCap = pen.lineJoin = 'round';
  for (const points of lines) {
    pen.beginPath();
    pen.moveTo(points[0][0] * size, points[0][1] * size);
    for (const [x, y] of points) pen.lineTo(x * size, y * size);
    pen.stroke();
  }
  if (document.activeElement === canvas()) {
    pen.fillStyle = penDown ? '#db2777' : '#64748b';
    pen.fillRect(cursor[0] * size - 6, cursor[1] * size - 6, 12, 12);
  }
}
function send() {
  sent = Date.now();
  props.value = JSON.stringify(lines);
  paint();
  trigger('change');
}
function pointAt(event) {
  const box = canvas().getBoundingClientRect();
  const inside = (value) => Math.round(Math.min(1, Math.max(0, value)) * 1e4) / 1e4;
  return [inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height)];
}
element.addEventListener('pointerdown', (event) => {
  if (event.target !== canvas()) return;
  event.preventDefault();
  lines.push(line = [pointAt(event)]);
  paint();
});
window.addEventListener('pointermove', (event) => {
  if (!line) return;
  line.push(pointAt(event));
  paint();
  if (Date.now() - sent > 200) send();
});
window.addEventListener('pointerup', () => {
  if (line) { line = null; send(); }
});
element.addEventListener('keydown', (event) => {
  const moves = {ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP]};
  const move = moves[event.key];
  if (event.target !== canvas() || !(move || event.key === ' ')) return;
  event.preventDefault();
  if (move) cursor = cursor.map((value, axis) => Math.min(1, Math.max(0, value + move[axis])));
  else penDown = !penDown;
  if (!move && penDown) lines.push([cursor]);
  else if (penDown) lines.at(-1).push(cursor);
  if (penDown) send();
  else paint();
});
for (const kind of ['focusin', 'focusout']) element.addEventListener(kind, () => { penDown = false; paint(); });
element.addEventListener('click', (event) => {
  const action = event.target.dataset.action;
  if (action === 'undo') lines.pop();
  if (action === 'clear') lines.length = 0;
  if (action) send();
});
paint();
