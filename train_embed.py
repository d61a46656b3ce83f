"""Train the encoder: ``python train_embed.py fit --config configs/embed/mini.yaml``."""

from hysafe.app.training import embed_main

if __name__ == "__main__":
    embed_main()
