"""Classes of the training pictures that are kept from training: `python benchmarks/held_out_pictures.py runs/mini_posts/model mini`

What a picture head is chosen by, so that `val.parquet` is left for the card: nearest class by distance to its text point.
"""

from __future__ import annotations

import argparse

from hysafe.app.card import _encode_pictures, class_points
from hysafe.app.pipeline import load
from hysafe.data.datamodule import EmbedData
from hysafe.taxonomy.metrics import hierarchical_scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    a = parser.parse_args()
    print("| model | pictures | top-1 | top-5 | tree-induced error | hierarchical precision |\n|---|---|---|---|---|---|")
    for name in a.models:
        model = load(name)
        data = EmbedData(a.data, model.encoder.image_size, text_sets=[], rendered=4, held_out_only=True)
        data.setup()
        pictures, leaf = data.held_out_pictures, data.world.leaf_ids()
        photos = pictures.classes < data.photo_classes
        truth = pictures.classes[photos]
        points, _ = _encode_pictures(model, pictures)
        order = points.dist(class_points(model, data.world)[: data.photo_classes]).argsort(-1)[photos]
        right = order == truth[:, None]
        scores = hierarchical_scores(data.world.parents(), [leaf[i] for i in order[:, 0]], [leaf[i] for i in truth])
        print(
            f"| {name} | {len(truth)} | {right[:, 0].float().mean():.3f} | {right[:, :5].any(-1).float().mean():.3f} | "
            f"{scores.tree_induced_error:.3f} | {scores.precision:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
