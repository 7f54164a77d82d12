"""The web page of `rectified-diffusers demo`.

`orders` says what a picture is made of, `styles` puts LoRAs and weight deltas on the model, `background` runs long
work so that it can be watched and stopped, `studio` draws, `history` remembers, and `page` alone knows gradio.
"""
