"""Serve the page from this process."""

import socket

import gradio as gr

from rectified_diffusers.demo import markup

SESSIONS = 256  # sessions whose histories the server keeps
MAX_UPLOAD = "1gb"


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def launch(page: gr.Blocks, host: str, port: int, *, open_browser: bool = False) -> str:
    """Serve the page from threads of this process and return its URL. `page.close()` stops it.

    Port 0 selects any free port. Nothing is fetched from or reported to the internet: no fonts, no usage data, no
    tunnel.

    Raises:
        OSError: the port is in use.
    """
    theme = gr.themes.Soft(
        primary_hue="pink", neutral_hue="slate", font=("system-ui", "sans-serif"), font_mono=("monospace",)
    ).set(block_title_background_fill="none", block_title_padding="0", block_title_text_color="*body_text_color")
    _, local_url, _ = page.launch(
        server_name=host,
        server_port=port or _free_port(host),
        inbrowser=open_browser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        max_file_size=MAX_UPLOAD,
        state_session_capacity=SESSIONS,
        theme=theme,
        css=markup.packaged("page.css"),
    )
    return local_url
