"""The explorer in a browser computes what PyTorch computes, and can be used by everybody, without a network."""

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.files import ASSETS
from minilora.nf4 import dequantize, quantize

ROOT = Path(__file__).parents[2]
EXPLORE = ROOT / "site" / "explore"
pytestmark = pytest.mark.site

PAGES = ("index.html", "small.html")
PARTS = ("self_attn", "mlp", "0", "1", "2", "3", "4")
BARE = {"scale": 0.0, "bits": 8}
SETTINGS = (
    {},
    BARE,
    {"scale": 0.5, "rank": 3},
    {"scale": 2.0, "bits": 4, "where": ("self_attn", "mlp", "0", "2", "4")},
    {"scale": 1.5, "rank": 8, "bits": 2, "where": ("mlp", "1", "3")},
    {"rank": 12, "bits": 3, "is_merged": True},
)
ROLES = {"slider", "textbox", "combobox", "radio", "checkbox", "button", "link", "image"}


@pytest.fixture(scope="module")
def packed():
    """The directory of the adapter that the page's script holds."""
    command, environment = [sys.executable, str(ROOT / "site" / "pack.py")], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return Path(done.stdout.rstrip("\n").rpartition("the adapter of ")[2])


@pytest.fixture
def open_page(open_page, packed):
    """The same for a page of the explorer."""
    return lambda name="index.html", *size: open_page(EXPLORE / name, *size)


def prompts(number):
    lines = (ASSETS / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in random.Random(0).sample(lines, number)]


def definition_of(prompt):
    return prompt.removeprefix("Definition: ").removesuffix("\nCategory:")


def set_controls(page, scale=1.0, rank=16, bits=16, where=PARTS, is_merged=False):
    page.locator("#scale").fill(str(scale))
    page.locator("#rank").fill(str(rank))
    page.locator(f'input[name="bits"][value="{bits}"]').check()
    for part in PARTS:
        page.locator(f'input[name="where"][value="{part}"]').set_checked(part in where)
    page.locator('input[name="merge"]').set_checked(is_merged)


def wait_for_frame(page):
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def levels(bits):
    """The levels of a code: even ones in eight bits, otherwise quantiles of a normal distribution, as NF4 has them."""
    if bits == 8:
        return torch.arange(-127, 128) / 127
    outermost = 1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2
    half = 2 ** (bits - 1)
    below = [1 - outermost + i * (outermost - 0.5) / (half - 1) for i in range(half - 1)]
    above = [0.5 + i * (outermost - 0.5) / half for i in range(half + 1)]
    quantiles = torch.tensor([statistics.NormalDist().inv_cdf(p) for p in below + above], dtype=torch.float64)
    return (quantiles / quantiles[-1]).float()


def round_weight(weight, bits):
    if bits == 16:
        return weight
    if bits == 4:
        return dequantize(*quantize(weight), weight.shape, torch.float32)
    blocks = weight.view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    bounds = (levels(bits)[1:] + levels(bits)[:-1]) / 2
    codes = torch.searchsorted(bounds, blocks * absmax.reciprocal())  # as in NF4; quotients may lie beyond a bound
    return (levels(bits)[codes] * absmax).view_as(weight)


def dense_model(run, scale=1.0, rank=16, bits=16, where=PARTS, is_merged=False):
    """The model with dense weights, W rounded plus ΔW cut by its singular value decomposition."""
    model = ml.load_model("minilora/builtin")
    ml.load_adapter(model, run)
    for path, layer in adapter_layers(model).items():
        adapter = layer.adapters["default"]
        U, sigma, Vt = torch.linalg.svd((adapter.lora_B @ adapter.lora_A).detach().double(), full_matrices=False)
        delta = scale * adapter.scale * (U[:, :rank] * sigma[:rank]) @ Vt[:rank]
        _, _, number, block, _ = path.split(".")
        is_on = number in where and block in where
        weight = round_weight(layer.base.weight.detach(), bits).double() + (delta if is_on else 0)
        layer.base.weight = nn.Parameter((weight.bfloat16() if is_merged else weight).float(), requires_grad=False)
        layer.active = ()
    return model


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_logits_are_those_of_pytorch(open_page, packed, settings):
    page, tokenizer = open_page(), ml.load_tokenizer("minilora/builtin")
    models = {
        "adapted": dense_model(packed, **settings),
        "base": dense_model(packed, **BARE | {"bits": settings.get("bits", 16)}),
    }
    set_controls(page, **settings)
    milliseconds = []
    for prompt in prompts(20):
        page.locator("#definition").fill(definition_of(prompt))
        wait_for_frame(page)
        milliseconds.append(page.evaluate("drawn.milliseconds"))
        tokens = torch.tensor([tokenizer.encode(prompt)])
        for name, model in models.items():
            found = torch.tensor(page.evaluate(f"Array.from(drawn.{name})"))
            with torch.no_grad():
                torch.testing.assert_close(found, model(tokens)[0, -1], rtol=0, atol=1e-3)
    print(f"{settings}: a new definition is answered in {statistics.median(milliseconds):.0f} ms")  # not asserted


def test_the_merge_counts_the_weights_that_change(open_page, packed):
    page = open_page()
    set_controls(page, scale=0.05, is_merged=True)
    wait_for_frame(page)
    before, after = (adapter_layers(dense_model(packed, scale=scale, is_merged=True)) for scale in (0.0, 0.05))
    changed = sum((after[path].base.weight != layer.base.weight).sum().item() for path, layer in before.items())
    shown = int(page.inner_text("#merge-value").split()[0].replace(",", ""))
    assert shown == pytest.approx(changed, abs=20)  # a sum may be exactly midway in one precision


def test_a_click_on_the_singular_values_of_a_matrix_shows_it(open_page):
    page = open_page()
    page.locator(".cell").nth(10).click()
    assert page.locator("#layer").input_value() == "10"
    assert page.locator(".cell").nth(10).evaluate("cell => cell.classList.contains('chosen')")


def test_tokens_are_those_of_the_tokenizer(open_page):
    page, tokenizer = open_page(), ml.load_tokenizer("minilora/builtin")
    draw = random.Random(0)
    letters = "aeinorst  \n\t'.,;()0123456789ÄßéñλжЯ中文字😀👩‍🚀\u00a0\u2003\u3000\u0301\u200b\ufeff\x85²½Ⅷ_-<|>"
    drawn = ["".join(draw.choices(letters, k=draw.randint(0, 40))) for _ in range(95)]
    texts = [*prompts(100), *drawn, "", "<|endoftext|>", "it's we'll I'd they've", "   three", "tail   "]
    assert len(texts) == 200
    found = page.evaluate("texts => texts.map(text => TOKENIZER.encode(text))", texts)
    for text, tokens in zip(texts, found, strict=True):
        assert tokens == tokenizer.encode(tokenizer.quote(text)), repr(text)  # no text is a control token


@pytest.mark.parametrize("name", PAGES)
def test_every_control_has_a_name_and_is_reached_by_the_keyboard(open_page, name):
    page = open_page(name)
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node["name"]["value"].strip()) for node in nodes if not node["ignored"]]
    assert len([role for role, _ in named if role in ROLES]) > 20
    assert not [role for role, name in named if role in ROLES and not name]
    focusable = "a[href], button, select, textarea, input:not([type=radio]), input[type=radio]:checked"
    expected = page.evaluate(f"document.querySelectorAll('{focusable}').length")
    reached = set()
    for _ in range(expected):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
    assert len(reached) == expected


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_and_colours_have_contrast(open_page, name, width, scheme):
    page = open_page(name, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    names = ["text", "soft", "adapter", "base", "mark", "ground", "card"]
    values = page.evaluate("names => names.map(n => getComputedStyle(document.body).getPropertyValue('--' + n))", names)
    colours = dict(zip(names, map(luminance, values), strict=True))
    assert (colours["ground"] < colours["text"]) == (scheme == "dark")
    for ground in ("ground", "card"):
        for text in ("text", "soft", "adapter", "mark", "base"):
            low, high = sorted((colours[text], colours[ground]))
            assert (high + 0.05) / (low + 0.05) >= (3 if text == "base" else 4.5), (text, ground)  # WCAG AA


def luminance(colour):
    """The relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_small_explorables_round_as_pytorch_does(open_page):
    page = open_page("small.html")
    numbers = [0.3, -0.12, 0.05, -0.9, 0.2, 0.61, -0.27, 0.0]
    for i, number in enumerate(numbers):
        page.locator(f"#number-{i}").fill(str(number))
    packed, _ = quantize(torch.tensor([numbers]), block_size=32)
    assert " ".join(f"{byte:02x}" for byte in packed.tolist()) in page.inner_text('[data-explorable="nf4"] .bytes')
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-5, 5).repeat(100)
    found = page.evaluate("numbers => Array.from(bfloat16(Float32Array.from(numbers)))", values.tolist())
    assert torch.equal(torch.tensor(found), values.bfloat16().float())


def test_no_arrow_leaves_the_picture_of_the_rows(open_page):
    page = open_page("small.html")
    page.locator("#row-scale").press("End")
    page.locator("#row-magnitude").press("End")
    inside = """svg => [svg, ...svg.children].map(each => each.getBoundingClientRect()).every((box, _, [whole]) =>
        box.left >= whole.left && box.right <= whole.right && box.top >= whole.top && box.bottom <= whole.bottom)"""
    for degrees in range(-180, 181, 15):
        page.locator("#row-turn").fill(str(degrees))
        assert page.locator(".plane").evaluate(inside), degrees


TRAININGS = (
    {"r": 4, "alpha": 8, "rate": 1 / 64, "c": 1, "is_adam": True},
    {"r": 1, "alpha": 2, "rate": 1 / 16, "c": 4, "is_adam": False},
    {"r": 8, "alpha": 64, "rate": 1 / 128, "c": 0.25, "is_adam": True},
)


def train_with_pytorch(r, alpha, rate, c, is_adam, start, wanted):
    """What is left of ‖wanted‖² after each step, by PyTorch's derivation and its optimizers."""
    lora_A, lora_B = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(len(wanted), len(start), dtype=start.dtype))
    optimizer = (torch.optim.Adam if is_adam else torch.optim.SGD)([lora_A, lora_B], lr=rate)
    left = [1.0]
    for _ in range(60):
        optimizer.zero_grad()
        ((alpha / r * lora_B @ lora_A - wanted).square().sum() / 2).backward()
        optimizer.step()
        left.append(((alpha / r * lora_B @ lora_A - wanted).norm() / wanted.norm()).item() ** 2)
    return left


@pytest.mark.parametrize("settings", TRAININGS)
def test_the_layer_that_learns_does_as_pytorch_does(open_page, settings):
    page = open_page()
    start, wanted = (
        torch.tensor(page.evaluate(f"settings => Array.from({call})", settings), dtype=torch.float64).view(-1, 16)
        for call in ("first_A(settings.r, settings.c)", "wanted_change()")
    )
    assert torch.linalg.svdvals(wanted)[:8].tolist() == pytest.approx([1 / k for k in range(1, 9)], rel=1e-5)
    found = page.evaluate("s => train_layer(s)", settings)
    assert found["left"] == pytest.approx(train_with_pytorch(**settings, start=start, wanted=wanted), rel=1e-3)
    assert page.evaluate("s => predicted_step(s)", settings) == pytest.approx(found["first"], rel=1e-4)
