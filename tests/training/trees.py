"""Made-up images and labels in the exact layouts of the public data sets."""

from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from training.data.potsdam import COLOURS, LABELLED
from training.data.procedural import ProceduralData

SIDES = (40, 56)  # height and width of an image
CITIES = {"train": ("aachen", "bochum"), "val": ("munster",)}


def picture(seed, sides=SIDES):
    """Pixels (h, w, 3) and regions (h, w), numbered from 0."""
    data = ProceduralData(1, sides, seed)
    return data.image(0).permute(1, 2, 0).numpy(), data.label(0).numpy().astype(np.uint8)


def save(file, pixels, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)


def coco(root, stego, images=6):
    """COCO-Stuff; STEGO's has lists, which leave out one image of each split."""
    base = root / "cocostuff" if stego else root
    for split, shift in (("train2017", 0), ("val2017", 100)):
        for index in range(images):
            pixels, regions = picture(shift + index)
            name = f"{shift + index:012d}"
            save(base / ("images" if stego else "") / split / f"{name}.jpg", pixels, quality=95, subsampling=0)
            label = np.array([0, 123, 156, 148, 181, 255], np.uint8)[regions]  # person, grass, sky, road, wood, void
            save(base / ("annotations" if stego else "stuffthingmaps") / split / f"{name}.png", label)
        if stego:
            lists = base / "curated" / split
            lists.mkdir(parents=True)
            names = "".join(f"{shift + index:012d}\n" for index in range(1, images))
            (lists / f"Coco164kFull_Stuff_Coarse{'' if shift == 0 else '_7'}.txt").write_text(names)
    return root


def cityscapes(root, stego, images=3):
    """Cityscapes; its own archives may be unpacked into folders of their names."""
    for split, cities in CITIES.items():
        for number, city in enumerate(cities):
            for index in range(images):
                pixels, regions = picture(10 * number + index + 100 * (split == "val"))
                stem = f"{city}_{index:06d}_000019"
                base = root / "cityscapes" if stego else root / "leftImg8bit_trainvaltest"
                save(base / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", pixels)
                base = root / "cityscapes" if stego else root / "gtFine_trainvaltest"
                label = np.array([7, 11, 21, 23, 33, 0], np.uint8)[regions]
                save(base / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", label)
    return root


def potsdam_tiles(root, images=6):
    """Potsdam as STEGO's download has it."""
    base = root / "potsdam"
    for kind in ("imgs", "gt"):
        (base / kind).mkdir(parents=True)
    for index in range(2 * images):
        pixels, regions = picture(index, (50, 50))
        infrared = np.concatenate([pixels, pixels[:, :, :1]], axis=2)
        scipy.io.savemat(base / "imgs" / f"{index}.mat", {"img": infrared})
        scipy.io.savemat(base / "gt" / f"{index}.mat", {"gt": regions.astype(np.int32)})
    (base / "labelled_train.txt").write_text("".join(f"{index}\n" for index in range(images)))
    (base / "labelled_test.txt").write_text("".join(f"{index}\n" for index in range(images, 2 * images)))
    return root


def potsdam_photographs(root, side=400):
    """Potsdam as ISPRS has it: the labelled photographs and one more, smaller than the real ones."""
    colours = np.array([colour for colour, _ in COLOURS.values()], np.uint8)
    for index, name in enumerate([*sorted(LABELLED), "2_13"]):
        large = (part.repeat(10, axis=0).repeat(10, axis=1) for part in picture(index, (side // 10,) * 2))
        pixels, regions = (np.roll(part, (1, 1), (0, 1)) for part in large)  # borders between every second pixel
        save(root / "2_Ortho_RGB" / f"top_potsdam_{name}_RGB.tif", pixels, compression="tiff_lzw")
        if name in LABELLED:
            label = root / "5_Labels_for_participants" / f"top_potsdam_{name}_label.tif"
            save(label, colours[regions], compression="tiff_lzw")
    return root


def plant(name: str, layout: str, root: Path) -> Path:
    """The tree of a data set in a layout, "stego" or "own"."""
    if name == "potsdam3":
        return potsdam_tiles(root) if layout == "stego" else potsdam_photographs(root)
    return {"coco27": coco, "cityscapes27": cityscapes}[name](root, layout == "stego")
