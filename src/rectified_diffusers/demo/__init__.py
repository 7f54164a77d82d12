"""The web page of `rectified-diffusers demo`.

`requests` defines generation requests and results. `styles` applies LoRAs and weight deltas to the model. `sketches`
converts sketches to ControlNet inputs. `tasks` runs long tasks that can be observed and stopped. `studio` generates
images, and `worker` runs it in a separate process. `session` stores a visitor's settings and history. `markup` defines
the page's style sheet and HTML. Only `page` imports gradio.
"""
