"""The web page of `rectified-diffusers demo`.

`requests` defines generation requests and results. `styles` applies LoRAs and weight deltas to the model. `sketches`
converts sketches to ControlNet inputs. `tasks` runs long tasks that can be observed and stopped. `studio` generates
images, and `worker` runs it in a separate process. `session` stores a visitor's settings and history. `markup` defines
the page's HTML and reads its style sheet and scripts. `server` serves the page, and `guard` checks every request. Only
`page`, `server` and `guard` import gradio.
"""
