"""The explorer of a report: what it shows is what the ops compute, in Python and in a browser."""

import base64
import os
import zlib

import numpy as np
import pytest
import torch
from chromium import Page, installed, opened
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from tiny import tiny_explorer, tiny_values
from torch.nn import functional as F

import hpkernels
from hpkernels.ops._philox import bernoulli
from training.config_file import config_from_dict
from training.report import explorer as explorer_module
from training.report.explorer import explore, explored, packed, telling_anchors
from training.report.page import Report, write_report
from training.results import write_results
from training.run import open_run
from training.train import train

KINDS = ("agnostic", "specific")


def unpacked(data):
    """The arrays of `packed` by name."""
    content = zlib.decompress(base64.b64decode(data["data"]))
    dtypes = {"Uint8Array": np.uint8, "Uint16Array": np.uint16, "Int16Array": np.int16, "Float32Array": np.float32}
    return {
        name: np.frombuffer(content, dtypes[kind], length, start)
        for name, (kind, start, length) in data["arrays"].items()
    }


@pytest.mark.parametrize("symmetric", [True, False])
def test_positives_thresholds_and_negatives_are_packed_exactly(symmetric):
    batch = tiny_explorer(symmetric=symmetric)
    data = packed(batch)
    arrays = unpacked(data)
    for kind in KINDS:
        bits = np.unpackbits(arrays[f"{kind}.positives"].reshape(60, -1), axis=1, count=60, bitorder="little") > 0
        positives = bits | bits.T if symmetric else bits
        assert np.array_equal(positives, batch.found[kind].positives.to_dense().numpy()) and positives.any()
        assert np.array_equal(arrays[f"{kind}.threshold"], batch.found[kind].threshold.numpy())
    drawn = np.unpackbits(arrays["negatives"].reshape(20, -1), axis=1, count=60, bitorder="little") > 0
    assert np.array_equal(drawn, bernoulli(torch.tensor(5), 20, 60, 0.2).numpy())
    assert np.array_equal(arrays["labels"], batch.labels.numpy())


def test_similarities_are_as_close_as_they_say():
    batch = tiny_explorer()
    data = packed(batch)
    arrays = unpacked(data)
    for kind in KINDS:
        low, high = arrays[f"{kind}.features"].reshape(2, -1, 60).astype(int)
        code = low | high << 8
        features = ((code >> 1) ^ -(code & 1)) * data["kinds"][kind]["step"]
        exact = batch.found[kind].features @ batch.found[kind].features.T
        error = np.abs(features.T @ features - exact.numpy()).max()
        assert error == pytest.approx(data["kinds"][kind]["error"], abs=1e-6) and error <= 0.005


def test_weights_are_packed_patch_by_patch():
    batch = tiny_explorer()
    data = packed(batch)
    for name in ("before", "after"):
        weights = unpacked(data)[name].reshape(3, 4, 5, 9) / 65535 * data["greatest"][name]
        assert np.allclose(weights, getattr(batch, name).permute(0, 2, 3, 1), atol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run and its report."""
    run = open_run(config_from_dict(tiny_values(tmp_path_factory.mktemp("finished") / "run", steps=12, warmup=2)))
    train(run)
    return run, write_results(run)[0]


@pytest.fixture(scope="module")
def run(finished):
    return finished[0]


@pytest.fixture(scope="module")
def batch(run):
    """The batch in the report."""
    return explore(run)


def test_a_batch_has_the_positives_of_the_ops(run):
    batch = explore(run, most_images=5)
    tokens = run.train_bank.get(batch.images).tokens
    rows = {"agnostic": tokens, "specific": run.state.ema_head.eval()(tokens)}
    pools = {"agnostic": run.state.pools.agnostic(), "specific": run.state.pools.specific()}
    for kind, found in batch.found.items():
        unit = F.normalize(rows[kind], dim=-1).flatten(0, 1)
        threshold = hpkernels.masked_topk(unit, pools[kind], backend="reference").values[:, 0]
        assert torch.allclose(found.threshold, threshold, atol=1e-6)
        limit = torch.minimum(threshold[:, None], threshold)
        reference = hpkernels.hidden_positives(unit, threshold, backend="reference").to_dense()
        near = (unit @ unit.T - limit).abs() < 1e-5  # a patch of the pool meets itself there
        assert not ((found.positives.to_dense() != reference) & ~near).any() and reference.any()
    assert len(batch.images.unique()) == 5 and batch.labels.shape == (100,)


def test_the_images_of_a_batch_have_positives_in_each_other(run):
    number = 3

    def shared(images):
        found = explorer_module.discovered(run, images)["agnostic"].positives.to_dense()
        pairs = found.view(number, 20, number, 20).sum(dim=(1, 3))
        return int(pairs.sum() - pairs.trace())

    chosen = shared(explore(run, number).images)
    others = [shared(torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:number]) for seed in range(20)]
    assert chosen > np.mean(others) and chosen > 0


@pytest.mark.parametrize("name", ["patch_dictionary", "vit_tiny_patch16_224"])
def test_weights_before_the_threshold_are_those_of_the_op_where_it_keeps_them(tmp_path, name):
    backbone = {"name": name, "patch_size": 8, "features_dim": 24, "cache": True}
    run = open_run(
        config_from_dict(
            tiny_values(
                tmp_path,
                data={"name": "procedural", "size": [64, 80], "train_images": 4, "val_images": 1},
                backbone=backbone,
                loss={"consistency": 0},
            )
        )
    )
    run.state.pools.renew_specific(run.train_bank, run.state.ema_head, torch.Generator().manual_seed(0))
    batch = explore(run, 2)
    kept = batch.after > 0
    assert torch.allclose(batch.before[kept], batch.after[kept], rtol=1e-4)
    inside = batch.before > 0
    height, width = batch.grid
    cells = F.conv2d(torch.ones(1, 1, height, width), torch.ones(1, 1, 3, 3), padding=1)[0, 0]
    below = batch.before * cells < 28 / (height * width)
    assert (inside & ~kept).any() and (below | kept | ~inside).all()


def test_anchors_to_begin_with_show_what_they_say():
    batch = tiny_explorer(images=6)
    agnostic, specific = (batch.found[kind].positives.to_dense() for kind in KINDS)
    image = torch.arange(120) // 20
    elsewhere = image[:, None] != image
    same = elsewhere & (batch.labels[:, None] == batch.labels) & (batch.labels >= 0)
    anchors = {title: patch for patch, title in telling_anchors(batch.found, batch.labels, 20)}
    first = anchors["right in many images"]
    assert (agnostic & same)[first].any() and (specific & same)[first].any()
    assert (specific & same & ~agnostic)[anchors["right by codes alone"]].any()
    assert (agnostic & elsewhere & ~same)[anchors["wrong in many images"]].any()
    counts = (agnostic | specific).sum(dim=1)
    assert counts[anchors["median number"]] == counts.sort().values[60]
    without = [title for _, title in telling_anchors(batch.found, None, 20)]
    assert without == ["in many images", "by codes alone", "median number"]
    alone = [title for _, title in telling_anchors(tiny_explorer(images=1).found, None, 20)]
    assert alone == ["median number"], "there are no other images"


def test_a_page_too_large_gets_fewer_images(run, monkeypatch):
    whole, data = explored(run)
    assert len(whole) == len(run.train_bank)
    monkeypatch.setattr(explorer_module, "_BYTES", len(data["data"]) // 3)
    fewer, smaller = explored(run)
    assert 0 < len(fewer) < len(whole) and len(smaller["data"]) <= len(data["data"]) * 4 / 9
    monkeypatch.setattr(explorer_module, "_PATCHES", 19)
    assert explored(run) is None


# ------------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """One browser for all tests of this file."""
    if not installed():
        if os.environ.get("HPKERNELS_REQUIRE_CHROMIUM") == "1":
            pytest.fail("HPKERNELS_REQUIRE_CHROMIUM=1, and there is no Chromium")
        pytest.skip("needs Chromium (apt-get install chromium chromium-driver)")
    with opened(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def page(chromium, finished):
    uri = finished[1].as_uri()
    page = Page(chromium, finished[1], again=chromium.current_url != uri)
    yield page
    assert page.errors() == []
    fetched = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name.slice(0, 5))")
    assert set(fetched) <= {"data:"}, "no network"


def test_a_click_shows_the_positives_of_the_ops(page, batch):
    masks = {kind: batch.found[kind].positives.to_dense().numpy() for kind in KINDS}
    patches = batch.grid[0] * batch.grid[1]
    for anchor in (3, 47, 110, 199):
        page.point(batch, anchor).click().perform()
        assert page.one("#explorer").get_attribute("data-anchor") == str(anchor)
        for kind, mask in masks.items():
            (expected,) = mask[anchor].nonzero()
            assert sorted(page.run("return [...explorer.positives[arguments[0]]]", kind)) == expected.tolist()
            cells = page.texts(f'#panel [data-kind="{kind}"] td')
            elsewhere = expected[expected // patches != anchor // patches]
            images = len(set(elsewhere // patches))
            assert cells[0] == f"{batch.found[kind].threshold[anchor]:.3f}"
            assert cells[1:3] == [
                str(len(expected) - len(elsewhere)),
                f"{len(elsewhere)} in {images}" if images else "0",
            ]
        expected = masks["agnostic"][anchor] | masks["specific"][anchor]
        expected[anchor] = True
        assert np.array_equal(page.shown(), expected)


def test_layers_can_be_hidden_and_similarities_shown(page, batch):
    page.run("explorer.choose(47)")
    specific = page.centred(page.one('[name="specific"]'))
    specific.click()
    expected = batch.found["agnostic"].positives.to_dense().numpy()[47].copy()
    expected[47] = True
    assert np.array_equal(page.shown(), expected)
    Select(page.one('[name="heat"]')).select_by_value("agnostic")
    assert page.shown().all(), "every patch has a colour"
    Select(page.one('[name="heat"]')).select_by_value("")
    specific.click()


def test_pointing_at_a_patch_compares_it_with_the_anchor(page, batch):
    found = batch.found["agnostic"]
    dense = found.positives.to_dense()
    anchor = int(dense.sum(dim=1).argmax())
    page.run("explorer.choose(arguments[0])", anchor)
    positive, other = int(dense[anchor].nonzero()[-1]), int((~dense[anchor]).nonzero()[0])
    for patch in (positive, other):
        page.point(batch, patch).perform()
        line = page.text("#pair").split("\n")[1]
        own, its = (float(found.threshold[at]) for at in (anchor, patch))
        similarity = float(found.features[anchor] @ found.features[patch])
        assert abs(float(line.split("similarity ")[1][:4].rstrip(",")) - similarity) <= 0.011
        assert f"threshold {min(own, its):.3f} (the anchor's {own:.3f}, its {its:.3f})" in line
        whose = "the anchor's" if own <= its else "its"
        assert line.endswith(f"positive by {whose} threshold" if patch == positive else ": no positive")


def test_negatives_are_those_of_the_hash(page, batch):
    number = len(batch.labels)
    drawn = bernoulli(torch.tensor(batch.seed), 20, number, batch.negative_rate)
    for anchor in (0, 33):
        expected = drawn[anchor % 20].clone()
        expected[anchor] = False
        negative = page.run(
            "return Array.from({length: arguments[1]}, (_, j) => explorer.batch.negative(arguments[0], j))",
            anchor,
            number,
        )
        assert negative == expected.tolist() and any(negative)


def test_local_weights_and_nearest_patches(page, batch):
    page.run("explorer.choose(26)")
    cells = page.texts("#panel .window span")
    row, column = divmod(6, 5)
    for name, shown in (("before", cells[:9]), ("after", cells[9:])):
        expected = getattr(batch, name)[1, :, row, column].tolist()
        for text, value in zip(shown, expected, strict=True):
            assert float(text) == pytest.approx(value, rel=0.06, abs=1e-4)
    page.run("explorer.choose(20)")
    outside = [text == "–" for text in page.texts("#panel .window span")[:9]]
    assert outside == [True, True, True, True, False, False, True, False, False], "in the corner"
    page.run("explorer.choose(26)")
    similarity = batch.found["agnostic"].features @ batch.found["agnostic"].features[26]
    similarity[20:40] = -2
    first = page.one("#panel .near button")
    assert float(first.text.split("\n")[0]) == pytest.approx(float(similarity.max()), abs=0.011)
    page.centred(first).click()
    chosen = int(page.one("#explorer").get_attribute("data-anchor"))
    assert page.run("return document.activeElement === explorer.figures[arguments[0]].canvas", chosen // 20)
    assert float(similarity[chosen]) == pytest.approx(float(similarity.max()), abs=0.011)


def test_the_explorer_goes_by_keyboard(page):
    canvas = page.centred(page.all("#explorer .batch canvas")[2])
    page.run("explorer.choose(0)")
    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert "row 3, column 2" in page.text("#pair")
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    canvas.send_keys(Keys.ENTER)
    assert page.one("#explorer").get_attribute("data-anchor") == str(2 * 20 + 2 * 5 + 1)
    canvas.send_keys(*[Keys.ARROW_LEFT] * 9)
    assert "row 3, column 1" in page.text("#pair"), "it stays in the image"
    canvas.send_keys(Keys.TAB)
    assert page.run("return document.activeElement === explorer.figures[3].canvas")


def test_the_slider_compares_two_maps(page):
    Select(page.one('[name="left"]')).select_by_visible_text("Photograph")
    slider = page.centred(page.one('[name="divider"]'))
    slider.send_keys(Keys.HOME)
    covered = "return getComputedStyle(document.querySelector('.stage .over')).clipPath"
    assert page.run(covered) == "inset(0px 100% 0px 0px)"
    slider.send_keys(*[Keys.ARROW_RIGHT] * 30)
    assert page.run(covered) == "inset(0px 70% 0px 0px)"
    page.centred(page.one('[name="next"]')).click()
    assert page.text(".what h3") == page.texts("#examples figcaption")[6]
    assert "current" in page.all("#examples .row")[1].get_attribute("class")


def test_a_map_tells_its_classes_and_hides_some(page):
    Select(page.one('[name="right"]')).select_by_visible_text("Label")
    page.one('[name="divider"]').send_keys(Keys.HOME)
    stage = page.centred(page.one(".stage"))
    ActionChains(page.browser).move_to_element(stage).perform()
    name = page.texts(".what dd")[0]
    assert name in page.texts(".legend li")
    at = (
        "const c = document.querySelector('.under');"
        "return [...c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data].join()"
    )
    before = page.run(at)
    button = next(button for button in page.all(".legend button") if button.text == name)
    page.centred(button).click()
    assert page.run(at) != before and button.get_attribute("aria-pressed") == "false"
    button.click()
    assert page.run(at) == before


def test_examples_in_order_of_their_scores(page):
    Select(page.one('[name="order"]')).select_by_value("1 Baseline")
    captions = [text for text in page.texts("#examples figcaption") if text.startswith("Baseline, mIoU")]
    scores = [float(text.split()[-2]) for text in captions]
    assert scores == sorted(scores) and len(set(scores)) > 1
    Select(page.one('[name="order"]')).select_by_value("")


def test_tables_are_sorted_by_a_click(page):
    head = page.centred(page.all("#classes table.sortable thead th button")[1])
    column = "#classes table.sortable tbody td:nth-child(2)"
    for direction in (-1, 1):
        head.click()
        cells = page.texts(column)
        numbers = [float(cell) for cell in cells if cell != "–"]
        assert numbers == sorted(numbers, key=lambda number: direction * number) and len(numbers) > 1
    assert page.all("#classes table.sortable th")[1].get_attribute("aria-sort") == "ascending"


def test_dashes_are_sorted_last(chromium, tmp_path):
    iou = {"Codes": [float("nan"), 3.0, 10.0, 4.0]}
    write_report(tmp_path / "report.html", Report("Dashes", {}, ("a", "b", "c", "d"), class_iou=iou))
    page = Page(chromium, tmp_path / "report.html")
    for expected in (["10.0", "4.0", "3.0", "–"], ["3.0", "4.0", "10.0", "–"]):
        page.all("#classes thead th button")[1].click()
        assert page.texts("#classes tbody td") == expected


def test_the_confusion_matrix_by_label_and_by_segmentation(page):
    pixels = """return [...document.querySelectorAll('.choices > [data-title]:not([hidden]) tbody tr')].map(
        (row) => [...row.querySelectorAll('td')].map((cell) => [Number(cell.dataset.pixels), cell.textContent]))"""
    select = Select(page.one('[name="normalise"]'))
    for mode, axis in (("column", 0), ("row", 1)):
        select.select_by_value(mode)
        cells = page.run(pixels)
        counts = np.array([[cell[0] for cell in row] for row in cells], dtype=float)
        total = counts.sum(axis=axis, keepdims=True).repeat(counts.shape[axis], axis=axis)
        for (_, text), count, of in zip(sum(cells, []), counts.flat, total.flat, strict=True):
            assert text == ("–" if of == 0 else text) and (of == 0 or abs(float(text) - 100 * count / of) <= 0.5)
    first = page.all(".choices > [data-title]:not([hidden]) tbody td")[0]
    page.centred(first).send_keys(Keys.ARROW_DOWN)
    assert f"{int(counts[1, 0]):,} pixels" in page.text(".cell")
    tabs = page.all(".tabs button")
    page.centred(tabs[0]).click()
    assert page.run("return document.querySelectorAll('.choices > [data-title]:not([hidden])').length") == 1


def test_curves_are_smoothed_as_in_tensorboard_and_tell_their_values(page):
    assert len(page.all(".curve")) == len(page.run("return page.curves")) >= 6
    values = [value for _, value in page.run("return page.curves[0].points")]
    slider = page.centred(page.one("#curves input"))
    path = "return document.querySelector('.curve .smooth').getAttribute('d')"
    slider.send_keys(Keys.HOME)
    raw = page.run(path)
    assert raw == page.run("return document.querySelector('.curve .raw').getAttribute('d')")
    page.run("arguments[0].value = 0.8; arguments[0].dispatchEvent(new Event('input'))", slider)
    assert page.run(path) != raw and page.text("#curves output") == "0.80"
    last, expected = 0.0, []
    for number, value in enumerate(values, start=1):
        last = 0.8 * last + 0.2 * value
        expected.append(last / (1 - 0.8**number))
    curve = page.one(".curve svg")
    curve.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    step, told = page.text(".curve output").split(": ")
    shown, smooth = (float(number) for number in told.split(", smoothed "))
    assert (
        step == "step 2"
        and shown == pytest.approx(values[2], rel=1e-3)
        and smooth == pytest.approx(expected[2], rel=1e-3)
    )


def test_the_configuration_is_searched(page):
    search, changed = page.one("#filter input[type=search]"), page.one("#filter input[type=checkbox]")
    page.centred(search).send_keys("temperature")
    visible = """return [...document.querySelectorAll('.settings tbody tr')].filter((row) => !row.hidden)
        .map((row) => row.children[0].textContent)"""
    assert {"loss.temperature", "loss.base_temperature"} <= set(page.run(visible)) and len(page.run(visible)) < 9
    search.clear()
    page.run("arguments[0].dispatchEvent(new Event('input', {bubbles: true}))", search)
    changed.click()
    assert "batch_size" in page.run(visible) and "loss.temperature" not in page.run(visible)
    changed.click()


def test_the_command_is_copied(page):
    button = page.centred(page.one('[data-copy="command"]'))
    button.click()
    assert page.run("return getSelection().toString()") == page.text("#command")


def overflow(page):
    return page.run("return document.documentElement.scrollWidth")


def test_on_a_phone_nothing_is_wider_than_the_screen(chromium, finished):
    page = Page(chromium, finished[1], width=400, height=800)
    assert overflow(page) <= 400
    page.centred(page.all("#explorer .batch canvas")[1])
    page.run("explorer.choose(31)")
    assert overflow(page) <= 400 and page.one("#panel").is_displayed()
    row, order = page.one("#compare .bar").rect, page.one("[name=order]").rect
    assert order["x"] + order["width"] <= row["x"] + row["width"] + 1
    assert page.errors() == []


def test_the_table_below_the_explorer_is_not_covered(page):
    caption = page.centred(page.one("#hidden-positives caption"))
    line = page.one("#pair").rect
    assert line["y"] + line["height"] <= caption.rect["y"]


def test_without_scripts_it_can_be_read(chromium, finished):
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.get(finished[1].as_uri())
        text = chromium.find_element(By.TAG_NAME, "body").text
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        chromium.get("about:blank")  # the next test is to load the page anew
    for expected in (
        "needs JavaScript",
        "IoU of each class",
        "vertical stripes",
        "Linear probe loss",
        "loss.temperature",
    ):
        assert expected in text, expected
    assert "click compares" not in text


def test_a_report_is_small(finished):
    assert finished[1].stat().st_size < 5_000_000


@pytest.mark.parametrize("kind", ["no labels", "one image", "none, void", "stego, more clusters"])
def test_every_run_has_a_page_without_errors(chromium, tmp_path, photo_folder, kind):
    data = {
        "name": "folder",
        "size": [32, 40],
        "classes": ["<script>alert(1)</script>", "a&b", "</script>", "d", "e", "f"],
    }
    top = {"steps": 2, "warmup": 1}
    images = 1 if kind == "one image" else 4
    root = photo_folder(labels=kind != "no labels", name="<b>photos", images=images)
    if kind == "no labels":
        data |= {"clusters": 4}
    if "more clusters" in kind:
        data |= {"clusters": 9}
    if "void" in kind:
        data |= {"classes": data["classes"][:2]}
    if "," in kind:
        top |= {"loss": {"objective": kind.partition(",")[0]}}
    run = open_run(
        config_from_dict(tiny_values(tmp_path / "run", data=data | {"root": str(root)}, batch_size=images, **top))
    )
    train(run)
    report, _ = write_results(run)
    page = Page(chromium, report)
    assert page.errors() == [] and overflow(page) <= 1200
    assert page.run("return document.querySelectorAll('script').length") == 2
    assert len(page.all("#explorer canvas")) >= images
    if "stego" in kind:
        assert "loss.objective is stego" in page.text("#hidden-positives")
    if kind == "one image":
        assert page.texts('#panel [data-kind="agnostic"] td')[2] == "0"


def test_thresholds_of_the_anchor_alone(chromium, tmp_path):
    explorer = tiny_explorer(symmetric=False)
    dense = explorer.found["agnostic"].positives.to_dense()
    image = ("a", torch.zeros(3, 32, 40, dtype=torch.uint8))
    write_report(
        tmp_path / "report.html", Report("One way", {}, explorer=packed(explorer), explorer_images=[image] * 3)
    )
    page = Page(chromium, tmp_path / "report.html")
    positive = "return explorer.batch.positive('agnostic', ...arguments)"
    one_way = (dense & ~dense.T).nonzero()
    for anchor, patch in one_way[:5].tolist():
        assert page.run(positive, anchor, patch) and not page.run(positive, patch, anchor)
    assert len(one_way) and page.errors() == []
