"""The configuration of a run small enough to train in seconds."""


def tiny_values(output, **top):
    """The configuration of a run of a few steps on built-in images, as nested values."""
    return {
        "output": str(output),
        "device": "cpu",
        "steps": 6,
        "warmup": 2,
        "batch_size": 4,
        "log_every": 1,
        "checkpoint_every": 2,
        "data": {"name": "procedural", "size": [32, 40], "train_images": 10, "val_images": 4},
        "backbone": {"name": "patch_dictionary", "patch_size": 8, "features_dim": 24, "cache": True, "views": 1},
        "head": {"dim": 16},
        "pool": {"size": 32, "renew_every": 2},
        "evaluation": {"every": 0},
    } | top
