"""Small pieces of HTML that the report's sections share.

Whatever comes from a file goes through `escape`: prompts, names and settings are other people's text.
"""

from html import escape

from align_cluster.observe.charts import number


def panel(title: str, meaning: str, body: str, kind: str = "") -> str:
    """A framed figure; `meaning` and `body` are HTML, `title` is text."""
    caption = f"<figcaption><b>{escape(title)}</b><span>{meaning}</span></figcaption>"
    return f'<figure class="panel {kind}">{caption}{body}</figure>'


def facts_table(facts: dict[str, str]) -> str:
    rows = (f'<tr><td>{escape(name)}</td><td class="num">{escape(text)}</td></tr>' for name, text in facts.items())
    return f"<table>{''.join(rows)}</table>"


def short(column: str | None) -> str:
    """A score column without the prefix that all of them share."""
    return (column or "").removeprefix("reward/")


def duration(seconds: float) -> str:
    """Seconds for a reader: 6.7 ms, 5.4 s, 5 min 04 s, 2 h 13 min."""
    if seconds < 100:
        return f"{number(seconds)} s" if seconds >= 1 else f"{number(1000 * seconds)} ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
