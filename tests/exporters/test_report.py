"""The report: a schema without nulls, and a page that is self-contained, escaped and says only what was run."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from fxprune.cli.tables import show_rungs
from fxprune.core.errors import ExportError, OutputError
from fxprune.evaluation.perplexity import PerplexityResult
from fxprune.exporters.report import markdown_summary, perplexity_entry, read_report, validate_report
from fxprune.exporters.report_page import binary, duration, headline, page, percent, si, times
from fxprune.exporters.report_writer import write_report

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VOID = {"br", "meta", "link", "img", "hr", "input"}
HOSTILE = "<script>alert(1)</script> & \"quoted\" 'n' $x_{1}$ | a`b`\n#010206"

FULL: dict[str, Any] = {
    "model": "org/tiny",
    "method": "channel",
    "seed": 0,
    "params": {
        "dense": 134_515_008,
        "slim": 113_102_208,
        "dense_blocks": 106_168_320,
        "slim_blocks": 84_755_520,
        "removed_share_blocks": 0.2,
        "removed_share_all": 0.159,
        "mask_sparsity": 0.0,
    },
    "macs": {"dense": 134_479_872, "slim": 113_000_000, "lm_head_dense": 28_311_552, "lm_head_slim": 28_311_552},
    "file_bytes": {"dense": 538_000_000, "slim": 452_000_000},
    "groups": [
        {"name": "l.0.mlp", "kind": "mlp", "layer": 0, "dense": 1536, "kept": 1024, "unit": "channels"},
        {"name": "l.1.mlp", "kind": "mlp", "layer": 1, "dense": 1536, "kept": 1280, "unit": "channels"},
        {"name": "l.0.attn", "kind": "attention", "layer": 0, "dense": 9, "kept": 6, "kv_dense": 3, "kv_kept": 2},
    ],
    "sparsity": {
        "method": "sparsegpt",
        "target": "0.5",
        "allocation": "loss",
        "removed_share": 0.5,
        "weights": 20_480,
        "pruned_linears": 3,
        "dense_linears": ["l.1.attn.q", "l.1.attn.k", "l.1.attn.v", "lm_head"],
        "mean_error": 0.0412,
        "linears": [
            {"name": "l.0.attn.q", "target": "0.5", "shape": [64, 64], "removed": 0.5, "error": 0.012, "tokens": 4096},
            {
                "name": "l.0.mlp.down",
                "target": "2:4",
                "shape": [64, 128],
                "removed": 0.5,
                "error": 0.11,
                "tokens": 4096,
                "seconds": 0.25,
                "notes": {"damping": 0.1, "damping_escalations": 1},
            },
            {
                "name": "l.1.mlp.down",
                "target": "0.5",
                "shape": [4, 64, 32],
                "removed": 0.5,
                "error": 0.0016,
                "tokens": 17,
                "notes": {"experts_with_few_tokens": [1, 3]},
            },
        ],
        "speed": "zeros make nothing faster",
        "seconds": {"text": 1.5, "solve": 4.0},
        "batch_size": 4,
    },
    "verify": [
        {"rung": "masked = slim", "max_abs_error": 3.1e-7, "tolerance": 1e-5, "passed": True},
        {"rung": "greedy text", "passed": True},
    ],
    "speed": [
        {
            "runtime": "onnxruntime",
            "case": "prefill-512",
            "threads": 2,
            "repeats": 20,
            "dense_ms": 812.3,
            "slim_ms": 651.2,
            "speedup": 1.247,
            "ci": [1.21, 1.29],
            "bound": 1.27,
            "bound_kind": "macs",
        },
        {"runtime": "torch", "case": "decode-8@64", "dense_ms": 20.0, "slim_ms": 18.0, "speedup": 1.111},
    ],
    "quality": [
        {
            "text": "some text",
            "metric": "perplexity",
            "dense": 35.2,
            "slim": 60.1,
            "dense_stderr": 0.9,
            "better": "lower",
            "definition": "over 60 windows of 512",
        }
    ],
    "calibration": {"source": "self", "samples": 128, "seq_len": 512},
    "history": [
        {"name": "channel", "options": {"ratio": 0.2, "target": None}, "modified": True, "seconds": 64.1, "details": {}}
    ],
    "seconds": {"trace": 3.1, "prune": 64.1},
    "peak_rss_bytes": 2_313_000_000,
    "machine": {"cpu": "some CPU", "memory_bytes": 2**34},
    "versions": {"fxprune": "0.1.0", "torch": "2.13.0"},
    "details": {"pins": [{"op": "aten.foo", "module": "m", "reason": None}]},
}

SECTIONS = {
    "size": ("params", "macs", "file_bytes"),
    "widths": ("groups",),
    "sparsity": ("sparsity",),
    "quality": ("quality",),
    "speed": ("speed",),
    "verify": ("verify",),
    "calibration": ("calibration",),
    "history": ("history",),
    "cost": ("seconds", "peak_rss_bytes"),
    "machine": ("machine",),
    "versions": ("versions",),
    "details": ("details",),
}


class Page(HTMLParser):
    """Checks that tags nest and collects what the tests ask about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if "id" in values:
            self.ids.append(values["id"] or "")
        if tag == "section":
            self.sections.append(values["id"] or "")


def written(report: dict[str, Any], directory: Path) -> tuple[Any, str, Page]:
    json_path, html_path = write_report(report, directory)
    html = html_path.read_text(encoding="utf-8")
    return json.loads(json_path.read_text(encoding="utf-8")), html, Page(html)


def nulls(value: object, path: str = "") -> Iterator[str]:
    if value is None:
        yield path
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from nulls(child, f"{path}.{key}")
    elif isinstance(value, list):
        for child in value:
            yield from nulls(child, f"{path}[]")


# ---- JSON ----------------------------------------------------------------------------------------------------------


def test_json_holds_what_was_given(tmp_path: Path) -> None:
    data, _, _ = written(FULL, tmp_path / "made")
    assert data == FULL
    assert read_report(tmp_path / "made" / "report.json") == {
        **FULL,
        "speed": [{**FULL["speed"][0], "ci": (1.21, 1.29)}, FULL["speed"][1]],
    }
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


def test_what_was_not_run_is_absent(tmp_path: Path) -> None:
    report = {
        **dict.fromkeys(("method", "seed", "macs", "speed", "quality", "calibration", "peak_rss_bytes")),
        "model": "m",
        "params": {"dense": 10, "slim": 8, "mask_sparsity": None},
        "verify": [{"rung": "a = b", "passed": True, "max_abs_error": None, "cases": None}],
    }
    data, _, _ = written(report, tmp_path)
    assert data == {
        "model": "m",
        "params": {"dense": 10, "slim": 8},
        "verify": [{"rung": "a = b", "passed": True}],
    }
    assert list(nulls(data)) == []


def test_none_is_kept_where_it_is_a_value(tmp_path: Path) -> None:
    data, _, _ = written(FULL, tmp_path)
    assert list(nulls(data)) == [".history[].options.target", ".details.pins[].reason"]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"parms": {}}, "parms"),
        ({"params": {"dense": "many"}}, "params.dense"),
        ({"params": {"removed_share_all": 1.2}}, "params.removed_share_all"),
        ({"speed": [{"runtime": "torch"}]}, "speed.0.speedup"),
        ({"groups": [{"name": "a", "kind": "mlp", "dense": -1, "kept": 0}]}, "groups.0.dense"),
        ({"sparsity": {"method": "wanda", "target": "0.5"}}, "sparsity.removed_share"),
        ({"sparsity": {**FULL["sparsity"], "linears": [{"name": "a"}]}}, "sparsity.linears.0.target"),
        ({"verify": [{"rung": "a"}]}, "verify.0.passed"),
        ({"details": {"value": object()}}, "not JSON"),
    ],
)
def test_a_wrong_report_is_refused_and_nothing_is_written(tmp_path: Path, change: dict[str, Any], place: str) -> None:
    with pytest.raises(ExportError, match=re.escape(place)):
        write_report({**FULL, **change}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_facts_of_ones_own_may_be_added_to_an_entry() -> None:
    report = {"verify": [{"rung": "a", "passed": False, "first_difference": "l.3.mlp"}]}
    assert validate_report(report) == report


def test_undefined_figures_are_json_and_come_back(tmp_path: Path) -> None:
    report = {
        "verify": [{"rung": "a", "max_abs_error": math.inf, "tolerance": 1e-5, "passed": False}],
        "quality": [{"text": "t", "metric": "perplexity", "dense": 9.0, "slim": math.nan}],
        "details": {"loss": math.inf},
    }
    data, html, _ = written(report, tmp_path)
    assert data["verify"][0]["max_abs_error"] == "Infinity"
    assert data["quality"][0]["slim"] == "NaN"
    assert "undefined" in html
    back = read_report(tmp_path / "report.json")
    assert back["verify"][0]["max_abs_error"] == math.inf
    assert math.isnan(back["quality"][0]["slim"])


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, html, _ = written(FULL, tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("fxprune.exporters.report_files.write_json", fail)
    with pytest.raises(OutputError, match="no space left"):
        write_report({"model": "other"}, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="taken"):
        write_report(FULL, tmp_path / "taken")
    with pytest.raises(ExportError, match="taken"):
        read_report(tmp_path / "taken")


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_full_page_has_every_section(tmp_path: Path) -> None:
    _, _, parsed = written(FULL, tmp_path)
    assert parsed.sections == list(SECTIONS)
    assert len(parsed.ids) == len(set(parsed.ids))


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_there_only_with_its_data(section: str, tmp_path: Path) -> None:
    without = {key: value for key, value in FULL.items() if key not in SECTIONS[section]}
    _, _, parsed = written(without, tmp_path / "without")
    assert parsed.sections == [name for name in SECTIONS if name != section]
    only = {key: FULL[key] for key in SECTIONS[section]}
    _, _, parsed = written(only, tmp_path / "only")
    assert parsed.sections == [section]


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    data, html, parsed = written({}, tmp_path)
    assert data == {}
    assert parsed.sections == []
    assert "None" not in html


def test_empty_lists_make_no_sections() -> None:
    empty: dict[str, Any] = {"groups": [], "verify": [], "speed": [], "quality": [], "history": [], "seconds": {}}
    assert Page(page(empty)).sections == []


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    _, html, parsed = written(FULL, tmp_path)
    assert re.findall(r"(?i)\b(?:https?|ftp|file|data|javascript):", html) == []
    assert "@import" not in html
    assert {target for target in re.findall(r"url\(([^)]*)\)", html) if not target.startswith("#")} == set()
    names = {tag for tag, _ in parsed.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
    references = [value for _, attrs in parsed.tags for key, value in attrs.items() if key in {"src", "href"}]
    assert [value for value in references if value and not value.startswith("#")] == ["report.json"]
    assert not any(key.startswith("on") for _, attrs in parsed.tags for key in attrs)


def test_inner_references_resolve(tmp_path: Path) -> None:
    _, html, parsed = written(FULL, tmp_path)
    used = {*re.findall(r"url\(#([^)]*)\)", html), *re.findall(r'href="#([^"]*)"', html)}
    assert used
    assert used <= set(parsed.ids)


def test_charts_are_described_and_follow_the_scheme(tmp_path: Path) -> None:
    _, html, parsed = written(FULL, tmp_path)
    charts = [attrs for tag, attrs in parsed.tags if tag == "svg"]
    assert len(charts) == 8  # four charts, for wide screens and for phones
    labels = [attrs["aria-label"] or "" for attrs in charts]
    assert all(attrs["role"] == "img" for attrs in charts)
    assert "2,304 of 3,072 kept over 2 layers" in labels[0]
    assert "KV groups" in labels[0]
    assert "q: 0.012 to 0.012 over 1 layers; down: 0.0016 to 0.11 over 2 layers" in labels[2]
    assert "dense 35.2, slim 60.1" in labels[4]
    assert "1.25 times, 95% interval 1.21 to 1.29, bound 1.27" in labels[6]
    assert "prefers-color-scheme: dark" in html
    assert "#0102" not in html
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    used = set(re.findall(r"var\(--\w+\)", svgs))
    assert {f"var(--{name})" for name in ("accent", "dense", "bound", "ink", "s0", "s1")} <= used
    assert re.findall(r"(?:fill|stroke): #\w+", svgs) == []


def hostile(value: Any) -> Any:
    """The report with every string replaced that a user or a model can choose."""
    if isinstance(value, dict):
        return {
            HOSTILE if key in {"fxprune", "cpu", "trace", "ratio"} else key: hostile(child)
            for key, child in value.items()
        }
    if isinstance(value, list):
        return [hostile(child) for child in value]
    return HOSTILE if isinstance(value, str) and value not in {"lower", "higher"} else value


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    _, html, parsed = written(hostile(copy.deepcopy(FULL)), tmp_path)
    assert "<script" not in html
    assert parsed.sections == list(SECTIONS)
    assert sum(text.count("<script>alert(1)</script>") for text in parsed.text) > 20
    # The colour that stands in for the accent while drawing is only replaced where it is a colour.
    assert any("#010206" in text for text in parsed.text)


def test_a_failed_rung_cannot_be_overlooked(tmp_path: Path) -> None:
    report = {"verify": [{"rung": "masked = slim", "max_abs_error": 0.3, "tolerance": 1e-5, "passed": False}]}
    _, html, parsed = written(report, tmp_path)
    assert "failed" in parsed.text
    assert 'class="badge bad"' in html
    assert "verification FAILED at masked = slim" in html
    assert "**failed**" in markdown_summary(report)


def test_an_error_above_the_tolerance_says_why_it_passed() -> None:
    why = "float32 rounding alone; max abs error in float64: 3.0e-12"
    rung = {"rung": "slim = masked", "max_abs_error": 1.4e-4, "tolerance": 1e-4, "passed": True, "detail": why}
    assert f"| passed ({why}) |" in markdown_summary({"verify": [rung]})
    out = Console(record=True, width=200, file=io.StringIO())
    show_rungs([rung, {**rung, "rung": "traced = eager", "detail": "[red]not a colour"}], out)
    said = out.export_text()
    assert f"passed ({why})" in said
    assert "passed ([red]not a colour)" in said


def test_experts_of_a_layer_add_up_and_groups_without_layers_are_counted() -> None:
    experts = [{"name": f"e{i}", "kind": "mlp", "layer": 4, "dense": 8, "kept": 6} for i in range(3)]
    assert "18 of 24 kept over 1 layers" in page({"groups": experts})
    loose = [{"name": f"e{i}", "kind": "mlp", "dense": 8, "kept": 6} for i in range(3)]
    assert "18 of 24 kept over 3 layers" in page({"groups": loose})


def test_query_heads_are_drawn_when_they_leave_inside_their_groups() -> None:
    group = {"name": "a", "kind": "attention", "layer": 0, "dense": 8, "kept": 4, "kv_dense": 2, "kv_kept": 2}
    assert "Attention (query heads): 4 of 8" in page({"groups": [group]})


# ---- headline, Markdown, figures -----------------------------------------------------------------------------------


def test_headline_reads_as_a_sentence() -> None:
    sentence = "; ".join(fact.text for fact in headline(FULL))
    assert sentence == (
        f"134.5 M → 113.1 M parameters; 20.0% of block Linears removed; 50.0% zeros in 3 Linears; "
        f"perplexity 35.2 → 60.1; "
        f"prefill-512 {times(1.247)}; 2 of 2 checks passed"
    )
    assert headline({}) == []


def test_headline_prefers_perplexity_and_prefill() -> None:
    report = {
        "quality": [{"text": "t", "metric": "accuracy", "dense": 0.5, "slim": 0.4}, FULL["quality"][0]],
        "speed": FULL["speed"][::-1],
    }
    labels = [fact.label for fact in headline(report)]
    assert labels == ["perplexity", "prefill-512"]


@pytest.mark.smoke
def test_markdown_has_tables_of_what_was_run() -> None:
    text = markdown_summary(FULL)
    assert text.startswith("### org/tiny, channel\n")
    assert "| parameters | 134.5 M | 113.1 M | 15.9% |" in text
    assert (
        f"| prefill-512 | onnxruntime | 2 | 812.3 | 651.2 | {times(1.247)} | 1.21 to 1.29 | {times(1.27)} (macs) |"
        in text
    )
    assert "| masked = slim | 3.1e-07 | 1e-05 | passed |" in text
    assert "None" not in text
    assert "| speed" not in markdown_summary({"model": "m", "params": FULL["params"]})
    assert markdown_summary({}) == "### fxprune report\n"


def test_markdown_tables_survive_hostile_names() -> None:
    text = markdown_summary(hostile(copy.deepcopy(FULL)))
    assert "<script" not in text
    for line in text.splitlines():
        if line.startswith("|") and "---" in line:
            columns = line.count("|")
        elif line.startswith("|") and "script" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == columns


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (si(0), "0"),
        (si(950), "950"),
        (si(134_515_008), "134.5 M"),
        (si(113_000_000), "113.0 M"),
        (si(6_738_415_616), "6.738 B"),
        (binary(512), "512 B"),
        (binary(538_000_000), "513.1 MiB"),
        (percent(0.0672), "6.7%"),
        (percent(None), ""),
        (duration(0.4213), "0.421 s"),
        (duration(185.2), "3 min 05 s"),
    ],
)
def test_figures_as_text(text: str, expected: str) -> None:
    assert text == expected


def result(ppl: float, error: float | None, tokens: str = "aa") -> PerplexityResult:
    return PerplexityResult(
        ppl, math.log(ppl), error, 60, 30660, 512, "text", "float32", "graph", tokens, "over 60 windows"
    )


def test_perplexity_entry_carries_the_standard_error_to_the_perplexity() -> None:
    entry = perplexity_entry(result(35.0, 0.02), result(60.0, None))
    assert entry["dense_stderr"] == pytest.approx(0.7)
    assert "slim_stderr" not in entry
    assert (entry["dense"], entry["slim"], entry["better"]) == (35.0, 60.0, "lower")
    assert validate_report({"quality": [entry]})["quality"] == [entry]
    assert "dense" not in perplexity_entry(None, result(60.0, 0.1))


def test_perplexities_over_other_tokens_are_never_one_entry() -> None:
    with pytest.raises(ExportError, match="very same tokens"):
        perplexity_entry(result(35.0, 0.1), result(60.0, 0.1, tokens="bb"))
    with pytest.raises(ExportError, match="very same tokens"):
        perplexity_entry(None, None)
