"""The README and the docs: their code runs, and what they link to is there."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch

from lnprune.removal.operations import listed

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")])


def code_of(page: pathlib.Path) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "models.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("number", range(len(code_of(ROOT / "README.md"))))
def test_code_of_the_readme_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code_of(ROOT / "README.md")[number], names)  # each by itself, as readers copy it
    CHECKS[number](names)


def check_first_compact(names):
    small = names["small"]
    assert small[0].out_channels == small[1].num_features == small[3].in_channels == 32


def check_smaller_model(names):
    model, small, again = names["model"], names["small"], names["again"]
    inputs = torch.randn(5, 16)
    assert small[0].out_features == 32
    torch.testing.assert_close(small(inputs), model(inputs))
    assert torch.equal(again(inputs), small(inputs))


def check_use(names):
    layer, output = names["layer"], names["output"]
    zeros = layer.weight == 0
    assert int(zeros.all(dim=(1, 2, 3)).sum()) == round(0.3 * 128)
    assert int(zeros.all(dim=(0, 2, 3)).sum()) == 8
    assert not names["prune"].is_pruned(layer)
    assert output.grad_fn is not None


def check_whole_models(names):
    model, plan = names["model"], names["plan"]
    assert not (model[4].weight == 0).any()
    assert pathlib.Path("plan.png").exists()
    for entry, layer in zip(plan.entries, (model[0], model[2]), strict=True):
        pruned = (layer.weight == 0).all(dim=1)
        assert int(pruned.sum()) == entry.channels - entry.kept
        assert bool((layer.bias[pruned] == 0).all())
        assert entry.kept % 8 == 0
        assert entry.kept >= 16


def check_channels_that_go_together(names):
    groups, plan, model = names["coupling"].groups, names["plan"], names["model"]
    assert [(group.name, group.channels) for group in groups] == [
        ("stem.weight", 16),
        ("inner.0.weight", 32),
    ]
    assert sum(int(flags.sum()) for flags in plan.keep.values()) == 24
    plan.apply(permanent=True)
    pruned = ~plan.keep["stem.weight"]
    for weight in (model.stem.weight[pruned], model.inner[3].weight[pruned], model.head.weight[:, pruned]):
        assert not weight.any()


def check_the_mask(names):
    import lnprune

    flags = lnprune.channel_mask(names["weight"], names["pruned"], names["n"], names["dim"])
    assert (names["mask"][:, 0] == 1).tolist() == flags.tolist()


CHECKS = [
    check_first_compact,
    check_use,
    check_whole_models,
    check_channels_that_go_together,
    check_smaller_model,
    check_the_mask,
]


DOCS = sorted(ROOT.glob("docs/*.md"))


# The code of sharded.md runs on two ranks, in test_sharded.py; of transformers.md, in test_pretrained.py.
@pytest.mark.parametrize(
    "page",
    [page for page in DOCS if code_of(page) and page.name not in ("sharded.md", "transformers.md")],
    ids=lambda page: page.name,
)
def test_code_of_the_docs_runs(page, tmp_path, monkeypatch):
    """With what it says it ranks: a comment after a call names the parameters."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in code_of(page):
        exec(block, names)
        said = re.findall(r"^(lnprune\.rank\(.+\))  # ((?:[\w.]+, )*[\w.]+)", block, re.MULTILINE)
        for call, expected in said:
            assert ", ".join(eval(call, names).names) == expected
    if page.name in DOCS_CHECKS:
        DOCS_CHECKS[page.name](names)


def check_training(names):
    """The zeros came through all of it, and the export computes the same."""
    model = names["model"]
    kept = [int(layer.weight.ne(0).any(dim=1).sum()) for layer in (model[0], model[2], model[4])]
    assert kept[0] % 8 == kept[1] % 8 == 0
    assert sum(kept[:2]) == 64  # 0.3 of 128 and of what was left, to multiples of 8
    assert kept[2] == 4
    for layer in (model[0], model[2]):
        assert torch.equal(layer.bias != 0, layer.weight.ne(0).any(dim=1))
    state, _ = torch.load("checkpoint.pt")
    assert any(key.endswith("weight_mask") for key in state)
    exported = torch.export.load("model.pt2").module()
    torch.testing.assert_close(exported(*names["inputs"]), model(*names["inputs"]))
    lines = "".join(code_of(ROOT / "docs" / "training.md")).splitlines()
    assert len([line for line in lines if line]) <= 40


def check_heads(names):
    """The same heads are gone from all four weights, those with the smallest sums of squares."""
    attention, size = names["attention"], names["size"]
    gone = [set(names["squares"].argsort()[:2].tolist())] * 4
    for name, heads in zip("qkvo", gone, strict=True):
        weight = attention[name].weight.T if name == "o" else attention[name].weight
        pruned = (weight == 0).all(dim=1).nonzero().flatten().tolist()
        assert {channel // size for channel in pruned} == heads
        assert len(pruned) == 2 * size


def check_coupling(names):
    """The page shows what a coupling prints, and the plan that was loaded zeroes whole channels."""
    page = (ROOT / "docs" / "coupling.md").read_text()
    assert f"```\n{names['coupling']}\n```" in page
    model, pruned = names["model"], ~names["plan"].keep["first.weight"]
    assert pruned.any()
    for weight in (model.first.weight.T, model.outer.weight.T, model.inner.weight, model.last.weight):
        assert torch.equal((weight == 0).all(dim=0), pruned)


def check_compact(names):
    """What was saved computes what the model computes with its masks; and the recipe is short."""
    model, small, again = (names[name].eval() for name in ("model", "small", "again"))
    inputs = torch.randn(100, 16)
    assert again[0].out_features == 32
    torch.testing.assert_close(again(inputs), model(inputs))
    assert not torch.allclose(small(inputs), model(inputs)), "it trained on"
    assert names["plan"].keep["0.weight"].sum() == 32
    assert names["network"][3].in_features == 32
    recipe = code_of(ROOT / "docs" / "compact.md")[1].splitlines()
    assert len([line for line in recipe if line]) <= 20


def check_experts(names):
    """Amounts of each expert, a narrower layer, and one without an expert that computes the same."""
    model, tokens, small, keep = (names[name] for name in ("model", "tokens", "small", "keep"))
    assert not torch.allclose(names["narrow"], names["before"])
    assert int(keep.sum()) == 3
    torch.testing.assert_close(model(tokens), names["before"])
    flags = names["plan"].keep
    assert all(torch.equal(each, keep) for each in flags.values())
    norms = [w.flatten(1).norm(dim=1) for w in (*model.experts.parameters(), model.router.weight)]
    assert int(torch.stack(norms).norm(dim=0).argmin()) == int((~keep).nonzero())
    logits = model.router(tokens).masked_fill(~keep, -torch.inf)
    best, chosen = logits.topk(2, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, chosen, best.softmax(dim=-1))
    torch.testing.assert_close(small(tokens), model.experts(tokens, weights))


def check_scores(names):
    """Rankings by what the page says."""
    model, norms = names["model"], names["norms"]
    for layer in ("0", "2"):
        weight, factors = model.get_parameter(f"{layer}.weight").detach().double(), norms[f"{layer}.weight"]
        key = f"{layer}.weight"
        torch.testing.assert_close(names["outputs"].norms[key], (weight * factors).norm(dim=1))
        torch.testing.assert_close(names["inputs"].norms[key], weight.norm(dim=0) * factors)
        gradient = model.get_parameter(key).grad.double()
        torch.testing.assert_close(
            names["taylor"].norms[key], (weight * gradient).abs().sum(dim=1), rtol=1e-5, atol=0
        )


def check_checkpoints(names):
    """The plan of the file is that of the model, and is applied to it."""
    keep, model = names["plan"].keep, names["model"]
    kept = torch.cat([(layer.weight != 0).any(dim=1) for layer in (model[0], model[2])])
    assert torch.equal(kept, torch.cat([keep["0.weight"], keep["2.weight"]]))
    assert int(kept.sum()) == 27


DOCS_CHECKS = {
    "checkpoints.md": check_checkpoints,
    "experts.md": check_experts,
    "scores.md": check_scores,
    "training.md": check_training,
    "models.md": check_heads,
    "coupling.md": check_coupling,
    "compact.md": check_compact,
}


def test_what_resumed_trains_as_what_was_saved(tmp_path, monkeypatch):
    """The page up to there, and then both on the same inputs."""
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = code_of(ROOT / "docs" / "training.md")
    for block in blocks[:2]:
        exec(block, names)
    saved = names["model"], names["optimizer"]
    exec(blocks[2], names)
    resumed = names["model"], names["optimizer"]
    for model, optimizer in (saved, resumed):
        torch.manual_seed(0)
        names["train"](model, optimizer, 5)
    for (name, left), (_, right) in zip(*(m.named_parameters() for m, _ in (saved, resumed)), strict=True):
        assert torch.equal(left, right), name


def test_the_list_of_operations_is_the_table_of_rules():
    page = (ROOT / "docs" / "coupling.md").read_text()
    found = page.partition("<!-- made by lnprune.removal.operations.listed() -->")[2]
    assert found.partition("<!--")[0].strip() == listed()


def test_each_block_of_the_readme_has_a_check():
    assert len(code_of(ROOT / "README.md")) == len(CHECKS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_pages_name_are_there(page):
    makefile = (ROOT / "Makefile").read_text()
    text = page.read_text()
    targets = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert [name for name in sorted(targets) if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []
    files = re.findall(r"python ((?:\w+/)+\w+\.py)", text)
    files += [
        f"{module.replace('.', '/')}.py" for module in re.findall(r"python -m (benchmarks\.\w+)", text)
    ]
    assert [name for name in files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["masks", "coupling"])
def test_pictures_are_what_their_scripts_draw(name, tmp_path):
    script = tmp_path / f"{name}.py"
    script.write_text((ROOT / "docs" / f"{name}.py").read_text())
    subprocess.run([sys.executable, script], check=True, cwd=ROOT)
    image = pytest.importorskip("matplotlib.image")
    drawn, kept = (image.imread(folder / f"{name}.png") for folder in (tmp_path, ROOT / "docs"))
    assert drawn.shape == kept.shape
    # Fonts may differ by a little.
    assert abs(drawn - kept).mean() < 0.01
