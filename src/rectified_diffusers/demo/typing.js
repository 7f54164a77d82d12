// In gradio 6.31, a textbox sends its `input` event only for key presses, not for paste, cut or deletion, nor for text
// from an input method or voice input. The browser's event covers all of these. It is forwarded once gradio has read
// the text.
document.addEventListener('input', (event) => {
  if (event.target.closest('#prompt')) setTimeout(() => trigger('input'));
}, true);
