from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from training.figures import IGNORED, class_palette, colour_map, data_uri, heat_map, kept_fraction, patches_overlay
from training.report import AnchorPositives, Example, PropagationWeights, Report, duration, percent, write_report

NAMES = ("sky", "road <wet>", "tree & bush")
METRICS = {
    "baseline": {"unsupervised": {"accuracy": 41.23, "miou": 18.74}},
    "hp": {
        "unsupervised": {"accuracy": 52.08, "miou": 24.96},
        "kmeans": {"accuracy": 52.08, "miou": 24.96},
        "linear": {"accuracy": 81.3, "miou": 49.37},
    },
    "config": {"seed": 7, "data": {"size": (32, 40), "classes": NAMES}, "output": "<runs>"},
}
VOID = {"img", "meta", "link", "br", "hr", "input", "source", "base"}


class Page(HTMLParser):
    """The elements of a page and its text; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            self.texts.setdefault(tag, []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str = "body") -> str:
        return " ".join(self.texts.get(tag, []))


def example(labelled: bool = True) -> Example:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 32, 40), generator=generator, dtype=torch.uint8)
    baseline, hp, label = (torch.randint(low, 3, (32, 40), generator=generator) for low in (0, 0, -1))
    maps = {"Baseline": baseline, "Hidden Positives": hp}
    return Example("street <1>", image, {"Label": label} | maps if labelled else maps)


def full_report(labelled: bool = True) -> Report:
    images = torch.stack([example().image] * 3)
    positives = torch.zeros(3, 4, 5, dtype=torch.bool)
    positives[0, 1, 2] = positives[2, :2, 0] = True
    weights = torch.zeros(9, 4, 5)
    weights[4], weights[5, 0, 0] = 0.25, 0.125
    return Report(
        title="Run <script>alert(1)</script> & more",
        metrics=METRICS if labelled else {"baseline": {"unsupervised": None}, "config": METRICS["config"]},
        class_names=NAMES,
        history=[{"step": step, "loss": 6.5 - step / 100, "lambda": step / 90} for step in range(0, 100, 10)],
        examples=[example(labelled)] * 2,
        positives=[AnchorPositives(images, (1, 3), positives)],
        propagation=[PropagationWeights(images[0], weights, (0, 0))],
        class_iou={"Baseline": [10.04, float("nan"), 3], "Hidden Positives": [20, 30.5, 4]} if labelled else {},
        confusion={"Hidden Positives": [[30, 0, 0], [10, 7, 0], [0, 0, 0], [0, 14, 0]]} if labelled else {},
        facts=["2025-01-02 · a device", "10 <training> images"],
        command="python -m training.train 'output=<runs>'",
        versions={"torch": "1.2.3"},
    )


def written(tmp_path, report: Report) -> tuple[Page, str]:
    write_report(tmp_path / "report.html", report)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    return Page(html), html


@pytest.fixture(scope="module")
def page_and_html(tmp_path_factory) -> tuple[Page, str]:
    return written(tmp_path_factory.mktemp("report"), full_report())


@pytest.fixture(scope="module")
def page(page_and_html) -> Page:
    return page_and_html[0]


def test_needs_no_other_file(page_and_html):
    page, html = page_and_html
    assert not re.search(r"https?://|url\(|@import|src=\"(?!data:image/png;base64,)", html)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    assert all(link["href"].startswith("#") for link in page.all("a"))
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert all(link["href"][1:] in targets for link in page.all("a"))


def test_images_decode_and_are_described(page):
    images = page.all("img")
    assert len(images) == 2 + 2 * 4 + 3 + 2  # curves, examples, positives, local propagation
    for attributes in images:
        picture = Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",", 1)[1])))
        picture.load()
        assert (str(picture.width), str(picture.height)) == (attributes["width"], attributes["height"])
        assert attributes["alt"]


def test_shows_everything(page):
    headings = page.texts["h2"]
    assert headings == [
        "Results",
        "Training",
        "Segmentations",
        "Global hidden positives",
        "Local propagation",
        "IoU of each class",
        "Confusion",
        "Versions",
        "Configuration",
    ]
    body = page.text()
    for text in ("18.7", "25.0", "+6.2", "49.4", "81.3", "2025-01-02 · a device", "output=<runs>", "1.2.3", *NAMES):
        assert text in body
    captions = page.texts["figcaption"]
    assert captions.count("Label") == captions.count("Baseline") == captions.count("Hidden Positives") == 2
    assert [caption for caption in captions if "positive" in caption.split()[-1]] == [
        "own image: 1 positive",
        "other image: 0 positives",
        "other image: 2 positives",
    ]
    assert {"ignored", *NAMES} <= set(page.texts["li"])
    alts = [image["alt"] for image in page.all("img")]
    assert alts.count("street <1>: photograph") == 2
    assert "Loss: 6.5 at step 0, 5.6 at step 90" in alts
    assert "Photograph, own image: 1 positive; anchor at row 1, column 3" in alts


def test_headline_is_not_repeated_in_the_table(page):
    rows = page.texts["th"]
    assert "Codes: k-means" in rows
    assert "Hidden Positives, unsupervised" not in rows


def test_both_matchings_and_the_images_scored_are_named(tmp_path):
    scored = {"accuracy": 40.5, "miou": 20.5, "matching": "one-to-one", "majority": {"accuracy": 60.5, "miou": 30.5}}
    metrics = {"baseline": {"unsupervised": scored}, "hp": {"linear": {"accuracy": 70.5, "miou": 50.5}}}
    page, _ = written(tmp_path, Report("Both", metrics | {"images": "training"}))
    assert page.texts["th"][:5] == ["Method", "mIoU, %", "Accuracy, %", "mIoU, majority, %", "Accuracy, majority, %"]
    assert page.texts["td"] == ["20.5", "40.5", "30.5", "60.5", "50.5", "70.5", "–", "–"]
    assert page.text("caption").startswith("Training images. Clusters are matched one to one")


def test_figures_without_a_labelled_pixel_are_dashes(tmp_path):
    page, _ = written(tmp_path, Report("Void", {"baseline": {"unsupervised": {"accuracy": None, "miou": None}}}))
    assert page.texts["td"] == ["–", "–"]
    assert "A dash: there are no labelled pixels." in page.text("caption")


def test_window_at_the_border(page):
    cells = page.texts["td"]
    start = cells.index("0.25") - 4
    assert cells[start : start + 9] == ["–", "–", "–", "–", "0.25", "0.125", "–", "0", "0"]


def test_absent_class_is_a_dash(page):
    cells = page.texts["td"]
    start = cells.index("10.0")
    assert cells[start : start + 6] == ["10.0", "20.0", "–", "30.5", "3.0", "4.0"]


def test_confusion_in_shares_of_each_class(page):
    cells = page.texts["td"]
    start = cells.index("75")
    assert cells[start : start + 12] == ["75", "0", "–", "25", "33", "–", "0", "0", "–", "0", "67", "–"]
    assert "no class" in page.texts["th"]


def test_position_score_and_precision_of_positives(tmp_path):
    score = {"accuracy": 40.5, "miou": 20.5}
    here = {"precision": 61.5, "per_anchor": 7.5}
    positives = {"agnostic": {"own_image": here}, "specific": {"precision": 63.5}, "images": 4}
    metrics = {"hp": {"kmeans": score, "linear": {"accuracy": 70.5, "miou": 50.5}}, "positives": positives}
    metrics |= {"position_score": {"kmeans": 12.5, "labels": 33.5}}
    page, _ = written(tmp_path, Report("Both", metrics))
    assert page.texts["h2"] == ["Results", "Global hidden positives"]
    assert page.texts["td"] == ["20.5", "40.5", "12.5", "50.5", "70.5", "–", "61.5", "7.5", "63.5", "–"]
    assert "of the labels themselves 33.5" in page.text()
    assert {"Position score, %", "per anchor", "Agnostic own image", "Specific"} <= set(page.texts["th"])


def test_without_labels(tmp_path):
    page, _ = written(tmp_path, full_report(labelled=False))
    assert "There are no labels" in page.text()
    assert "Label" not in page.texts["figcaption"]
    assert len(page.all("img")) == 2 + 2 * 3 + 3 + 2
    assert "IoU of each class" not in page.texts["h2"]
    assert "ignored" not in page.texts["li"]
    assert "road <wet>" in page.texts["li"]


def test_text_is_escaped(page_and_html):
    page, html = page_and_html
    title = "Run <script>alert(1)</script> & more"
    assert page.text("title") == page.text("h1") == title
    assert (
        "<script" not in html
        and "<wet>" not in html
        and "street <1>" not in html
        and "<runs>" not in html
        and "<training>" not in html
    )
    assert "street <1>" in page.texts["figcaption"]


def test_configuration_is_yaml(page):
    config = yaml.safe_load(page.text("pre"))
    assert config == {"seed": 7, "data": {"size": [32, 40], "classes": list(NAMES)}, "output": "<runs>"}
    assert list(config) == ["seed", "data", "output"]  # in the order of the configuration


def test_little_to_show(tmp_path):
    page, _ = written(tmp_path, Report("Empty", {}))
    assert page.texts["h2"] == ["Results"] and not page.all("img")
    # One logged step, a value that is not finite, names for some classes only.
    history = [{"step": 0, "loss": 1.0, "cluster_probe": float("nan")}]
    page, _ = written(tmp_path, Report("Little", {}, ("sky",), history, [example()]))
    assert page.texts["h3"] == ["Loss"]
    assert {"sky", "class 1", "class 2"} <= set(page.texts["li"])


def test_a_sum_is_not_drawn_beside_its_parts(tmp_path):
    page, _ = written(
        tmp_path, Report("Sum", {}, history=[{"step": 0, "loss": 3.0, "contrastive": 2.0, "new_term": 1}])
    )
    assert page.texts["h3"] == ["Contrastive loss", "new term"]


def test_same_report_same_file(tmp_path, page_and_html):
    assert written(tmp_path, full_report())[1] == page_and_html[1]


def test_palette_is_distinct_and_fixed():
    palette = class_palette(60).astype(int)
    assert palette.shape == (60, 3)
    assert np.array_equal(class_palette(5), palette[:5]) and np.array_equal(class_palette(27), palette[:27])
    with_ignored = np.vstack([palette, IGNORED])
    distance = np.abs(with_ignored[:, None] - with_ignored[None]).max(axis=-1)
    assert distance[np.triu_indices(61, 1)].min() >= 30


def test_colour_map():
    palette = class_palette(3)
    picture = np.asarray(colour_map(torch.tensor([[0, 2], [-3, 1]]), palette))
    assert np.array_equal(picture, [[palette[0], palette[2]], [IGNORED, palette[1]]])


def test_patches_overlay_keeps_the_chosen_patch_in_colour():
    image = torch.tensor([200, 30, 30], dtype=torch.uint8)[:, None, None].expand(3, 40, 60)
    chosen = torch.zeros(2, 3, dtype=torch.bool)
    chosen[1, 2] = True
    picture = np.asarray(patches_overlay(image, chosen))
    height, width = picture.shape[0] // 2, picture.shape[1] // 3
    assert picture[height + height // 2, 2 * width + width // 2].tolist() == [200, 30, 30]
    red, green, blue = picture[height // 2, width // 2].tolist()
    assert red == green == blue > 100
    marked = np.asarray(patches_overlay(image, chosen, anchor=(0, 1)))
    assert marked[height // 2, width + width // 2].tolist() == [200, 30, 30], "what the anchor shows"
    changed = (marked != picture).any(axis=-1)
    rows, columns = np.nonzero(changed)
    assert abs(rows.max() - height) < 5 and abs(columns.min() - width) < 5 and abs(columns.max() - 2 * width) < 5


def test_kept_fraction_counts_cells_inside_the_image():
    weights = torch.zeros(9, 3, 4)
    weights[4] = 1  # each patch keeps itself
    weights[5, 1, 1] = 0.1  # and one its right neighbour
    kept = kept_fraction(weights)
    assert kept[0, 0].item() == pytest.approx(1 / 4)
    assert kept[0, 1].item() == pytest.approx(1 / 6)
    assert kept[1, 1].item() == pytest.approx(2 / 9)


def test_heat_map_size_and_order():
    picture = heat_map(torch.tensor([[0.0, 1.0, 0.5]]), (20, 60))
    assert picture.size == (60, 20)
    brightness = np.asarray(picture.convert("L"))[10, [5, 25, 55]].astype(int)
    assert brightness[0] < brightness[2] < brightness[1]


def test_data_uri_is_lossless():
    pixels = torch.randint(256, (7, 5, 3), dtype=torch.uint8).numpy()
    encoded = data_uri(Image.fromarray(pixels)).removeprefix("data:image/png;base64,")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), pixels)


@pytest.mark.parametrize(("seconds", "text"), [(44.6, "45 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_percent():
    assert [percent(value) for value in (12.345, 0.0, None, float("nan"))] == ["12.3", "0.0", "–", "–"]
