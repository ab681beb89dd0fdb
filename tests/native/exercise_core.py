"""Runs every CPU kernel on small awkward sizes: ``python exercise_core.py FOLDER`` with the test module in FOLDER."""

import importlib
import sys

import numpy as np


def main(folder):
    sys.path.insert(0, folder)
    core = importlib.import_module("_core")
    core.set_threads(3)
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    def topk(query, pool, k):
        (codes, stats), (pool_codes, pool_stats) = core.coarse_int8(query), core.coarse_int8(pool)
        core.topk(codes.astype(np.int32) @ pool_codes.T, query, stats, pool, pool_stats, k)

    for anchors in (1, 31, 33, 70):
        rows = normal(anchors, 5)
        codes, stats = core.coarse_int8(rows)
        threshold = normal(anchors)
        for symmetric in (False, True):
            bits = core.pack(codes.astype(np.int32) @ codes.T, rows, stats, threshold, symmetric)
        keys = normal(anchors + 7, 5)
        key_codes, key_stats = core.coarse_int8(keys)
        of_keys = keys, key_stats, threshold, normal(anchors + 7)
        for either, first in ((True, -anchors), (False, 7)):
            core.pack_between(codes.astype(np.int32) @ key_codes.T, rows, stats, *of_keys, either, first)
        core.transpose_bits(bits, anchors)
        core.repeat_bits(bits[0], anchors, 5 * anchors)
        for per_image in sorted({1, anchors}):
            negatives = core.draw_negatives(4, per_image, anchors, 0.2)
            for by_pairs in (True, False):
                core.contrastive(rows, rows @ rows.T, bits, negatives, by_pairs, 0)
                if per_image < anchors:
                    part = slice(anchors // 3, anchors // 3 + (anchors + 1) // 2)
                    core.contrastive(rows, rows[part] @ rows.T, bits[part].copy(), negatives, by_pairs, part.start)
        for k in sorted({1, min(3, anchors), anchors}):
            topk(rows, rows, k)
    topk(normal(2, 33), normal(300, 33), 40)
    topk(normal(2, 33), normal(300, 33), 200)
    core.coarse_int8(np.float32([[np.nan, 1], [np.inf, -np.inf], [1e-45, 0], [3e38, 3e38], [0, 0]]))
    for height, width, window in ((1, 1, 1), (1, 5, 3), (4, 3, 5), (2, 2, 7)):
        logits = normal(2, height * width, height * width)
        core.local_propagation(logits, normal(2, 3, height, width), window)
    core.exp_nonpositive(np.linspace(-100, 0, 999, dtype=np.float32))
    for values in ([0], [np.nan, np.nan], [np.inf, -np.inf, 3e38, -3e38, 1e-45], [-0.0, 0.0, np.nan]):
        core.quantiles(np.float32(values), 0.1, 0.9)
    core.bits_outside(4, 31, 70)
    core.log_sum(np.float32([1, -np.inf, 300, np.nan]), 2)
    for value in (0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan):
        core.rank_key(value, 2**31 - 1)
    core.geometries()
    core.pairs_met(64, 128, 99, 33, True)


if __name__ == "__main__":
    main(sys.argv[1])
