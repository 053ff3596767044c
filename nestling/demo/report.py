"""report.html: one file that needs nothing else. Tables, sentences and plots come from the same Results."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable

from nestling.demo.results import Results
from nestling.demo.sentences import sentences
from nestling.demo.tables import tables

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1917; background: #fff; max-width: 46rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: .9rem; margin: 1.2rem 0; width: 100%; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { border-bottom: 1px solid #e7e5e4; padding: .25rem .6rem; text-align: right;
  font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; font-weight: 400; }
svg { max-width: 100%; height: auto; }
pre { background: #f5f5f4; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
.prompt { color: #78716c; } footer { color: #57534e; font-size: .85rem; margin-top: 2.5rem; }
"""


def page(r: Results, figures: Iterable[tuple[str, str]]) -> str:
    """The whole report; `figures` are (heading, SVG)."""
    title = f"Nestling demo{', quick' if r.quick else ''}: a Hope that keeps learning while it reads"
    found = "\n".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences(r))
    drawn = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{svg}" for heading, svg in figures)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<ul>
{found}
</ul>
{"".join(table.html() for table in tables(r))}
{drawn}
<h2>In its own words</h2>
{samples(r)}
{footer(r)}
<script type="application/json" id="results">{embedded(r)}</script>
</body></html>
"""


def samples(r: Results) -> str:
    """The prompt and its two continuations."""
    prompt = f'<span class="prompt">{html.escape(r.samples.prompt)}</span>'
    return (
        f"<p>Hope continues the same text (grey) before it has read, and after, with an empty context.</p>"
        f"<p>Before:</p><pre>{prompt}{html.escape(r.samples.before)}</pre>"
        f"<p>After:</p><pre>{prompt}{html.escape(r.samples.after)}</pre>"
    )


def footer(r: Results) -> str:
    """Where, when and with what."""
    versions = ", ".join(f"{name} {version}" for name, version in r.machine["versions"].items())
    lines = [
        f"{r.machine['date']}, seed {r.seed}, {r.seconds:.0f} seconds in all",
        f"{r.machine['hardware']}, {r.machine['threads']} thread{'s' if r.machine['threads'] > 1 else ''}",
        f"{versions}, commit {r.machine['commit'] or 'unknown (installed package)'}",
    ]
    told = "<br>".join(html.escape(line) for line in lines)
    return f"<footer>{told}<br>All numbers: results.json, also inside this page.</footer>"


def embedded(r: Results) -> str:
    """The results as JSON that cannot end the script element."""
    return json.dumps(r.to_dict(), allow_nan=False).replace("<", "\\u003c")
