"""Cityscapes-27: the fine labels of Cityscapes, without its void ids.

The ids are those of the data set's own scripts: 0 to 6 are void, 7 to 33 are the classes below, in this order.
"""

from __future__ import annotations

from pathlib import Path

from training.data.pairs import DataSet, Found, Pair, below, first_folder, id_table, visible

CLASSES = (
    *("road", "sidewalk", "parking", "rail track"),
    *("building", "wall", "fence", "guard rail", "bridge", "tunnel"),
    *("pole", "polegroup", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider"),
    *("car", "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle"),
)
_FIRST = 7  # the id of road
_IMAGE, _LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"


def _find(root: Path, split: str) -> Found:
    base = below(root, "cityscapes")
    images = first_folder(base, ("leftImg8bit", "leftImg8bit_trainvaltest/leftImg8bit"))
    labels = first_folder(base, ("gtFine", "gtFine_trainvaltest/gtFine"))
    for folder, name in ((images, "leftImg8bit"), (labels, "gtFine")):
        if folder is None:
            raise CITYSCAPES27.missing(f"there is neither {name} nor {name}_trainvaltest/{name} in {base}")
        if not (folder / split).is_dir():
            raise CITYSCAPES27.missing(f"there is no {folder / split}")
    files = sorted(visible(images / split, f"*/*{_IMAGE}"))
    if not files:
        raise CITYSCAPES27.missing(f"there are no folders of cities with *{_IMAGE} in {images / split}")
    pairs = []
    for file in files:
        name, city = file.name.removesuffix(_IMAGE), file.parent.name
        pairs.append(Pair(name, file, labels / split / city / f"{name}{_LABEL}"))
    return Found(pairs, f"{images.relative_to(base)}/{split} and {labels.relative_to(base)}/{split} in {base}")


CITYSCAPES27 = DataSet(
    title="Cityscapes-27",
    published="cityscapes",
    classes=CLASSES,
    table=id_table({_FIRST + index: index for index in range(len(CLASSES))}, void=range(_FIRST)),
    origin=(
        "leftImg8bit/{train,val}/CITY/ and gtFine/{train,val}/CITY/ are leftImg8bit_trainvaltest.zip and"
        " gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com (registration), both in `data.root` or in its"
        " cityscapes/"
    ),
    find=_find,
)
