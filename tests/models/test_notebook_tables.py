"""What notebooks show of models, summaries and explanations: HTML that can be parsed, with the numbers of the text."""

from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import pytest
import tiny_models

import attn
import models
from attn.core.tables import html_table


class Tables(HTMLParser):
    """Cells of all tables in a piece of HTML, by row; every tag has to be closed."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("scan", [True, False])
def test_a_model_shows_its_parameters_and_options(scan):
    shown = Tables(tiny_models.abstract("swin", scan=scan)._repr_html_())
    rows = {row[0]: row[1:] for row in shown.rows}
    _, params, _ = models.split(tiny_models.abstract("swin", scan=scan))
    assert rows["total"] == [f"{sum(value.size for value in params.values()):,}"]
    names = list(rows)
    assert names[:3] == ["", "patch_embed", "stages.0.blocks.[0:3] (each)"]
    assert names.index("stages.1") < names.index("stages.1.blocks.[0:2] (each)") < names.index("head")
    assert rows["window"] == ["4"]
    assert "dropout" not in rows, "an option that is as usual"
    assert "SwinTransformer" in shown.text


def test_a_summary_and_an_explanation_show_what_their_texts_say():
    summary = models.summarize(tiny_models.abstract("vit"), 2, activations=False)
    shown = Tables(summary._repr_html_())
    assert shown.rows[0] == ["", "parameters", "multiply-adds", "activations"]
    assert [" ".join(row).split() for row in shown.rows[1:]] == [
        line.split() for line in str(summary).splitlines()[1:-1] if not line.startswith("---")
    ]
    assert "batch of 2" in shown.text

    q = jax.ShapeDtypeStruct((1, 8, 8, 2, 16), jnp.float32)
    explained = attn.explain(attn.neighborhood_attention, q, q, q, window=3)
    rows = Tables(explained._repr_html_()).rows[1:]
    assert [row[1] for row in rows] == ["cpu", "tpu", "cuda"]
    assert all(explained[row[1]].implementation == row[2].partition("\n")[0] for row in rows)
    assert rows[0][0].startswith("neighborhood_attention")
    assert "tpu: runs on tpu only" in rows[0][3]
    assert "no operator" in Tables(attn.explain(jnp.sin, 1.0)._repr_html_()).text


def test_texts_are_escaped():
    text = html_table("<b>", ("a<b",), [("1 < 2 & 3",)], note="<script>")
    assert Tables(text).rows == [["a<b"], ["1 < 2 & 3"]]
    assert "<script>" not in text
