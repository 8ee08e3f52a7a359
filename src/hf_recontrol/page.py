"""The page: a prompt answered without and with control, side by side, its tokens coloured by value."""

import html
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from .control_head import ControlHead
from .errors import SteeringNotApplied
from .head import Head
from .page_answers import COLOURS, Answerer, Asked, curves, side_by_side
from .trace import Trace
from .trace_text import show
from .value_head import ValueHead

REFUSALS = (ValueError, SteeringNotApplied, torch.OutOfMemoryError)  # HeadError and HeadMismatch are ValueErrors
TITLE = (
    "# RE-Control\nOne prompt, one seed: what the language model says by itself, and what it says steered. Point at a "
    "token, or tap it, for its numbers."
)
TITLES = ("Base", "Steered")
VALUES = {"values": "Value before", "steered_values": "Value after"}
MEANT = {**VALUES, "kl": "KL", "control_norms": "‖u‖"}
CSS = """
.answer {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.8; min-height: 7em}
.answer.growing::after {content: "▍"}
.answer .prompt, .summary {opacity: 0.65}
.summary {font-size: 0.85em; line-height: 1.4; white-space: normal}
.legend {line-height: 1.8}
.legend span[style*=background] {display: inline-block; white-space: pre}
[data-numbers] {border-radius: 3px; cursor: default}
[data-numbers]:is(:hover, :focus) {outline: 2px solid #555}
[data-numbers]:hover::after, .answer:not(:hover) [data-numbers]:focus::after {
  content: attr(data-numbers); position: fixed; left: 0; right: 0; bottom: 0; z-index: 100; margin: 0 auto; width: 24em;
  max-width: 100vw; padding: 0.6em 1em; white-space: pre-line; line-height: 1.5; background: #222; color: #fff;
  border: 1px solid #888; border-radius: 8px 8px 0 0; pointer-events: none}
.refusal {padding: 0.6em 1em; border-left: 4px solid #D55E00; background: #D55E0018}
"""


def build_page(model: Any, tokenizer: Any, heads: Mapping[str, Head], examples: Sequence[str] = ()) -> Any:
    """The page, a gradio.Blocks; `launch_page` serves it.

    Args:
        model, tokenizer, heads: as of `Answerer`.
        examples: prompts to choose from.

    Raises:
        ImportError: gradio is not installed.
        ValueError, HeadMismatch: as of `Answerer`.
    """
    gr = _gradio()
    view, first = _View(gr, Answerer(model, tokenizer, heads)), next(iter(heads.values()))
    with gr.Blocks(title="RE-Control", analytics_enabled=False) as page:
        gr.Markdown(TITLE)
        prompt = gr.Textbox(label="Prompt", value=examples[0] if examples else "", max_lines=6, elem_id="prompt")
        if len(examples) > 1:
            gr.Examples([[example] for example in examples], prompt, label="Examples")
        with gr.Row(equal_height=True):
            head = gr.Dropdown(list(heads), label="Head", elem_id="head")
            strength = _strength(gr, first)
        with gr.Row():
            go = gr.Button("Answer", variant="primary", elem_id="go", min_width=120)
            stop = gr.Button("Stop", elem_id="stop", min_width=120)
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            advanced = _advanced(gr, first, has_chat=bool(tokenizer.chat_template))
        refusal = gr.HTML(visible=False, elem_id="refusal")
        by = gr.Radio([(name, key) for key, name in MEANT.items()], value="values", label="Colours", elem_id="by")
        legend = gr.HTML(elem_id="legend")
        with gr.Row():
            answers = [gr.HTML(_answer(title), elem_id=title.lower()) for title in TITLES]
        plot = gr.LinePlot(
            None, "token", "value", color="answer", color_map=COLOURS, height=240, visible=False, elem_id="plot"
        )
        kept = gr.State(None)

        asking: dict[str, Any] = {
            "fn": view.answer,
            "inputs": [by, kept, prompt, head, strength, *advanced],
            "outputs": [refusal, legend, *answers, plot, kept],
            "show_progress": "hidden",
            "trigger_mode": "always_last",
            "concurrency_id": "model",  # one at a time, whoever asks
        }
        recolouring: dict[str, Any] = {
            "fn": view.recolour,
            "inputs": [by, kept],
            "outputs": [legend, *answers],
            "show_progress": "hidden",
        }
        asked = [gr.on([go.click, prompt.submit, strength.release], **asking)]
        changed = head.input(view.controls, head, [strength, *advanced[:2]], show_progress="hidden")
        asked.append(changed.then(**asking))
        for event in asked:
            event.then(**recolouring)  # the colours may have been chosen anew meanwhile
        stop.click(view.stop, kept, queue=False)
        by.input(**recolouring)
    return page


def launch_page(page: Any, *, host: str | None = None, port: int | None = None, **options: Any) -> None:
    """Serve the page until the process is interrupted. Nothing is asked of another machine.

    Args:
        host: 127.0.0.1 where None: no other machine sees the page.
        port: the first that is free from 7860 where None.
        options: further ones of `gradio.Blocks.launch`.
    """
    options = {"quiet": True, "prevent_thread_lock": True, "run_history": False, "footer_links": []} | options
    _, url, _ = page.launch(server_name=host, server_port=port, css=CSS, **options)
    print(f"The page is at {url} until Ctrl-C.", flush=True)
    page.block_thread()


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ImportError('The page needs gradio. Install the extra: pip install "hf-recontrol[demo]"') from error
    return gradio


def _strength(gr: Any, head: Head) -> Any:
    """The slider, up to where the head is calibrated."""
    table = head.config.control.calibration
    return gr.Slider(
        minimum=0,
        maximum=table[-1][0] if table else 1,
        value=0.1 if table else 0,
        step=0.01,
        label="Strength",
        info="Mean KL per token from the base model, nats; 0 is off."
        if table
        else "This head is not calibrated: say under Advanced how hard it steers.",
        interactive=bool(table),
        elem_id="strength",
    )


# Numbers that may be left out are boxes for text: gradio's for numbers shows 0, and sends it, where there is none.


def _multiplier(gr: Any, head: Head) -> Any:
    """α or the scale; the head's own where it has no strength."""
    control, name, own = head.config.control, "α (step_size)", "step_size"
    if isinstance(head, ControlHead):
        name = own = "scale"
    return gr.Textbox(
        value="" if control.calibration else str(getattr(control, own)),
        label=name,
        placeholder="from the strength",
        info="Takes the place of the strength.",
        elem_id="multiplier",
        min_width=150,
    )


def _num_steps(gr: Any, head: Head) -> Any:
    return gr.Textbox(
        value="",
        label="n (num_steps)",
        placeholder="the head's own",
        info="Steps of the ascent at each token.",
        visible=isinstance(head, ValueHead),
        elem_id="num_steps",
        min_width=150,
    )


def _advanced(gr: Any, head: Head, *, has_chat: bool) -> list[Any]:
    """In the order of Asked's fields."""
    with gr.Row():
        steering = [_multiplier(gr, head), _num_steps(gr, head)]
        info = "No token's KL above it, nats."
        steering.append(
            gr.Textbox("", label="max_kl", placeholder="4 × the strength", info=info, elem_id="max_kl", min_width=150)
        )
    with gr.Row():
        return [
            *steering,
            gr.Number(0, label="Seed", elem_id="seed", min_width=100),
            gr.Number(40, label="Length (max_new_tokens)", elem_id="length", min_width=100),
            gr.Number(0.7, label="Temperature", info="0 is greedy.", elem_id="temperature", min_width=100),
            gr.Checkbox(has_chat, label="As a chat's message", visible=has_chat, elem_id="chat"),
        ]


@dataclass(frozen=True)
class _Kept:
    """What a session's page shows."""

    asked: Asked
    plain: Asked | None
    """Of a whole base answer, what was asked for it: asked again, it is not generated again."""
    traces: list[Trace]
    """Of the base answer, then of the steered one, as far as they have come."""
    stop: threading.Event
    """Set, it ends the generation."""


class _View:
    """What the page's parts show after each event."""

    def __init__(self, gr: Any, answerer: Answerer):
        self._gr = gr
        self._answerer = answerer

    def answer(self, by: str, kept: _Kept | None, *typed: Any) -> Iterator[list[Any]]:
        """Both answers as they grow: [refusal, legend, base, steered, plot, what is kept]."""
        asked, stop = Asked(*typed), threading.Event()
        try:
            self._answerer.checked(asked)  # all of it, before the base answer is made
            plain = self._answerer.plain(asked)
            whole = kept.traces[:1] if kept is not None and kept.plain == plain else []
            shown = _Kept(asked, plain if whole else None, whole, stop)
            yield [self._gr.HTML(visible=False), *[self._gr.skip()] * 4, shown]
            for question in (plain, asked)[len(whole) :]:
                with closing(self._answerer.answer(question, stop)) as parts:
                    for part in parts:
                        shown = _Kept(asked, plain if whole else None, [*whole, part], stop)
                        yield [self._gr.skip(), *self._texts(by, shown, growing=True), self._gr.skip(), shown]
                if stop.is_set():
                    break
                whole = shown.traces
            plot = self._plot(shown) if len(shown.traces) == 2 else self._gr.skip()
            yield [self._gr.skip(), *self._texts(by, shown), plot, shown]
        except REFUSALS as error:
            text = f'<div class="refusal">{html.escape(str(error))}</div>'
            yield [self._gr.HTML(text, visible=True), *[self._gr.skip()] * 5]

    def recolour(self, by: str, kept: _Kept | None) -> list[Any]:
        """The same answers in other colours: [legend, base, steered]."""
        return [self._gr.skip()] * 3 if kept is None else self._texts(by, kept)

    def stop(self, kept: _Kept | None) -> None:
        """End what is being answered; it ends as if whole, so nothing comes after what is shown then."""
        if kept is not None:
            kept.stop.set()

    def controls(self, name: str) -> list[Any]:
        """What a head can be told: [strength, multiplier, number of steps]."""
        head = self._answerer.heads[name]
        return [_strength(self._gr, head), _multiplier(self._gr, head), _num_steps(self._gr, head)]

    def _texts(self, by: str, kept: _Kept, *, growing: bool = False) -> list[Any]:
        if not kept.traces:
            return [self._gr.skip()] * 3
        trace = side_by_side(kept.traces)
        by = "kl" if by in VALUES and bool(trace.values.isnan().all()) else by
        shown, watching = show(trace, self._answerer.tokenizer, by=by), self._answerer.plain(kept.asked).head
        whose = f"; values by {html.escape(watching)}" if watching != kept.asked.head and by in VALUES else ""
        rows = [*shown.rows, ("", [])][:2]  # the steered answer may not have begun
        last = len(kept.traces) - 1
        answers = [
            _answer(title, kept.asked.prompt, *row, growing=growing and place == last)
            for place, (title, row) in enumerate(zip(TITLES, rows, strict=True))
        ]
        return [f'<div class="legend">{shown.legend_html()}{whose}</div>', *answers]

    def _plot(self, kept: _Kept) -> Any:
        import pandas  # gradio's

        name, rows = curves(*kept.traces)
        return self._gr.LinePlot(pandas.DataFrame(rows), y_title=name, visible=True)


def _answer(
    title: str, prompt: str = "", summary: str = "", tokens: Sequence[Any] = (), *, growing: bool = False
) -> str:
    text = "".join(token.html('tabindex="0" data-numbers') for token in tokens)  # a tap and the Tab key focus
    prompt = f'<span class="prompt">{html.escape(prompt)}</span>'
    kind = "answer growing" if growing else "answer"
    return f'<h3>{title}</h3><div class="{kind}">{prompt}{text}</div><div class="summary">{summary}</div>'
