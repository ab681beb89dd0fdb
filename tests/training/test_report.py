from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_explorer

from training.config_file import Setting
from training.report.explorer import packed
from training.report.figures import IGNORED, class_palette, colour_map, jpeg_uri, png_uri
from training.report.page import Example, Report, duration, percent, write_report

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
    if not labelled:
        return Example("street <1>", image, maps)
    return Example("street <1>", image, {"Label": label} | maps, {"Baseline": 20.5, "Hidden Positives": float("nan")})


def full_report(labelled: bool = True) -> Report:
    return Report(
        title="Run <script>alert(1)</script> & more",
        metrics=METRICS if labelled else {"baseline": {"unsupervised": None}, "config": METRICS["config"]},
        class_names=NAMES,
        history=[{"step": step, "loss": 6.5 - step / 100, "lambda": step / 90} for step in range(0, 100, 10)],
        examples=[example(labelled)] * 2,
        explorer=packed(tiny_explorer(NAMES, labelled=labelled)),
        explorer_images=[("wood </script><b>", example().image)] * 3,
        class_iou={"Baseline": [10.04, float("nan"), 3], "Hidden Positives": [20, 30.5, 4]} if labelled else {},
        confusion={"Hidden Positives": [[30, 0, 0], [10, 7, 0], [0, 0, 0], [0, 14, 0]]} if labelled else {},
        facts=["2025-01-02 · a device", "10 <training> images"],
        command="python -m training.train 'output=<runs>'",
        assignments={"Codes": ["sky", "none"], "Baseline": ["road <wet>", "sky"]} if labelled else {},
        provenance={"versions": {"torch": "1.2.3"}, "training_images": 1234, "commit": None},
        settings=[Setting("seed", "7", "0", "of all"), Setting("data.root", "<here>", "<here>", "a & b")],
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
    links = re.sub(r"http://www.w3.org/2000/svg", "", html)  # a name, of what is drawn
    assert not re.search(r"https?://|url\(|@import|src=\"(?!data:image/(png|jpeg);base64,)", links)
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    policy = next(attributes["content"] for attributes in page.all("meta") if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not any("src" in script for script in page.all("script"))
    assert all(link["href"].startswith("#") for link in page.all("a"))
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert all(link["href"][1:] in targets for link in page.all("a"))


def test_images_decode_and_are_described(page):
    images = page.all("img")
    assert len(images) == 3 + 2 * 4  # explorer, examples
    for attributes in images:
        picture = Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",", 1)[1])))
        picture.load()
        assert (str(picture.width), str(picture.height)) == (attributes["width"], attributes["height"])
        assert attributes["alt"]


def test_shows_everything(page):
    assert page.texts["h2"] == [
        "Results",
        "Hidden positives",
        "Segmentations",
        "Classes",
        "Training",
        "How to reproduce",
        "Configuration",
    ]
    body = page.text()
    for text in ("18.7", "25.0", "+6.2", "49.4", "81.3", "2025-01-02 · a device", "output=<runs>", "1.2.3", *NAMES):
        assert text in body
    captions = page.texts["figcaption"]
    assert captions.count("Label") == captions.count("Baseline, mIoU 20.5 %") == 2
    assert captions.count("Hidden Positives, mIoU – %") == 2
    assert {"ignored", *NAMES} <= set(page.texts["li"])
    assert [image["alt"] for image in page.all("img")].count("street <1>: photograph") == 2


def test_without_a_script_there_is_something_to_read(page):
    noscript = page.text("noscript")
    assert "needs JavaScript" in noscript
    cells = [text for text in page.texts["noscript"] if text.strip()]
    assert cells[cells.index("Loss") : cells.index("Loss") + 3] == ["Loss", "6.5", "5.6"]


def test_clusters_and_what_the_run_was(page):
    cells = page.texts["td"]
    start = cells.index("none") - 2
    assert cells[start : start + 4] == ["sky", "road <wet>", "none", "sky"]
    assert cells[cells.index("1.2.3") :][:2] == ["1.2.3", "1,234"]
    assert "commit" not in page.texts["th"]
    rows = [attributes.get("class") for attributes in page.all("tr")][-2:]
    assert rows == ["changed", None], "only what differs from its default is marked"


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
    assert page.texts["h2"] == ["Results", "Hidden positives"]
    assert page.texts["td"] == ["20.5", "40.5", "12.5", "50.5", "70.5", "–", "61.5", "7.5", "63.5", "–"]
    assert "of the labels themselves 33.5" in page.text()
    assert {"Position score, %", "per anchor", "Agnostic own image", "Specific"} <= set(page.texts["th"])


def test_without_labels(tmp_path):
    page, _ = written(tmp_path, full_report(labelled=False))
    assert "There are no labels" in page.text()
    assert "Label" not in page.texts["figcaption"]
    assert len(page.all("img")) == 3 + 2 * 3
    assert "Classes" not in page.texts["h2"]
    assert "ignored" not in page.texts["li"]
    assert "road <wet>" in page.texts["li"]


def test_text_is_escaped(page_and_html):
    page, html = page_and_html
    title = "Run <script>alert(1)</script> & more"
    assert page.text("title") == page.text("h1") == title
    assert [script.get("type") for script in page.all("script")] == ["application/json", None]
    assert not re.search("alert\\(1\\)</script|<wet>|street <1>|<runs>|<training>|<here>|wood </script>", html)
    assert "street <1>" in page.texts["figcaption"] and "wood </script><b>" in page.texts["figcaption"]


def test_data_of_the_script_are_json_that_ends_no_script(page_and_html):
    page, html = page_and_html
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]
    data = json.loads(text, parse_constant=pytest.fail)  # no NaN, for which JSON has no name
    assert data["explorer"]["class_names"] == list(NAMES) and "<" not in text
    assert data["miou"] == [{"Baseline": 20.5}] * 2 and data["titles"][:2] == ["Photograph", "Label"]


def test_configuration_is_yaml(page):
    config = yaml.safe_load("".join(page.texts["pre"][1:]))
    assert config == {"seed": 7, "data": {"size": [32, 40], "classes": list(NAMES)}, "output": "<runs>"}
    assert list(config) == ["seed", "data", "output"]  # in the order of the configuration


def test_little_to_show(tmp_path):
    page, _ = written(tmp_path, Report("Empty", {}))
    assert page.texts["h2"] == ["Results"] and not page.all("img")
    # One logged step, a value that is not finite, names for some classes only.
    history = [{"step": 0, "loss": 1.0, "cluster_probe": float("nan")}]
    page, html = written(tmp_path, Report("Little", {}, ("sky",), history, [example()]))
    assert curves(html) == {"Loss": [[0, 1.0]]}
    assert {"sky", "class 1", "class 2"} <= set(page.texts["li"])


def curves(html: str) -> dict[str, list]:
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    return {curve["title"]: curve["points"] for curve in data["curves"]}


def test_a_sum_is_not_drawn_beside_its_parts_but_any_other_figure_is(tmp_path):
    history = [{"step": 0, "loss": 3.0, "contrastive": 2.0, "new_term": 1}, {"step": 9, "val/miou_linear": 1 / 3}]
    _, html = written(tmp_path, Report("Sum", {}, history=history))
    validation = {"Validation mIoU linear": [[9, 0.33333]]}
    assert curves(html) == {"Contrastive loss": [[0, 2.0]], "new term": [[0, 1]]} | validation


def test_long_curves_are_thinned_to_their_end(tmp_path):
    history = [{"step": step, "loss": float(step)} for step in range(1201)]
    _, html = written(tmp_path, Report("Long", {}, history=history))
    points = curves(html)["Loss"]
    assert points[:3] == [[0, 0], [3, 3], [6, 6]] and points[-1] == [1200, 1200] and len(points) == 401


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
    picture = np.asarray(colour_map(torch.tensor([[0, 2], [-3, 1]]), palette).convert("RGB"))
    assert np.array_equal(picture, [[palette[0], palette[2]], [IGNORED, palette[1]]])


@pytest.mark.parametrize("classes", [3, 300])  # with a palette, and beyond one
def test_pictures_of_maps_are_lossless(classes):
    generator = torch.Generator().manual_seed(0)
    picture = colour_map(torch.randint(-1, classes, (7, 60), generator=generator), class_palette(classes))
    read = Image.open(io.BytesIO(base64.b64decode(png_uri(picture).removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(read.convert("RGB")), np.asarray(picture.convert("RGB")))


def test_photographs_are_small_and_close():
    row = torch.linspace(0, 255, 160)
    pixels = torch.stack([row.expand(120, 160), row.flip(0).expand(120, 160), torch.full((120, 160), 90.0)]).byte()
    uri = jpeg_uri(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    read = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))))
    assert np.abs(read.astype(int) - pixels.permute(1, 2, 0).numpy()).max() < 12 and len(uri) < 120 * 160 / 2


def test_large_pictures_are_shrunk(tmp_path):
    image, of_classes = torch.zeros(3, 960, 1300, dtype=torch.uint8), torch.zeros(960, 1300, dtype=torch.int64)
    page, _ = written(tmp_path, Report("Large", {}, ("sky",), examples=[Example("a", image, {"Label": of_classes})]))
    assert [(picture["width"], picture["height"]) for picture in page.all("img")] == [("480", "354")] * 2


@pytest.mark.parametrize(("seconds", "text"), [(44.6, "45 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_percent():
    assert [percent(value) for value in (12.345, 0.0, None, float("nan"))] == ["12.3", "0.0", "–", "–"]
