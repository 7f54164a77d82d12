// Names for screen readers that gradio 6.31 leaves out. The caption of an image has the prompt as its title.
const captions = {
  picture: 'own-caption', beside: 'beside-caption', 'sketch-picture': 'sketch-caption', 'morph-picture': 'morph-caption',
  'photo-picture': 'photo-caption',
  ...Object.fromEntries([0, 1, 2, 3].map((slot) => [`few-${slot}`, `few-${slot}-caption`])),
};
const set = (element, name, value) => element.getAttribute(name) === value || element.setAttribute(name, value);
function nameAll() {
  for (const [id, captionId] of Object.entries(captions)) {
    const caption = document.querySelector(`#${captionId} .caption`);
    const image = document.querySelector(`#${id} img`);
    const name = caption?.querySelector('b').textContent;
    // Without a title, the image is still the one of the last title.
    if (image && caption && (caption.title || !image.alt)) set(image, 'alt', caption.title ? `${caption.title} (${name})` : name);
  }
  for (const image of document.querySelectorAll('#history button img')) set(image.closest('button'), 'aria-label', image.alt);
  for (const empty of document.querySelectorAll('.image .empty')) {
    set(empty, 'role', 'img');
    set(empty, 'aria-label', 'No image yet');
  }
  // A link that contains a button is two stops of the Tab key.
  for (const button of document.querySelectorAll('a[download] button')) set(button, 'tabindex', '-1');
  for (const link of document.querySelectorAll('a[download]')) set(link, 'aria-label', 'Download');
  const remark = document.querySelector('#remark');
  if (remark) set(remark, 'role', 'status');
}
const filter = ['alt', 'aria-label', 'src', 'title'];
new MutationObserver(nameAll).observe(document.body, {subtree: true, childList: true, attributeFilter: filter});
nameAll();
