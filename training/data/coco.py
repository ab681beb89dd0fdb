"""COCO-Stuff-27: COCO 2017 with the 182 ids of COCO-Stuff in their 27 supercategories.

The ids and the hierarchy are those of Caesar et al., "COCO-Stuff: Thing and Stuff Classes in Context" (CVPR 2018). The
stuff-and-thing maps store an id of its list less one, and 255 for "unlabeled".
"""

from __future__ import annotations

from pathlib import Path

from training.data.pairs import VOID, DataSet, Found, Pair, below, first_folder, id_table, read_list, visible

# Supercategory by supercategory, in the order of the published class list: its ids. Things lie together in the list of
# COCO-Stuff; stuff is listed by the alphabet, so its ids are scattered.
SUPERCATEGORIES: dict[str, tuple[int, ...]] = {
    "electronic": tuple(range(71, 77)),  # tv to cell phone
    "appliance": tuple(range(77, 83)),  # microwave to blender
    "food": tuple(range(51, 61)),  # banana to cake
    "furniture": tuple(range(61, 71)),  # chair to door
    "indoor": tuple(range(83, 91)),  # book to hair brush
    "kitchen": tuple(range(43, 51)),  # bottle to bowl
    "accessory": tuple(range(25, 33)),  # hat to suitcase
    "animal": tuple(range(15, 25)),  # bird to giraffe
    "outdoor": tuple(range(9, 15)),  # traffic light to bench
    "person": (0,),
    "sports": tuple(range(33, 43)),  # frisbee to tennis racket
    "vehicle": tuple(range(1, 9)),  # bicycle to boat
    "ceiling": (101, 102),  # other, tile
    "floor": (100, 113, 114, 115, 116, 117),  # carpet; marble, other, stone, tile, wood
    "food-stuff": (120, 121, 152, 169),  # other, fruit, salad, vegetable
    # cabinet, counter, cupboard, desk, door, other, light, mirror, shelf, stairs, table
    "furniture-stuff": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "rawmaterial": (99, 131, 138, 142),  # cardboard, metal, paper, plastic
    # banner, blanket, cloth, clothes, curtain, mat, napkin, pillow, rug, other, towel
    "textile": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall": tuple(range(170, 177)),  # brick to wood
    "window": (179, 180),  # blind, other
    "building": (94, 95, 127, 150, 157, 165),  # bridge, other, house, roof, skyscraper, tent
    # dirt, gravel, other, mud, pavement, platform, playingfield, railroad, road, sand, snow
    "ground": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    # branch, bush, flower, grass, leaves, moss, other, straw, tree
    "plant": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky": (105, 156),  # clouds, other
    "solid": (126, 134, 149, 159, 161, 181),  # hill, mountain, rock, other, stone, wood
    "structural": (98, 112, 137, 145, 163),  # cage, fence, net, railing, other
    "water": (119, 147, 154, 177, 178),  # fog, river, sea, other, waterdrops
}

# The published runs train and validate on subsets, by these lists, which come with STEGO's download.
LISTS = {"train": "Coco164kFull_Stuff_Coarse.txt", "val": "Coco164kFull_Stuff_Coarse_7.txt"}


def _find(root: Path, split: str) -> Found:
    part = f"{split}2017"
    base = below(root, "cocostuff")
    images = first_folder(base, (f"images/{part}", part))
    labels = first_folder(base, (f"{kind}/{part}" for kind in ("annotations", "stuffthingmaps")))
    if labels is None and (base / part).is_dir() and any(visible(base / part, "*.png")):
        labels = base / part  # both archives, unpacked into one folder
    if images is None:
        raise COCO27.missing(f"there is neither images/{part} nor {part} in {base}")
    if labels is None:
        raise COCO27.missing(f"there is neither annotations/{part} nor stuffthingmaps/{part} in {base}")
    layout = f"{images.relative_to(base)} and {labels.relative_to(base)} in {base}"
    listed = base / "curated" / part / LISTS[split]
    if listed.is_file():
        names, which = read_list(COCO27, listed), f"the images of curated/{part}/{LISTS[split]}"
    else:
        names = sorted(file.stem for file in visible(images, "*.jpg"))
        which = f"all images, as there is no curated/{part}/{LISTS[split]}, whose images the published runs take"
    if not names:
        raise COCO27.missing(f"there are no .jpg files in {images}")
    return Found([Pair(name, images / f"{name}.jpg", labels / f"{name}.png") for name in names], f"{layout}, {which}")


COCO27 = DataSet(
    title="COCO-Stuff-27",
    published="cocostuff27",
    classes=tuple(SUPERCATEGORIES),
    table=id_table(
        {value: index for index, values in enumerate(SUPERCATEGORIES.values()) for value in values}, void=[VOID]
    ),
    origin=(
        "images/{train2017,val2017} are train2017.zip and val2017.zip of https://cocodataset.org, and"
        " annotations/{train2017,val2017} is stuffthingmaps_trainval2017.zip of https://github.com/nightrome/cocostuff,"
        " both in `data.root` or in its cocostuff/"
    ),
    find=_find,
)
