"""The site: its code runs, its tables are complete and agree with code and results, nothing is said twice."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from dataclasses import fields
from importlib import import_module
from typing import Any

import pytest
import torch
from page_blocks import ROOT, blocks, tiny, toys  # noqa: F401
from problems import closure_of

import gradreg_optim
from gradreg_optim import GradRegConfig, GradRegOptimizer

PAGES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
TRAINERS = ("docs/trainers.md", "docs/upgrading.md")
"""Pages whose blocks take a model, data and a trainer as given."""
WITH_CODE = [page for page in PAGES if page not in TRAINERS and any(run for _, run in blocks(page))]


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """The sentences of a page, without code, tables, headings and what is made of results."""
    rest = re.sub(r"```.*?```|<!-- ([\w-]+) -->.*?<!-- end -->", "", text(page), flags=re.DOTALL)
    starts = ("|", "#", "    ", "!", "<!--")
    return "\n".join(line for line in rest.splitlines() if not line.startswith(starts))


@pytest.mark.parametrize("page", WITH_CODE)
def test_blocks_run(page):
    """The blocks of a page run one after the other."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for code, can_run in blocks(page):
        if can_run:
            exec(code, names)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("page", TRAINERS)
def test_blocks_about_trainers_run(page, tmp_path):
    """Each block runs on a tiny model, and whatever is trained is regularized."""
    pytest.importorskip("peft", reason="LoRA comes with peft")
    names: dict[str, Any] = {}
    trained = 0
    for code, can_run in blocks(page):
        names |= toys(tmp_path)
        if not can_run:
            continue
        exec(code, names)
        if "trainer.train()" in code:
            trained += 1
            assert names["trainer"].state.log_history[0]["grad_reg/penalty_ratio"] > 0
    assert trained


def test_blocks_that_do_not_run_are_python():
    """They compile, there are few of them, and each says why it does not run."""
    left_out = [code for page in PAGES for code, can_run in blocks(page) if not can_run]
    assert 0 < len(left_out) <= 3
    for code in left_out:
        compile(code, "docs", "exec")


def test_every_setting_has_its_row():
    """In the order of the signature, with its default. Its flag is its name, but for what the page says."""
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", text("docs/settings.md"), re.MULTILINE)
    parameters = dict(inspect.signature(GradRegOptimizer).parameters)
    del parameters["optimizer"], parameters["unknown"]  # the latter catches misspelt names
    assert [name for name, _ in rows] == list(parameters)
    for name, default in rows:
        assert default == str(parameters[name].default), name
    flags = {"grad_reg_warmup" if name == "warmup_steps" else f"grad_reg_{name}" for name, _ in rows}
    assert (flags | {"grad_reg_published"}) - {"grad_reg_model", "grad_reg_scaler"} == {
        f.name for f in fields(GradRegConfig)
    }


def test_every_metric_has_its_row():
    """All that a checked step and a trainer report, and nothing that the package does not know."""
    table = re.findall(r"^\|(.*?)\|", text("docs/metrics.md"), re.MULTILINE)
    documented = [name for row in table for name in re.findall(r"`(\w+)`", row)]
    attachment = text("gradreg_optim/trainers/attachment.py")
    found = set(re.findall(r'_note\("(\w+)"', attachment))
    assert "reweighted" in found
    for dtype in (torch.float32, torch.bfloat16):
        model, x = torch.nn.Linear(4, 1, dtype=dtype), torch.ones(8, 4, dtype=dtype)
        optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), check_every=1)
        optimizer.step(closure_of(optimizer, lambda model=model, x=x: model(x).square().mean()))
        found |= optimizer.metrics.keys()
    assert found <= set(documented)
    assert len(set(documented)) == len(documented)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "gradreg_optim").rglob("*.py"))
    assert [name for name in documented if f'"{name}"' not in source] == []


def test_every_public_name_is_in_the_reference():
    """And nothing else is."""
    documented = re.findall(r"^::: gradreg_optim\.(\w+)$", text("docs/api.md"), re.MULTILINE)
    assert sorted(documented) == sorted(gradreg_optim.__all__)


def test_every_argument_of_the_published_code_has_its_row():
    """With a setting that takes its place, or none."""
    rows = text("docs/upgrading.md")
    published = ("strength", "eps", "warmup", "g1_clip", "g2_clip", "exclude")
    assert all(f"`grad_reg_{name}`" in rows and f"`--grad_reg_{name}`" in rows for name in published)
    assert {f"grad_reg_{name}" for name in published} <= {field.name for field in fields(GradRegConfig)}


def test_figures_are_those_of_the_newest_results():
    """What README and site show between marks is what ``python -m benchmarks.pages`` writes."""
    pytest.importorskip("tqdm", reason="the benchmarks come with the extra [demo]")
    pages = import_module("benchmarks.pages")
    for page in pages.PARTS:
        assert pages.written(page, text(page)) == text(page), f"{page}: run python -m benchmarks.pages"


def test_no_sentence_twice():
    """Neither on two pages nor in the README and on a page."""
    said: Counter[str] = Counter()
    for page in ("README.md", *PAGES):
        plain = re.sub(r"\s+", " ", prose(page))
        said.update(sentence for sentence in re.split(r"(?<=[.:?!])\s+", plain) if sentence.count(" ") >= 6)
    assert [sentence for sentence, times in said.items() if times > 1] == []
    assert len(said) > 100  # a search that finds nothing would pass
