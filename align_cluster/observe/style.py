"""The report's style sheet: one accent, grey for what was before, light and dark after the reader's system."""

CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --panel: #ffffff; --ink: #1b1f24; --soft: #626b78; --rule: #e3e6eb; --grid: #eceff3;
  --accent: #2461c4; --before: #a9b2bf; --good: #19794a; --bad: #b3372f; --faint: 0.28;
  --stage-0: #2f6fcf; --stage-1: #d99a2b; --stage-2: #7c63b8; --stage-3: #2b9384; --stage-4: #c4617a;
  --stage-5: #7b8794; --stage-6: #a3b545; }
@media (prefers-color-scheme: dark) { :root {
  --page: #111418; --panel: #191d23; --ink: #e5e8ec; --soft: #98a2b0; --rule: #2b313a; --grid: #252a32;
  --accent: #74a7f7; --before: #5d6775; --good: #5cc48d; --bad: #ec8078; --faint: 0.38;
  --stage-0: #6a9fee; --stage-1: #e3b45c; --stage-2: #a48fdc; --stage-3: #55b8a9; --stage-4: #df8a9f;
  --stage-5: #98a2b0; --stage-6: #bccb6c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 25px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 36px 0 10px; padding-top: 10px; border-top: 2px solid var(--ink); }
h2 small { font-weight: 400; font-size: 13px; color: var(--soft); margin-left: 8px; }
p { margin: 4px 0 10px; max-width: 80ch; }
.note, .sub { color: var(--soft); }
.head { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: baseline; }
.pill { font-size: 12px; padding: 1px 9px; border-radius: 10px; border: 1px solid currentColor; }
.good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: minmax(300px, 2fr) repeat(4, minmax(125px, 1fr)); gap: 12px;
  margin-top: 18px; }
.tile, .panel { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; min-width: 0; }
.tile { padding: 12px 14px; }
.tile b { display: block; font-size: 22px; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 12.5px; }
.tile .arrow { color: var(--soft); font-weight: 400; padding: 0 2px; }
.tile b .good, .tile b .bad { font-size: 16px; margin-left: 8px; color: var(--good); white-space: nowrap; }
.tile b .bad { color: var(--bad); }
.panels { display: grid; grid-template-columns: repeat(12, 1fr); gap: 12px; margin-bottom: 12px; }
.panel { padding: 12px 14px; margin: 0; grid-column: span 4; display: flex; flex-direction: column; }
.panel > svg, .panel > .scroll { margin-top: auto; }
.w3 { grid-column: span 3; } .w5 { grid-column: span 5; } .w6 { grid-column: span 6; } .w7 { grid-column: span 7; }
.w8 { grid-column: span 8; } .w12 { grid-column: span 12; }
figcaption { margin-bottom: 6px; font-size: 13px; line-height: 1.35; }
figcaption b { font-weight: 600; }
figcaption span { display: block; color: var(--soft); font-size: 12px; }
figcaption span span { display: inline; } figcaption .bad { color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 12px; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
.num { text-align: right; white-space: nowrap; }
.total td { font-weight: 600; border-top: 1px solid var(--soft); }
.total small { display: block; font-weight: 400; color: var(--soft); }
td.barcell { width: 40%; padding-right: 0; }
code, pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre { margin: 0; overflow: auto; max-height: 620px; }
details { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: 10px 14px;
  margin-bottom: 12px; }
summary { cursor: pointer; }
details[open] summary { margin-bottom: 8px; }
ol { margin: 0; padding-left: 24px; }
img { display: block; width: 100%; height: auto; border-radius: 3px; background: #fff; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, -apple-system, "Segoe UI", Arial, sans-serif; }
svg text { fill: var(--soft); }
svg.bars { height: 20px; }
.grid { stroke: var(--grid); } .axis { stroke: var(--before); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.line.accent { stroke: var(--accent); stroke-width: 2.2; } .line.muted { stroke: var(--before); stroke-width: 1.4; }
.line.faint { stroke-width: 1.1; opacity: var(--faint); }
.band { opacity: 0.16; } .band.accent { fill: var(--accent); }
.dot.accent { fill: var(--accent); } .dot.muted { fill: var(--before); }
.hit { fill: transparent; } .hit:hover { fill: var(--accent); fill-opacity: 0.35; }
table svg { min-width: 70px; }
svg text.end { fill: var(--soft); } svg text.end.accent { fill: var(--accent); font-weight: 600; }
rect.before, i.before { fill: var(--before); background: var(--before); }
rect.after, i.after { fill: var(--accent); background: var(--accent); }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.share { display: flex; height: 14px; border-radius: 3px; overflow: hidden; gap: 1px; margin: 4px 0 8px; }
footer { color: var(--soft); font-size: 12px; margin-top: 28px; }
@media (max-width: 900px) {
  .tiles { grid-template-columns: repeat(2, 1fr); } .tiles .tile:first-child { grid-column: span 2; }
  .panel { grid-column: span 12; } .w3, .w4 { grid-column: span 6; } }
@media (max-width: 640px) {
  main { padding: 18px 12px 32px; } .w3, .w4, .panel { grid-column: span 12; }
  .w3 svg { max-width: 340px; } .scroll { overflow-x: auto; } .scroll svg { min-width: 640px; }
  td.barcell { width: 26%; } th, td { padding-right: 7px; } }
@media print { body { background: #fff; } details, .panel, .tile { break-inside: avoid; } }
""" + "".join(
    f".stage-{index} {{ fill: var(--stage-{index}); background: var(--stage-{index}); }}\n" for index in range(7)
)


def standalone(chart: str) -> str:
    """A chart of `charts` as a picture of its own, with what the report's page would give it."""
    head, rest = chart.split(">", 1)
    ground = '<rect width="100%" height="100%" style="fill: var(--panel)"/>'
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"')
    return f"{head}><style>{CSS}</style>{ground}{rest}\n"
