"""Theme and style sheet; system fonts only, so that nothing is fetched from elsewhere."""

from __future__ import annotations

import gradio as gr


def theme() -> gr.themes.Base:
    """Calm colours, light and dark, without fonts from the network."""
    return gr.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    ).set(  # the theme's own teal has too little contrast with white and with its labels
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        block_label_text_color="*primary_800",
        block_label_background_fill_dark="*primary_700",
        block_title_text_color="*primary_800",
        body_text_color_subdued="*neutral_600",
        # and its light controls are white on white
        block_border_width="1px",
        block_border_color="*neutral_200",
        input_border_width="1px",
        input_border_color="*neutral_300",
        checkbox_border_color="*neutral_400",
        checkbox_label_border_width="1px",
        checkbox_label_border_color="*neutral_300",
        button_border_width="1px",
        button_secondary_border_color="*neutral_300",
    )


CSS = """
:root {
  --dz-0: #0072b2; --dz-1: #c8500a; --dz-2: #00795b; --dz-3: #a6428a; --dz-4: #8a6d00;
  --dz-5: #555f6d; --dz-hot: #f2542d; --dz-cool: #0f8b8d; --dz-good: #0b7a53; --dz-late: #b4540a;
  --dz-faint: #5b6675; --dz-rule: #d8dee6;
}
.dark {
  --dz-0: #56b4e9; --dz-1: #ff8d4d; --dz-2: #2fcf9f; --dz-3: #e58ac9; --dz-4: #e6c229;
  --dz-5: #a8b3c1; --dz-hot: #f2643d; --dz-cool: #14b8b8; --dz-good: #34d399; --dz-late: #fbab60;
  --dz-faint: #a3afbf; --dz-rule: #3b4657;
}
.gradio-container { max-width: 1240px !important; margin: 0 auto !important;
  width: 100%; min-width: 0 !important; }
.gradio-container > .main, .gradio-container > .main > .wrap { width: 100%; }
.gradio-container > .main > .wrap > .contain { width: 100%; }
@media (min-width: 820px) {
  .dz-layout { display: grid !important; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr);
    grid-template-rows: auto 1fr; align-items: start; column-gap: 1.4rem; }
  .dz-layout > :nth-child(2) { grid-column: 2; grid-row: 1 / span 2; }
  .dz-layout > :nth-child(3) { grid-column: 1; grid-row: 2; }
}
@media (max-width: 640px) {
  .gradio-container .fillable { padding: 12px !important; }
  .tab-wrapper, .tab-container { height: auto !important; min-width: 0; }
  .tab-container { flex-wrap: wrap; overflow: visible !important; }
  .tab-container button { padding: .45rem .55rem !important; }
}
.tab-container button.selected { color: #0f766e !important; }
.dark .tab-container button.selected { color: #5eead4 !important; }
#dz-head h1 { font-size: 1.7rem; margin: .4rem 0 .2rem; letter-spacing: -.01em; }
#dz-head p { font-size: 1.02rem; color: var(--dz-faint); max-width: 52rem; margin: 0; }
.dz-waiting, .dz-note { color: var(--dz-faint); }
.dz-waiting { padding: 1.2rem; border: 1px dashed var(--dz-rule); border-radius: 12px;
  line-height: 1.5; }
.dz-note { font-size: .88rem; }
.dz-verdict { display: flex; gap: .9rem; align-items: center; padding: .3rem 0 .6rem;
  line-height: 1.55; }
.dz-badge { color: #fff; border-radius: 999px; padding: .12rem .65rem; font-weight: 600;
  font-size: .88rem; white-space: nowrap; margin-right: .3rem; }
.dz-good .dz-badge { background: #0b7a53; }
.dz-late .dz-badge { background: #b4540a; }
.dz-seen { width: 72px; height: 72px; image-rendering: pixelated; border-radius: 8px; flex: none;
  margin: 0 !important; }
.dz-charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr));
  gap: 1rem; }
.dz-chart { margin: 0; min-width: 0; }
.dz-chart figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .3rem; }
.dz-chart svg { width: 100%; height: auto; display: block; overflow: visible; }
.dz-chart text { fill: var(--dz-faint); font-size: 13px; }
.dz-grid { stroke: var(--dz-rule); stroke-width: 1; }
.dz-line { fill: none; stroke-width: 2.4; stroke-linejoin: round; stroke-linecap: round; }
.dz-tolerance { stroke: var(--dz-faint); stroke-width: 1.8; stroke-dasharray: 6 5; }
.dz-stroke-0 { stroke: var(--dz-0); } .dz-stroke-1 { stroke: var(--dz-1); }
.dz-stroke-2 { stroke: var(--dz-2); } .dz-stroke-3 { stroke: var(--dz-3); }
.dz-stroke-4 { stroke: var(--dz-4); stroke-dasharray: 3 5; } .dz-stroke-5 { stroke: var(--dz-5); }
.dz-fill-0 { fill: var(--dz-0); background: var(--dz-0); }
.dz-fill-1 { fill: var(--dz-1); background: var(--dz-1); }
.dz-fill-2 { fill: var(--dz-2); background: var(--dz-2); }
.dz-fill-3 { fill: var(--dz-3); background: var(--dz-3); }
.dz-fill-4 { fill: var(--dz-4); background: var(--dz-4); }
.dz-fill-5 { fill: var(--dz-5); background: var(--dz-5); }
.dz-legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .88rem;
  padding-left: 11%; }
.dz-key { display: inline-flex; align-items: center; gap: .35rem; }
.dz-chip { width: .75rem; height: .75rem; border-radius: 3px; display: inline-block; }
.dz-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(230px, 100%), 1fr));
  gap: .7rem; }
.dz-card { display: flex; gap: .7rem; padding: .6rem; border: 1px solid var(--dz-rule);
  border-radius: 12px; align-items: center; min-width: 0; }
.dz-card > div { flex: 1; min-width: 0; overflow-wrap: anywhere; }
.dz-card img { width: 72px; height: 72px; object-fit: cover; border-radius: 8px; flex: none;
  margin: 0 !important; }
.dz-bar { background: var(--dz-rule); border-radius: 99px; height: .5rem; overflow: hidden;
  margin: .25rem 0; }
.dz-bar i { display: block; height: 100%; background: var(--dz-cool); border-radius: 99px; }
.dz-bar i.dz-open { background: var(--dz-late); }
.dz-figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr));
  gap: .7rem; }
.dz-figure { display: flex; flex-direction: column; padding: .7rem .9rem; border-radius: 12px;
  border: 1px solid var(--dz-rule); }
.dz-figure b { font-size: 1.55rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.dz-figure small { color: var(--dz-faint); }
.dz-switch { border: 0; padding: 0; margin: .6rem 0 .2rem; display: flex; flex-wrap: wrap;
  gap: .2rem 1rem; align-items: center; font-size: .9rem; }
.dz-switch legend { float: left; margin-right: 1rem; color: var(--dz-faint); }
.dz-switch label { display: inline-flex; gap: .35rem; align-items: center; cursor: pointer;
  padding: .25rem 0; }
.dz-scale { display: inline-block; width: 6rem; height: .7rem; vertical-align: middle; }
.dz-scale i { display: block; height: 100%; border-radius: 99px; border: 1px solid var(--dz-rule);
  background: linear-gradient(90deg, transparent, var(--dz-hot)); }
.dz-ends { color: var(--dz-faint); font-size: .85rem; }
.dz-on-steps { display: none; }
.dz-tokens:has(.dz-by-steps:checked) .dz-on-steps { display: inline; }
.dz-tokens:has(.dz-by-steps:checked) .dz-on-surprise { display: none; }
.dz-tokens:has(.dz-by-steps:checked) .dz-switch .dz-scale i {
  background: linear-gradient(90deg, transparent, var(--dz-cool)); }
.dz-text { line-height: 2; font-size: 1.02rem; margin: .3rem 0; overflow-wrap: anywhere; }
.dz-token { padding: .12rem .22rem; border-radius: 5px; cursor: help;
  background: color-mix(in srgb, var(--dz-hot) calc(var(--s) * 75%), transparent); }
.dz-tokens:has(.dz-by-steps:checked) .dz-token {
  background: color-mix(in srgb, var(--dz-cool) calc(var(--e) * 75%), transparent); }
.dz-unknown { text-decoration: underline wavy var(--dz-late) 1.5px; text-underline-offset: 4px; }
.dz-token:hover, .dz-token:focus { outline: 2px solid var(--dz-0); }
.dz-token:hover::after, .dz-token:focus::after { content: attr(data-tip); position: fixed;
  left: 50%; bottom: 1.2rem; transform: translateX(-50%); z-index: 1000; background: #17202b;
  color: #fff; padding: .5rem .9rem; border-radius: 10px; font-size: .95rem; line-height: 1.4;
  max-width: 92vw; box-shadow: 0 4px 18px #0006; pointer-events: none; }
.dz-h { margin: .8rem 0 .3rem; font-size: 1rem; }
.dz-next { width: 100%; max-width: 26rem; border-collapse: collapse; border: 0 !important;
  margin: 0 !important; }
.dz-next th, .dz-next td { border: 0 !important; padding: .15rem .4rem; text-align: left; }
.dz-next th { font-weight: 500; white-space: nowrap; }
.dz-next td:nth-child(2) { width: 60%; }
.dz-next td:last-child { text-align: right; color: var(--dz-faint); }
.dz-next tr { border: 0; background: none !important; }
.dz-written { line-height: 1.7; font-size: 1.04rem; white-space: pre-wrap; min-height: 2rem; }
.dz-writing { margin-top: .6rem; border-top: 1px solid var(--dz-rule); padding-top: .8rem; }
.dz-graph { margin: 0; }
.dz-graph svg { width: 100%; height: auto; }
.dz-graph figcaption { font-size: .9rem; color: var(--dz-faint); }
.dz-edges line { stroke: var(--dz-faint); stroke-width: 1.4; opacity: .65; }
.dz-nodes text { font-size: 10px; font-weight: 600; text-anchor: middle; pointer-events: none;
  fill: var(--body-text-color); }
.dz-answer { stroke: var(--dz-faint); stroke-width: 1.6; stroke-dasharray: 2 3; }
.dz-error { padding: .8rem 1rem; border-radius: 8px; line-height: 1.5; overflow-wrap: anywhere;
  background: color-mix(in srgb, var(--dz-late) 14%, transparent);
  box-shadow: inset 4px 0 0 var(--dz-late); }
#graph-residuals .dz-chart, #node-distance .dz-chart { max-width: 400px; }
.dz-why { margin: .4rem 0 1rem; }
.dz-why h3 { margin: 0 0 .2rem; font-size: 1.1rem; }
.dz-why p { margin: 0 0 .6rem; max-width: 52rem; }
.dz-why .dz-chart { max-width: 400px; }
.dz-why .dz-cards { max-width: 480px; margin-bottom: .6rem;
  grid-template-columns: repeat(2, minmax(0, 1fr)); }
#why-head { align-items: end; flex-wrap: wrap; }
#why-head > .form { flex: 1 1 240px; }
#why-run { margin-bottom: .5rem; }
.dz-dial { margin: .2rem 0 .6rem; }
.dz-minis { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.6rem, 1fr));
  gap: .5rem; }
.dz-mini { display: flex; gap: .5rem; align-items: center; min-width: 0; }
.dz-mini img { width: 48px; height: 48px; object-fit: cover; border-radius: 8px; flex: none;
  margin: 0 !important; }
.dz-mini small { display: block; color: var(--dz-faint); }
.dz-right span { color: var(--dz-good); } .dz-wrong span { color: var(--dz-late); }
#image-picture img { object-fit: contain; }
[id$="-checkpoint"] input { text-overflow: ellipsis; padding-right: 1.6rem !important; }
[id$="-examples"] button img { object-fit: cover !important; width: 100%; height: 100%; }
footer .show-api { display: inline-flex !important; }
@media (max-width: 640px) {
  .dz-why .dz-card { flex-direction: column; align-items: flex-start; }
  [id^="image"][id$="-examples"] > .gallery { flex-wrap: nowrap; overflow-x: auto;
    max-width: calc(100vw - 66px); }
  [id^="image"][id$="-examples"] > .gallery > * { flex: none; }
}
.dz-nodes .dz-ringed { stroke: var(--body-text-color) !important; stroke-width: 3 !important; }
.dz-nodes circle { stroke: var(--dz-faint); stroke-width: 1;
  fill: color-mix(in srgb, var(--dz-hot) calc(var(--s) * 100%), var(--background-fill-primary)); }
"""
