"""The page as a whole: tabs, API endpoints, limits, and how it is served."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

# Gradio reads this when it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from transformers.utils import logging as transformers_logging

from deqzoo.models.mdeq.native_norm import native_norm_available

from . import examples as example_pictures
from . import graphs_tab, images_tab, look, text_tab, why_tab
from .guard import CORES, GATE, MAX_FILE, middleware
from .shelf import Shelf

TITLE = "deqzoo: networks that solve for their answer"
#: Seconds between clean-ups of uploaded files, and the age at which they go.
UPLOADS_LAST = (1800, 3600)
_HEAD = """
# Networks that solve for their answer

A deep equilibrium model has no stack of layers. It has one map and answers with the state that this
map leaves unchanged, its *equilibrium*. Applying the map again and again may never get there, so a
solver looks for it, step by step.
Watch it here; "Why a DEQ" measures what that is good for.
"""
_ABOUT = """
### What am I looking at?

- **Residual**: how much one more application of the map would still change the state, relative to
  its size. The solve has *converged* when it is below the **tolerance**.
- **Budget**: the largest number of steps. Lower it, and see what the model would have said earlier.
- **Badge**: whether the solve converged, and if not, whether it ran out of steps or went astray.
  The answer is always that of the state nearest to the equilibrium; where that is not the last one,
  a dotted line marks its step.
- **Method**: how the next step is chosen. All methods look for the same equilibrium; Anderson and
  Broyden learn from earlier steps and usually need fewer. Plain iteration finds it only where the
  map draws states together; with the small picture model that is so for some pictures only.

Everything runs on this server's processor. What you upload is used for nothing else, and is
deleted within two hours.

### Use it from a program

```python
from gradio_client import Client, handle_file
client = Client("http://127.0.0.1:7860")  # or where this page is
label, report = client.predict(handle_file("cat.png"), api_name="/classify")
figures = client.predict("The river rises in the hills .", api_name="/perplexity")
text, report = client.predict("The river", 40, api_name="/generate")
```

The link *Use via API* at the bottom lists all arguments.

### Read more

[Deep Equilibrium Models](https://arxiv.org/abs/1909.01377) is the paper of the idea, which
[Multiscale Deep Equilibrium Models](https://arxiv.org/abs/2006.08656) takes to pictures and
[Implicit Graph Neural Networks](https://arxiv.org/abs/2009.06211) to graphs.
[On Training Implicit Models](https://arxiv.org/abs/2111.05177) has the gradients that most of these
checkpoints were trained with.
"""


def build_demo(examples: Path | None = None, graph_data: Path | None = None) -> gr.Blocks:
    """The page over the bundled checkpoints.

    Args:
        examples: folder of example pictures.
        graph_data: local folder with TUDataset's sets COX2 and PROTEINS.
    """
    shelf = Shelf()
    pictures = _pictures(examples)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=UPLOADS_LAST) as demo:
        gr.Markdown(_HEAD, elem_id="dz-head")
        with gr.Tabs():
            with gr.Tab("Image", id="image"):
                images_tab.single_tab(shelf, pictures, demo)
            with gr.Tab("Why a DEQ", id="why") as why:
                why_tab.why_tab(shelf, pictures, why)
            with gr.Tab("Several images", id="batch"):
                images_tab.batch_tab(shelf, pictures)
            with gr.Tab("Text", id="text"):
                text_tab.text_tab(shelf)
            with gr.Tab("Graph", id="graph"):
                graphs_tab.graphs_tab(shelf, graph_data)
            with gr.Tab("About", id="about"):
                gr.Markdown(_ABOUT)
        images_tab.endpoint(shelf)
        text_tab.endpoints(shelf)
        graphs_tab.endpoint(shelf, graph_data)
        demo.load(None, None, None, js=example_pictures.NAME_THUMBNAILS)
    # The gate decides who works; Gradio's own queue knows no clients.
    return demo.queue(max_size=2 * GATE.waiting, default_concurrency_limit=GATE.waiting)


def launch(
    demo: gr.Blocks,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    share: bool = False,
    examples: Path | None = None,
    block: bool = True,
) -> Any:
    """Serve the page.

    Args:
        host: address to listen on; 0.0.0.0 for all.
        port: None for a free one.
        share: also make a public link, through Gradio's servers.
        examples: folder of example pictures, which the page may read.
        block: wait until the server is stopped.
    """
    transformers_logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:  # else every worker would start one for each core
        torch.set_num_threads(max(1, CORES // GATE.workers))
    # Until the native norm is ready, pictures are solved without it.
    threading.Thread(target=native_norm_available, kwargs={"wait": False}, daemon=True).start()
    # The page itself says what has not converged.
    logging.getLogger("deqzoo.models").setLevel(logging.ERROR)
    return demo.launch(
        server_name=host,
        server_port=port,
        share=share,
        show_error=True,
        max_file_size=MAX_FILE,
        allowed_paths=[str(p.parent) for p in _pictures(examples)[:1]],
        theme=look.theme(),
        css=look.CSS,
        ssr_mode=False,
        quiet=not block,
        footer_links=["api", "settings"],
        prevent_thread_lock=not block,
        max_threads=2 * GATE.waiting,
        app_kwargs={"middleware": middleware(host, "SPACE_ID" in os.environ, share)},
    )


def _pictures(folder: Path | None) -> list[Path]:
    if folder is None or not folder.is_dir():
        return []
    paths = sorted(p for p in folder.resolve().iterdir() if p.suffix in (".png", ".jpg"))
    return sorted(paths, key=lambda path: path.suffix != ".png")  # photographs first
