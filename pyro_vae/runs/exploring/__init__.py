"""A page on which a finished run is played with: data drawn or uploaded, latents moved, what is erased filled in.

``explore(settings)`` serves it on this machine alone, until it is interrupted. The page is made by Gradio, an optional
extra; what it shows is computed by :class:`pyro_vae.runs.exploring.explorer.Explorer`, which needs none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pyro_vae.errors import RunError, need_extra
from pyro_vae.runs.exploring.explorer import Explorer
from pyro_vae.runs.given import check_made
from pyro_vae.runs.loading import load
from pyro_vae.runs.settings import check_seed

HOST = "127.0.0.1"
"""Nobody else's machine reaches the page."""


@dataclass(frozen=True)
class ExploreSettings:
    """Settings of a page to play with.

    Args:
        run: directory of a finished run, or hf://USER/NAME; may stand first, without --run.
        port: of this machine, where the page is; 0: any that is free.
        browser: open the page in a browser; null: if there is one.
        seed: of random draws, at least 0.
        trust: build whatever classes the run's settings name; false: only those of pyro_vae; null: false for a run of
            hf://, else true.
    """

    DESCRIPTION: ClassVar[str] = (
        "A page on this machine on which a finished run is played with; it ends with Ctrl-C.\n\n"
        "Usage: pyro-vae explore RUN [options]\n\n"
        "Draw an image, upload one, or fill in a form: the page shows its reconstruction, its posterior, log p(x)\n"
        "with its error, and where that is among the test data. Move the active units, walk between two data, draw\n"
        "samples, of each class where the model is told it, and erase what is to be filled in. Only this machine\n"
        "reaches the page, and it fetches nothing from anywhere. It needs the extra explore, and the run's data."
    )

    run: Path
    port: int = 7860
    browser: bool | None = None
    seed: int = 0
    trust: bool | None = None

    def __post_init__(self):
        check_made(self)
        check_seed(self.seed)
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port must be in 0..65535, got {self.port}")


def explore(settings: ExploreSettings) -> None:
    """Serve the page of a run until it is interrupted.

    Raises:
        RunError: if there is no finished run of images or of a table with its data, or the port is busy, or no browser
            is found and one was asked for.
        MissingExtra: without Gradio.
    """
    need_extra("explore", ["gradio"])
    run = load(settings.run, settings.trust)
    explorer = Explorer(run, settings.seed)
    try:
        explorer.data  # noqa: B018
    except RunError as error:
        raise RunError(f"explore needs the data of the run: {error}") from error
    from pyro_vae.runs.exploring.serving import serve

    serve(explorer, HOST, settings.port, settings.browser)
