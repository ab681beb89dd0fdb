"""Runs every CPU kernel on small awkward sizes: ``python exercise_core.py FOLDER`` with the test module in FOLDER."""

import sys

import numpy as np

sys.path.insert(0, sys.argv[1])
import _core  # noqa: E402

random = np.random.default_rng(0)
_core.set_threads(3)


def normal(*shape):
    return random.normal(size=shape).astype(np.float32)


for anchors in (1, 31, 33, 70):
    rows = normal(anchors, 4)
    products = rows @ rows.T
    bits = _core.pack(products, normal(anchors))
    _core.transpose_bits(bits, anchors)
    _core.repeat_bits(bits[0], anchors, 5 * anchors)
    for per_image in sorted({1, anchors}):
        negatives = _core.draw_negatives(4, per_image, anchors, 0.2)
        for by_rows in (True, False):
            _core.contrastive(rows, products, bits, negatives, by_rows)
    for k in sorted({1, min(3, anchors), anchors}):
        _core.topk(products, k)
_core.topk(normal(2, 300), 200)
for height, width, window in ((1, 1, 1), (1, 5, 3), (4, 3, 5), (2, 2, 7)):
    _core.local_propagation(normal(2, height * width, height * width), normal(2, 3, height, width), window)
_core.exp_nonpositive(np.linspace(-100, 0, 999, dtype=np.float32))
